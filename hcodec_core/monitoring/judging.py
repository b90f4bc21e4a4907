"""Did a window drift? Divergences beside what dealing the same files again gives.

Divergences between two samples of one distribution are not zero: PSI over 1024 entries is about 0.2
at ten thousand codes. So thresholds are those of this very pair of sizes: the files of reference
and window are shuffled and dealt again into two sides as large, again and again. Whole files are
dealt, since the codes of one file depend on each other. Drawing files of the reference with
replacement instead puts the same rare codes on both sides: it gave three times as many false alarms
as declared (see ``docs/monitoring.md``).

One window is asked many questions at once (each codebook, each statistic of the audio, two
measures each). Thresholds of all of them are raised together until a dealt pair exceeds any of
them as rarely as the declared rate: each statistic's draws are put on one scale by their own mean
and spread, and the largest of a draw is what counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hcodec_core.dataset.card_drift import (
    Floats,
    jensen_shannon_bits,
    population_stability,
)
from hcodec_core.monitoring.bins import Bins
from hcodec_core.monitoring.documents import Bin, StatisticDrift
from hcodec_core.monitoring.profiles import Profile

NUM_DRAWS = 1000
PSI_PER_JS_BIT = 8 * np.log(2)  # of small divergences: both are multiples of chi-squared
_CELLS_AT_ONCE = 1_000_000
_NUM_BARS = 64
_LEAST_SPREAD = 1e-9


@dataclass(frozen=True)
class Histogram:
    """One statistic of all sampled files: counts [file, bin], those of the reference first."""

    name: str
    stream: str | None
    codebook: int | None
    files: Floats
    labels: list[str]


def judge(
    reference: Profile,
    window: Profile,
    *,
    false_alarm_rate: float,
    least_psi: float,
    num_draws: int = NUM_DRAWS,
) -> list[StatisticDrift]:
    """All statistics with their thresholds; the same for the same profiles.

    Both profiles hold at least one file. ``false_alarm_rate``: of all statistics together.
    """
    histograms = list(_histograms(reference, window))
    is_window = _dealt(len(reference.sample.files), len(window.sample.files), num_draws)
    distances = np.stack([_distances(histogram.files, is_window) for histogram in histograms])
    # The first deal is the real one.
    thresholds = _thresholds(distances, false_alarm_rate)
    floors = np.array([least_psi / PSI_PER_JS_BIT, least_psi])
    sides = is_window[0].astype(bool)
    return [
        _drift(histogram, sides, found[:, 0] ** 2, np.maximum(threshold, floors))
        for histogram, found, threshold in zip(histograms, distances, thresholds, strict=True)
    ]


def _histograms(reference: Profile, window: Profile) -> Iterator[Histogram]:
    for index, (stream, book) in enumerate(reference.books):
        sides = [side.sample.counts(index, stream.codebook_size) for side in (reference, window)]
        yield Histogram(f"{stream.name} {book}", stream.name, book, np.concatenate(sides), [])
    after = window.audio_values()
    for name, before in reference.audio_values().items():
        values = np.concatenate([before, after[name]])
        bins = Bins.of(values)
        yield Histogram(name, None, None, bins.one_hot(values), bins.labels)


def _dealt(num_reference: int, num_window: int, num_draws: int) -> Floats:
    """Which files are the window's, 0 or 1 [draw, file]: as they are, then dealt at random."""
    rng = np.random.default_rng(0)  # judged again, a window gets the same thresholds
    real = np.repeat([0.0, 1.0], [num_reference, num_window])
    return np.concatenate([real[None], rng.permuted(np.tile(real, (num_draws, 1)), axis=1)])


def _distances(files: Floats, is_window: Floats) -> Floats:
    """Square roots of Jensen-Shannon divergence (bits) and PSI of each deal: [2, draw]."""
    at_once = max(1, _CELLS_AT_ONCE // files.shape[1])
    total = files.sum(axis=0)
    parts = []
    for start in range(0, len(is_window), at_once):
        window = is_window[start : start + at_once] @ files
        reference = total - window
        measures = jensen_shannon_bits(window, reference), population_stability(window, reference)
        parts.append(np.sqrt(np.maximum(np.stack(measures), 0)))
    return np.concatenate(parts, axis=1)


def _thresholds(distances: Floats, false_alarm_rate: float) -> Floats:
    """Thresholds [statistic, measure] of distances [statistic, measure, draw]."""
    mean = distances.mean(axis=2)
    spread = np.maximum(distances.std(axis=2), _LEAST_SPREAD)
    largest = ((distances - mean[..., None]) / spread[..., None]).max(axis=(0, 1))
    # The real deal is one of the draws: so the rate holds whatever the number of draws.
    factor = np.quantile(largest, 1 - false_alarm_rate, method="higher")
    return np.asarray((mean + factor * spread) ** 2)


def _drift(
    histogram: Histogram, is_window: npt.NDArray[np.bool_], measures: Floats, thresholds: Floats
) -> StatisticDrift:
    window = histogram.files[is_window].sum(axis=0)
    reference = histogram.files[~is_window].sum(axis=0)
    return StatisticDrift(
        name=histogram.name,
        stream=histogram.stream,
        codebook=histogram.codebook,
        num_reference=int(reference.sum()),
        num_window=int(window.sum()),
        js_bits=rounded(measures[0]),
        js_threshold=rounded(thresholds[0]),
        psi=rounded(measures[1]),
        psi_threshold=rounded(thresholds[1]),
        bins=_bins(reference, window, histogram.labels),
    )


def rounded(value: float) -> float:
    """A number to six digits."""
    return float(f"{value:.6g}")


def _bins(reference: Floats, window: Floats, labels: list[str]) -> list[Bin]:
    """The histogram as shares; codebooks in equal ranges of entries."""
    if not labels:
        edges = np.linspace(0, len(reference), min(_NUM_BARS, len(reference)) + 1).astype(int)
        reference, window = (np.add.reduceat(side, edges[:-1]) for side in (reference, window))
        labels = [f"{low} to {high - 1}" for low, high in pairwise(edges)]
    before, after = (side / max(1.0, side.sum()) for side in (reference, window))
    return [
        Bin(label=label, reference=rounded(one), window=rounded(other))
        for label, one, other in zip(labels, before, after, strict=True)
    ]
