"""What the tasks of ``maintain_datasets`` do, free of Airflow."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hcodec_airflow.requests import DatasetName, read_form

logger = logging.getLogger(__name__)

SCHEDULED = "scheduled"
LEAST_AGE_DAYS = 1 / 24

_HEADS = ("dataset", "encode id", "small files", "become", "snapshots", "orphans", "size", "kept")
_NUM_NAMED = 20


class UpkeepRequest(BaseModel):
    """One run of ``maintain_datasets``. ``datasets``: empty for all that are declared.

    ``dry_run``: ``by hand`` for every run but a scheduled one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: tuple[DatasetName, ...] = ()
    dry_run: Literal["by hand", "always", "never"] = "by hand"
    compact: bool = True
    small_file_mib: float = Field(default=32.0, gt=0)
    expire_after_days: float = Field(default=7.0, ge=0)
    orphan_age_days: float = Field(default=3.0, ge=LEAST_AGE_DAYS)
    open_plan_days: float = Field(default=30.0, gt=0)

    def is_dry(self, run_type: str) -> bool:
        """Whether a run of this type (``scheduled``, ``manual`` ...) changes nothing."""
        return self.dry_run == "always" or (self.dry_run == "by hand" and run_type != SCHEDULED)


def read_upkeep(values: Mapping[str, Any]) -> UpkeepRequest:
    """A request from a form's values. Raises ``ConfigError`` naming each wrong entry."""
    known = dict(values)
    known["datasets"] = known.get("datasets") or ()
    return read_form(known, UpkeepRequest)


def maintain_dataset(
    dataset: str, request: UpkeepRequest, *, dry_run: bool
) -> list[dict[str, Any]]:
    """Compact, expire, sweep all tables of a dataset; what was done, or would be, to each.

    The caller holds the dataset's lock, but for a dry run.
    """
    from hcodec_airflow.settings import read_settings
    from hcodec_core.dataset.maintenance import Upkeep, maintain_locked
    from hcodec_core.dataset.table import find_layouts

    settings = read_settings()
    config, storage = settings.load_config(), settings.open_storage()
    terms = Upkeep(
        expire_after_days=request.expire_after_days,
        orphan_age_days=request.orphan_age_days,
        open_plan_days=request.open_plan_days,
        small_file_mib=request.small_file_mib if request.compact else 0.0,
    )
    rows = []
    for layout in find_layouts(config, dataset):
        report = maintain_locked(storage, layout, terms, dry_run=dry_run)
        for uri in report.sweep.uris[:_NUM_NAMED]:
            logger.info("orphan: %s", uri)
        rows.append(
            {
                "dataset": dataset,
                "encode_id": layout.encode_id[:12],
                "is_dry_run": dry_run,
                "num_small_files": report.compaction.num_files_before,
                "num_files_after": report.compaction.num_files_after,
                "num_expired_snapshots": report.num_expired_snapshots,
                "num_orphans": report.sweep.num_orphans,
                "num_orphan_bytes": report.sweep.num_bytes,
                "num_kept": report.sweep.num_kept,
            }
        )
    return rows


def describe_upkeep(rows: Iterable[Mapping[str, Any]], *, dry_run: bool) -> list[str]:
    """A table for people of what ``maintain_dataset`` returned."""
    from hcodec_airflow.steps import size_text

    lines: list[Sequence[str]] = [_HEADS]
    for row in rows:
        names = ("num_small_files", "num_files_after", "num_expired_snapshots", "num_orphans")
        counts = (str(row[name]) for name in names)
        size, kept = size_text(row["num_orphan_bytes"]), str(row["num_kept"])
        lines.append((row["dataset"], row["encode_id"], *counts, size, kept))
    if len(lines) == 1:
        return ["No dataset has a table yet: nothing to maintain."]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    end = "Dry run: nothing was changed." if dry_run else "Done."
    return [*text, end]
