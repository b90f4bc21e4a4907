"""Cut a file of any length into segments that encode to one contiguous token stream.

A file up to L is one segment. A longer one is cut at multiples of L (L a multiple of the hop); a
tail under one second joins the segment before it. Each segment carries a halo H of the file's own
samples on both sides, of which the caller throws the frames away. L and H are part of
``encode_id``: the cuts follow from the length of the file alone, never from block sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from hcodec_core.audio.native import Samples
from hcodec_core.errors import ConfigError

_MIN_TAIL_SECONDS = 1


@dataclass(frozen=True)
class Segment:
    """Part of a file with its halos.

    samples: float32 [N], halo, interior, halo. start_sample: where the interior begins in the
    file. Frames are token frames of one hop: drop ``halo_left_frames`` of the encoded frames, keep
    the next ``num_interior_frames``, drop the rest (``halo_right_frames``; the last of these may
    be a partial hop at the end of the file). Only in the last segment may the interior itself end
    in a partial hop.
    """

    index: int
    samples: Samples = field(repr=False, compare=False)
    start_sample: int
    halo_left_frames: int
    halo_right_frames: int
    num_interior_frames: int
    num_interior_samples: int
    is_last: bool

    @property
    def interior(self) -> slice:
        """The frames to keep."""
        return slice(self.halo_left_frames, self.halo_left_frames + self.num_interior_frames)


@dataclass(frozen=True)
class SegmentRule:
    """L and H in samples at the codec's rate, both multiples of the hop."""

    hop_length: int
    segment_samples: int
    halo_samples: int
    min_tail_samples: int

    @classmethod
    def of(
        cls, *, sample_rate: int, hop_length: int, segment_seconds: float, halo_seconds: float
    ) -> SegmentRule:
        """Rule in samples: L rounded down to whole hops, H rounded up.

        Raises ``ConfigError`` when L is not longer than one second and one hop, or H is negative.
        """
        per_second = Fraction(sample_rate, hop_length)
        segment_frames = int(_exact(segment_seconds) * per_second)
        halo_frames = -int(-_exact(halo_seconds) * per_second // 1)
        tail = _MIN_TAIL_SECONDS * sample_rate
        if segment_frames * hop_length < max(tail, hop_length) or halo_seconds < 0:
            raise ConfigError(
                f"Segments of {segment_seconds} s with halos of {halo_seconds} s cannot be cut: "
                f"use at least {_MIN_TAIL_SECONDS} s and one hop, and no negative halo."
            )
        return cls(hop_length, segment_frames * hop_length, halo_frames * hop_length, tail)

    @property
    def look_ahead_samples(self) -> int:
        """Samples needed after a cut before the segment in front of it can be given."""
        return max(self.min_tail_samples, self.halo_samples)


def segments(
    blocks: Iterable[Samples],
    *,
    sample_rate: int,
    hop_length: int,
    segment_seconds: float,
    halo_seconds: float,
) -> Iterator[Segment]:
    """Segments of the file whose samples come in ``blocks`` (float32 [n], any lengths).

    Interiors follow each other without gap or overlap; their frames add up to ceil(n / hop) for n
    samples. No samples, no segments. Holds at most H + L + max(H, 1 s) samples beside the current
    block. Raises ``ConfigError`` as ``SegmentRule.of``.
    """
    rule = SegmentRule.of(
        sample_rate=sample_rate,
        hop_length=hop_length,
        segment_seconds=segment_seconds,
        halo_seconds=halo_seconds,
    )
    return _cut(blocks, rule)


def _cut(blocks: Iterable[Samples], rule: SegmentRule) -> Iterator[Segment]:
    window = _Window(rule)
    for block in blocks:
        offset = 0
        while offset < len(block):
            offset += window.fill(block[offset:])
            if window.is_full:
                yield window.give(is_last=False)
    while window.num_ahead >= rule.segment_samples + rule.min_tail_samples:
        yield window.give(is_last=False)
    if window.num_ahead:
        yield window.give(is_last=True)


class _Window:
    """The samples from the left halo of the next segment on."""

    def __init__(self, rule: SegmentRule) -> None:
        self._rule = rule
        capacity = rule.halo_samples + rule.segment_samples + rule.look_ahead_samples
        self._samples: Samples = np.empty(capacity, np.float32)
        self._num_held = 0
        self._num_left = 0
        self._start_sample = 0
        self._index = 0

    @property
    def num_ahead(self) -> int:
        """Samples held from the start of the next interior on."""
        return self._num_held - self._num_left

    @property
    def is_full(self) -> bool:
        """Whether the next segment is certainly not the last and its right halo is complete."""
        return self.num_ahead == self._rule.segment_samples + self._rule.look_ahead_samples

    def fill(self, block: Samples) -> int:
        """Take what is needed from a block; returns how many samples that was."""
        wanted = self._rule.segment_samples + self._rule.look_ahead_samples - self.num_ahead
        taken = block[:wanted]
        self._samples[self._num_held : self._num_held + len(taken)] = taken
        self._num_held += len(taken)
        return len(taken)

    def give(self, *, is_last: bool) -> Segment:
        """Next segment; moves on to the one after it."""
        hop = self._rule.hop_length
        interior = self.num_ahead if is_last else self._rule.segment_samples
        right = min(self._rule.halo_samples, self.num_ahead - interior)
        segment = Segment(
            index=self._index,
            samples=self._samples[: self._num_left + interior + right].copy(),
            start_sample=self._start_sample,
            halo_left_frames=self._num_left // hop,
            halo_right_frames=-(-right // hop),
            num_interior_frames=-(-interior // hop),
            num_interior_samples=interior,
            is_last=is_last,
        )
        self._advance(interior)
        return segment

    def _advance(self, interior: int) -> None:
        passed = self._num_left + interior
        left = min(self._rule.halo_samples, passed)
        kept = self._samples[passed - left : self._num_held].copy()
        self._samples[: len(kept)] = kept
        self._num_held, self._num_left = len(kept), left
        self._start_sample += interior
        self._index += 1


def _exact(seconds: float) -> Fraction:
    """The decimal number that was written, not its binary neighbour: 0.1 s is 1/10 s."""
    return Fraction(str(seconds))
