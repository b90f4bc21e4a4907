"""Shapes of the H-Codec family and its presets. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hcodec_core.errors import ConfigError
from hcodec_core.models.facts import AS_PUBLISHED, CodecFacts, untrained
from hcodec_core.nn.ssl_config import SslConfig
from hcodec_core.tokens import StreamSpec


class MelConfig(BaseModel):
    """Log-mel features in place of an SSL model: FFT and hop in samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_mels: int
    n_fft: int
    hop_length: int


class HCodecConfig(BaseModel):
    """Shape of one H-Codec. Exactly one of ``ssl`` and ``mel`` feeds the semantic stream.

    A field's default, once released, never changes: manifests leave nothing out, but the digests
    of parts speak of some fields only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal["1.0"] = "1.0"
    sample_rate: int  # Hz
    latent_dim: int  # features of each stream
    num_filters: int  # channels of the first convolution
    strides: tuple[int, ...]  # of the acoustic encoder's stages, in the order of use
    last_stride: int
    encoder_heads: int
    encoder_layers: int  # of the transformer in the acoustic encoder
    ssl: SslConfig | None = None
    mel: MelConfig | None = None
    semantic_dim: int
    semantic_strides: tuple[int, ...]
    num_codebooks: int  # of each stream
    codebook_size: int
    decoder_dim: int  # a multiple of 32
    decoder_heads: int
    decoder_layers: int  # of the transformer in the decoder
    decoder_upsample: int  # spectral frames per token frame
    convnext_dim: int
    convnext_layers: int
    n_fft: int  # samples

    @model_validator(mode="after")
    def _check(self) -> HCodecConfig:
        if (self.ssl is None) == (self.mel is None):
            raise ValueError("exactly one of ssl and mel must be given")
        if self.feature_hop_length * prod(self.semantic_strides) != self.hop_length:
            raise ValueError("the semantic and the acoustic stream have different frame rates")
        if self.hop_length % self.decoder_upsample or self.decoder_dim % 32:
            raise ValueError("decoder_upsample must divide the hop, and 32 decoder_dim")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per token frame."""
        return prod(self.strides) * self.last_stride

    @property
    def decoder_hop_length(self) -> int:
        """Samples per spectral frame of the decoder."""
        return self.hop_length // self.decoder_upsample

    @property
    def feature_hop_length(self) -> int:
        """Samples per frame of the features behind the semantic stream."""
        source = self.ssl or self.mel
        assert source is not None
        return source.hop_length

    @property
    def feature_dim(self) -> int:
        """Number of features behind the semantic stream."""
        if self.ssl is not None:
            return self.ssl.hidden_size
        assert self.mel is not None
        return self.mel.num_mels

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """Both streams have the same shape."""
        return tuple(
            StreamSpec(
                name=name, num_codebooks=self.num_codebooks, codebook_size=self.codebook_size
            )
            for name in ("semantic", "acoustic")
        )

    @property
    def is_variable_rate(self) -> bool:
        """Every token spans one frame."""
        return False

    def architecture(self) -> dict[str, Any]:
        """All fields as JSON."""
        return self.model_dump(mode="json")

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> HCodecConfig:
        """Read what ``architecture`` wrote. Raises ``ConfigError`` naming the wrong field."""
        try:
            return cls.model_validate(architecture)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "architecture"
            raise ConfigError(f"H-Codec's {field} cannot be used: {first['msg']}.") from error


def hubert_base() -> SslConfig:
    """HuBERT base: 12 layers of 768 features at 50 Hz."""
    return SslConfig(
        model_type="hubert",
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        conv_dim=(512,) * 7,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_bias=False,
        feat_extract_norm="group",
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
    )


def hcodec_1_0() -> HCodecConfig:
    """H-Codec 1.0 as released: 16 kHz, 25 Hz, 4 + 4 codebooks of 1024."""
    return HCodecConfig(
        sample_rate=16000,
        latent_dim=512,
        num_filters=32,
        strides=(2, 4, 5, 8),
        last_stride=2,
        encoder_heads=8,
        encoder_layers=2,
        ssl=hubert_base(),
        semantic_dim=768,
        semantic_strides=(2, 1),
        num_codebooks=4,
        codebook_size=1024,
        decoder_dim=768,
        decoder_heads=8,
        decoder_layers=2,
        decoder_upsample=2,
        convnext_dim=2304,
        convnext_layers=12,
        n_fft=1280,
    )


def hcodec_nano() -> HCodecConfig:
    """The same plan at 2 M parameters, with log-mel features: needs no download, runs on a CPU."""
    return HCodecConfig(
        sample_rate=16000,
        latent_dim=64,
        num_filters=4,
        strides=(2, 4, 5, 8),
        last_stride=2,
        encoder_heads=4,
        encoder_layers=2,
        mel=MelConfig(num_mels=80, n_fft=640, hop_length=320),
        semantic_dim=48,
        semantic_strides=(2, 1),
        num_codebooks=4,
        codebook_size=1024,
        decoder_dim=96,
        decoder_heads=4,
        decoder_layers=2,
        decoder_upsample=2,
        convnext_dim=288,
        convnext_layers=4,
        n_fft=1280,
    )


def tiny() -> HCodecConfig:
    """The smallest H-Codec with an SSL model, for unit tests."""
    return HCodecConfig(
        sample_rate=16000,
        latent_dim=16,
        num_filters=2,
        strides=(2, 4, 5, 8),
        last_stride=2,
        encoder_heads=2,
        encoder_layers=1,
        ssl=hubert_base().model_copy(
            update={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "conv_dim": (8,) * 7,
                "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 4,
            }
        ),
        semantic_dim=16,
        semantic_strides=(2, 1),
        num_codebooks=3,
        codebook_size=32,
        decoder_dim=32,
        decoder_heads=2,
        decoder_layers=1,
        decoder_upsample=2,
        convnext_dim=48,
        convnext_layers=2,
        n_fft=1280,
    )


PRESETS: Mapping[str, Callable[[], HCodecConfig]] = {
    "hcodec-1.0": hcodec_1_0,
    "hcodec-nano": hcodec_nano,
    "hcodec-tiny": tiny,
}

FACTS: Mapping[str, CodecFacts] = {
    "hcodec-1.0": CodecFacts(
        235_686_514,
        "length-aware",
        AS_PUBLISHED,
        "hf QuarkAudio/QuarkAudio-HCodec; SSL model hf bosonai/hubert_base",
        "Apache-2.0",
    ),
    "hcodec-nano": untrained(1_975_648, "length-aware"),
    "hcodec-tiny": untrained(164_917, "length-aware"),
}
