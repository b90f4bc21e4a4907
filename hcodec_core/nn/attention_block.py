"""Single-head attention over time with a skip (the ``AttnBlock`` of latent diffusion models).

Shape letters: B batch, D feature, T step.
"""

from __future__ import annotations

from torch import Tensor, nn

from hcodec_core.nn.attention import attend
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import ValidGroupNorm


class AttentionBlock(nn.Module):
    """x + out(attention(norm(x))) with a group norm (32 groups), biases, and no positions."""

    def __init__(self, dim: int) -> None:
        """Build for ``dim`` channels, a multiple of 32."""
        super().__init__()
        self.norm = ValidGroupNorm(32, dim, eps=1e-6)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, D, T]; past a row's end anything finite."""
        inner = self.norm(x, lengths).transpose(1, 2)
        parts = (self.query(inner), self.key(inner), self.value(inner))
        query, key, value = (part[:, None] for part in parts)
        mixed: Tensor = self.out(attend(query, key, value, lengths))
        return x + mixed.transpose(1, 2)
