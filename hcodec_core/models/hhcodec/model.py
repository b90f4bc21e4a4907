"""HH-Codec (arXiv 2507.18897; opendilab/HH-Codec): one codebook at 23.4 Hz, mel in the middle.

A SEANet encoder with a bidirectional LSTM, one SimVQ codebook, a Vocos backbone that predicts
log-mel frames, and a BigVGAN generator from these to audio. No weights are public: an HH-Codec has
random weights (``is_trained`` false) or was trained by its user.

Deliberate differences from the published code: rows of a batch may have different lengths; the
decoder that it builds and never uses (``decoder.*``) and its distillation head are left out; of the
training codebooks only the first makes tokens, as there; weight norm is folded; codes are mapped
straight to their vectors, where the published forward pass rotates (equal to 2e-6).

For a trainer: the published mel loss takes the logarithm of log-mel values again (clipped at 1e-7,
so that everything below 1 collapses and has no gradient). The target that the vocoder understands
is plain L1 on natural-log mel as BigVGAN defines it (``nn.slaney_mel``).

Shape letters: B batch, D feature, N sample, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hcodec_core.models.base import Codec, FrameCodes, Part
from hcodec_core.models.hhcodec.config import HHCodecConfig
from hcodec_core.nn.attention_block import AttentionBlock
from hcodec_core.nn.bigvgan import BigVganGenerator
from hcodec_core.nn.bilstm import BiLstm
from hcodec_core.nn.conv import SameConv1d
from hcodec_core.nn.initial import keep_variance
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import ValidGroupNorm
from hcodec_core.nn.resnet import ChannelLayerNorm, ConvNeXtBlock, ResnetBlock
from hcodec_core.nn.seanet import SeanetConfig, SeanetEncoder
from hcodec_core.nn.simvq import ResidualSimVq

NUM_LSTM_LAYERS = 2
_PARTS = {
    "encoder": Part.ENCODER,
    "quantizer": Part.CODEBOOKS,
    "backbone": Part.DECODER,
    "mel_head": Part.DECODER,
    "vocoder": Part.DECODER,
}
_PART_FIELDS = {Part.ENCODER: ("strides",), Part.DECODER: ("mel_stride", "vocoder")}
_TOKEN_BOOK = "quantizer.books.0."


class Backbone(nn.Module):
    """Convolution, residual blocks around one attention, ConvNeXt blocks (Vocos, WavTokenizer)."""

    def __init__(self, config: HHCodecConfig) -> None:
        """Build the backbone."""
        super().__init__()
        dim, layers = config.backbone_dim, config.convnext_layers
        self.embed = SameConv1d(config.latent_dim, dim, 7)
        self.resnets_before = nn.ModuleList(ResnetBlock(dim) for _ in range(2))
        self.attention = AttentionBlock(dim)
        self.resnets_after = nn.ModuleList(ResnetBlock(dim) for _ in range(2))
        self.group_norm = ValidGroupNorm(32, dim, eps=1e-6)
        self.norm = ChannelLayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(
            ConvNeXtBlock(dim, config.convnext_dim, 1.0 / layers) for _ in range(layers)
        )
        self.final_norm = ChannelLayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, latent_dim, T] -> [B, backbone_dim, T]; past a row's end anything finite."""
        x = self.embed(x, lengths)
        for block in self.resnets_before:
            x = block(x, lengths)
        x = self.attention(x, lengths)
        for block in self.resnets_after:
            x = block(x, lengths)
        x = self.norm(self.group_norm(x, lengths))
        for block in self.convnext:
            x = block(x, lengths)
        y: Tensor = self.final_norm(x)
        return y


class HHCodec(Codec):
    """HH-Codec: the fused stream of one codebook."""

    family = "hhcodec"

    def __init__(self, config: HHCodecConfig) -> None:
        """Build with random weights."""
        super().__init__(config)
        self.config = config
        self.encoder = _encoder(config)
        self.quantizer = ResidualSimVq(
            config.latent_dim,
            config.num_training_books,
            config.codebook_size,
            config.transform_dim,
        )
        self.backbone = Backbone(config)
        self.mel_head = nn.ConvTranspose1d(
            config.backbone_dim,
            config.vocoder.num_mels,
            config.mel_stride,
            stride=config.mel_stride,
        )
        self.vocoder = BigVganGenerator(config.vocoder)
        for network in (self.encoder, self.quantizer):
            keep_variance(network)

    def embed(self, audio: Tensor, num_samples: Tensor) -> tuple[Tensor, Lengths]:
        """What the quantiser receives, [B, latent_dim, T], and its lengths in frames.

        Args:
            audio: [B, 1, N], N a multiple of the hop, zero past each clip's end.
            num_samples: int64 [B], at least 1; the encoder's windows end there, not at a hop.
        """
        samples = Lengths(num_samples, audio.shape[2])
        return self.encoder(audio, samples), samples.divided(self.hop_length)

    def mel(self, latents: Tensor, lengths: Lengths) -> Tensor:
        """Natural-log mel [B, num_mels, T * mel_stride] of quantised latents [B, D, T]."""
        y: Tensor = self.mel_head(self.backbone(latents, lengths))
        return y

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        latents, frames = self.embed(audio, num_samples)
        quantised = self.quantizer.encode(latents, with_margins, num_codebooks=1)
        margins = quantised.margins
        return FrameCodes(
            codes={"fused": quantised.codes},
            num_frames=frames.valid,
            margins=None if margins is None else {"fused": margins},
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        latents = self.quantizer.decode(frames.codes["fused"])
        lengths = Lengths(frames.num_frames, latents.shape[2])
        mel = self.mel(latents, lengths)
        audio: Tensor = self.vocoder(mel, lengths.multiplied(self.config.mel_stride))
        return audio

    @classmethod
    def part_of(cls, key: str) -> Part:
        """Part of the tensor ``key``, by its first name; further codebooks are for training."""
        if key.startswith("quantizer.books.") and not key.startswith(_TOKEN_BOOK):
            return Part.TRAINING
        return _PARTS[key.partition(".")[0]]

    def identity(self, part: Part) -> Mapping[str, Any]:
        """Fields of the configuration that tensors do not show."""
        return {field: self.architecture[field] for field in _PART_FIELDS.get(part, ())}


def build(architecture: Mapping[str, Any]) -> HHCodec:
    """A codec of this family with random weights. Raises ``ConfigError`` for a wrong field."""
    return HHCodec(HHCodecConfig.from_architecture(architecture))


def _encoder(config: HHCodecConfig) -> SeanetEncoder:
    shape = SeanetConfig(
        num_filters=config.num_filters,
        strides=config.strides,
        out_dim=config.latent_dim,
        last_kernel=7,
        is_causal=True,
    )
    dim = shape.widths[-1]
    return SeanetEncoder(shape, BiLstm(dim, NUM_LSTM_LAYERS), middle_dim=2 * dim)
