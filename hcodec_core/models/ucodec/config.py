"""Shapes of the U-Codec family and its presets. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hcodec_core.errors import ConfigError
from hcodec_core.models.facts import AS_PUBLISHED, CodecFacts, untrained
from hcodec_core.nn.transformer_config import TransformerConfig
from hcodec_core.tokens import StreamSpec


class ConvNetConfig(BaseModel):
    """Shape of a SEANet encoder, or of the decoder that mirrors it.

    Field names are those of ``nn.seanet.SeanetConfig``; ``strides`` in the encoder's order of use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_filters: int = Field(gt=0)  # channels next to the waveform; they double with each stride
    strides: tuple[int, ...] = Field(min_length=1)
    out_dim: int = Field(gt=0)  # channels next to the transformer
    kernel: int = 7  # of the network's first convolution
    last_kernel: int = 7
    residual_kernel: int = 3
    num_residual_layers: int = 1
    dilation_base: int = 2
    compress: int = 2
    has_conv_shortcut: bool = False
    pad_mode: Literal["reflect", "replicate", "constant"] = "reflect"
    is_causal: bool = False

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.strides)


class UCodecConfig(BaseModel):
    """Shape of one U-Codec. A field's default, once released, never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_rate: int = Field(default=16000, gt=0)  # Hz
    normalises_audio: bool = False  # each clip to mean 0 and variance 1, hop padding included
    encoder: ConvNetConfig
    encoder_transformer: TransformerConfig | None  # None: a convolution of kernel 1
    frame_stride: int = Field(default=1, gt=0)  # encoder frames per token frame
    latent_dim: int = Field(gt=0)  # features that are quantised
    num_codebooks: int = Field(gt=0)
    codebook_size: int = Field(gt=1)
    codebook_dim: int = Field(gt=0)
    decoder: ConvNetConfig
    decoder_transformer: TransformerConfig | None

    @model_validator(mode="after")
    def _check(self) -> UCodecConfig:
        if self.encoder.hop_length != self.decoder.hop_length:
            raise ValueError("encoder and decoder have different hops")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per token frame."""
        return self.encoder.hop_length * self.frame_stride

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """The one stream."""
        return (
            StreamSpec(
                name="fused", num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
            ),
        )

    @property
    def is_variable_rate(self) -> bool:
        """Every token spans one frame."""
        return False

    def architecture(self) -> dict[str, Any]:
        """All fields as JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> UCodecConfig:
        """Read what ``architecture`` wrote. Raises ``ConfigError`` naming the wrong field."""
        try:
            return cls.model_validate(architecture)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "architecture"
            raise ConfigError(f"U-Codec's {field} cannot be used: {first['msg']}.") from error


def ucodec_5hz() -> UCodecConfig:
    """U-Codec at 5 Hz with 32 codebooks of 256.

    Known: sample rate, hop 3200, codebooks, a latent of 512 features. The configuration of the
    released weights is not public: strides, widths, transformers and ``codebook_dim`` are our
    choice, and the converter takes them from the weights and the file that comes with them.
    """
    convolutions = ConvNetConfig(num_filters=32, strides=(4, 4, 5, 5, 8), out_dim=512)
    transformer = TransformerConfig(
        dim=512, num_heads=8, num_layers=8, hidden_dim=2048, layer_scale=0.01
    )
    return UCodecConfig(
        encoder=convolutions,
        encoder_transformer=transformer,
        latent_dim=512,
        num_codebooks=32,
        codebook_size=256,
        codebook_dim=8,
        decoder=convolutions,
        decoder_transformer=transformer,
    )


def ucodec_5hz_8x16384() -> UCodecConfig:
    """The variant with 8 codebooks of 16384; what is known and what is chosen as above."""
    return ucodec_5hz().model_copy(update={"num_codebooks": 8, "codebook_size": 16384})


def tiny() -> UCodecConfig:
    """The smallest U-Codec, for unit tests."""
    convolutions = ConvNetConfig(num_filters=2, strides=(2, 4, 5, 5), out_dim=16)
    transformer = TransformerConfig(
        dim=16, num_heads=2, num_layers=1, hidden_dim=32, layer_scale=0.5
    )
    return UCodecConfig(
        encoder=convolutions,
        encoder_transformer=transformer,
        latent_dim=24,
        num_codebooks=4,
        codebook_size=32,
        codebook_dim=4,
        decoder=convolutions,
        decoder_transformer=transformer,
    )


def tiny_strided() -> UCodecConfig:
    """The other branches: two encoder frames per token frame, normalised audio, causal decoder."""
    convolutions = ConvNetConfig(
        num_filters=2, strides=(4, 5, 8), out_dim=16, has_conv_shortcut=True, pad_mode="constant"
    )
    return tiny().model_copy(
        update={
            "normalises_audio": True,
            "frame_stride": 2,
            "encoder": convolutions.model_copy(update={"num_residual_layers": 2}),
            "encoder_transformer": TransformerConfig(
                dim=24,
                num_heads=3,
                num_layers=2,
                hidden_dim=16,
                norm="rms_norm",
                positions="sin",
                gating="silu",
            ),
            "decoder": convolutions.model_copy(update={"is_causal": True}),
            "decoder_transformer": TransformerConfig(
                dim=24, num_heads=2, num_layers=1, hidden_dim=32, is_causal=True, context=4
            ),
        }
    )


PRESETS: Mapping[str, Callable[[], UCodecConfig]] = {
    "ucodec-5hz": ucodec_5hz,
    "ucodec-5hz-8x16384": ucodec_5hz_8x16384,
    "ucodec-tiny": tiny,
    "ucodec-tiny-strided": tiny_strided,
}

_HUB = "hf shaunxsyang/U-Codec"
_LICENCE = "MIT (a sentence in the README)"
_GEOMETRY = f"{AS_PUBLISHED}; widths of the released weights come with them"

FACTS: Mapping[str, CodecFacts] = {
    "ucodec-5hz": CodecFacts(79_687_713, "length-aware", _GEOMETRY, _HUB, _LICENCE),
    "ucodec-5hz-8x16384": CodecFacts(80_461_665, "length-aware", _GEOMETRY, _HUB, _LICENCE),
    "ucodec-tiny": untrained(28_611, "length-aware"),
    "ucodec-tiny-strided": untrained(24_918, "length-aware"),
}
