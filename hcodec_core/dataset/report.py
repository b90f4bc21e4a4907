"""The result of a validation, as a value and as a page that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from hcodec_core.dataset.expectations import Severity
from hcodec_core.dataset.pages import bars_of, render_page
from hcodec_core.dataset.summary import SnapshotSummary
from hcodec_core.jobs import TokenizeJob
from hcodec_core.storage import Storage, join_uri

PAGE_FILE = "index.html"
RESULT_FILE = "result.json"
WITHOUT_TOKENS_FILE = "files_without_tokens.jsonl"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CheckOutcome(_Value):
    """What one check found. ``observed`` is None where nothing could be measured.

    ``num_faults``: how many files (or codebooks) are at fault; ``examples``: the first of them by
    name, with the reason in brackets, safe to print.
    """

    name: str
    title: str
    passed: bool
    severity: Severity
    observed: float | None
    expected: str
    detail: str = ""
    num_faults: int = 0
    examples: list[str] = []


class ValidationResult(_Value):
    """Verdict on one snapshot: ``passed`` when no check of severity ``error`` failed.

    ``report_uri``: the uploaded page; ``report_path``: the same page on this machine.
    ``faulty_files``: the first files at fault with their checks, safe to print, of
    ``num_faulty_files``.
    """

    format_version: Literal[1] = 1
    dataset: str
    plan_id: str
    encode_id: str
    snapshot_id: int
    branch: str
    codec: str
    is_trained: bool
    passed: bool
    checked_at: str
    checks: list[CheckOutcome]
    faulty_files: list[str]
    num_faulty_files: int
    summary: SnapshotSummary
    report_uri: str
    report_path: str

    def failed(self, severity: Severity) -> list[CheckOutcome]:
        """Checks of a severity that did not hold."""
        return [c for c in self.checks if not c.passed and c.severity == severity]


@dataclass(frozen=True)
class ReportParts:
    """What the page shows beside the result: first files without tokens, links by title."""

    without_tokens: Sequence[tuple[str, str, str]]
    pages: Mapping[str, str]


def write_report(
    folder_path: Path, result: ValidationResult, job: TokenizeJob, parts: ReportParts
) -> None:
    """Write the page and the result as JSON into a local folder."""
    (folder_path / RESULT_FILE).write_text(result.model_dump_json(indent=1))
    (folder_path / PAGE_FILE).write_text(_render(result, job, parts))


def upload_report(storage: Storage, folder_path: Path, report_prefix_uri: str) -> str:
    """Upload a report's folder, the page last, so that a page never links to what is not there.

    Returns the URI of the page.
    """
    files = (path for path in sorted(folder_path.rglob("*")) if path.is_file())
    page = folder_path / PAGE_FILE
    for path in [*(path for path in files if path != page), page]:
        storage.upload(path, join_uri(report_prefix_uri, path.relative_to(folder_path).as_posix()))
    return join_uri(report_prefix_uri, PAGE_FILE)


def _render(result: ValidationResult, job: TokenizeJob, parts: ReportParts) -> str:
    return render_page(
        "report.html",
        result=result,
        summary=result.summary,
        job=job,
        manifest=job.manifest,
        parts=parts,
        checks=sorted(result.checks, key=lambda c: (c.passed, c.severity)),
        durations=bars_of([bin_.num_files for bin_ in result.summary.durations]),
        codebooks=[(use, bars_of(use.bars)) for use in result.summary.codebooks],
        without_tokens_file=WITHOUT_TOKENS_FILE,
        result_file=RESULT_FILE,
    )
