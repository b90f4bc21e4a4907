"""Geometry of the report's drawings, as numbers for SVG; the template writes the marks.

Coordinates run from 0 to ``WIDTH`` and 0 (top) to ``HEIGHT``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hcodec_core.evaluation.documents import MetricVerdict
from hcodec_core.evaluation.metrics import METRICS, Metric

WIDTH, HEIGHT = 320, 92
_NUM_BINS = 24
_FOREST_MARGINS = 3.0


@dataclass(frozen=True)
class Curve:
    """Outline of a histogram. ``kind``: the side's label, for its colour; ``path``: SVG data."""

    kind: str
    path: str
    mean_x: float
    mean: str


@dataclass(frozen=True)
class Drawing:
    """One histogram figure. ``marks``: x, kind and label of vertical lines."""

    title: str
    caption: str
    low: str
    high: str
    curves: list[Curve]
    marks: list[tuple[float, str, str]]


@dataclass(frozen=True)
class ForestRow:
    """One metric of the verdict on a common scale: x of gain and bounds, in 0..100 percent.

    ``is_cut``: the interval reaches beyond the drawing.
    """

    verdict: MetricVerdict
    metric: Metric
    gain_x: float | None
    lower_x: float | None
    upper_x: float | None
    is_cut: bool


def distribution(metric: Metric, values: Mapping[str, Sequence[float]]) -> Drawing | None:
    """How a metric spreads over the files, side by side; None without values."""
    found = {label: np.asarray(side) for label, side in values.items() if len(side)}
    if not found:
        return None
    edges = _edges(np.concatenate(list(found.values())))
    counts = {label: np.histogram(side, edges)[0] for label, side in found.items()}
    highest = max(int(side.max()) for side in counts.values())
    return Drawing(
        title=metric.title,
        caption=("more" if metric.more_is_better else "less") + " is better",
        low=metric.shown(float(edges[0])),
        high=metric.shown(float(edges[-1])),
        curves=[
            Curve(
                label,
                _outline(counts[label], highest),
                _x(float(side.mean()), edges),
                metric.shown(float(side.mean())),
            )
            for label, side in found.items()
        ],
        marks=[],
    )


def gains(verdict: MetricVerdict, pairs: Sequence[tuple[float, float]]) -> Drawing | None:
    """Gain of the challenger file by file, with zero and the margin; None below two pairs."""
    metric = METRICS[verdict.metric]
    if len(pairs) < 2 or verdict.gain is None:
        return None
    values = np.array([metric.gain(mine, other) for mine, other in pairs])
    margin = verdict.margin or 0.0
    edges = _edges(np.concatenate((values, [0.0, -margin])))
    counts = np.histogram(values, edges)[0]
    share = float((values >= 0).mean())
    return Drawing(
        title=metric.title,
        caption=f"{share:.0%} of {len(values)} files no worse",
        low=_signed(metric, float(edges[0])),
        high=_signed(metric, float(edges[-1])),
        curves=[
            Curve(
                "codec",
                _outline(counts, int(counts.max())),
                _x(verdict.gain, edges),
                _signed(metric, verdict.gain),
            )
        ],
        marks=[(_x(0.0, edges), "zero", "equal"), (_x(-margin, edges), "margin", "margin")],
    )


def forest(verdicts: Sequence[MetricVerdict]) -> list[ForestRow]:
    """All metrics on one scale of margins: -1 is the margin, 0 equal, right is better."""
    return [_forest_row(verdict) for verdict in verdicts]


def _forest_row(verdict: MetricVerdict) -> ForestRow:
    metric = METRICS[verdict.metric]
    values = (verdict.gain, verdict.lower, verdict.upper)
    if verdict.margin is None or verdict.margin == 0 or None in values:
        return ForestRow(verdict, metric, None, None, None, False)
    scaled = [value / verdict.margin for value in values if value is not None]
    places = [_percent_of(value) for value in scaled]
    is_cut = any(abs(value) > _FOREST_MARGINS for value in scaled)
    return ForestRow(verdict, metric, places[0], places[1], places[2], is_cut)


def margin_place() -> float:
    """Where minus one margin lies in a forest row, percent."""
    return _percent_of(-1.0)


def _percent_of(margins: float) -> float:
    cut = min(max(margins, -_FOREST_MARGINS), _FOREST_MARGINS)
    return 50 * (1 + cut / _FOREST_MARGINS)


def _edges(
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _NUM_BINS + 1)


def _x(value: float, edges: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    share = (value - float(edges[0])) / float(edges[-1] - edges[0])
    return WIDTH * min(max(share, 0.0), 1.0)


def _outline(counts: np.ndarray[tuple[int], np.dtype[np.int64]], highest: int) -> str:
    step = WIDTH / len(counts)
    parts = [f"M0,{HEIGHT}"]
    for index, count in enumerate(counts):
        y = HEIGHT - (HEIGHT - 6) * int(count) / max(highest, 1)
        parts.append(f"L{index * step:.1f},{y:.1f} L{(index + 1) * step:.1f},{y:.1f}")
    return " ".join([*parts, f"L{WIDTH},{HEIGHT} Z"])


def _signed(metric: Metric, value: float) -> str:
    return f"{'+' if value > 0 else ''}{metric.shown(value)}"
