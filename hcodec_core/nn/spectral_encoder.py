"""Encoder on short-time spectra: the way of Vocos (arXiv 2306.00814) backwards.

Shape letters: B batch, D feature, N sample, F frequency, T frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcodec_core.nn.conv import SameConv1d
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.resnet import ChannelLayerNorm, ConvNeXtBlock
from hcodec_core.nn.spectral import spectrum


@dataclass(frozen=True)
class SpectralEncoderConfig:
    """Shape of a spectral encoder; ``n_fft`` and ``hop_length`` in samples.

    ``stride`` spectral frames become one frame out. ``fft_is_exact``: spectra in float64. In
    float32 the rounding of the FFT decides the phases of bins that hold next to nothing (all those
    above the band of audio that was once sampled at a lower rate), so that features, and with them
    codes, change with the library and even with the instruction set of the CPU.
    """

    n_fft: int
    hop_length: int
    dim: int
    convnext_dim: int
    num_convnext_layers: int
    out_dim: int
    stride: int
    fft_is_exact: bool = True


class SpectralEncoder(nn.Module):
    """Log magnitudes and phases, conv, ConvNeXt blocks, a module on frames, strided conv.

    The encoder of H-Codec 2.0. ``middle`` maps ([B, D, T], lengths) to [B, D, T].
    """

    def __init__(self, config: SpectralEncoderConfig, middle: nn.Module) -> None:
        """Build the encoder."""
        super().__init__()
        self.config = config
        dim, layers = config.dim, config.num_convnext_layers
        self.conv_in = SameConv1d(config.n_fft + 2, dim, 3)
        self.norm = ChannelLayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(
            ConvNeXtBlock(dim, config.convnext_dim, 1.0 / layers) for _ in range(layers)
        )
        self.middle = middle
        self.final_norm = ChannelLayerNorm(dim, eps=1e-6)
        self.conv_out = SameConv1d(dim, config.out_dim, 2 * config.stride + 1, stride=config.stride)

    def forward(self, audio: Tensor, lengths: Lengths) -> Tensor:
        """[B, 1, N] -> [B, out_dim, N / (hop * stride)]; past a row's end anything finite.

        N and the lengths are multiples of hop * stride, the audio is zero past each row's end.
        """
        heard = audio[:, 0].double() if self.config.fft_is_exact else audio[:, 0]
        x = polar_features(spectrum(heard, self.config.n_fft, self.config.hop_length))
        lengths = lengths.divided(self.config.hop_length)
        x = self.norm(self.conv_in(x.to(audio.dtype), lengths))
        for block in self.convnext:
            x = block(x, lengths)
        x = self.final_norm(self.middle(x, lengths))
        y: Tensor = self.conv_out(x, lengths)
        return y


def polar_features(spectra: Tensor) -> Tensor:
    """Log magnitudes (at least ln 1e-5), then phases over pi: complex [B, F, T] -> [B, 2 F, T].

    FFT libraries give zeros of either sign, and a zero's sign turns a phase by pi. Phases of zeros
    are therefore fixed here, as the published code has them on x86 CPUs: 0 up to a quarter of the
    sample rate and at the Nyquist rate, pi between. So digital silence is the same everywhere.
    """
    log_magnitudes = spectra.abs().clamp(min=1e-5).log()
    num_bins = spectra.shape[1]
    bins = torch.arange(num_bins, device=spectra.device)[:, None]
    is_upper = (bins > num_bins // 2) & (bins < num_bins - 1)
    is_turned = torch.where(spectra == 0, is_upper, spectra.real < 0)
    phases = spectra.angle() / torch.pi
    phases = torch.where(spectra.imag == 0, is_turned.to(phases.dtype), phases)
    return torch.cat((log_magnitudes, phases), dim=1)
