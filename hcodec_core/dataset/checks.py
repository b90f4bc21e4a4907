"""Does a snapshot hold what its plan promised? The last gate before readers see a version.

Facts are gathered in ``facts`` and ``summary``, the ``rules`` are judged by Great Expectations;
here are the way through all of it and the sentence that a failed version ends with. The rows that
the plan added are checked one by one; keys must be unique in the whole snapshot.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from hcodec_core.config import Config
from hcodec_core.dataset.audit import FileAudit
from hcodec_core.dataset.expectations import Rule, judge, page_of
from hcodec_core.dataset.facts import Faults, RowReader, SnapshotFacts
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.pages import printable
from hcodec_core.dataset.plan_documents import BadFileBudget, read_plan
from hcodec_core.dataset.rates import remember_rate
from hcodec_core.dataset.report import (
    PAGE_FILE,
    WITHOUT_TOKENS_FILE,
    CheckOutcome,
    ReportParts,
    ValidationResult,
    upload_report,
    write_report,
)
from hcodec_core.dataset.rules import AUDIT_TITLES, Thresholds, rules_of
from hcodec_core.dataset.summary import CodebookUse, SnapshotSummary, summary_of
from hcodec_core.dataset.table import catalog_errors, load_table
from hcodec_core.errors import BudgetExceededError, HCodecError, ValidationFailedError
from hcodec_core.jobs import JOB_FILE, Outcome, TokenizeJob, read_job
from hcodec_core.storage import Storage, join_uri

if TYPE_CHECKING:
    from pyiceberg.table import Table

    from hcodec_core.dataset.commit import CommitInfo

logger = logging.getLogger(__name__)

_NUM_EXAMPLES = 10
_NUM_LISTED_FILES = 500  # files without tokens on the page; all of them are in a file beside it
_CODES_PER_ENTRY = 20  # fewer codes than this per entry say little about a codebook's use
_JUDGED_CODES = 1000  # fewer codes than this say nothing at all
_BUDGET_CHECKS = frozenset({"bad_file_share", "bad_file_count"})
_FILES_AT_ONCE = 4
_MOVED = (Outcome.CHANGED, Outcome.DELETED)


@dataclass(frozen=True)
class SnapshotName:
    """A snapshot of a token table, its branch, and how many rows its commit counted, if known."""

    snapshot_id: int
    branch: str
    num_rows: int | None = None


def validate_plan(
    config: Config,
    storage: Storage,
    commit: CommitInfo,
    work_path: Path,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 - frozen
) -> ValidationResult:
    """Check what a plan committed, within the plan's own budget for bad files.

    ``work_path``: existing local folder for scratch and for the report. The report is uploaded
    below ``report_prefix_uri``. Raises ``AccessError`` when that is no allowed destination,
    ``StorageError`` when storage or catalog fail; see ``validate_snapshot``. How fast the workers
    were is kept for the estimates of later plans.
    """
    job = read_job(storage.read(join_uri(commit.plan_uri, JOB_FILE)))
    prefix_uri = report_prefix_uri(config, job)
    config.check_destination(prefix_uri)
    table = load_table(DatasetLayout(config, job.dataset, job.encode_id))
    result = validate_snapshot(
        storage,
        job,
        SnapshotName(commit.snapshot_id, commit.branch, commit.counts.num_total_rows),
        rows_of_snapshot(table, commit.snapshot_id),
        read_plan(storage, commit.plan_uri).bad_files,
        prefix_uri,
        work_path,
        thresholds,
    )
    remember_rate(config, storage, job, result.summary.work)
    return result


def report_prefix_uri(config: Config, job: TokenizeJob) -> str:
    """Folder of the report of a plan."""
    return join_uri(config.work.work_uri, "datasets", job.dataset, "reports", job.plan_id)


def rows_of_snapshot(table: Table, snapshot_id: int) -> RowReader:
    """Reader of a snapshot's rows that holds a few data files in memory, whatever the table.

    Raises ``StorageError`` while reading when storage fails.
    """
    from pyiceberg.io.pyarrow import ArrowScan

    def rows(columns: Sequence[str], data_uris: Collection[str] | None) -> Iterator[pa.RecordBatch]:
        with catalog_errors(f"reading snapshot {snapshot_id}"):
            scan = table.scan(snapshot_id=snapshot_id, selected_fields=tuple(columns))
            tasks = list(scan.plan_files())
            if data_uris is not None:
                tasks = [task for task in tasks if task.file.file_path in data_uris]
            # pyiceberg's own reader of a scan runs ahead of its consumer through all files.
            reader = ArrowScan(table.metadata, table.io, scan.projection(), scan.row_filter)
            for start in range(0, len(tasks), _FILES_AT_ONCE):
                yield from reader.to_record_batches(tasks[start : start + _FILES_AT_ONCE])

    return rows


def validate_snapshot(
    storage: Storage,
    job: TokenizeJob,
    snapshot: SnapshotName,
    rows: RowReader,
    budget: BadFileBudget,
    report_prefix_uri: str,
    work_path: Path,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 - frozen
) -> ValidationResult:
    """Check the rows of ``job`` in a snapshot; upload the report below ``report_prefix_uri``.

    ``rows(columns, data_uris)`` gives batches of the snapshot's rows. ``work_path``: existing local
    folder for scratch and for the report (``report/index.html``). A snapshot that does not pass is
    a result, not an error: see ``raise_if_failed``. Raises ``StorageError`` when storage fails.
    """
    report_path = work_path / "report"
    shutil.rmtree(report_path, ignore_errors=True)
    report_path.mkdir()
    rules = rules_of(job, budget, thresholds)
    with SnapshotFacts(job, work_path) as facts:
        facts.gather(storage, rows)
        findings = _judge(facts, rules, report_path, snapshot)
        listed = facts.without_tokens((Outcome.QUARANTINED, *_MOVED), _NUM_LISTED_FILES)
        facts.write_files_without_tokens(report_path / WITHOUT_TOKENS_FILE)
    result = _result(job, snapshot, findings, report_prefix_uri, report_path)
    pages = {f"judged numbers: {frame}": page_of(frame, report_path) for frame in findings.frames}
    write_report(report_path, result, job, ReportParts(listed, pages))
    upload_report(storage, report_path, report_prefix_uri)
    logger.info(
        "snapshot %d passed: %s; %s", snapshot.snapshot_id, result.passed, result.report_uri
    )
    return result


@dataclass(frozen=True)
class _Findings:
    summary: SnapshotSummary
    frames: Mapping[str, pa.Table]
    checks: list[CheckOutcome]
    faulty: Faults


def _judge(
    facts: SnapshotFacts, rules: Sequence[Rule], report_path: Path, snapshot: SnapshotName
) -> _Findings:
    summary = summary_of(facts)
    frames = {
        "shards": facts.faults_by_shard(),
        "version": _version_frame(facts.job, summary, snapshot),
        "codebooks": _codebook_frame(summary),
    }
    verdicts = judge(frames, rules, report_path, f"snapshot-{snapshot.snapshot_id}")
    checks = []
    for rule in rules:
        values = [v for v in frames[rule.frame][rule.name].to_pylist() if v is not None]
        faults = Faults([], 0) if verdicts[rule.name] else _faults_of(rule, facts, summary)
        checks.append(_outcome(rule, verdicts[rule.name], values, faults))
    return _Findings(summary, frames, checks, facts.faulty_files(_NUM_EXAMPLES))


def _version_frame(job: TokenizeJob, summary: SnapshotSummary, snapshot: SnapshotName) -> pa.Table:
    counted = snapshot.num_rows
    numbers = {
        "plan_is_whole": abs(summary.num_files - job.num_files),
        "snapshot_is_whole": None if counted is None else abs(summary.num_snapshot_rows - counted),
        "accounts_add_up": summary.num_unaccounted,
        "bad_file_share": summary.bad_share,
        "bad_file_count": summary.num_quarantined,
        "silent_share": summary.silent_share,
        "clipped_share": summary.clipped_share,
        "moved_share": summary.moved_share,
        **{name: None if files is None else len(files) for name, files in _audited(summary)},
    }
    return pa.table({name: pa.array([value], pa.float64()) for name, value in numbers.items()})


def _codebook_frame(summary: SnapshotSummary) -> pa.Table:
    books = summary.codebooks
    use = [b.use if b.num_codes >= _CODES_PER_ENTRY * b.size else None for b in books]
    alive = [b.num_used if b.num_codes >= _JUDGED_CODES else None for b in books]
    return pa.table(
        {
            "codebook": [_book_name(book) for book in books],
            "codebook_use": pa.array(use, pa.float64()),
            "codebook_alive": pa.array(alive, pa.float64()),
        }
    )


def _audited(summary: SnapshotSummary) -> Iterator[tuple[str, list[FileAudit] | None]]:
    """Files at fault by check of the audit; None where the check does not apply."""
    audit = summary.audit
    is_exact = audit is not None and audit.mode == "exact"
    yield "audit_codes_equal", audit.with_other_codes if audit and is_exact else None
    yield "audit_lengths_equal", audit.with_wrong_length if audit else None
    yield "audit_audio_finite", audit.not_finite if audit else None


def _book_name(book: CodebookUse) -> str:
    return f"{book.stream} codebook {book.codebook}"


def _faults_of(rule: Rule, facts: SnapshotFacts, summary: SnapshotSummary) -> Faults:
    """What is to blame for a rule that does not hold: first ones by name, and how many."""
    if rule.frame == "shards":
        return facts.faulty(rule.name, _NUM_EXAMPLES)
    if rule.frame == "codebooks":
        return _poor_codebooks(rule, summary)
    if rule.name in AUDIT_TITLES:
        files = dict(_audited(summary))[rule.name] or []
        return Faults([(file.uri, _audit_note(file)) for file in files][:_NUM_EXAMPLES], len(files))
    outcomes: Sequence[Outcome] = ()
    if rule.name in _BUDGET_CHECKS:
        outcomes = (Outcome.QUARANTINED,)
    elif rule.name == "moved_share":
        outcomes = _MOVED
    listed = facts.without_tokens(outcomes, _NUM_EXAMPLES)
    count = sum(summary.outcomes[outcome.value] for outcome in outcomes)
    return Faults([(uri, reason) for uri, reason, _ in listed], count)


def _audit_note(file: FileAudit) -> str:
    return (
        f"{file.num_equal_codes} of {file.num_codes} codes the same, "
        f"{file.num_decoded_samples} of {file.num_samples} samples"
    )


def _poor_codebooks(rule: Rule, summary: SnapshotSummary) -> Faults:
    judged = zip(summary.codebooks, _codebook_frame(summary)[rule.name].to_pylist(), strict=True)
    poor = [
        (_book_name(book), f"{book.num_used} of {book.size} codes in use")
        for book, value in judged
        if value is not None and value < (rule.minimum or 0)
    ]
    return Faults(poor[:_NUM_EXAMPLES], len(poor))


def _outcome(rule: Rule, passed: bool, values: Sequence[float], faults: Faults) -> CheckOutcome:
    # Faults are summed up over the shards; of the codebooks, the worst counts.
    observed = min(values, default=None) if rule.frame == "codebooks" else sum(values)
    return CheckOutcome(
        name=rule.name,
        title=rule.title,
        passed=passed,
        severity=rule.severity,
        observed=observed if values or rule.frame == "shards" else None,
        expected=_expected(rule),
        num_faults=faults.count,
        examples=_named(faults.examples),
    )


def _expected(rule: Rule) -> str:
    if rule.minimum is not None and rule.maximum is None:
        return f"at least {rule.minimum:g}"
    return "0" if rule.maximum == 0 else f"at most {rule.maximum:g}"


def _named(examples: Sequence[tuple[str, str]]) -> list[str]:
    return [printable(f"{name} ({note})" if note else name) for name, note in examples]


def _result(
    job: TokenizeJob,
    snapshot: SnapshotName,
    findings: _Findings,
    report_prefix_uri: str,
    report_path: Path,
) -> ValidationResult:
    return ValidationResult(
        dataset=job.dataset,
        plan_id=job.plan_id,
        encode_id=job.encode_id,
        snapshot_id=snapshot.snapshot_id,
        branch=snapshot.branch,
        codec=job.manifest.name,
        is_trained=job.manifest.is_trained,
        passed=all(c.passed or c.severity == "warning" for c in findings.checks),
        checked_at=datetime.now(UTC).isoformat(timespec="seconds"),
        checks=findings.checks,
        faulty_files=_named(findings.faulty.examples),
        num_faulty_files=findings.faulty.count,
        summary=findings.summary,
        report_uri=join_uri(report_prefix_uri, PAGE_FILE),
        report_path=str(report_path / PAGE_FILE),
    )


def failure_of(result: ValidationResult) -> HCodecError | None:
    """The error that a result amounts to, None when it passed.

    ``BudgetExceededError`` when nothing but the budget was exceeded, else
    ``ValidationFailedError``; one sentence with the first ten files and the number of the others.
    """
    failed = result.failed("error")
    if not failed:
        return None
    if {check.name for check in failed} <= _BUDGET_CHECKS:
        return BudgetExceededError(_budget_sentence(result, failed[0]))
    names = ", ".join(f"{c.name} ({c.num_faults or c.observed:g})" for c in failed)
    blamed = _listed(result.faulty_files, result.num_faulty_files)
    if not result.num_faulty_files:
        examples = [example for check in failed for example in check.examples]
        blamed = _listed(examples, len(examples))
    return ValidationFailedError(
        f"Snapshot {result.snapshot_id} of dataset {result.dataset} failed {names}"
        f"{': ' + blamed if blamed else ''}; it is not published, see {result.report_uri}."
    )


def raise_if_failed(result: ValidationResult) -> None:
    """Raise the error of ``failure_of``, if there is one."""
    failure = failure_of(result)
    if failure is not None:
        raise failure


def _budget_sentence(result: ValidationResult, check: CheckOutcome) -> str:
    summary = result.summary
    return (
        f"{summary.num_quarantined} of {summary.num_files} files of plan {result.plan_id} could "
        f"not be used, which is over the budget ({check.name} {check.expected}): "
        f"{_listed(check.examples, check.num_faults)}; nothing is published: mend them or raise "
        f"the budget, see {result.report_uri}."
    )


def _listed(examples: Sequence[str], count: int) -> str:
    shown = ", ".join(examples[:_NUM_EXAMPLES])
    rest = count - min(len(examples), _NUM_EXAMPLES)
    return f"{shown} and {rest} more" if rest > 0 else shown
