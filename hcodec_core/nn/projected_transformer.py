"""Pre-norm transformer with optional projections around it (Mimi, arXiv 2410.00037, section 3.3).

Follows ``ProjectedTransformer`` of kyutai-labs/moshi. Deliberate difference: keys past a row's end
are masked. Shape letters: B batch, H head, T step, D feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.attention import rotate, split_heads
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import RmsNorm
from hcodec_core.nn.precision import at_least_float32
from hcodec_core.nn.transformer_config import TransformerConfig

_GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "mish": F.mish,
    "tanh": torch.tanh,
}


class ProjectedTransformer(nn.Module):
    """Transformer layers between two linear maps without bias, left out where widths agree."""

    def __init__(self, config: TransformerConfig, in_dim: int, out_dim: int) -> None:
        """Build for ``in_dim`` channels in and ``out_dim`` channels out."""
        super().__init__()
        dim = config.dim
        self.config = config
        self.project_in = None if in_dim == dim else nn.Linear(in_dim, dim, bias=False)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_layers))
        self.project_out = None if out_dim == dim else nn.Linear(dim, out_dim, bias=False)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T]; past a row's end anything finite."""
        x = x.transpose(1, 2)
        if self.project_in is not None:
            x = self.project_in(x)
        x = at_least_float32(x)
        if self.config.positions in ("sin", "sin_rope"):
            x = x + sinusoids(x, self.config.max_period)
        mask = self._mask(lengths)
        for layer in self.layers:
            x = layer(x, mask)
        if self.project_out is not None:
            x = self.project_out(x)
        return x.transpose(1, 2)

    def _mask(self, lengths: Lengths) -> Tensor:
        """Bool, true where a query may look at a key: [B, 1, 1, T], or [T, T] when causal.

        A causal query within its row sees no padding, and one past the end must see something.
        """
        if not self.config.is_causal:
            return lengths.attention_mask
        steps = torch.arange(lengths.size, device=lengths.valid.device)
        age = steps[:, None] - steps
        allowed = age >= 0
        return allowed if self.config.context is None else allowed & (age < self.config.context)


class TransformerLayer(nn.Module):
    """x += scale1 * attention(norm1(x)); x += scale2 * feed_forward(norm2(x)); no biases."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build one layer."""
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = PackedAttention(config)
        self.mlp_norm = _norm(config)
        self.mlp = PlainMlp(config) if config.gating == "none" else GatedMlp(config)
        self.attention_scale = self.mlp_scale = None
        if config.layer_scale is not None:
            self.attention_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.mlp_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + _scaled(self.attention(self.attention_norm(x), mask), self.attention_scale)
        return x + _scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)


class PackedAttention(nn.Module):
    """Self-attention with one map for queries, keys and values; RoPE turns neighbouring pairs."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build for ``config.dim`` features."""
        super().__init__()
        assert config.dim % config.num_heads == 0
        self.num_heads = config.num_heads
        self.period = config.max_period if config.positions in ("rope", "sin_rope") else None
        self.query_key_value = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        parts = self.query_key_value(x).chunk(3, dim=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        if self.period is not None:
            query = rotate(query, "neighbours", self.period)
            key = rotate(key, "neighbours", self.period)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class PlainMlp(nn.Module):
    """reduce(gelu(expand(x))) with the exact GELU, without biases."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build for ``config.dim`` features."""
        super().__init__()
        self.expand = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.reduce = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y: Tensor = self.reduce(F.gelu(self.expand(x)))
        return y


class GatedMlp(nn.Module):
    """reduce(gate(first half of expand(x)) * second half), without biases."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build for ``config.dim`` features."""
        super().__init__()
        self.gate = _GATES[config.gating]
        self.expand = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.reduce = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gated, passed = self.expand(x).chunk(2, dim=-1)
        y: Tensor = self.reduce(self.gate(gated) * passed)
        return y


def sinusoids(x: Tensor, max_period: float) -> Tensor:
    """Cosines, then sines, of each step's position: [T, D] in the type of ``x`` [B, T, D]."""
    steps, dim = x.shape[1:]
    kind = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(dim // 2, device=x.device, dtype=kind) / (dim // 2 - 1)
    phases = torch.arange(steps, device=x.device, dtype=kind)[:, None] / max_period**exponents
    return torch.cat((phases.cos(), phases.sin()), dim=1).to(x.dtype)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale * x


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.dim, eps=1e-5)
    return RmsNorm(config.dim, eps=1e-5 if config.norm == "rms_norm" else 1e-8)
