"""Convolutional networks between SSL features and the semantic latent (X-Codec, arXiv 2408.17175).

Plain convolutions, no norms. Shape letters: B batch, D feature, T step.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.conv import HalfPaddedConv1d, RepeatedStepsConv1d, SameConv1d
from hcodec_core.nn.lengths import Lengths

_NUM_UNITS = 2


class ResidualUnit(nn.Module):
    """ELU, conv k3, ELU, conv k1, plus the input; no biases."""

    def __init__(self, dim: int) -> None:
        """Build for ``dim`` channels."""
        super().__init__()
        self.conv1 = SameConv1d(dim, dim, 3, has_bias=False)
        self.conv2 = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, D, T]."""
        y: Tensor = x + self.conv2(F.elu(self.conv1(F.elu(x), lengths)))
        return y


class SemanticEncoder(nn.Module):
    """SSL features to the semantic latent; each stride ends a block of two residual units."""

    def __init__(self, in_dim: int, dim: int, out_dim: int, strides: tuple[int, ...]) -> None:
        """Build for ``in_dim`` features; T must be a multiple of the product of ``strides``."""
        super().__init__()
        self.strides = strides
        self.conv_in = SameConv1d(in_dim, dim, 3, has_bias=False)
        self.units = nn.ModuleList(ResidualUnit(dim) for _ in range(_NUM_UNITS * len(strides)))
        self.downs = nn.ModuleList(HalfPaddedConv1d(dim, dim, stride) for stride in strides)
        self.conv_out = SameConv1d(dim, out_dim, 3, has_bias=False)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T / prod(strides)]; past a row's end anything finite."""
        x = self.conv_in(x, lengths)
        for block, (down, stride) in enumerate(zip(self.downs, self.strides, strict=True)):
            for unit in self.units[_NUM_UNITS * block : _NUM_UNITS * (block + 1)]:
                x = unit(x, lengths)
            x = down(x, lengths)
            lengths = lengths.divided(stride)
        y: Tensor = self.conv_out(x, lengths)
        return y


class SemanticDecoder(nn.Module):
    """Semantic latent back to SSL features; each stride begins a block of two residual units."""

    def __init__(self, in_dim: int, dim: int, out_dim: int, strides: tuple[int, ...]) -> None:
        """Build for ``in_dim`` features."""
        super().__init__()
        self.strides = strides
        self.conv_in = SameConv1d(in_dim, dim, 3, has_bias=False)
        self.ups = nn.ModuleList(RepeatedStepsConv1d(dim, dim, stride) for stride in strides)
        self.units = nn.ModuleList(ResidualUnit(dim) for _ in range(_NUM_UNITS * len(strides)))
        self.conv_out = SameConv1d(dim, out_dim, 3, has_bias=False)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T * prod(strides)]; past a row's end anything finite."""
        x = self.conv_in(x, lengths)
        for block, (up, stride) in enumerate(zip(self.ups, self.strides, strict=True)):
            x = up(x, lengths)
            lengths = lengths.multiplied(stride)
            for unit in self.units[_NUM_UNITS * block : _NUM_UNITS * (block + 1)]:
                x = unit(x, lengths)
        y: Tensor = self.conv_out(x, lengths)
        return y
