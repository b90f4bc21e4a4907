"""What monitoring remembers of a dataset: one step per judged window, each created once.

Step N is created with ``If-None-Match: *``: of two runs that judged at the same time one is told
to look again. A window is known by its version and reference, so that a task that is tried again
finds its step and counts nothing twice.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import ValidationError

from hcodec_core.config import describe
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.tabular import each, list_folder
from hcodec_core.errors import ConfigError
from hcodec_core.monitoring.documents import DriftReport, WindowState, WindowStep
from hcodec_core.storage import Storage, join_uri


class WindowHistory:
    """The steps of one dataset. Raises what the storage raises."""

    def __init__(self, storage: Storage, layout: DatasetLayout) -> None:
        """Keep where to look."""
        self._storage = storage
        self._uri = join_uri(layout.drift_uri, "windows")

    def steps(self) -> list[WindowStep]:
        """All steps, oldest first."""
        uris = sorted(info.uri for info in list_folder(self._storage, self._uri))
        return each(self._read, [uri for uri in uris if uri.endswith(".json")])

    def create(self, step: WindowStep) -> bool:
        """Add the next step; false when another one has that number."""
        uri = join_uri(self._uri, f"{step.number:08}.json")
        return self._storage.create(uri, step.model_dump_json(indent=1).encode())

    def _read(self, uri: str) -> WindowStep:
        try:
            return WindowStep.model_validate_json(self._storage.read(uri))
        except ValidationError as error:
            raise ConfigError(f"{uri} is no window of ours: {describe(error)}.") from error


def find_step(steps: list[WindowStep], version: str, reference: str) -> WindowStep | None:
    """The step of a window that was counted before."""
    found = (s for s in steps if (s.version, s.reference) == (version, reference))
    return next(found, None)


def next_step(
    steps: list[WindowStep], report: DriftReport, evidence_uri: str, owner: str, now: datetime
) -> WindowStep:
    """What a judged window becomes after these steps.

    Windows of another reference do not count on; a window that is the same starts anew; one in the
    cool-down of the last alarm does not count.
    """
    last = steps[-1] if steps else None
    cool_until = last.cool_until if last is not None else None
    is_cooling = cool_until is not None and now < cool_until
    counts_on = last is not None and last.reference == report.reference
    before = last.num_in_a_row if last is not None and counts_on else 0
    is_drifted = report.state is WindowState.DRIFTED
    num_in_a_row = before + 1 if is_drifted and not is_cooling else 0
    is_alarm = num_in_a_row >= report.terms.windows_in_a_row
    if is_alarm:
        cool_until = now + timedelta(days=report.terms.cool_down_days)
    return WindowStep(
        number=len(steps) + 1,
        version=report.version,
        snapshot_id=report.snapshot_id,
        base_version=report.base_version,
        reference=report.reference,
        reference_snapshot_id=report.reference_snapshot_id,
        state=report.state,
        num_window_files=report.num_window_files,
        moved=[statistic.name for statistic in report.moved],
        num_in_a_row=0 if is_alarm else num_in_a_row,
        is_alarm=is_alarm,
        judged_at=now,
        cool_until=cool_until,
        evidence_uri=evidence_uri,
        owner=owner,
    )
