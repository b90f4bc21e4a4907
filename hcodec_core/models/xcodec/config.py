"""Shapes of X-Codec and its presets. No torch here.

The fields are those of the transformers library's ``XcodecConfig`` that decide results, under the
same names; variants that this family does not run are refused by the field's type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, log2, prod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hcodec_core.errors import ConfigError
from hcodec_core.models.facts import AS_PUBLISHED, CodecFacts, untrained
from hcodec_core.tokens import StreamSpec

_FROZEN = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class AcousticConfig(BaseModel):
    """The DAC that codes the waveform; both lists of strides in the order of use."""

    model_config = _FROZEN

    model_type: Literal["dac"] = "dac"
    encoder_hidden_size: int = 64
    downsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    decoder_hidden_size: int = 1024
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    hidden_size: int = 256


class SemanticConfig(BaseModel):
    """The frozen SSL model: HuBERT or WavLM. ``num_buckets`` and the next are WavLM's only."""

    model_config = _FROZEN

    model_type: Literal["hubert", "wavlm"] = "hubert"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: Literal["group", "layer"] = "group"
    feat_extract_activation: Literal["gelu"] = "gelu"
    feat_proj_layer_norm: bool = True
    hidden_act: Literal["gelu"] = "gelu"
    do_stable_layer_norm: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    conv_pos_batch_norm: Literal[False] = False
    layer_norm_eps: float = 1e-5
    num_buckets: int = 320
    max_bucket_distance: int = 800

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that the first frame sees."""
        steps = [prod(self.conv_stride[:index]) for index in range(len(self.conv_stride))]
        pairs = zip(self.conv_kernel, steps, strict=True)
        return 1 + sum((kernel - 1) * step for kernel, step in pairs)

    def library_fields(self) -> dict[str, Any]:
        """Arguments of the library's configuration class, everything random switched off."""
        of_the_other = {
            "hubert": {"num_buckets", "max_bucket_distance"},
            "wavlm": {"conv_pos_batch_norm", "feat_proj_layer_norm"},
        }[self.model_type]
        training_only = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}
        return self.model_dump(mode="json", exclude=of_the_other) | training_only


class XCodecConfig(BaseModel):
    """Shape of one X-Codec. A field's default, once released, never changes."""

    model_config = _FROZEN

    model_type: Literal["xcodec"] = "xcodec"
    sample_rate: Literal[16_000] = 16_000  # Hz, what its SSL models hear
    target_bandwidths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 4.0)  # kbit/s
    kernel_size: int = 3
    channel_ratios: tuple[int, ...] = (1, 1)
    strides: tuple[Literal[1], ...] = (1, 1)
    block_dilations: tuple[int, ...] = (1, 1)
    unit_kernel_size: int = 3
    codebook_size: int = 1024
    acoustic_model_config: AcousticConfig = AcousticConfig()
    semantic_model_config: SemanticConfig = SemanticConfig()

    @model_validator(mode="after")
    def _check(self) -> XCodecConfig:
        strides = self.acoustic_model_config.downsampling_ratios
        if self.semantic_model_config.hop_length != prod(strides):
            raise ValueError("the acoustic and the SSL model have different frame rates")
        if prod(self.acoustic_model_config.upsampling_ratios) != prod(strides):
            raise ValueError("encoder and decoder have different frame rates")
        if not 1 <= self.min_tail_samples <= self.hop_length:
            raise ValueError("the SSL model's first frame sees too many or too few samples")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per token frame."""
        return prod(self.acoustic_model_config.downsampling_ratios)

    @property
    def ssl_padding(self) -> int:
        """Zeros before and after the samples that the SSL model sees."""
        return self.hop_length // 2

    @property
    def min_tail_samples(self) -> int:
        """The SSL model counts the frames: T = floor((n + 240) / 320) as released, from n = 80."""
        return self.semantic_model_config.receptive_field - 2 * self.ssl_padding

    @property
    def quantized_dim(self) -> int:
        """Features that are quantised: acoustic first, then semantic."""
        return self.acoustic_model_config.hidden_size + self.semantic_model_config.hidden_size

    @property
    def num_codebooks(self) -> int:
        """Codebooks of the highest bandwidth; lower bandwidths use the first ones."""
        return self.codebooks_of(self.target_bandwidths[-1])

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """One stream."""
        return (
            StreamSpec(
                name="fused", num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
            ),
        )

    @property
    def is_variable_rate(self) -> bool:
        """Every token spans one frame."""
        return False

    def codebooks_of(self, bandwidth: float) -> int:
        """Codebooks of a bandwidth in kbit/s: its codes are exactly the first ones of all."""
        bits = ceil(self.sample_rate / self.hop_length) * ceil(log2(self.codebook_size))
        return int(1000 * bandwidth // bits)

    def acoustic_frames(self, num_samples: int) -> int:
        """Frames that the acoustic encoder makes of ``num_samples`` samples."""
        length = num_samples
        for stride in self.acoustic_model_config.downsampling_ratios:
            length = (length + 2 * ceil(stride / 2) - 2 * stride) // stride + 1
        return length

    def architecture(self) -> dict[str, Any]:
        """All fields as JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> XCodecConfig:
        """Read what ``architecture`` wrote. Raises ``ConfigError`` naming the wrong field."""
        try:
            return cls.model_validate(dict(architecture))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "architecture"
            raise ConfigError(f"X-Codec's {field} cannot be used: {first['msg']}.") from error

    @classmethod
    def from_library(cls, values: Mapping[str, Any]) -> XCodecConfig:
        """Read the library's own ``config.json``, whole. Raises ``ConfigError`` naming the field.

        What decides no result is left out.
        """
        picked = _picked(cls, values)
        parts: Mapping[str, type[BaseModel]] = {
            "acoustic_model_config": AcousticConfig,
            "semantic_model_config": SemanticConfig,
        }
        for name, part in parts.items():
            if isinstance(picked.get(name), Mapping):
                picked[name] = _picked(part, picked[name])
        config = cls.from_architecture(picked)
        acoustic = values.get("acoustic_model_config") or {}
        if acoustic.get("sampling_rate", config.sample_rate) != config.sample_rate:
            raise ConfigError(
                f"The acoustic model's sampling_rate is {acoustic['sampling_rate']}; X-Codec's is "
                f"{config.sample_rate}."
            )
        if values.get("codebook_dim") not in (None, config.quantized_dim):
            raise ConfigError(
                f"codebook_dim is {values['codebook_dim']}; X-Codec quantises all its "
                f"{config.quantized_dim} features."
            )
        return config


def _picked(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in model.model_fields.keys() & values.keys()}


def tiny() -> XCodecConfig:
    """X-Codec of 60 thousand parameters for tests."""
    return XCodecConfig(
        codebook_size=64,
        target_bandwidths=(0.3, 0.6, 1.2),
        acoustic_model_config=AcousticConfig(
            encoder_hidden_size=4, decoder_hidden_size=32, hidden_size=8
        ),
        semantic_model_config=SemanticConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
    )


def hubert() -> XCodecConfig:
    """X-Codec with HuBERT base: three of the five released models."""
    return XCodecConfig()


def wavlm() -> XCodecConfig:
    """X-Codec with WavLM base plus: two of the five released models."""
    return XCodecConfig(semantic_model_config=SemanticConfig(model_type="wavlm"))


PRESETS: Mapping[str, Callable[[], XCodecConfig]] = {
    "xcodec-tiny": tiny,
    "xcodec-hubert-librispeech": hubert,
    "xcodec-hubert-general": hubert,
    "xcodec-hubert-general-balanced": hubert,
    "xcodec-wavlm-mls": wavlm,
    "xcodec-wavlm-more-data": wavlm,
}

ORIGINAL_FILES: Mapping[str, str] = {
    "xcodec-hubert-librispeech": "xcodec_speech_hubert_librispeech.pth",
    "xcodec-hubert-general": "xcodec_hubert_general_audio.pth",
    "xcodec-hubert-general-balanced": "xcodec_hubert_general_audio_v2.pth",
    "xcodec-wavlm-mls": "xcodec_speech_wavlm_mls.pth",
    "xcodec-wavlm-more-data": "xcodec_speech_wavlm_more_data.pth",
}
"""Name of a released model -> its original file in the hub repository ZhenYe234/xcodec."""

HUB_IDS: Mapping[str, str] = {name: f"hf-audio/{name}" for name in ORIGINAL_FILES}
"""Name of a released model -> its repository in the library's format on the Hugging Face hub."""


def _facts(name: str) -> CodecFacts:
    num_parameters = 169_086_337 if "hubert" in name else 169_096_561
    weights = f"hf {HUB_IDS[name]}, or hf ZhenYe234/xcodec {ORIGINAL_FILES[name]}"
    return CodecFacts(num_parameters, "equal-length", AS_PUBLISHED, weights, "not stated")


FACTS: Mapping[str, CodecFacts] = {
    **{name: _facts(name) for name in ORIGINAL_FILES},
    "xcodec-tiny": untrained(97_247, "equal-length"),
}
