"""Periodic activation applied at twice the rate, so that its harmonics do not fold back.

SnakeBeta (BigVGAN, arXiv 2206.04658, section 3) between an up- and a down-sampler of factor 2
(alias-free activations, arXiv 2106.12423). Shape letters: B batch, D feature, N sample.
"""

from __future__ import annotations

from functools import lru_cache
from math import pi

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.conv import pad_ends
from hcodec_core.nn.lengths import Lengths

NUM_TAPS = 12
_HALF_WIDTH = 0.3  # of the transition band, in units of the doubled rate's Nyquist frequency


@lru_cache(maxsize=1)
def half_band_taps() -> tuple[float, ...]:
    """Kaiser-windowed sinc that keeps the lower half of the band; 12 taps of sum 1."""
    attenuation = 2.285 * (NUM_TAPS // 2 - 1) * pi * 4 * _HALF_WIDTH + 7.95
    # Kaiser's rule above 50 dB, where this filter just lies.
    window = np.kaiser(NUM_TAPS, 0.1102 * (attenuation - 8.7))
    times = np.arange(NUM_TAPS) - (NUM_TAPS - 1) / 2
    taps = window * np.sinc(times / 2)
    return tuple((taps / taps.sum()).tolist())


def half_band_filter(like: Tensor) -> Tensor:
    """The taps [1, 1, 12] in the type and on the device of ``like``."""
    return torch.tensor(half_band_taps(), device=like.device, dtype=like.dtype)[None, None]


class AliasFreeSnake(nn.Module):
    """x + sin(alpha x)^2 / beta per channel at twice the rate; both are learned as logarithms.

    Each row's true ends are continued by their last values.
    """

    def __init__(self, dim: int) -> None:
        """Build for ``dim`` channels."""
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, lengths: Lengths, taps: Tensor) -> Tensor:
        """[B, D, N] -> [B, D, N]; ``taps`` are those of ``half_band_filter``."""
        y = self._activate(upsampled_twice(x, lengths, taps))
        return halved(y, lengths.multiplied(2), taps)

    def _activate(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + (x * alpha).sin().square() / (beta + 1e-9)


def upsampled_twice(x: Tensor, lengths: Lengths, taps: Tensor) -> Tensor:
    """[B, D, N] at twice the rate: [B, D, 2 N]."""
    pad = NUM_TAPS // 2 - 1
    cut = 2 * pad + pad
    padded = pad_ends(x, lengths, pad, pad, 1, "replicate")
    weight = (2 * taps).expand(x.shape[1], -1, -1)
    return F.conv_transpose1d(padded, weight, stride=2, groups=x.shape[1])[:, :, cut:-cut]


def halved(x: Tensor, lengths: Lengths, taps: Tensor) -> Tensor:
    """[B, D, 2 N] at half the rate: [B, D, N]."""
    right = NUM_TAPS // 2
    padded = pad_ends(x, lengths, right - 1, right, 1, "replicate")
    weight = taps.expand(x.shape[1], -1, -1)
    return F.conv1d(padded, weight, stride=2, groups=x.shape[1])
