"""Judging the window that is due for a dataset, and remembering what became of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.table import load_table
from hcodec_core.dataset.versions import resolve_version
from hcodec_core.errors import CommitConflictError, ConfigError
from hcodec_core.monitoring.culprits import culprits
from hcodec_core.monitoring.documents import (
    DriftReport,
    MonitorResult,
    MonitorTerms,
    WindowState,
    WindowStep,
)
from hcodec_core.monitoring.evidence import write_evidence
from hcodec_core.monitoring.history import WindowHistory, find_step, next_step
from hcodec_core.monitoring.judging import judge
from hcodec_core.monitoring.profiles import Profile
from hcodec_core.monitoring.windows import (
    Side,
    earlier_versions,
    find_base,
    find_reference,
    manifest_of,
    reference_profile,
    window_profile,
)
from hcodec_core.storage import Storage

if TYPE_CHECKING:
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

_TRIES = 10


def look(
    storage: Storage, layout: DatasetLayout, terms: MonitorTerms, version: str = "latest"
) -> MonitorResult:
    """Judge a version's window and record nothing. Raises like ``monitor``."""
    due = _Due.of(storage, layout, terms, version)
    report = _report(due, layout, terms)
    return MonitorResult(
        state=report.state, text=describe(report, None), report=report, step=None, is_alarm=False
    )


def monitor(
    storage: Storage,
    layout: DatasetLayout,
    terms: MonitorTerms,
    *,
    owner: str,
    now: datetime | None = None,
) -> MonitorResult:
    """Judge the window that is due, store its evidence, count it, raise the alarm if it is time.

    A window with too few files, or none, is not counted: its files are judged with the next one's.
    One that was counted before is not counted again; if it raised the alarm and ``owner`` (the run)
    is the one that judged it, the result says so again. Raises ``ConfigError`` when there is no
    such dataset or reference, ``CommitConflictError`` when others record all the time,
    ``StorageError``, ``AccessError``.
    """
    history = WindowHistory(storage, layout)
    report: DriftReport | None = None
    for _ in range(_TRIES):
        due = _Due.of(storage, layout, terms)
        if due.counted is not None:
            return _repeat(due.counted, owner)
        if report is None or report.base_version != due.base_version:
            report = _report(due, layout, terms)
        if report.state not in {WindowState.SAME, WindowState.DRIFTED}:
            return MonitorResult(
                state=report.state,
                text=describe(report, None),
                report=report,
                step=None,
                is_alarm=False,
            )
        step = _recorded(storage, layout, history, due, report, owner, now or datetime.now(UTC))
        if step is not None:
            text = describe(report, step)
            return MonitorResult(
                state=report.state, text=text, report=report, step=step, is_alarm=step.is_alarm
            )
    raise CommitConflictError(
        f"Windows of dataset {layout.dataset} were recorded by others again and again; try again."
    )


@dataclass(frozen=True)
class _Due:
    """What is to be judged now. ``counted``: its step, when it was judged before."""

    table: Table
    window: Side
    base: Side | None
    reference: Side
    steps: list[WindowStep]
    counted: WindowStep | None

    @property
    def base_version(self) -> str | None:
        return None if self.base is None else self.base.version

    @classmethod
    def of(
        cls, storage: Storage, layout: DatasetLayout, terms: MonitorTerms, version: str = "latest"
    ) -> _Due:
        table = load_table(layout)
        reference = find_reference(layout, table, terms.reference)
        window = Side(*resolve_version(table, version))
        steps = WindowHistory(storage, layout).steps()
        counted = find_step(steps, window.version, reference.version)
        others = [step.version for step in steps if step.version != window.version]
        if version != "latest":  # as it was when that version was the latest
            earlier = earlier_versions(table, window.version)
            others = [name for name in others if name in earlier]
        base = find_base(table, terms, reference, others[-1] if others else None)
        return cls(table, window, base, reference, steps, counted)


def _repeat(step: WindowStep, owner: str) -> MonitorResult:
    text = (
        f"{step.version} was judged against {step.reference} on {step.judged_at:%Y-%m-%d %H:%M} "
        f"UTC ({step.state}) and is not counted again."
    )
    is_alarm = step.is_alarm and step.owner == owner
    return MonitorResult(state=step.state, text=text, report=None, step=step, is_alarm=is_alarm)


def _report(due: _Due, layout: DatasetLayout, terms: MonitorTerms) -> DriftReport:
    if due.window.version == due.reference.version:
        window = Profile(manifest_of(due.table))
    else:
        window = window_profile(due.table, due.window, due.base)
    facts = DriftReport(
        dataset=layout.dataset,
        encode_id=layout.encode_id,
        codec_name=window.manifest.name,
        state=WindowState.TOO_FEW if window.num_files else WindowState.NOTHING_NEW,
        version=due.window.version,
        snapshot_id=due.window.snapshot_id,
        base_version=due.base_version,
        reference=due.reference.version,
        reference_snapshot_id=due.reference.snapshot_id,
        terms=terms,
        num_reference_files=0,
        num_window_files=window.num_files,
        num_window_seconds=window.num_seconds,
    )
    if window.num_files < terms.min_files:
        return facts
    reference = reference_profile(due.table, due.reference)
    if reference.num_files < terms.min_files:
        raise ConfigError(
            f"Reference {due.reference.version} of dataset {layout.dataset} has "
            f"{reference.num_files} files, and {terms.min_files} are needed to tell drift from "
            "chance: take a larger version as the reference, or lower min_files."
        )
    return _judged(facts, reference, window)


def _judged(facts: DriftReport, reference: Profile, window: Profile) -> DriftReport:
    terms = facts.terms
    statistics = judge(
        reference, window, false_alarm_rate=terms.false_alarm_rate, least_psi=terms.least_psi
    )
    moved = [statistic for statistic in statistics if statistic.is_drifted]
    changes = {
        "state": WindowState.DRIFTED if moved else WindowState.SAME,
        "num_reference_files": reference.num_files,
        "num_reference_seconds": reference.num_seconds,
        "num_sampled": (len(reference.sample.files), len(window.sample.files)),
        "statistics": statistics,
        "files": culprits(reference, window, moved),
    }
    return facts.model_copy(update=changes)


def _recorded(
    storage: Storage,
    layout: DatasetLayout,
    history: WindowHistory,
    due: _Due,
    report: DriftReport,
    owner: str,
    now: datetime,
) -> WindowStep | None:
    """The window's step, its evidence stored before; None when another run was first."""
    step = next_step(due.steps, report, "", owner, now)
    evidence_uri = write_evidence(storage, layout, report, [*due.steps, step])
    step = step.model_copy(update={"evidence_uri": evidence_uri})
    if not history.create(step):
        return None
    logger.info("window %s of %s: %s", step.version, layout.dataset, step.state)
    return step


def describe(report: DriftReport, step: WindowStep | None) -> str:
    """One sentence on a window, for people."""
    what = f"{report.num_window_files} files of {report.version}"
    if report.base_version is not None:
        what += f" that {report.base_version} does not have"
    if report.state is WindowState.NOTHING_NEW:
        return f"Nothing new in {report.version}: there is nothing to judge."
    if report.state is WindowState.TOO_FEW:
        return (
            f"{what}: fewer than {report.terms.min_files}, so they are judged with the next ones."
        )
    if report.state is WindowState.SAME:
        return f"{what}: nothing moved against {report.reference} beyond chance."
    names = ", ".join(statistic.name for statistic in report.moved[:5])
    more = f" and {len(report.moved) - 5} more" if len(report.moved) > 5 else ""
    text = f"{what}: drifted against {report.reference}: {names}{more}."
    return text if step is None else f"{text} {_standing(step, report.terms)}"


def _standing(step: WindowStep, terms: MonitorTerms) -> str:
    if step.is_alarm:
        return "ALARM."
    if step.cool_until is not None and step.judged_at < step.cool_until:
        return f"It does not count: cool-down until {step.cool_until:%Y-%m-%d %H:%M} UTC."
    return f"{step.num_in_a_row} of {terms.windows_in_a_row} drifted windows in a row."
