"""Residual blocks along time.

Shape letters: B batch, D feature, T step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.conv import SameConv1d
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import ValidGroupNorm, swish


class ResnetBlock(nn.Module):
    """Group norm (32 groups), swish, conv k3, twice, with a skip (WavTokenizer's ``pos_net``).

    ``dropout`` acts before the second convolution, while training only.
    """

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        """Build for ``dim`` channels, a multiple of 32."""
        super().__init__()
        self.norm1 = ValidGroupNorm(32, dim, eps=1e-6)
        self.conv1 = SameConv1d(dim, dim, 3)
        self.norm2 = ValidGroupNorm(32, dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = SameConv1d(dim, dim, 3)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, D, T]; past a row's end anything finite."""
        inner = self.conv1(swish(self.norm1(x, lengths)), lengths)
        inner = self.dropout(swish(self.norm2(inner, lengths)))
        y: Tensor = x + self.conv2(inner, lengths)
        return y


class ConvNeXtBlock(nn.Module):
    """Depthwise conv k7, layer norm, GELU network, scale, skip (Vocos, arXiv 2306.00814)."""

    def __init__(self, dim: int, hidden_dim: int, scale: float) -> None:
        """Build for ``dim`` channels; ``scale`` is the first value of the learned scale."""
        super().__init__()
        self.depthwise = SameConv1d(dim, dim, 7, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.expand = nn.Linear(dim, hidden_dim)
        self.reduce = nn.Linear(hidden_dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, D, T]; past a row's end anything finite."""
        inner = self.norm(self.depthwise(x, lengths).transpose(1, 2))
        inner = self.gamma * self.reduce(F.gelu(self.expand(inner)))
        y: Tensor = x + inner.transpose(1, 2)
        return y


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, D, T]."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, T] -> [B, D, T]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)
