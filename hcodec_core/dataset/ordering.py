"""The order in which an epoch visits the rows of a version: a pure function of a position.

Every position of an epoch maps to one row, whoever asks: ranks and workers only choose positions.
A state of training is therefore one number, and the number of ranks may change in between.

A shuffled epoch lays the files out in random order and cuts that row of rows into ``num_lanes``
lanes of equal length (to one row). Position p is row p // lanes of lane p % lanes, after each
lane's rows were permuted within windows. Ranks stride over positions, so where ranks x workers
divide the number of lanes each reader has lanes, and so files, of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hcodec_core.errors import ConfigError


@dataclass(frozen=True)
class Shuffle:
    """How rows are shuffled.

    ``num_lanes``: places of the version read at once; 24 has 1, 2, 3, 4, 6, 8, 12 and 24 readers
    divide it. ``window_rows``: rows of one lane that change places with each other.
    """

    seed: int = 0
    num_lanes: int = 24
    window_rows: int = 1024

    def __post_init__(self) -> None:
        """Refuse what is no shuffle. Raises ``ConfigError``."""
        if min(self.num_lanes, self.window_rows) < 1 or self.seed < 0:
            raise ConfigError(
                f"A shuffle needs a seed from 0 and at least one lane and window row, not {self}."
            )


class EpochOrder:
    """Rows of one epoch by position; ``file_rows``: rows of each file, in the version's order."""

    def __init__(self, file_rows: Sequence[int], epoch: int, shuffle: Shuffle | None) -> None:
        """``shuffle`` None: the order of the files' names and of the rows in them."""
        self._rows = np.asarray(file_rows, dtype=np.int64)
        self._epoch = epoch
        self._shuffle = shuffle
        self._files = np.arange(len(self._rows))
        if shuffle is not None:
            self._files = _permutation(len(self._rows), shuffle.seed, epoch, 0)
        self._ends = np.cumsum(self._rows[self._files], dtype=np.int64)
        self._windows: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Rows of the epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, position: int) -> tuple[int, int]:
        """File index and row in that file at ``position``. Raises ``IndexError``."""
        if not 0 <= position < len(self):
            raise IndexError(f"Position {position} of an epoch of {len(self)} rows.")
        place = position if self._shuffle is None else self._shuffled(position, self._shuffle)
        index = int(np.searchsorted(self._ends, place, side="right"))
        file = int(self._files[index])
        return file, int(place - self._ends[index] + self._rows[file])

    def _shuffled(self, position: int, shuffle: Shuffle) -> int:
        index, lane = divmod(position, shuffle.num_lanes)
        length, longer = divmod(len(self), shuffle.num_lanes)
        start = lane * length + min(lane, longer)
        window, offset = divmod(index, shuffle.window_rows)
        known = self._windows.get(lane)
        if known is None or known[0] != window:
            left = length + (lane < longer) - window * shuffle.window_rows
            rows = min(shuffle.window_rows, left)
            order = _permutation(rows, shuffle.seed, self._epoch, 1, lane, window)
            known = self._windows[lane] = window, order
        return start + window * shuffle.window_rows + int(known[1][offset])


def _permutation(length: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation that no version of NumPy may change: raw bits of a fixed generator, sorted."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(np.asarray(bits, dtype=np.uint64), kind="stable")
