"""Attention along time with rotary positions; keys past a row's end are never seen.

Shape letters: B batch, H head, T step, D feature.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hcodec_core.nn.lengths import Lengths

RotaryPairs = Literal["halves", "neighbours"]
"""Which two features turn together: i and i + D/2 (LLaMA, H-Codec) or 2i and 2i + 1 (Mimi)."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def rotate(x: Tensor, pairs: RotaryPairs, period: float = 10000.0) -> Tensor:
    """Turn each pair of features of [B, H, T, D] by its position (RoPE, arXiv 2104.09864)."""
    cos, sin = _rotary_angles(x, period)
    if pairs == "halves":
        first, second = x.chunk(2, dim=-1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if pairs == "halves":
        return torch.cat(turned, dim=-1)
    return torch.stack(turned, dim=-1).flatten(-2)


def _rotary_angles(x: Tensor, period: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, D / 2] in the type of ``x``, computed in float32 or better."""
    steps, dim = x.shape[-2:]
    kind = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=x.device, dtype=kind) / dim
    angles = torch.arange(steps, device=x.device, dtype=kind)[:, None] * period**-exponents
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """Full attention [B, H, T, D] x3 -> [B, T, H * D], scale D ** -0.5.

    The mask is passed even where nothing is padded: without one another kernel may be chosen, and
    codes would depend on a clip's neighbours.
    """
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=lengths.attention_mask)
    return mixed.transpose(1, 2).flatten(2)
