"""Normalisation that looks at valid steps only.

Shape letters: B batch, D feature, T step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcodec_core.nn.lengths import Lengths


class ValidGroupNorm(nn.Module):
    """Group norm (arXiv 1803.08494) with statistics over each row's valid steps.

    On a row without padding it agrees with ``torch.nn.GroupNorm`` to rounding; one path serves
    padded and unpadded rows, since another order of summation would change bits.
    """

    def __init__(self, num_groups: int, dim: int, eps: float) -> None:
        """Build the norm over ``dim`` channels."""
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, D, T]; past a row's end anything finite."""
        batch, dim, steps = x.shape
        grouped = lengths.zero_past(x).reshape(batch, self.num_groups, -1, steps)
        count = (lengths.valid * (dim // self.num_groups)).to(x.dtype)[:, None, None, None]
        mean = grouped.sum(dim=(2, 3), keepdim=True) / count
        centred = lengths.zero_past((grouped - mean).view(batch, dim, steps)).view_as(grouped)
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        normal = (centred * torch.rsqrt(variance + self.eps)).view(batch, dim, steps)
        return normal * self.weight[:, None] + self.bias[:, None]


class RmsNorm(nn.Module):
    """Root mean square norm over the last dimension (arXiv 1910.07467), weight only."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        """Build the norm over ``dim`` features."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x * scale * self.weight


def swish(x: Tensor) -> Tensor:
    """X * sigmoid(x)."""
    return nn.functional.silu(x)
