"""Histograms of numbers: bins that hold equal shares, or one for each of a few values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hcodec_core.dataset.card_drift import Floats
from hcodec_core.monitoring.profiles import Values

_NUM_BINS = 10
_MAX_DISTINCT = 8


@dataclass(frozen=True)
class Bins:
    """Bins by a few ``known`` values, or else between ``edges``; the last is for unknown values."""

    known: Floats
    edges: Floats

    @classmethod
    def of(cls, values: Values) -> Bins:
        """Bins for these values."""
        given = values[~np.isnan(values)]
        distinct = np.unique(given)
        if len(distinct) <= _MAX_DISTINCT:
            return cls(distinct, np.zeros(0))
        shares = np.linspace(0, 1, _NUM_BINS + 1)[1:-1]
        return cls(np.zeros(0), np.unique(np.quantile(given, shares, method="lower")))

    @property
    def labels(self) -> list[str]:
        """What each bin holds, for people."""
        if not len(self.edges):
            return [*(f"{value:g}" for value in self.known), "not known"]
        ends = [f"{edge:.4g}" for edge in self.edges]
        between = [f"{low} to {high}" for low, high in pairwise(ends)]
        return [f"up to {ends[0]}", *between, f"above {ends[-1]}", "not known"]

    def one_hot(self, values: Values) -> Floats:
        """For each value a row with 1 in its bin: float64 [value, bin]."""
        places = np.searchsorted(self.edges if len(self.edges) else self.known, values)
        last = len(self.labels) - 1
        return np.eye(last + 1)[np.where(np.isnan(values), last, places)]
