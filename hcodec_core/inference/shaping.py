"""Which clips run together, and in which shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hcodec_core.tokens import ShapeRule

_GROWTH = 4.0
_ROOM = 0.8  # share of free memory that a batch may take


@dataclass(frozen=True)
class Batch:
    """Clips that run together: ``num_rows`` rows of ``size`` samples or base frames."""

    indices: Sequence[int]
    num_rows: int
    size: int

    def halves(self) -> tuple[Batch, Batch]:
        """The same clips in two batches."""
        middle = len(self.indices) // 2
        first, second = self.indices[:middle], self.indices[middle:]
        return Batch(first, len(first), self.size), Batch(second, len(second), self.size)


class BatchBudget:
    """How much audio (seconds, padding included) one batch may hold in mode fast.

    ``max_seconds`` where memory is no matter; on a GPU it is found while running: it begins small,
    grows to what the memory of the last full batch foretells, and is halved when memory runs out.
    """

    def __init__(self, max_seconds: float, first_seconds: float | None = None) -> None:
        """Begin with ``first_seconds``, or with ``max_seconds`` at once."""
        self.max_seconds = max_seconds
        self.seconds = min(max_seconds, first_seconds or max_seconds)

    def rows(self, row_seconds: float) -> int:
        """Rows of a batch whose rows are ``row_seconds`` long."""
        return max(1, int(self.seconds / row_seconds))

    def learn(self, seconds: float, used_bytes: int, free_bytes: int) -> None:
        """A batch of ``seconds`` took ``used_bytes`` where ``free_bytes`` were to be had."""
        if used_bytes <= 0 or 2 * seconds < self.seconds:
            return  # it says little of a full one
        fitting = seconds * _ROOM * free_bytes / used_bytes
        self.seconds = min(self.max_seconds, max(seconds, min(fitting, _GROWTH * seconds)))

    def shrink(self, seconds: float) -> None:
        """A batch of ``seconds`` did not fit: never try as much again."""
        self.max_seconds = self.seconds = min(self.seconds, seconds / 2)


def in_fixed_shapes(
    num_frames: Sequence[int], shapes: ShapeRule, frame_rate: Fraction
) -> Iterator[Batch]:
    """Batches of mode exact: shapes follow from each clip's own length; long ones first."""
    by_bound: dict[int, list[int]] = {}
    for index in _long_first(num_frames):
        by_bound.setdefault(shapes.bucket_frames(num_frames[index]), []).append(index)
    for bound, indices in by_bound.items():
        rows = shapes.bucket_rows(bound, frame_rate)
        for start in range(0, len(indices), rows):
            yield Batch(indices[start : start + rows], rows, bound)


def in_free_shapes(
    num_frames: Sequence[int], shapes: ShapeRule, frame_rate: Fraction, budget: BatchBudget
) -> Iterator[Batch]:
    """Batches of mode fast: neighbours in length, no longer than the longest; long ones first."""
    order = _long_first(num_frames)
    while order:
        longest = num_frames[order[0]]
        rows = min(shapes.max_rows, budget.rows(float(longest / frame_rate)))
        chosen, order = order[:rows], order[rows:]
        yield Batch(chosen, len(chosen), longest)


def in_equal_lengths(num_samples: Sequence[int], rows_of: Callable[[int], int]) -> Iterator[Batch]:
    """Batches of clips of one length each, at most ``rows_of`` that many samples."""
    by_length: dict[int, list[int]] = {}
    for index, size in enumerate(num_samples):
        by_length.setdefault(size, []).append(index)
    for size, indices in by_length.items():
        while indices:
            rows = rows_of(size)
            chosen, indices = indices[:rows], indices[rows:]
            yield Batch(chosen, len(chosen), size)


def _long_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])
