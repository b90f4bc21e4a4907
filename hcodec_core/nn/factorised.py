"""Residual quantisation through small projected codebooks, compared by angle.

Factorised codes after the Improved RVQGAN (arXiv 2306.06546, section 3.2).
Shape letters: B batch, D feature, Q codebook, K entry, T frame.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.quantize import Quantised


class FactorisedBook(nn.Module):
    """One codebook: a map to few dimensions, the entry of nearest direction, a map back.

    The entry goes into the map back as it is stored, not normalised. Weight norm of released
    checkpoints is folded when they are converted.
    """

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int) -> None:
        """Build with random entries."""
        super().__init__()
        self.project_in = nn.Linear(dim, codebook_dim)
        self.entries = nn.Parameter(torch.randn(codebook_size, codebook_dim))
        self.project_out = nn.Linear(codebook_dim, dim)

    def cosines(self, x: Tensor) -> Tensor:
        """Cosine of the angle to each entry: [B, T, D] -> [B, T, K]."""
        return F.normalize(self.project_in(x), dim=-1) @ F.normalize(self.entries, dim=-1).T

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors of codes: [B, T] -> [B, T, D]."""
        y: Tensor = self.project_out(self.entries[codes])
        return y


class FactorisedResidualQuantizer(nn.Module):
    """Each codebook quantises what the ones before left over.

    The search runs in float32 or better, also under autocast: half precision changes codes.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int, codebook_dim: int) -> None:
        """Build with random entries."""
        super().__init__()
        self.books = nn.ModuleList(
            FactorisedBook(dim, codebook_size, codebook_dim) for _ in range(num_codebooks)
        )

    def encode(self, x: Tensor, with_margins: bool = False) -> Quantised:
        """Quantise [B, D, T] with all codebooks; distances are those of unit vectors."""
        residual = target = x.transpose(1, 2).to(self._book(0).entries.dtype)
        codes, margins = [], []
        with torch.autocast(x.device.type, enabled=False):
            for book in map(self._book, range(len(self.books))):
                cosines = book.cosines(residual)
                codes.append(cosines.argmax(dim=-1))
                if with_margins:
                    margins.append(_margins(cosines))
                residual = residual - book.decode(codes[-1])
        return Quantised(
            codes=torch.stack(codes, dim=1),
            vectors=(target - residual).transpose(1, 2),
            margins=torch.stack(margins, dim=1) if with_margins else None,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Sum of the vectors of codes [B, q, T], q at most Q: [B, D, T]."""
        vectors = self._book(0).decode(codes[:, 0])
        for index in range(1, codes.shape[1]):
            vectors = vectors + self._book(index).decode(codes[:, index])
        return vectors.transpose(1, 2)

    def _book(self, index: int) -> FactorisedBook:
        return cast("FactorisedBook", self.books[index])


def _margins(cosines: Tensor) -> Tensor:
    """(d2 - d1) / d1 of the squared distances 2 - 2 cos of the two best entries."""
    best, second = cosines.topk(2, dim=-1).values.unbind(-1)
    return (best - second) / (1.0 - best).clamp(min=torch.finfo(cosines.dtype).tiny)
