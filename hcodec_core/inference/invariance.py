"""Do a clip's codes depend on its company, the number of threads, or the device? Measured.

Codes of every clip alone are the reference. Random batches of the same clips must give the same
codes bit for bit in mode ``exact``; what differs is counted per stream and codebook. Between
compute classes codes may differ at near ties only: each difference is listed with the float64
margin of the first decision of its frame that differs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from hcodec_core.inference.engine import Clip, ClipTokens, Engine
from hcodec_core.inference.parity import TIE_MARGIN
from hcodec_core.inference.spans import start_margins, starts_of, strays

SHORTEST_SECONDS = 0.2
LONGEST_SECONDS = 12.0
SMALLEST_BATCH = 2
LARGEST_BATCH = 16

StreamBook = tuple[str, int]


@dataclass(frozen=True)
class Difference:
    """First differing code of one frame. ``margin``: (d2 - d1) / d1 in float64.

    With stream ``boundaries``: a base frame at which a token begins on one side only; ``margin`` is
    how far its similarity is from the threshold. Codes of such a clip are not compared. With
    stream ``length``: a clip with another number of frames; never a near tie.
    """

    clip: int
    stream: str
    codebook: int
    frame: int
    margin: float

    @property
    def is_near_tie(self) -> bool:
        """Whether compute classes may differ here."""
        return self.margin < TIE_MARGIN


@dataclass
class Agreement:
    """Equal codes over compared codes, per (stream, codebook).

    num_length_faults: clips with another number of tokens, or with tokens of other spans.
    """

    equal: Counter[StreamBook] = field(default_factory=Counter)
    total: Counter[StreamBook] = field(default_factory=Counter)
    num_length_faults: int = 0

    def add(self, found: ClipTokens, expected: ClipTokens) -> bool:
        """Compare one clip; true when every code is equal."""
        if not have_equal_spans(found, expected):
            self.num_length_faults += 1
            return False
        same = True
        for stream, codes in expected.codes.items():
            equal = found.codes[stream] == codes
            for book, row in enumerate(equal):
                self.equal[stream, book] += int(row.sum())
                self.total[stream, book] += row.size
            same = same and bool(equal.all())
        return same

    @property
    def is_complete(self) -> bool:
        """Whether every code compared was equal."""
        return not self.num_length_faults and self.equal == self.total


@dataclass
class InvarianceReport:
    """Outcome of ``measure_invariance``."""

    num_batches: int
    num_clips: int
    agreement: Agreement


def synthetic_clips(sample_rate: int, num_clips: int, seed: int) -> list[Clip]:
    """Clips of 0.2 to 12 s of gliding harmonics, noise bursts and pauses; float32, peak below 1."""
    rng = np.random.default_rng(seed)
    return [_synthetic_clip(sample_rate, rng) for _ in range(num_clips)]


def cut_clips(
    recordings: Sequence[Clip], sample_rate: int, num_clips: int, seed: int
) -> list[Clip]:
    """Random cuts of 0.2 to 12 s out of ``recordings`` (whole ones where these are shorter)."""
    rng = np.random.default_rng(seed)
    clips = []
    for _ in range(num_clips):
        recording = recordings[int(rng.integers(len(recordings)))]
        size = min(len(recording), int(_random_seconds(rng) * sample_rate))
        start = int(rng.integers(len(recording) - size + 1))
        clips.append(recording[start : start + size].copy())
    return clips


def measure_invariance(
    engine: Engine,
    clips: Sequence[Clip],
    num_batches: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> InvarianceReport:
    """Encode random batches of 2 to 16 of ``clips`` and compare with each clip alone."""
    rng = np.random.default_rng(seed)
    alone: dict[int, ClipTokens] = {}
    report = InvarianceReport(num_batches, 0, Agreement())
    for done in range(num_batches):
        size = int(rng.integers(SMALLEST_BATCH, LARGEST_BATCH + 1))
        chosen = rng.integers(len(clips), size=size)
        for index in set(chosen.tolist()) - alone.keys():
            alone[index] = engine.encode_clips([clips[index]])[0]
        for index, found in zip(
            chosen, engine.encode_clips([clips[i] for i in chosen]), strict=True
        ):
            report.agreement.add(found, alone[int(index)])
        report.num_clips += size
        progress(done + 1)
    return report


def compare_engines(
    engine: Engine, other: Engine, clips: Sequence[Clip]
) -> tuple[Agreement, list[Difference]]:
    """Codes of two engines (threads, devices, modes) over the same clips.

    Every frame with a difference is listed once per stream, with the margin of its first differing
    codebook as a float64 copy of ``engine``'s codec sees it.
    """
    agreement = Agreement()
    differences: list[Difference] = []
    judge: _Judge | None = None
    for index, clip in enumerate(clips):
        expected, found = engine.encode_clips([clip])[0], other.encode_clips([clip])[0]
        if not agreement.add(found, expected):
            judge = judge or _Judge(engine)
            differences.extend(judge.differences(index, clip, found, expected))
    return agreement, differences


def have_equal_spans(found: ClipTokens, expected: ClipTokens) -> bool:
    """Whether two clips have tokens of the same base frames."""
    if found.num_frames != expected.num_frames:
        return False
    if found.frame_spans is None or expected.frame_spans is None:
        return found.frame_spans is expected.frame_spans
    return np.array_equal(found.frame_spans, expected.frame_spans)


class _Judge:
    """Says how clear decisions were, in float64."""

    def __init__(self, engine: Engine) -> None:
        self._codec = copy.deepcopy(engine.codec).cpu().double()

    def differences(
        self, index: int, clip: Clip, found: ClipTokens, expected: ClipTokens
    ) -> Iterator[Difference]:
        if not have_equal_spans(found, expected):
            yield from self._boundaries(index, clip, found, expected)
            return
        audio = torch.from_numpy(clip)[None, None]
        frames = self._codec.encode_frames(audio, torch.tensor([len(clip)]), with_margins=True)
        assert frames.margins is not None
        for stream, codes in expected.codes.items():
            exact = frames.codes[stream][0].numpy()
            margins = frames.margins[stream][0].numpy()
            unequal = found.codes[stream] != codes
            for frame in np.flatnonzero(unequal.any(axis=0)):
                # Where one of the two already left the float64 path is where the tie was.
                strays = unequal[:, frame] | (codes[:, frame] != exact[: len(codes), frame])
                book = int(strays.argmax())
                yield Difference(index, stream, book, int(frame), float(margins[book, frame]))

    def _boundaries(
        self, index: int, clip: Clip, found: ClipTokens, expected: ClipTokens
    ) -> Iterator[Difference]:
        sides = [t.frame_spans for t in (found, expected) if t.frame_spans is not None]
        if len({int(spans.sum()) for spans in sides}) != 1:
            yield Difference(index, "length", 0, 0, np.inf)
            return
        margins = start_margins(self._codec, clip)
        wrong: dict[int, float] = {}
        for spans in sides:
            wrong |= strays(starts_of(spans), margins, self._codec.max_frame_span)
        for frame, margin in sorted(wrong.items()):
            yield Difference(index, "boundaries", 0, frame, margin)


def _random_seconds(rng: np.random.Generator) -> float:
    return float(rng.uniform(SHORTEST_SECONDS, LONGEST_SECONDS))


def _synthetic_clip(sample_rate: int, rng: np.random.Generator) -> Clip:
    seconds = _random_seconds(rng)
    time = np.arange(int(seconds * sample_rate)) / sample_rate
    pitch = rng.uniform(80, 400) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.2, 3) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    voice = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 9))
    envelope = np.clip(np.sin(2 * np.pi * rng.uniform(0.5, 4) * time + rng.uniform(0, 6)), 0, 1)
    noise = rng.standard_normal(len(time)) * rng.uniform(0.01, 0.3)
    mixed = voice * envelope + noise * (1 - envelope)
    scaled = mixed / max(1e-6, float(np.abs(mixed).max())) * rng.uniform(0.05, 0.95)
    return np.asarray(scaled, dtype=np.float32)
