"""Bootstrap intervals of a mean over files, and summaries of one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hcodec_core.evaluation.documents import MetricSummary

Floats = npt.NDArray[np.float64]

_CELLS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its bounds, each of which holds alone with the confidence asked for."""

    mean: float
    lower: float
    upper: float


def bootstrap_mean(
    values: Sequence[float],
    groups: Sequence[str],
    *,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> Interval:
    """Mean of ``values`` with percentile bootstrap bounds, the same for the same arguments.

    Whole groups are drawn with replacement: values of one group (files of one speaker) move
    together. Give each value a group of its own where all are independent. ``confidence`` is
    one-sided: the mean is above ``lower`` with that confidence, and below ``upper`` with it.
    """
    assert len(values) == len(groups) > 0
    sums, counts = _by_group(values, groups)
    means = _resampled_means(sums, counts, num_resamples, seed)
    lower, upper = np.quantile(means, [1 - confidence, confidence])
    return Interval(float(sums.sum() / counts.sum()), float(lower), float(upper))


def num_groups(groups: Sequence[str]) -> int:
    """How many different groups there are."""
    return len(set(groups))


def group_of(name: str, depth: int) -> str:
    """Group of a file by its first ``depth`` folders; the file itself when ``depth`` is 0."""
    folders = name.split("/")[:-1]
    return "/".join(folders[:depth]) if depth else name


def summarise(values: Sequence[float]) -> MetricSummary:
    """Mean and quantiles of at least one value."""
    p5, median, p95 = np.quantile(values, [0.05, 0.5, 0.95])
    return MetricSummary(
        num_files=len(values),
        mean=float(np.mean(values)),
        median=float(median),
        p5=float(p5),
        p95=float(p95),
    )


def _by_group(values: Sequence[float], groups: Sequence[str]) -> tuple[Floats, Floats]:
    names = {name: index for index, name in enumerate(sorted(set(groups)))}
    where = np.array([names[group] for group in groups])
    sums = np.bincount(where, weights=np.asarray(values, np.float64))
    return sums.astype(np.float64), np.bincount(where).astype(np.float64)


def _resampled_means(sums: Floats, counts: Floats, num_resamples: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    size = len(sums)
    rows = max(1, _CELLS_AT_ONCE // size)
    means = []
    for first in range(0, num_resamples, rows):
        drawn = generator.integers(0, size, (min(rows, num_resamples - first), size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)
