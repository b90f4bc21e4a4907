"""Shapes of the H-Codec family: 1.0, 1.5 (adaptive rate), 2.0 (48 kHz); presets. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hcodec_core.errors import ConfigError
from hcodec_core.models.facts import AS_PUBLISHED, CodecFacts, untrained
from hcodec_core.nn.ssl_config import SslConfig, hubert_base, wav2vec2_large_xlsr
from hcodec_core.nn.transformer_config import TransformerConfig
from hcodec_core.tokens import StreamSpec

Fft = Literal["float64", "float32"]
SSL_SAMPLE_RATE = 16000
"""What SSL models hear, Hz."""


class MelConfig(BaseModel):
    """Log-mel features in place of an SSL model: FFT and hop in samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_mels: int
    n_fft: int
    hop_length: int


class HCodecConfig(BaseModel):
    """What all versions have. Exactly one of ``ssl`` and ``mel`` feeds the semantic stream.

    A field's default, once released, never changes: manifests leave nothing out, but the digests
    of parts speak of some fields only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    sample_rate: int  # Hz
    latent_dim: int  # features of each stream
    encoder_heads: int
    encoder_layers: int  # of the transformer in the acoustic encoder
    ssl: SslConfig | None = None
    ssl_layers: tuple[int, ...] | None = None  # hidden states to average; None: all; 0: embeddings
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
    def _check(self) -> Self:
        if (self.ssl is None) == (self.mel is None):
            raise ValueError("exactly one of ssl and mel must be given")
        if self.ssl_layers is not None and self.ssl is not None:
            if not 0 <= min(self.ssl_layers) <= max(self.ssl_layers) <= self.ssl.num_hidden_layers:
                raise ValueError("ssl_layers must be hidden states that the SSL model has")
        if self.feature_hop_length * prod(self.semantic_strides) != self.hop_length:
            raise ValueError("the semantic and the acoustic stream have different frame rates")
        if self.hop_length % self.decoder_upsample or self.decoder_dim % 32:
            raise ValueError("decoder_upsample must divide the hop, and 32 decoder_dim")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per base frame."""
        raise NotImplementedError

    @property
    def decoder_hop_length(self) -> int:
        """Samples per spectral frame of the decoder."""
        return self.hop_length // self.decoder_upsample

    @property
    def feature_hop_length(self) -> int:
        """Samples per frame of the features behind the semantic stream."""
        if self.ssl is not None:
            return self.ssl.hop_length * self.sample_rate // SSL_SAMPLE_RATE
        assert self.mel is not None
        return self.mel.hop_length

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
        """Whether one token may span several base frames."""
        return False

    def architecture(self) -> dict[str, Any]:
        """All fields as JSON."""
        return self.model_dump(mode="json")


class SeanetHCodecConfig(HCodecConfig):
    """H-Codec 1.0, and what 1.5 shares with it: a SEANet in front of the acoustic stream."""

    version: Literal["1.0", "1.5"] = "1.0"
    num_filters: int  # channels of the first convolution
    strides: tuple[int, ...]  # of the acoustic encoder's stages, in the order of use
    last_stride: int

    @property
    def hop_length(self) -> int:
        """Samples per base frame."""
        return prod(self.strides) * self.last_stride


class AdaptiveHCodecConfig(SeanetHCodecConfig):
    """H-Codec 1.5: runs of similar frames become one token.

    A token begins where the cosine of a frame's semantic latent with the one before is at most a
    threshold, and ends after ``max_frame_span`` frames at the latest.
    """

    version: Literal["1.5"] = "1.5"
    aggregator: TransformerConfig  # one such for each stream
    bottleneck: TransformerConfig  # over both streams, at the base rate
    max_frame_span: int = Field(default=8, gt=1)
    released_threshold: float = Field(default=0.6, gt=0, le=1)  # where none is asked for
    trained_thresholds: tuple[float, float] = (0.7, 1.0)  # drawn from while training

    @model_validator(mode="after")
    def _check_transformers(self) -> Self:
        dims = (self.aggregator.dim, self.bottleneck.dim)
        if dims != (self.latent_dim, 2 * self.latent_dim):
            raise ValueError("the aggregator must be as wide as one latent, the bottleneck as both")
        return self

    @property
    def is_variable_rate(self) -> bool:
        """Whether one token may span several base frames."""
        return True


class SpectralHCodecConfig(HCodecConfig):
    """H-Codec 2.0: the acoustic stream comes from short-time spectra (FFT and hop in samples)."""

    version: Literal["2.0"] = "2.0"
    encoder_dim: int
    encoder_convnext_dim: int
    encoder_convnext_layers: int
    encoder_n_fft: int
    encoder_hop_length: int
    encoder_stride: int  # spectral frames per token frame
    encoder_fft: Fft = "float64"  # float32 is what was published

    @property
    def hop_length(self) -> int:
        """Samples per token frame."""
        return self.encoder_hop_length * self.encoder_stride


_VERSIONS: Mapping[str, type[HCodecConfig]] = {
    "1.0": SeanetHCodecConfig,
    "1.5": AdaptiveHCodecConfig,
    "2.0": SpectralHCodecConfig,
}


def config_of(architecture: Mapping[str, Any]) -> HCodecConfig:
    """Read what ``HCodecConfig.architecture`` wrote.

    Raises ``ConfigError`` naming the wrong field.
    """
    version = architecture.get("version", "1.0")
    if version not in _VERSIONS:
        raise ConfigError(
            f"There is no H-Codec version {version!r} here: known are {', '.join(_VERSIONS)}."
        )
    try:
        return _VERSIONS[version].model_validate(architecture)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "architecture"
        raise ConfigError(f"H-Codec's {field} cannot be used: {first['msg']}.") from error


def hcodec_1_0() -> SeanetHCodecConfig:
    """H-Codec 1.0 as released: 16 kHz, 25 Hz, 4 + 4 codebooks of 1024."""
    return SeanetHCodecConfig(
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


def hcodec_1_5() -> AdaptiveHCodecConfig:
    """H-Codec 1.5 as released: 16 kHz, at most 25 Hz, 4 + 4 codebooks of 1024."""
    return AdaptiveHCodecConfig(
        sample_rate=16000,
        latent_dim=512,
        num_filters=32,
        strides=(8, 5, 4, 2),
        last_stride=2,
        encoder_heads=8,
        encoder_layers=2,
        ssl=wav2vec2_large_xlsr(),
        ssl_layers=(11, 14, 16),
        semantic_dim=1024,
        semantic_strides=(2, 1),
        num_codebooks=4,
        codebook_size=1024,
        aggregator=mimi_transformer(512, 2048),
        bottleneck=mimi_transformer(1024, 2048),
        decoder_dim=1024,
        decoder_heads=8,
        decoder_layers=2,
        decoder_upsample=2,
        convnext_dim=2304,
        convnext_layers=12,
        n_fft=1280,
    )


def mimi_transformer(
    dim: int, hidden_dim: int, num_heads: int = 8, num_layers: int = 32
) -> TransformerConfig:
    """A transformer of H-Codec 1.5."""
    return TransformerConfig(
        dim=dim,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        layer_scale=0.01,
    )


def hcodec_2_0() -> SpectralHCodecConfig:
    """H-Codec 2.0 as released: 48 kHz, 12.5 Hz, 16 + 16 codebooks of 1024."""
    return SpectralHCodecConfig(
        sample_rate=48000,
        latent_dim=512,
        encoder_dim=1536,
        encoder_heads=24,
        encoder_layers=2,
        encoder_convnext_dim=4608,
        encoder_convnext_layers=24,
        encoder_n_fft=1920,
        encoder_hop_length=960,
        encoder_stride=4,
        ssl=hubert_base(),
        semantic_dim=1536,
        semantic_strides=(2, 1, 2),
        num_codebooks=16,
        codebook_size=1024,
        decoder_dim=1536,
        decoder_heads=24,
        decoder_layers=2,
        decoder_upsample=4,
        convnext_dim=4608,
        convnext_layers=32,
        n_fft=1920,
    )


def hcodec_nano() -> SeanetHCodecConfig:
    """The same plan at 2 M parameters, with log-mel features: needs no download, runs on a CPU."""
    return SeanetHCodecConfig(
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


_TINY_SSL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_TINY = {
    "latent_dim": 16,
    "encoder_heads": 2,
    "encoder_layers": 1,
    "semantic_dim": 16,
    "num_codebooks": 3,
    "codebook_size": 32,
    "decoder_dim": 32,
    "decoder_heads": 2,
    "decoder_layers": 1,
    "convnext_dim": 48,
    "convnext_layers": 2,
}


def tiny() -> SeanetHCodecConfig:
    """The smallest H-Codec with an SSL model, for unit tests."""
    ssl = hubert_base().model_copy(update=_TINY_SSL)
    return hcodec_1_0().model_copy(update=_TINY | {"ssl": ssl, "num_filters": 2})


def tiny_1_5() -> AdaptiveHCodecConfig:
    """The smallest H-Codec of an adaptive rate, for unit tests."""
    ssl = wav2vec2_large_xlsr().model_copy(update=_TINY_SSL | {"num_hidden_layers": 3})
    return hcodec_1_5().model_copy(
        update=_TINY
        | {
            "ssl": ssl,
            "ssl_layers": (1, 3),
            "num_filters": 2,
            "aggregator": mimi_transformer(16, 32, num_heads=2, num_layers=2),
            "bottleneck": mimi_transformer(32, 32, num_heads=2, num_layers=2),
        }
    )


def tiny_2_0() -> SpectralHCodecConfig:
    """The smallest H-Codec at 48 kHz, for unit tests."""
    ssl = hubert_base().model_copy(update=_TINY_SSL)
    return hcodec_2_0().model_copy(
        update=_TINY
        | {
            "ssl": ssl,
            "encoder_dim": 32,
            "encoder_convnext_dim": 48,
            "encoder_convnext_layers": 2,
        }
    )


PRESETS: Mapping[str, Callable[[], HCodecConfig]] = {
    "hcodec-1.0": hcodec_1_0,
    "hcodec-1.5": hcodec_1_5,
    "hcodec-2.0": hcodec_2_0,
    "hcodec-nano": hcodec_nano,
    "hcodec-tiny": tiny,
    "hcodec-1.5-tiny": tiny_1_5,
    "hcodec-2.0-tiny": tiny_2_0,
}

FACTS: Mapping[str, CodecFacts] = {
    "hcodec-1.0": CodecFacts(
        235_686_514,
        "length-aware",
        AS_PUBLISHED,
        "hf QuarkAudio/QuarkAudio-HCodec; SSL model hf bosonai/hubert_base",
        "Apache-2.0",
    ),
    "hcodec-1.5": CodecFacts(
        897_274_482,
        "length-aware",
        AS_PUBLISHED,
        "hf QuarkAudio/HCodec-1.5-adaptive; SSL model hf facebook/wav2vec2-large-xlsr-53",
        "Apache-2.0",
    ),
    "hcodec-2.0": CodecFacts(
        1_354_373_506,
        "length-aware",
        f"{AS_PUBLISHED} when converted with fft=float32",
        "hf QuarkAudio/H-Codec-2.0; SSL model hf bosonai/hubert_base",
        "Apache-2.0",
    ),
    "hcodec-nano": untrained(1_975_648, "length-aware"),
    "hcodec-tiny": untrained(164_917, "length-aware"),
    "hcodec-1.5-tiny": untrained(182_301, "length-aware"),
    "hcodec-2.0-tiny": untrained(378_370, "length-aware"),
}
