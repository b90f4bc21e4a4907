"""H-Codec 1.0, 1.5 and 2.0 (arXiv 2510.26372 and 2512.20151; alibaba/unified-audio).

Two streams at one frame rate: the acoustic one from the waveform, the semantic one from frozen SSL
features (X-Codec's convolutional encoder); each has its own residual quantiser. The decoder sees
both, acoustic channels first.

1.0: SEANet with a transformer. 1.5: the same, but runs of similar frames become one token (the
idea of FlexiCodec, arXiv 2510.00981). 2.0: 48 kHz, an encoder on short-time spectra.

Deliberate differences from the published code: rows of a batch may have different lengths (a
clip's end is the end of its zero-padded last hop, as for a single file); output is trimmed by the
caller's lengths; weight norm is folded; the stream order of this project is semantic, acoustic.
1.5: padding is masked in aggregators and bottleneck; similarity is computed in float64; codes are
plain and spans are told once (``offset_ids`` has the published form); the threshold that the
published tokeniser fixes at 0.6, below all that the model was trained with, can be chosen.
2.0: spectra are computed in float64 unless the configuration says ``float32``, as published: there
rounding decides phases of empty bins, and codes change with the FFT library (see ``docs``).

Shape letters: B batch, D feature, G token, N sample, T base frame.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.models.base import Codec, FrameCodes, Part, SoloEncoder, TokenStarts
from hcodec_core.models.hcodec.config import (
    SSL_SAMPLE_RATE,
    AdaptiveHCodecConfig,
    HCodecConfig,
    SeanetHCodecConfig,
    SpectralHCodecConfig,
    config_of,
)
from hcodec_core.models.hcodec.solo import HCodecSolo
from hcodec_core.nn.aggregator import QueryAggregator
from hcodec_core.nn.conv import RepeatUpsample1d, SubPixelUpsample1d
from hcodec_core.nn.grouping import Groups, similarity_to_previous, split_long_runs, spread
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import ValidGroupNorm
from hcodec_core.nn.projected_transformer import ProjectedTransformer
from hcodec_core.nn.quantize import Quantised, ResidualQuantizer
from hcodec_core.nn.resample import sinc_resample
from hcodec_core.nn.resnet import ChannelLayerNorm, ConvNeXtBlock, ResnetBlock
from hcodec_core.nn.seanet import SeanetConfig, SeanetEncoder
from hcodec_core.nn.semantic import SemanticDecoder, SemanticEncoder
from hcodec_core.nn.spectral import IstftHead, log_mel, mel_bank
from hcodec_core.nn.spectral_encoder import SpectralEncoder, SpectralEncoderConfig
from hcodec_core.nn.ssl import SslModel
from hcodec_core.nn.transformer import LstmTransformer
from hcodec_core.tokens import CodecSpec

logger = logging.getLogger(__name__)

_MAX_HIDDEN_DIM = 4096  # of the transformers' feed-forward layers
_SSL_MARGIN = 160  # zeros before and after the audio give exactly one SSL frame per 320 samples
_PARTS = {
    "acoustic_encoder": Part.ENCODER,
    "semantic_encoder": Part.ENCODER,
    "ssl": Part.SSL,
    "quantizers": Part.CODEBOOKS,
    "decoder": Part.DECODER,
    "semantic_decoder": Part.TRAINING,
    "aggregators": Part.ENCODER,
    "bottleneck": Part.DECODER,
}
_DECODER_FIELDS = ("version", "decoder_heads", "decoder_upsample", "n_fft")
_SEANET_FIELDS = ("version", "strides", "last_stride", "encoder_heads", "semantic_strides", "mel")


class Decoder(nn.Module):
    """Both latents to audio: up-sampling, residual blocks and a transformer, ConvNeXt, ISTFT."""

    def __init__(self, config: HCodecConfig) -> None:
        """Build the decoder."""
        super().__init__()
        dim = config.decoder_dim
        is_spectral = isinstance(config, SpectralHCodecConfig)
        upsample = RepeatUpsample1d if is_spectral else SubPixelUpsample1d
        self.factor = config.decoder_upsample
        self.upsample = upsample(2 * config.latent_dim, dim, self.factor)
        self.resnets_before = nn.ModuleList(ResnetBlock(dim) for _ in range(2))
        self.transformer = _transformer(dim, config.decoder_heads, config.decoder_layers)
        self.resnets_after = nn.ModuleList(ResnetBlock(dim) for _ in range(2))
        self.group_norm = ValidGroupNorm(32, dim, eps=1e-6)
        self.norm = ChannelLayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(
            ConvNeXtBlock(dim, config.convnext_dim, 1.0 / config.convnext_layers)
            for _ in range(config.convnext_layers)
        )
        self.final_norm = ChannelLayerNorm(dim, eps=1e-6)
        self.head = IstftHead(dim, config.n_fft, config.decoder_hop_length)

    def forward(self, latents: Tensor, lengths: Lengths) -> Tensor:
        """[B, 2 D, T] (acoustic, then semantic) -> audio [B, 1, N], zero past each row's end."""
        x = self.upsample(latents, lengths)
        lengths = lengths.multiplied(self.factor)
        for block in self.resnets_before:
            x = block(x, lengths)
        x = self.transformer(x, lengths)
        for block in self.resnets_after:
            x = block(x, lengths)
        x = self.norm(self.group_norm(x, lengths))
        for block in self.convnext:
            x = block(x, lengths)
        y: Tensor = self.head(self.final_norm(x), lengths)
        return y


class HCodec(Codec):
    """H-Codec 1.0, codecs of the same plan, and what all versions share."""

    family = "hcodec"
    part_fields: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        Part.ENCODER: _SEANET_FIELDS,
        Part.DECODER: _DECODER_FIELDS,
    }

    def __init__(self, config: HCodecConfig) -> None:
        """Build with random weights."""
        super().__init__(config)
        self.config = config
        dim, semantic_dim = config.latent_dim, config.semantic_dim
        self.acoustic_encoder = _acoustic_encoder(config)
        self.ssl = None if config.ssl is None else SslModel(config.ssl).requires_grad_(False)
        self.semantic_encoder = SemanticEncoder(
            config.feature_dim, semantic_dim, dim, config.semantic_strides
        )
        self.semantic_decoder = SemanticDecoder(
            dim, semantic_dim, config.feature_dim, config.semantic_strides
        )
        self.quantizers = nn.ModuleDict(
            {
                stream.name: ResidualQuantizer(dim, stream.num_codebooks, stream.codebook_size)
                for stream in config.streams
            }
        )
        self.decoder = Decoder(config)

    def features(self, audio: Tensor, lengths: Lengths) -> Tensor:
        """Features behind the semantic stream, [B, feature_dim, N / feature_hop_length].

        SSL features are the mean of hidden states under sign(x) |x| ** 0.3.

        Args:
            audio: [B, 1, N], N a hop multiple, zero past each clip's end.
            lengths: Valid samples, hop multiples.
        """
        if self.ssl is None:
            return self.mel_features(audio, self.mel_bank())
        speech = sinc_resample(audio[:, 0], lengths, self.sample_rate, SSL_SAMPLE_RATE)
        valid = lengths.valid * SSL_SAMPLE_RATE // self.sample_rate
        padded = F.pad(speech, (_SSL_MARGIN, _SSL_MARGIN))
        widened = Lengths(valid + 2 * _SSL_MARGIN, padded.shape[1])
        chosen = self.config.ssl_layers
        states = [
            state
            for index, (state, _) in enumerate(self.ssl.hidden_states(padded, widened))
            if chosen is None or index in chosen
        ]
        mean = torch.stack(states).mean(dim=0)
        return (mean.sign() * mean.abs().pow(0.3)).transpose(1, 2)

    def mel_bank(self) -> Tensor:
        """Filters of ``mel_features``, [num_mels, F]."""
        assert self.config.mel is not None
        return mel_bank(self.config.mel.num_mels, self.config.mel.n_fft, self.sample_rate)

    def mel_features(self, audio: Tensor, bank: Tensor) -> Tensor:
        """Log-mel features [B, num_mels, T] of [B, 1, N], about -1..1 (silence -1.15)."""
        assert self.config.mel is not None
        return (log_mel(audio[:, 0], bank, self.config.mel.hop_length) + 3.0) / 7.4

    def embed(self, audio: Tensor, num_samples: Tensor) -> tuple[dict[str, Tensor], Lengths]:
        """Unquantised latents of each stream, [B, latent_dim, T], and their lengths in base frames.

        Args:
            audio: [B, 1, N], N a hop multiple, zero past each clip's end.
            num_samples: int64 [B], at least 1.
        """
        frames = Lengths(
            (num_samples + self.hop_length - 1) // self.hop_length,
            audio.shape[2] // self.hop_length,
        )
        samples = frames.multiplied(self.hop_length)
        features = self.features(audio, samples)
        feature_lengths = frames.multiplied(self.hop_length // self.config.feature_hop_length)
        latents = {
            "semantic": self.semantic_encoder(features, feature_lengths),
            "acoustic": self.acoustic_encoder(audio, samples),
        }
        return latents, frames

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        latents, frames = self.embed(audio, num_samples)
        quantised = {
            name: self._quantizer(name).encode(latent, with_margins)
            for name, latent in latents.items()
        }
        return FrameCodes(
            codes={name: value.codes for name, value in quantised.items()},
            num_frames=frames.valid,
            margins=_margins(quantised) if with_margins else None,
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        latents = self._latents(frames)
        audio: Tensor = self.decoder(latents, Lengths(frames.num_frames, latents.shape[2]))
        return audio

    def solo_encoder(self) -> SoloEncoder | None:
        """Encoder for clips alone on a CPU; None where it has no advantage."""
        is_plain = type(self) is HCodec and self.device.type == "cpu"
        return HCodecSolo(self) if is_plain else None

    @classmethod
    def part_of(cls, key: str) -> Part:
        """Part of the tensor ``key``, by its first name."""
        return _PARTS[key.partition(".")[0]]

    def identity(self, part: Part) -> Mapping[str, Any]:
        """Fields of the configuration that tensors do not show."""
        if part is Part.SSL and self.config.ssl is not None:
            chosen = {} if self.config.ssl_layers is None else {"layers": self.config.ssl_layers}
            return self.config.ssl.model_dump(mode="json", exclude_defaults=True) | chosen
        values = self.architecture
        return {field: values[field] for field in self.part_fields.get(part, ())}

    def _latents(self, frames: FrameCodes) -> Tensor:
        """Both streams' vectors, acoustic first: [B, 2 D, G]."""
        streams = ("acoustic", "semantic")
        return torch.cat([self._quantizer(s).decode(frames.codes[s]) for s in streams], dim=1)

    def _quantizer(self, stream: str) -> ResidualQuantizer:
        quantizer = self.quantizers[stream]
        assert isinstance(quantizer, ResidualQuantizer)
        return quantizer


class AdaptiveHCodec(HCodec):
    """H-Codec 1.5: a token spans 1 to ``max_frame_span`` base frames, both streams alike.

    ``threshold``: a frame whose semantic latent has a cosine of at most this with the one before
    begins a token. ``bind`` sets it.
    """

    part_fields: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        Part.ENCODER: (*_SEANET_FIELDS, "aggregator", "max_frame_span", "released_threshold"),
        Part.DECODER: (*_DECODER_FIELDS, "bottleneck"),
    }

    def __init__(self, config: AdaptiveHCodecConfig) -> None:
        """Build with random weights."""
        super().__init__(config)
        self.max_frame_span = config.max_frame_span
        self.trained_thresholds = config.trained_thresholds
        self.released_threshold = self.threshold = config.released_threshold
        self.aggregators = nn.ModuleDict(
            {
                s.name: QueryAggregator(config.aggregator, config.max_frame_span)
                for s in self.streams
            }
        )
        width = 2 * config.latent_dim
        self.bottleneck = ProjectedTransformer(config.bottleneck, width, width)

    def bind(self, spec: CodecSpec) -> Self:
        """Take identity and settings; without a threshold there, the released one."""
        super().bind(spec)
        asked = spec.settings.threshold
        self.threshold = self.released_threshold if asked is None else asked
        lowest, highest = self.trained_thresholds
        if not lowest <= self.threshold <= highest:
            logger.warning(
                "Codec %s joins frames at threshold %g%s, which lies outside %g..%g, with which it "
                "was trained: its tokens may be poor; choose a threshold within.",
                spec.name,
                self.threshold,
                " as its published tokeniser does" if asked is None else "",
                lowest,
                highest,
            )
        return self

    def start_margins(self, semantic: Tensor) -> Tensor:
        """Similarity of each frame with the one before, less the threshold: float64 [B, T].

        A frame at 0 or below begins a token; the first is at -inf. ``semantic``: [B, D, T].
        """
        return similarity_to_previous(semantic) - self.threshold

    def groups(self, margins: Tensor, frames: Lengths, starts: TokenStarts | None = None) -> Groups:
        """Tokens of each row, from ``start_margins`` and the beginnings that are asked for."""
        begins = margins <= 0
        if starts is not None:
            begins = starts.frames if starts.is_complete else begins | starts.frames
        return Groups(split_long_runs(begins, self.max_frame_span), frames)

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        return self._encode_from(audio, num_samples, with_margins, None)

    def _encode_from(
        self, audio: Tensor, num_samples: Tensor, with_margins: bool, starts: TokenStarts | None
    ) -> FrameCodes:
        latents, frames = self.embed(audio, num_samples)
        start_margins = self.start_margins(latents["semantic"])
        groups = self.groups(start_margins, frames, starts)
        quantised = {
            name: self._quantizer(name).encode(self.aggregators[name](x, groups), with_margins)
            for name, x in latents.items()
        }
        return FrameCodes(
            codes={name: value.codes for name, value in quantised.items()},
            num_frames=groups.lengths.valid,
            frame_spans=groups.spans,
            margins=_margins(quantised) if with_margins else None,
            start_margins=start_margins if with_margins else None,
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        assert frames.frame_spans is not None
        tokens = self._latents(frames)
        # A row that is not used has no spans.
        num_frames = frames.frame_spans.sum(dim=1).clamp(min=1)
        lengths = Lengths(num_frames, max(tokens.shape[2], int(num_frames.max())))
        latents = spread(tokens, frames.frame_spans, lengths.size)
        audio: Tensor = self.decoder(self.bottleneck(latents, lengths), lengths)
        return audio


class SpectralHCodec(HCodec):
    """H-Codec 2.0: at 48 kHz, from spectra; trained without dropping codebooks."""

    decodes_prefixes = False
    part_fields: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        Part.ENCODER: (
            "version",
            "encoder_n_fft",
            "encoder_hop_length",
            "encoder_stride",
            "encoder_fft",
            "encoder_heads",
            "semantic_strides",
            "mel",
        ),
        Part.DECODER: _DECODER_FIELDS,
    }


def build(architecture: Mapping[str, Any]) -> HCodec:
    """A codec of this family with random weights. Raises ``ConfigError`` for a wrong field."""
    return codec_of(config_of(architecture))


def codec_of(config: HCodecConfig) -> HCodec:
    """The codec of the version that ``config`` is of, with random weights."""
    if isinstance(config, AdaptiveHCodecConfig):
        return AdaptiveHCodec(config)
    return SpectralHCodec(config) if isinstance(config, SpectralHCodecConfig) else HCodec(config)


def _acoustic_encoder(config: HCodecConfig) -> SeanetEncoder | SpectralEncoder:
    if isinstance(config, SpectralHCodecConfig):
        spectral = SpectralEncoderConfig(
            n_fft=config.encoder_n_fft,
            hop_length=config.encoder_hop_length,
            dim=config.encoder_dim,
            convnext_dim=config.encoder_convnext_dim,
            num_convnext_layers=config.encoder_convnext_layers,
            out_dim=config.latent_dim,
            stride=config.encoder_stride,
            fft_is_exact=config.encoder_fft == "float64",
        )
        dim = config.encoder_dim
        return SpectralEncoder(
            spectral, _transformer(dim, config.encoder_heads, config.encoder_layers)
        )
    assert isinstance(config, SeanetHCodecConfig)
    shape = SeanetConfig(
        num_filters=config.num_filters,
        strides=config.strides,
        out_dim=config.latent_dim,
        last_kernel=2 * config.last_stride,
        last_stride=config.last_stride,
    )
    dim = shape.widths[-1]
    return SeanetEncoder(shape, _transformer(dim, config.encoder_heads, config.encoder_layers))


def _transformer(dim: int, num_heads: int, num_layers: int) -> LstmTransformer:
    return LstmTransformer(dim, num_heads, min(4 * dim, _MAX_HIDDEN_DIM), num_layers)


def _margins(quantised: Mapping[str, Quantised]) -> dict[str, Tensor]:
    return {name: q.margins for name, q in quantised.items() if q.margins is not None}
