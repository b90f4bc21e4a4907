"""Shapes of the codecs of the transformers library and their presets. No torch here.

Every class holds the fields of the library's configuration that decide results, under the same
names; variants of a model that this adapter does not run are refused by the field's type.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import ceil, log2, prod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hcodec_core.errors import ConfigError
from hcodec_core.models.facts import AS_IN_LIBRARY, Batching, CodecFacts, untrained
from hcodec_core.tokens import StreamSpec


class LibraryConfig(BaseModel):
    """What the three models' configurations have in common.

    A field's default, once released, never changes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    sampling_rate: int = Field(gt=0)  # Hz

    @property
    def sample_rate(self) -> int:
        """Sample rate of audio in and out, Hz."""
        return self.sampling_rate

    @property
    @abstractmethod
    def hop_length(self) -> int:
        """Samples per token frame."""

    @property
    @abstractmethod
    def streams(self) -> tuple[StreamSpec, ...]:
        """Streams in the order in which they are stored."""

    @property
    def is_variable_rate(self) -> bool:
        """Every token spans one frame."""
        return False

    def architecture(self) -> dict[str, Any]:
        """All fields as JSON."""
        return self.model_dump(mode="json")

    def library_fields(self) -> dict[str, Any]:
        """Arguments of the library's configuration class."""
        return self.model_dump(exclude={"model_type"})


class MimiConfig(LibraryConfig):
    """Mimi (arXiv 2410.00037, section 3.3): causal, one semantic and up to 31 acoustic books."""

    model_type: Literal["mimi"] = "mimi"
    sampling_rate: int = Field(default=24_000, gt=0)
    hidden_size: int = 512
    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    codebook_size: int = 2048
    codebook_dim: int = 256
    num_quantizers: int = 32
    num_semantic_quantizers: int = 1
    vector_quantization_hidden_dimension: int = 256
    use_conv_shortcut: bool = False
    upsample_groups: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int = 250  # frames at twice the token rate
    attention_bias: bool = False
    audio_channels: Literal[1] = 1
    use_causal_conv: Literal[True] = True
    pad_mode: Literal["constant"] = "constant"

    @property
    def hop_length(self) -> int:
        """Samples per token frame; the transformer runs at twice the token rate."""
        return 2 * prod(self.upsampling_ratios)

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """The semantic book is no residual of the others: it is a stream of its own."""
        num_acoustic = self.num_quantizers - self.num_semantic_quantizers
        return (
            StreamSpec(
                name="semantic",
                num_codebooks=self.num_semantic_quantizers,
                codebook_size=self.codebook_size,
            ),
            StreamSpec(
                name="acoustic", num_codebooks=num_acoustic, codebook_size=self.codebook_size
            ),
        )

    def library_fields(self) -> dict[str, Any]:
        """Arguments of the library's configuration class."""
        fields = super().library_fields()
        theta = fields.pop("rope_theta")
        ratios = list(fields.pop("upsampling_ratios"))
        rope = {"rope_type": "default", "rope_theta": theta}
        return fields | {"rope_parameters": rope, "upsampling_ratios": ratios}


class DacConfig(LibraryConfig):
    """DAC (arXiv 2306.06546): symmetric convolutions, small codebooks compared by angle."""

    model_type: Literal["dac"] = "dac"
    sampling_rate: int = Field(gt=0)
    encoder_hidden_size: int = 64
    downsampling_ratios: tuple[int, ...]
    decoder_hidden_size: int = 1536
    n_codebooks: int
    codebook_size: int = 1024
    codebook_dim: int = 8

    @property
    def hop_length(self) -> int:
        """Samples per token frame."""
        return prod(self.downsampling_ratios)

    @property
    def hidden_size(self) -> int:
        """Features that are quantised."""
        return self.encoder_hidden_size * int(2 ** len(self.downsampling_ratios))

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """One stream."""
        return (
            StreamSpec(
                name="fused", num_codebooks=self.n_codebooks, codebook_size=self.codebook_size
            ),
        )


class EncodecConfig(LibraryConfig):
    """EnCodec (arXiv 2210.13438) as released for 24 kHz mono: causal, not normalised, one chunk."""

    model_type: Literal["encodec"] = "encodec"
    sampling_rate: int = Field(default=24_000, gt=0)
    target_bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)  # kbit/s
    hidden_size: int = 128
    num_filters: int = 32
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    num_lstm_layers: int = 2
    trim_right_ratio: float = 1.0
    codebook_size: int = 1024
    codebook_dim: int = 128
    use_conv_shortcut: bool = True
    pad_mode: Literal["reflect", "constant"] = "reflect"
    norm_type: Literal["weight_norm"] = "weight_norm"
    audio_channels: Literal[1] = 1
    normalize: Literal[False] = False
    chunk_length_s: None = None
    use_causal_conv: Literal[True] = True

    @property
    def hop_length(self) -> int:
        """Samples per token frame."""
        return prod(self.upsampling_ratios)

    @property
    def num_codebooks(self) -> int:
        """Codebooks of the highest bandwidth; lower bandwidths use the first ones."""
        frame_rate = ceil(self.sampling_rate / self.hop_length)
        bits = frame_rate * ceil(log2(self.codebook_size))
        return int(1000 * self.target_bandwidths[-1] // bits)

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """One stream."""
        return (
            StreamSpec(
                name="fused", num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
            ),
        )


AnyConfig = MimiConfig | DacConfig | EncodecConfig
_ANY_CONFIG: TypeAdapter[AnyConfig] = TypeAdapter(
    Annotated[AnyConfig, Field(discriminator="model_type")]
)
_CLASSES: Mapping[str, type[AnyConfig]] = {
    "mimi": MimiConfig,
    "dac": DacConfig,
    "encodec": EncodecConfig,
}


def from_architecture(architecture: Mapping[str, Any]) -> AnyConfig:
    """Read what ``architecture`` wrote. Raises ``ConfigError`` naming the wrong field."""
    try:
        return _ANY_CONFIG.validate_python(dict(architecture))
    except ValidationError as error:
        raise ConfigError(f"This architecture cannot be used: {first_fault(error)}.") from error


def from_library(values: Mapping[str, Any]) -> AnyConfig:
    """Read the library's own ``config.json``, whole. Raises ``ConfigError`` naming the field."""
    kind = str(values.get("model_type"))
    if kind not in _CLASSES:
        raise ConfigError(
            f"There is no adapter for model type {kind!r}: there is one for {', '.join(_CLASSES)}."
        )
    fields = _CLASSES[kind].model_fields.keys() & values.keys()
    picked = {name: values[name] for name in fields}
    if kind == "mimi":
        picked |= {"rope_theta": (values.get("rope_parameters") or {}).get("rope_theta", 10_000.0)}
    config = from_architecture(picked)
    _check_derived(config, values)
    return config


def _check_derived(config: AnyConfig, values: Mapping[str, Any]) -> None:
    """What follows from other fields must not have been set to something else."""
    derived: dict[str, Any] = {}
    if isinstance(config, DacConfig):
        ratios = list(config.downsampling_ratios[::-1])
        derived = {"upsampling_ratios": ratios, "hidden_size": config.hidden_size}
    elif isinstance(config, MimiConfig):
        derived = {"frame_rate": config.sample_rate / config.hop_length, "trim_right_ratio": 1.0}
    for name, wanted in derived.items():
        found = values.get(name, wanted)
        if (list(found) if isinstance(found, list | tuple) else found) != wanted:
            raise ConfigError(f"{name} is {found}; this adapter runs {wanted} only.")


def first_fault(error: ValidationError) -> str:
    """The first fault of a refused configuration: field and reason."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "architecture"
    return f"{field}: {first['msg']}"


def tiny_mimi() -> MimiConfig:
    """Mimi of 20 thousand parameters for tests."""
    return MimiConfig(
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=(5, 4, 4),
        codebook_size=32,
        codebook_dim=8,
        num_quantizers=4,
        vector_quantization_hidden_dimension=8,
        upsample_groups=16,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=10,
    )


def tiny_dac() -> DacConfig:
    """DAC of 20 thousand parameters for tests, with an odd stride as the released ones have."""
    return DacConfig(
        sampling_rate=16_000,
        encoder_hidden_size=4,
        downsampling_ratios=(2, 4, 5),
        decoder_hidden_size=32,
        n_codebooks=4,
        codebook_size=32,
        codebook_dim=4,
    )


def tiny_encodec() -> EncodecConfig:
    """EnCodec of 30 thousand parameters for tests."""
    return EncodecConfig(
        target_bandwidths=(3.0, 12.0),
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=(5, 4, 4),
        codebook_size=32,
        codebook_dim=16,
    )


def mimi() -> MimiConfig:
    """Mimi as released: 24 kHz, 12.5 frames per second, 32 books of 2048."""
    return MimiConfig()


def dac_16khz() -> DacConfig:
    """DAC for 16 kHz: 50 frames per second, 12 books of 1024."""
    return DacConfig(sampling_rate=16_000, downsampling_ratios=(2, 4, 5, 8), n_codebooks=12)


def dac_24khz() -> DacConfig:
    """DAC for 24 kHz: 75 frames per second, 32 books of 1024."""
    return DacConfig(sampling_rate=24_000, downsampling_ratios=(2, 4, 5, 8), n_codebooks=32)


def dac_44khz() -> DacConfig:
    """DAC for 44.1 kHz: 86 frames per second, 9 books of 1024."""
    return DacConfig(sampling_rate=44_100, downsampling_ratios=(2, 4, 8, 8), n_codebooks=9)


def encodec_24khz() -> EncodecConfig:
    """EnCodec for 24 kHz mono: 75 frames per second, 32 books of 1024."""
    return EncodecConfig()


PRESETS: Mapping[str, Callable[[], AnyConfig]] = {
    "mimi-tiny": tiny_mimi,
    "dac-tiny": tiny_dac,
    "encodec-tiny": tiny_encodec,
    "mimi": mimi,
    "dac-16khz": dac_16khz,
    "dac-24khz": dac_24khz,
    "dac-44khz": dac_44khz,
    "encodec-24khz": encodec_24khz,
}

HUB_IDS: Mapping[str, str] = {
    "mimi": "kyutai/mimi",
    "dac-16khz": "descript/dac_16khz",
    "dac-24khz": "descript/dac_24khz",
    "dac-44khz": "descript/dac_44khz",
    "encodec-24khz": "facebook/encodec_24khz",
}
"""Name of a released model -> its repository on the Hugging Face hub."""


def _facts(name: str, num_parameters: int, batching: Batching, licence: str) -> CodecFacts:
    return CodecFacts(num_parameters, batching, AS_IN_LIBRARY, f"hf {HUB_IDS[name]}", licence)


FACTS: Mapping[str, CodecFacts] = {
    "mimi": _facts("mimi", 96_085_825, "length-aware", "CC-BY-4.0"),
    "dac-16khz": _facts("dac-16khz", 74_141_697, "equal-length", "MIT"),
    "dac-24khz": _facts("dac-24khz", 74_653_857, "equal-length", "MIT"),
    "dac-44khz": _facts("dac-44khz", 76_620_777, "equal-length", "MIT"),
    "encodec-24khz": _facts(
        "encodec-24khz", 19_041_121, "length-aware", "not stated (the code is MIT)"
    ),
    "mimi-tiny": untrained(30_725, "length-aware"),
    "dac-tiny": untrained(41_593, "equal-length"),
    "encodec-tiny": untrained(60_205, "length-aware"),
}
