"""What cutting long audio costs: segments against the whole file, near the cuts and far from them.

Two questions, answered apart. Codes: do segments with halos give the codes of the whole file?
Audio: does decoding those codes in pieces give the waveform of decoding them at once?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.segments import SegmentRule
from hcodec_core.errors import ConfigError
from hcodec_core.inference.clips import Clip, ClipTokens
from hcodec_core.inference.engine import Engine
from hcodec_core.inference.segmented import encode_in_segments

BAND_SECONDS = (0.0, 0.1, 0.5, 2.0, 10.0)
"""Lower bounds of the distances from the nearest cut that are told apart, seconds."""

_STEP_SECONDS = 0.05


@dataclass(frozen=True)
class SeamBand:
    """Frames whose distance from the nearest cut is in one band (``upper_seconds`` None: no end).

    equal: share of equal codes by (stream, codebook), segments against the whole file. wave_db:
    level of the difference between decoding the segments' codes in pieces and at once, relative to
    the audio there. None where there is no such frame.
    """

    lower_seconds: float
    upper_seconds: float | None
    num_frames: int
    equal: dict[tuple[str, int], float]
    wave_db: float | None


@dataclass(frozen=True)
class SeamReport:
    """Outcome of ``measure_seams``.

    step_db, step_elsewhere_db: largest step from one sample to the next of the difference between
    the two decodings, within 50 ms of a cut and anywhere else, relative to the level of the audio.
    """

    num_cuts: int
    num_frames: int
    bands: Sequence[SeamBand]
    step_db: float
    step_elsewhere_db: float


def measure_seams(pieces: Engine, whole: Engine, clip: Clip) -> SeamReport:
    """Compare one clip, float32 [N], cut as ``pieces`` cuts it, with ``whole``, which does not.

    Raises ``ConfigError`` when the rate is variable (codes have no common place), or the clip is
    not cut by ``pieces``, or is cut by ``whole``.
    """
    if pieces.codec.is_variable_rate:
        raise ConfigError("Seams are measured frame by frame: choose a codec of a fixed rate.")
    cuts = _cuts(pieces, len(clip))
    if not len(cuts) or len(_cuts(whole, len(clip))):
        raise ConfigError(
            f"A clip of {len(clip) / pieces.codec.sample_rate:.0f} s is not cut in one way and "
            "left whole in the other: choose other segments or a longer clip."
        )
    found, expected = encode_in_segments(pieces, clip), whole.encode_clips([clip])[0]
    reach = _STEP_SECONDS * pieces.codec.sample_rate
    joined, at_once = (engine.decode_clips([found])[0] for engine in (pieces, whole))
    steps = _steps_db(joined, at_once, _distance(np.arange(len(clip) - 1), cuts) <= reach)
    return SeamReport(
        num_cuts=len(cuts),
        num_frames=found.num_frames,
        bands=_bands(pieces, cuts, (found, expected), (joined, at_once)),
        step_db=steps[0],
        step_elsewhere_db=steps[1],
    )


def _cuts(engine: Engine, num_samples: int) -> npt.NDArray[np.int64]:
    """Samples at which a file is cut."""
    settings = engine.codec.spec.settings
    rule = SegmentRule.of(
        sample_rate=engine.codec.sample_rate,
        hop_length=engine.codec.hop_length,
        segment_seconds=settings.segment_seconds,
        halo_seconds=settings.halo_seconds,
    )
    last = num_samples - rule.min_tail_samples
    return np.arange(rule.segment_samples, last + 1, rule.segment_samples)


def _bands(
    engine: Engine,
    cuts: npt.NDArray[np.int64],
    tokens: tuple[ClipTokens, ClipTokens],
    audio: tuple[Clip, Clip],
) -> list[SeamBand]:
    rate, hop = engine.codec.sample_rate, engine.codec.hop_length
    frames = np.arange(tokens[0].num_frames) * hop + hop / 2
    samples = np.arange(len(audio[0]))
    by_frame, by_sample = (_distance(places, cuts) / rate for places in (frames, samples))
    bands = []
    for lower, upper in zip(BAND_SECONDS, (*BAND_SECONDS[1:], None), strict=True):
        end = np.inf if upper is None else upper
        inside = (by_frame >= lower) & (by_frame < end)
        chosen = (by_sample >= lower) & (by_sample < end)
        bands.append(
            SeamBand(
                lower_seconds=lower,
                upper_seconds=upper,
                num_frames=int(inside.sum()),
                equal=_equal_shares(*tokens, inside),
                wave_db=_difference_db(audio[0][chosen], audio[1][chosen]),
            )
        )
    return bands


def _distance(places: npt.NDArray[Any], cuts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    after = np.searchsorted(cuts, places)
    left = np.abs(places - cuts[np.maximum(after - 1, 0)])
    right = np.abs(places - cuts[np.minimum(after, len(cuts) - 1)])
    nearest: npt.NDArray[Any] = np.minimum(left, right)
    return nearest


def _equal_shares(
    found: ClipTokens, expected: ClipTokens, inside: npt.NDArray[np.bool_]
) -> dict[tuple[str, int], float]:
    if not inside.any():
        return {}
    return {
        (stream, book): float((found.codes[stream][book] == row)[inside].mean())
        for stream, codes in expected.codes.items()
        for book, row in enumerate(codes)
    }


def _difference_db(found: Clip, expected: Clip) -> float | None:
    if not len(found) or not expected.any():
        return None
    difference = np.square(found.astype(np.float64) - expected).sum()
    level = np.square(expected.astype(np.float64)).sum()
    return float(10 * np.log10(max(difference / level, 1e-20)))


def _steps_db(joined: Clip, at_once: Clip, is_near: npt.NDArray[np.bool_]) -> tuple[float, float]:
    steps = np.abs(np.diff(joined.astype(np.float64) - at_once))
    level = max(float(np.sqrt(np.square(at_once.astype(np.float64)).mean())), 1e-20)
    near, far = (steps[chosen].max(initial=1e-20) for chosen in (is_near, ~is_near))
    return float(20 * np.log10(near / level)), float(20 * np.log10(far / level))
