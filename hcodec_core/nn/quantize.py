"""Residual vector quantisation (arXiv 2107.03312, section III-C).

Shape letters: B batch, D feature, Q codebook, K entry, T frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantised:
    """What quantising gave: codes int64 [B, Q, T], vectors [B, D, T].

    margins: [B, Q, T] when asked for, (d2 - d1) / d1 of the squared distances to the best and the
    second best entry.
    """

    codes: Tensor
    vectors: Tensor
    margins: Tensor | None = None


class ResidualQuantizer(nn.Module):
    """Each codebook quantises what the ones before left over; nearest by Euclidean distance.

    The search runs in float32 or better, also under autocast: half precision changes codes.
    """

    codebooks: Tensor

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int) -> None:
        """Build with random entries; ``codebooks`` is a buffer [Q, K, D]."""
        super().__init__()
        self.register_buffer("codebooks", torch.randn(num_codebooks, codebook_size, dim))

    def encode(self, x: Tensor, with_margins: bool = False) -> Quantised:
        """Quantise [B, D, T] with all codebooks."""
        residual = x.transpose(1, 2).to(self.codebooks.dtype)
        codes, margins = [], []
        with torch.autocast(x.device.type, enabled=False):
            for book in self.codebooks:
                best = nearest_entries(residual, book)
                if with_margins:
                    margins.append(decision_margins(residual, book))
                residual = residual - book[best]
                codes.append(best)
        return Quantised(
            codes=torch.stack(codes, dim=1),
            vectors=(x.transpose(1, 2) - residual).transpose(1, 2),
            margins=torch.stack(margins, dim=1) if with_margins else None,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Sum of the entries of codes [B, q, T], q at most Q: [B, D, T]."""
        vectors = self.codebooks[0][codes[:, 0]]
        for book, indices in zip(self.codebooks[1:], codes.unbind(1)[1:], strict=False):
            vectors = vectors + book[indices]
        return vectors.transpose(1, 2)


def nearest_entries(x: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest entry of ``book`` [K, D] for each of ``x`` [..., D].

    Of |x|^2 - 2 x.e + |e|^2 only what depends on the entry is computed: the first term would only
    take digits away.
    """
    return (book.square().sum(dim=1) - 2.0 * (x @ book.T)).argmin(dim=-1)


def decision_margins(x: Tensor, book: Tensor) -> Tensor:
    """(d2 - d1) / d1 of the squared distances of ``x`` [..., D] to its two nearest entries."""
    scores = book.square().sum(dim=1) - 2.0 * (x @ book.T)
    best, second = scores.topk(2, dim=-1, largest=False).values.unbind(-1)
    distance = (best + x.square().sum(dim=-1)).clamp(min=torch.finfo(x.dtype).tiny)
    return (second - best) / distance
