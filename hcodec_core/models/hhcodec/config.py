"""Shapes of the HH-Codec family and its presets. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hcodec_core.errors import ConfigError
from hcodec_core.models.facts import AS_PUBLISHED, CodecFacts, untrained
from hcodec_core.nn.bigvgan_config import BigVganConfig
from hcodec_core.tokens import StreamSpec


class HHCodecConfig(BaseModel):
    """Shape of one HH-Codec. A field's default, once released, never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_rate: int = 24000  # Hz
    num_filters: int = Field(gt=0)  # channels of the encoder's first convolution
    strides: tuple[int, ...] = Field(min_length=1)  # of the encoder's stages, in the order of use
    latent_dim: int = Field(gt=0)  # features that are quantised
    codebook_size: int = Field(gt=1)
    num_training_books: int = Field(default=2, ge=1)  # tokens use the first
    transform_dim: int = Field(gt=0)  # inside the map that the frozen entries pass
    backbone_dim: int = Field(gt=0)  # a multiple of 32
    convnext_dim: int = Field(gt=0)
    convnext_layers: int = Field(gt=0)
    mel_stride: int = Field(gt=0)  # mel frames per token frame
    vocoder: BigVganConfig

    @model_validator(mode="after")
    def _check(self) -> HHCodecConfig:
        if self.mel_stride * self.vocoder.hop_length != self.hop_length:
            raise ValueError("mel_stride times the vocoder's hop must be the encoder's hop")
        if self.backbone_dim % 32:
            raise ValueError("backbone_dim must be a multiple of 32")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per token frame."""
        return prod(self.strides)

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """The one stream, of one codebook."""
        return (StreamSpec(name="fused", num_codebooks=1, codebook_size=self.codebook_size),)

    @property
    def is_variable_rate(self) -> bool:
        """Every token spans one frame."""
        return False

    def architecture(self) -> dict[str, Any]:
        """All fields as JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> HHCodecConfig:
        """Read what ``architecture`` wrote. Raises ``ConfigError`` naming the wrong field."""
        try:
            return cls.model_validate(architecture)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "architecture"
            raise ConfigError(f"HH-Codec's {field} cannot be used: {first['msg']}.") from error


def hhcodec_24khz() -> HHCodecConfig:
    """HH-Codec as published: one codebook of 8192 at 23.4 Hz. No weights are public.

    The vocoder has the shape of nvidia/bigvgan_v2_24khz_100band_256x, from which it is fine-tuned.
    """
    return HHCodecConfig(
        num_filters=32,
        strides=(4, 4, 8, 8),
        latent_dim=512,
        codebook_size=8192,
        transform_dim=1024,
        backbone_dim=768,
        convnext_dim=2304,
        convnext_layers=12,
        mel_stride=4,
        vocoder=BigVganConfig(
            num_mels=100,
            initial_dim=1536,
            upsample_rates=(4, 4, 2, 2, 2, 2),
            upsample_kernels=(8, 8, 4, 4, 4, 4),
            block_kernels=(3, 7, 11),
            block_dilations=(1, 3, 5),
        ),
    )


def tiny() -> HHCodecConfig:
    """The smallest HH-Codec, for unit tests."""
    return HHCodecConfig(
        num_filters=2,
        strides=(2, 4, 8),
        latent_dim=16,
        codebook_size=64,
        transform_dim=32,
        backbone_dim=32,
        convnext_dim=48,
        convnext_layers=2,
        mel_stride=4,
        vocoder=BigVganConfig(
            num_mels=20,
            initial_dim=32,
            upsample_rates=(4, 2, 2),
            upsample_kernels=(8, 4, 4),
            block_kernels=(3, 7),
            block_dilations=(1, 3),
        ),
    )


PRESETS: Mapping[str, Callable[[], HHCodecConfig]] = {
    "hhcodec-24khz": hhcodec_24khz,
    "hhcodec-tiny": tiny,
}

FACTS: Mapping[str, CodecFacts] = {
    "hhcodec-24khz": CodecFacts(
        201_201_668, "length-aware", AS_PUBLISHED, "none public: to be trained", "none"
    ),
    "hhcodec-tiny": untrained(86_591, "length-aware"),
}
