"""U-Codec (arXiv 2510.16718; YangXusheng-yxs/CodecFormer_5Hz): one stream at 5 Hz.

A SEANet encoder and a transformer (as in Mimi) down to few frames per second, a residual quantiser
with small projected codebooks compared by angle, and the mirror image back to audio.

Deliberate differences from the published code: rows of a batch may have different lengths (there,
attention sees the padding); a clip is normalised over its own padded length; no tensor of a row
past its end is ever used; weight norm is folded; speaker conditioning is left out.

As in the published code, the zeros that fill a clip's last encoder frame count as signal, and with
several encoder frames per token frame a last, unfinished token frame is quantised from zeros and
its codes are set to 0 and kept.

Shape letters: B batch, D feature, Q codebook, N sample, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hcodec_core.models.base import Codec, FrameCodes, Part
from hcodec_core.models.ucodec.config import ConvNetConfig, UCodecConfig
from hcodec_core.nn.conv import EdgeConv1d
from hcodec_core.nn.factorised import FactorisedResidualQuantizer
from hcodec_core.nn.initial import keep_variance
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.projected_transformer import ProjectedTransformer
from hcodec_core.nn.seanet import SeanetConfig, SeanetEncoder
from hcodec_core.nn.seanet_decoder import SeanetDecoder, TrimmedConvTranspose1d
from hcodec_core.nn.transformer_config import TransformerConfig

_PARTS = {
    "encoder": Part.ENCODER,
    "encoder_transformer": Part.ENCODER,
    "down": Part.ENCODER,
    "quantizer": Part.CODEBOOKS,
    "up": Part.DECODER,
    "decoder_transformer": Part.DECODER,
    "decoder": Part.DECODER,
}
_PART_FIELDS = {
    Part.ENCODER: ("normalises_audio", "encoder", "encoder_transformer", "frame_stride"),
    Part.DECODER: ("decoder", "decoder_transformer", "frame_stride"),
}


class PointwiseConv(nn.Conv1d):
    """Convolution of kernel 1 in the place of a transformer."""

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:  # type: ignore[override]
        """[B, in_dim, T] -> [B, out_dim, T]; the lengths play no part."""
        return super().forward(x)


class UCodec(Codec):
    """U-Codec: the fused stream, by default 32 codebooks of 256 at 5 Hz."""

    family = "ucodec"

    def __init__(self, config: UCodecConfig) -> None:
        """Build with random weights."""
        super().__init__(config)
        self.config = config
        stride, latent_dim = config.frame_stride, config.latent_dim
        self.encoder = SeanetEncoder(_seanet(config.encoder))
        self.encoder_transformer = _transformer(
            config.encoder_transformer, config.encoder.out_dim, latent_dim
        )
        self.down = None if stride == 1 else _down(latent_dim, stride, config.encoder.is_causal)
        self.quantizer = FactorisedResidualQuantizer(
            latent_dim, config.num_codebooks, config.codebook_size, config.codebook_dim
        )
        self.up = None if stride == 1 else _up(latent_dim, stride, config.decoder.is_causal)
        self.decoder_transformer = _transformer(
            config.decoder_transformer, latent_dim, config.decoder.out_dim
        )
        self.decoder = SeanetDecoder(_seanet(config.decoder))
        for network in (self.encoder, self.quantizer, self.decoder):
            keep_variance(network)

    def embed(self, audio: Tensor, num_samples: Tensor) -> tuple[Tensor, Lengths, Tensor]:
        """What the quantiser receives, its lengths in frames, and how many frames are whole.

        Args:
            audio: [B, 1, N], N a multiple of the hop, zero past each clip's end.
            num_samples: int64 [B], at least 1.

        Returns:
            Latents [B, latent_dim, T], zero from the first unfinished frame on; their lengths;
            int64 [B], the number of frames that no padding beyond the encoder's own completes.
        """
        hop = self.config.encoder.hop_length
        frames = Lengths((num_samples + hop - 1) // hop, audio.shape[2] // hop)
        samples = frames.multiplied(hop)
        if self.config.normalises_audio:
            audio = normalised(audio, samples)
        x = self.encoder_transformer(self.encoder(audio, samples), frames)
        if self.down is None:
            return x, frames, frames.valid
        x = self.down(x, frames)
        whole = frames.valid // self.config.frame_stride
        unfinished = torch.arange(x.shape[2], device=x.device) >= whole[:, None]
        x = x.masked_fill(unfinished[:, None], 0.0)
        return x, frames.divided(self.config.frame_stride), whole

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        latents, frames, whole = self.embed(audio, num_samples)
        quantised = self.quantizer.encode(latents, with_margins)
        unfinished = torch.arange(frames.size, device=whole.device) >= whole[:, None, None]
        margins = quantised.margins
        return FrameCodes(
            codes={"fused": quantised.codes.masked_fill(unfinished, 0)},
            num_frames=frames.valid,
            margins=(
                None if margins is None else {"fused": margins.masked_fill(unfinished, torch.inf)}
            ),
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        x = self.quantizer.decode(frames.codes["fused"])
        return self.rebuild(x, Lengths(frames.num_frames, x.shape[2]))

    def rebuild(self, x: Tensor, lengths: Lengths) -> Tensor:
        """Audio [B, 1, N] of quantised latents [B, latent_dim, T]."""
        if self.up is not None:
            x = self.up(x, lengths)
            lengths = lengths.multiplied(self.config.frame_stride)
        audio: Tensor = self.decoder(self.decoder_transformer(x, lengths), lengths)
        return audio

    @classmethod
    def part_of(cls, key: str) -> Part:
        """Part of the tensor ``key``, by its first name."""
        return _PARTS[key.partition(".")[0]]

    def identity(self, part: Part) -> Mapping[str, Any]:
        """Configuration of the part's networks, without the first values of learned scales."""
        values = {field: self.architecture[field] for field in _PART_FIELDS.get(part, ())}
        return {
            field: _without(value, "layer_scale") if isinstance(value, dict) else value
            for field, value in values.items()
        }


def build(architecture: Mapping[str, Any]) -> UCodec:
    """A codec of this family with random weights. Raises ``ConfigError`` for a wrong field."""
    return UCodec(UCodecConfig.from_architecture(architecture))


def normalised(audio: Tensor, lengths: Lengths) -> Tensor:
    """Each row of [B, 1, N] at mean 0 and variance 1 over its valid samples, zero past its end."""
    count = lengths.valid[:, None, None].to(audio.dtype)
    audio = lengths.zero_past(audio)
    mean = audio.sum(dim=2, keepdim=True) / count
    variance = audio.square().sum(dim=2, keepdim=True) / count - mean.square()
    return lengths.zero_past((audio - mean) / (variance + 1e-7).sqrt())


def _seanet(config: ConvNetConfig) -> SeanetConfig:
    return SeanetConfig(**config.model_dump())


def _transformer(config: TransformerConfig | None, in_dim: int, out_dim: int) -> nn.Module:
    if config is None:
        return PointwiseConv(in_dim, out_dim, 1)
    return ProjectedTransformer(config, in_dim, out_dim)


def _down(dim: int, stride: int, is_causal: bool) -> EdgeConv1d:
    return EdgeConv1d(
        dim,
        dim,
        2 * stride,
        stride=stride,
        pad_mode="replicate",
        is_causal=is_causal,
        has_bias=False,
    )


def _up(dim: int, stride: int, is_causal: bool) -> TrimmedConvTranspose1d:
    return TrimmedConvTranspose1d(dim, dim, stride, groups=dim, is_causal=is_causal, has_bias=False)


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
