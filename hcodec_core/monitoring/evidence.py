"""The evidence of a window: a page and the same in JSON, beside the dataset's cards.

It names files, so it lies in the dataset's work folder, which ``hcodec purge`` goes through.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.pages import render_page
from hcodec_core.monitoring.documents import Bin, DriftReport, StatisticDrift, WindowStep
from hcodec_core.storage import Storage, join_uri

PAGE_FILE = "index.html"
JSON_FILE = "drift.json"
_NUM_WINDOWS = 40
_NUM_PICTURES = 12


@dataclass(frozen=True)
class _Picture:
    """A histogram in 0..100.

    ``bars``: left edge, height and label of each bar of the window; ``outline``: the reference, as
    an SVG path.
    """

    statistic: StatisticDrift
    bars: list[tuple[float, float, str]]
    outline: str


def evidence_files(report: DriftReport, steps: Sequence[WindowStep]) -> dict[str, bytes]:
    """Content of the files by name. ``steps``: the windows so far, this one last."""
    text = report.model_dump_json(indent=1) + "\n"
    return {PAGE_FILE: render_evidence(report, steps).encode(), JSON_FILE: text.encode()}


def write_evidence(
    storage: Storage, layout: DatasetLayout, report: DriftReport, steps: Sequence[WindowStep]
) -> str:
    """Store the evidence, the page last; returns the page's URI.

    Its folder is named by its content: a run that lost a race overwrites nothing.
    """
    files = evidence_files(report, steps)
    digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:12]
    uri = join_uri(layout.drift_uri, "evidence", f"{report.version}-{digest}")
    layout.config.check_destination(uri)
    for name in (JSON_FILE, PAGE_FILE):
        storage.write(join_uri(uri, name), files[name])
    return join_uri(uri, PAGE_FILE)


def render_evidence(report: DriftReport, steps: Sequence[WindowStep]) -> str:
    """The page of a window."""
    ordered = sorted(report.statistics, key=lambda statistic: -statistic.excess)
    return render_page(
        "hcodec_core.monitoring:evidence.html",
        report=report,
        terms=report.terms,
        moved=report.moved,
        statistics=ordered,
        pictures=[_picture(statistic) for statistic in ordered[:_NUM_PICTURES]],
        num_books=sum(statistic.stream is not None for statistic in report.moved),
        step=steps[-1] if steps else None,
        steps=list(steps)[-_NUM_WINDOWS:],
    )


def _picture(statistic: StatisticDrift) -> _Picture:
    bins = [bin_ for bin_ in statistic.bins if bin_.reference or bin_.window or statistic.stream]
    # Square roots: a few frequent entries would flatten all others.
    highest = max((math.sqrt(max(b.reference, b.window)) for b in bins), default=0.0) or 1.0
    width = 100 / max(len(bins), 1)
    heights = [100 * math.sqrt(bin_.reference) / highest for bin_ in bins]
    steps = (f"V{100 - height:.2f}H{(i + 1) * width:.3f}" for i, height in enumerate(heights))
    bars = [
        (i * width, 100 * math.sqrt(bin_.window) / highest, _label(bin_))
        for i, bin_ in enumerate(bins)
    ]
    return _Picture(statistic, bars, f"M0 100{''.join(steps)}")


def _label(bin_: Bin) -> str:
    return f"{bin_.label}: {100 * bin_.window:.3g} %, reference {100 * bin_.reference:.3g} %"
