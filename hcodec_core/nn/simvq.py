"""Vector quantisation with a frozen codebook seen through a learned map (SimVQ, arXiv 2411.02038).

Shape letters: B batch, D feature, Q codebook, K entry, T frame.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hcodec_core.nn.quantize import Quantised, decision_margins, nearest_entries


class FrozenBook(nn.Module):
    """Random entries [K, D] that are never trained."""

    entries: Tensor

    def __init__(self, codebook_size: int, dim: int) -> None:
        """Build with Gaussian entries of length about 1."""
        super().__init__()
        self.register_buffer("entries", torch.randn(codebook_size, dim) * dim**-0.5)


class ResidualSimVq(nn.Module):
    """Each frozen book, mapped by one shared network, quantises what the ones before left over.

    Nearest by Euclidean distance in the mapped space. The search runs in float32 or better, also
    under autocast: half precision changes codes.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int, hidden_dim: int) -> None:
        """Build with random entries; ``hidden_dim`` is the inner width of the map."""
        super().__init__()
        self.books = nn.ModuleList(FrozenBook(codebook_size, dim) for _ in range(num_codebooks))
        self.transform = nn.Sequential(
            nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim)
        )

    def encode(
        self, x: Tensor, with_margins: bool = False, num_codebooks: int | None = None
    ) -> Quantised:
        """Quantise [B, D, T] with the first ``num_codebooks`` books (None: all)."""
        residual = target = x.transpose(1, 2).to(self._book(0).dtype)
        codes, margins = [], []
        with torch.autocast(x.device.type, enabled=False):
            for index in range(len(self.books))[:num_codebooks]:
                book = self.transform(self._book(index))
                codes.append(nearest_entries(residual, book))
                if with_margins:
                    margins.append(decision_margins(residual, book))
                residual = residual - book[codes[-1]]
        return Quantised(
            codes=torch.stack(codes, dim=1),
            vectors=(target - residual).transpose(1, 2),
            margins=torch.stack(margins, dim=1) if with_margins else None,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Sum of the mapped entries of codes [B, q, T], q at most Q: [B, D, T]."""
        vectors = self.transform(self._book(0)[codes[:, 0]])
        for index in range(1, codes.shape[1]):
            vectors = vectors + self.transform(self._book(index)[codes[:, index]])
        y: Tensor = vectors.transpose(1, 2)
        return y

    def _book(self, index: int) -> Tensor:
        return cast("FrozenBook", self.books[index]).entries
