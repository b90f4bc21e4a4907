"""The evaluation as a folder: ``evaluation.json``, and a page that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hcodec_core.dataset.pages import render_page
from hcodec_core.evaluation import drawings
from hcodec_core.evaluation.documents import (
    AGAINST,
    CODEC,
    RESULT_FILE,
    CodebookUse,
    EvaluationResult,
    SideSummary,
)
from hcodec_core.evaluation.listening import Example
from hcodec_core.evaluation.metrics import METRICS, Metric
from hcodec_core.storage import Storage, join_uri

PAGE_FILE = "index.html"
_MOST_FILES_LISTED = 40

BarRow = tuple[CodebookUse, float]
"""A codebook and its entropy in percent of what its size allows."""


def write_report(folder: Path, result: EvaluationResult, examples: Sequence[Example]) -> None:
    """Write result and page into a local folder (made when missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).write_text(result.model_dump_json(indent=1) + "\n")
    (folder / PAGE_FILE).write_text(render(result, examples))


def upload_report(storage: Storage, folder: Path, report_uri: str) -> str:
    """Upload the folder, the page last; returns the page's URI."""
    for name in (RESULT_FILE, PAGE_FILE):
        storage.upload(folder / name, join_uri(report_uri, name))
    return join_uri(report_uri, PAGE_FILE)


def render(result: EvaluationResult, examples: Sequence[Example]) -> str:
    """The page."""
    verdicts = result.verdict.metrics if result.verdict else []
    pairs = {verdict.metric: _pairs(result, verdict.metric) for verdict in verdicts}
    return render_page(
        "hcodec_core.evaluation:report.html",
        result=result,
        sides=result.sides,
        names=side_names(result),
        metrics=[metric for metric in METRICS.values() if _is_measured(result, metric)],
        not_run=[(METRICS[name].title, why) for name, why in sorted(result.not_run.items())],
        forest=drawings.forest(verdicts),
        margin_place=drawings.margin_place(),
        gains=[d for v in verdicts if (d := drawings.gains(v, pairs[v.metric]))],
        distributions=[
            drawing
            for metric in METRICS.values()
            if (drawing := drawings.distribution(metric, _values(result, metric)))
        ],
        size=(drawings.WIDTH, drawings.HEIGHT),
        codebooks={label: _bars(side) for label, side in result.sides.items()},
        examples=examples,
        troubled=_troubled(result),
        most_listed=_MOST_FILES_LISTED,
        result_file=RESULT_FILE,
        metric_of=METRICS,
    )


def side_names(result: EvaluationResult) -> dict[str, str]:
    """What the sides are called in tables and legends, by label."""
    roles = {CODEC: "challenger" if AGAINST in result.sides else "codec", AGAINST: "champion"}
    return {
        label: f"{side.facts.name} ({roles.get(label, 'baseline')})"
        for label, side in result.sides.items()
    }


def _is_measured(result: EvaluationResult, metric: Metric) -> bool:
    return any(metric.name in side.metrics for side in result.sides.values())


def _values(result: EvaluationResult, metric: Metric) -> dict[str, list[float]]:
    return {
        label: [
            scores.scores[label][metric.name]
            for scores in result.files
            if metric.name in scores.scores.get(label, {})
        ]
        for label in result.sides
    }


def _pairs(result: EvaluationResult, metric: str) -> list[tuple[float, float]]:
    return [
        (scores.scores[CODEC][metric], scores.scores[AGAINST][metric])
        for scores in result.files
        if all(metric in scores.scores.get(label, {}) for label in (CODEC, AGAINST))
    ]


def _bars(side: SideSummary) -> list[BarRow]:
    return [
        (use, 100 * use.entropy_bits / max(1e-9, (use.size - 1).bit_length()))
        for use in side.codebooks
    ]


def _troubled(result: EvaluationResult) -> list[tuple[str, str, str]]:
    """File, where, and why: unreadable ones, failures, and scores that could not be had."""
    found = [(file.name, "source", file.reason) for file in result.held_out.unreadable]
    names = side_names(result)
    for scores in result.files:
        found += [(scores.name, names[label], why) for label, why in scores.failures.items()]
    for scores in result.files:
        for label, reasons in scores.unmeasured.items():
            found += [
                (scores.name, names[label], f"no {METRICS[metric].title}: {why}")
                for metric, why in reasons.items()
            ]
    return found
