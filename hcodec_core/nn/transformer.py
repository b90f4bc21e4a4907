"""Transformer blocks along time.

Shape letters: B batch, T step, D feature.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.attention import attend, rotate, split_heads
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import RmsNorm
from hcodec_core.nn.precision import at_least_float32


class LstmAttention(nn.Module):
    """Self-attention whose input first passes a one-way LSTM (H-Codec, ``vq`` transformer).

    Right padding does not reach a one-way LSTM's earlier steps.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        """Build for ``dim`` features; queries, keys and values have biases, the output has none."""
        super().__init__()
        assert dim % num_heads == 0
        self.num_heads = num_heads
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x, _ = self.lstm(x)
        query = rotate(split_heads(self.query(x), self.num_heads), "halves")
        key = rotate(split_heads(self.key(x), self.num_heads), "halves")
        value = split_heads(self.value(x), self.num_heads)
        y: Tensor = self.out(attend(query, key, value, lengths))
        return y


class SwigluMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        """Build for ``dim`` features."""
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class LstmTransformerLayer(nn.Module):
    """Pre-norm layer: x += attention(norm(x)); x += mlp(norm(x)), with RMS norms."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        """Build for ``dim`` features."""
        super().__init__()
        self.attention_norm = RmsNorm(dim)
        self.attention = LstmAttention(dim, num_heads)
        self.mlp_norm = RmsNorm(dim)
        self.mlp = SwigluMlp(dim, hidden_dim)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), lengths)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class LstmTransformer(nn.Module):
    """Stack of LSTM-attention layers on channels-first input; no final norm (H-Codec)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, num_layers: int) -> None:
        """Build for ``dim`` features."""
        super().__init__()
        self.layers = nn.ModuleList(
            LstmTransformerLayer(dim, num_heads, hidden_dim) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, D, T]; past a row's end anything finite."""
        x = at_least_float32(x.transpose(1, 2))
        for layer in self.layers:
            x = layer(x, lengths)
        return x.transpose(1, 2)
