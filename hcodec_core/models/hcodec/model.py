"""H-Codec 1.0 (arXiv 2510.26372, UniTok-Audio; alibaba/unified-audio, folder HCodec-1.0).

Two streams at one frame rate: the acoustic one from the waveform (SEANet with a transformer), the
semantic one from frozen SSL features (X-Codec's convolutional encoder); each has its own residual
quantiser. The decoder sees both, acoustic channels first.

Deliberate differences from the published code: rows of a batch may have different lengths (a
clip's end is the end of its zero-padded last hop, as for a single file); output is trimmed by the
caller's lengths; weight norm is folded; the stream order of this project is semantic, acoustic.

Shape letters: B batch, D feature, N sample, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.models.base import Codec, FrameCodes, Part
from hcodec_core.models.hcodec.config import HCodecConfig, MelConfig
from hcodec_core.nn.conv import SubPixelUpsample1d
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import ValidGroupNorm
from hcodec_core.nn.quantize import ResidualQuantizer
from hcodec_core.nn.resnet import ChannelLayerNorm, ConvNeXtBlock, ResnetBlock
from hcodec_core.nn.seanet import SeanetConfig, SeanetEncoder
from hcodec_core.nn.semantic import SemanticDecoder, SemanticEncoder
from hcodec_core.nn.spectral import IstftHead, log_mel
from hcodec_core.nn.ssl import SslModel
from hcodec_core.nn.transformer import LstmTransformer

_SSL_MARGIN = 160  # zeros before and after the audio give exactly one SSL frame per 320 samples
_PARTS = {
    "acoustic_encoder": Part.ENCODER,
    "semantic_encoder": Part.ENCODER,
    "ssl": Part.SSL,
    "quantizers": Part.CODEBOOKS,
    "decoder": Part.DECODER,
    "semantic_decoder": Part.TRAINING,
}
_PART_FIELDS = {
    Part.ENCODER: ("version", "strides", "last_stride", "encoder_heads", "semantic_strides", "mel"),
    Part.DECODER: ("version", "decoder_heads", "decoder_upsample", "n_fft"),
}


class Decoder(nn.Module):
    """Both latents to audio: up-sampling, residual blocks and a transformer, ConvNeXt, ISTFT."""

    def __init__(self, config: HCodecConfig) -> None:
        """Build the decoder."""
        super().__init__()
        dim = config.decoder_dim
        self.upsample = SubPixelUpsample1d(2 * config.latent_dim, dim, config.decoder_upsample)
        self.resnets_before = nn.ModuleList(ResnetBlock(dim) for _ in range(2))
        self.transformer = LstmTransformer(
            dim, config.decoder_heads, 4 * dim, config.decoder_layers
        )
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
        lengths = lengths.multiplied(self.upsample.factor)
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
    """H-Codec 1.0 and codecs of the same plan."""

    family = "hcodec"

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

        SSL features are the mean of all hidden states under sign(x) |x| ** 0.3.

        Args:
            audio: [B, 1, N], N a hop multiple, zero past each clip's end.
            lengths: Valid samples, hop multiples.
        """
        if self.ssl is None:
            assert self.config.mel is not None
            return _mel_features(audio[:, 0], self.config.mel, self.sample_rate)
        padded = F.pad(audio[:, 0], (_SSL_MARGIN, _SSL_MARGIN))
        widened = Lengths(lengths.valid + 2 * _SSL_MARGIN, lengths.size + 2 * _SSL_MARGIN)
        states = [state for state, _ in self.ssl.hidden_states(padded, widened)]
        mean = torch.stack(states).mean(dim=0)
        return (mean.sign() * mean.abs().pow(0.3)).transpose(1, 2)

    def embed(self, audio: Tensor, num_samples: Tensor) -> tuple[dict[str, Tensor], Lengths]:
        """Unquantised latents of each stream, [B, latent_dim, T], and their lengths in frames.

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
        margins = {
            name: value.margins for name, value in quantised.items() if value.margins is not None
        }
        return FrameCodes(
            codes={name: value.codes for name, value in quantised.items()},
            num_frames=frames.valid,
            margins=margins if with_margins else None,
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        latents = [
            self._quantizer(name).decode(frames.codes[name]) for name in ("acoustic", "semantic")
        ]
        lengths = Lengths(frames.num_frames, latents[0].shape[2])
        audio: Tensor = self.decoder(torch.cat(latents, dim=1), lengths)
        return audio

    @classmethod
    def part_of(cls, key: str) -> Part:
        """Part of the tensor ``key``, by its first name."""
        return _PARTS[key.partition(".")[0]]

    def identity(self, part: Part) -> Mapping[str, Any]:
        """Fields of the configuration that tensors do not show."""
        if part is Part.SSL and self.config.ssl is not None:
            return self.config.ssl.model_dump(mode="json", exclude_defaults=True)
        values = self.architecture
        return {field: values[field] for field in _PART_FIELDS.get(part, ())}

    def _quantizer(self, stream: str) -> ResidualQuantizer:
        quantizer = self.quantizers[stream]
        assert isinstance(quantizer, ResidualQuantizer)
        return quantizer


def build(architecture: Mapping[str, Any]) -> HCodec:
    """A codec of this family with random weights. Raises ``ConfigError`` for a wrong field."""
    return HCodec(HCodecConfig.from_architecture(architecture))


def _acoustic_encoder(config: HCodecConfig) -> SeanetEncoder:
    shape = SeanetConfig(
        num_filters=config.num_filters,
        strides=config.strides,
        out_dim=config.latent_dim,
        last_kernel=2 * config.last_stride,
        last_stride=config.last_stride,
    )
    dim = shape.widths[-1]
    middle = LstmTransformer(dim, config.encoder_heads, 4 * dim, config.encoder_layers)
    return SeanetEncoder(shape, middle)


def _mel_features(audio: Tensor, config: MelConfig, sample_rate: int) -> Tensor:
    """Log-mel features brought to about -1..1 (silence to -1.15)."""
    mels = log_mel(audio, config.n_fft, config.hop_length, config.num_mels, sample_rate)
    return (mels + 3.0) / 7.4
