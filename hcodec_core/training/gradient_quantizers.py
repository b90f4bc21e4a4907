"""Quantising with codebooks that learn by gradients: factorised books and mapped frozen ones.

Both quantise in float32 and give, beside the commitment of what is quantised to its entry, the loss
that moves the entry. Shape letters: B batch, D feature, T frame, K entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hcodec_core.errors import ConfigError
from hcodec_core.nn.factorised import FactorisedBook, FactorisedResidualQuantizer
from hcodec_core.nn.quantize import nearest_entries
from hcodec_core.nn.simvq import FrozenBook, ResidualSimVq
from hcodec_core.training.quantizer import CodebookTrainer, QuantizerPass, rotated
from hcodec_core.training.recipe import QuantizerRecipe


class FactorisedTrainer(CodebookTrainer):
    """U-Codec's codebooks (factorised codes, arXiv 2306.06546, section 3.2)."""

    def __init__(self, quantizer: FactorisedResidualQuantizer, recipe: QuantizerRecipe) -> None:
        """See ``CodebookTrainer``. Raises ``ConfigError`` when entries should be replaced."""
        refuse_replacement(recipe)
        self.books = [cast("FactorisedBook", book) for book in quantizer.books]
        entries = self.books[0].entries
        super().__init__(entries.new_zeros(len(self.books), len(entries)).detach(), recipe)

    def quantise(self, x: Tensor, num_used: int) -> QuantizerPass:
        """Quantise [B, D, T] with the first ``num_used`` codebooks, in float32.

        Losses compare in the projected space, gradients pass straight through each codebook.
        """
        with torch.autocast(x.device.type, enabled=False):
            residual = x.transpose(1, 2).float()
            total = torch.zeros_like(residual)
            tally = _Tally()
            for book in self.books[:num_used]:
                with torch.no_grad():
                    codes = book.cosines(residual).argmax(dim=-1)
                projected, entries = book.project_in(residual), book.entries[codes]
                tally.add(projected, entries, codes, len(book.entries))
                vectors = book.project_out(projected + (entries - projected).detach())
                total, residual = total + vectors, residual - vectors
        return tally.result(total.transpose(1, 2))


class SimVqTrainer(CodebookTrainer):
    """HH-Codec's codebooks (SimVQ, arXiv 2411.02038): the shared map learns, the entries do not.

    All books quantise and give losses; what is decoded is the first one's vectors.
    """

    def __init__(self, quantizer: ResidualSimVq, recipe: QuantizerRecipe) -> None:
        """See ``CodebookTrainer``. Raises ``ConfigError`` when entries should be replaced."""
        refuse_replacement(recipe)
        self.quantizer = quantizer
        self.entries = [cast("FrozenBook", book).entries for book in quantizer.books]
        first = self.entries[0]
        super().__init__(first.new_zeros(len(self.entries), len(first)), recipe)

    def quantise(self, x: Tensor) -> QuantizerPass:
        """Quantise [B, D, T] with all codebooks, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            residual = x.transpose(1, 2).float()
            tally, decoded = _Tally(), []
            for frozen in self.entries:
                book = self.quantizer.transform(frozen)
                codes = nearest_entries(residual.detach(), book.detach())
                entries = book[codes]
                tally.add(residual, entries, codes, len(book))
                decoded.append(self._passed(residual, entries.detach()))
                residual = residual - entries.detach()
        return tally.result(decoded[0].transpose(1, 2))

    def _passed(self, x: Tensor, entries: Tensor) -> Tensor:
        if self.recipe.gradient == "rotation":
            return rotated(x, entries)
        return x + (entries - x).detach()


class _Tally:
    """Losses and hits, codebook by codebook."""

    def __init__(self) -> None:
        self._commitment: list[Tensor] = []
        self._codebook: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, x: Tensor, entries: Tensor, codes: Tensor, num_entries: int) -> None:
        self._commitment.append(F.mse_loss(x, entries.detach()))
        self._codebook.append(F.mse_loss(entries, x.detach()))
        counts = torch.bincount(codes.flatten(), minlength=num_entries)
        self._counts.append(counts.to(x.dtype))

    def result(self, vectors: Tensor) -> QuantizerPass:
        counts = torch.stack(self._counts)
        return QuantizerPass(
            vectors=vectors,
            commitment=_mean(self._commitment),
            counts=counts,
            sums=counts.new_zeros(0),
            candidates=counts.new_zeros(0),
            codebook=_mean(self._codebook),
        )


def refuse_replacement(recipe: QuantizerRecipe) -> None:
    """Raise ``ConfigError`` when a recipe would replace entries that learn by gradients."""
    if recipe.dead_below:
        raise ConfigError(
            "quantizer.dead_below must be 0 for this codec: its codebooks learn by gradients, and "
            "their entries are not replaced."
        )


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
