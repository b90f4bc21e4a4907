"""The ledger: what was committed, published, rejected and rolled back, in table properties.

Properties outlive compaction and the expiry of snapshots, and change in the same commit as the
snapshot or ref that they speak of.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pyiceberg.table import Table

_PLAN = "hcodec.plan."
_VERSION = "hcodec.version."
_ROLLBACK = "hcodec.rollback."


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CommitCounts(_Entry):
    """What one commit did to the rows and files of its base."""

    num_files: int = 0
    num_rows: int = 0
    num_rows_removed: int = 0
    num_rewritten_files: int = 0
    num_total_rows: int = 0
    outcomes: dict[str, int] = {}
    audio_seconds: float = 0.0
    num_tokens: int = 0


class PlanState(StrEnum):
    """How far a plan came after its shards were done."""

    COMMITTED = "committed"  # on its own branch, waiting for validation
    PUBLISHED = "published"
    REJECTED = "rejected"


class PlanEntry(_Entry):
    """A committed plan. ``attempt`` counts its commits: 1, and one more each time main moved."""

    state: PlanState
    snapshot_id: int
    base_snapshot_id: int
    branch: str
    attempt: int
    counts: CommitCounts = Field(default_factory=CommitCounts)
    version: str = ""


class VersionEntry(_Entry):
    """A published version."""

    plan_id: str
    snapshot_id: int
    base_snapshot_id: int
    published_at: datetime
    report_uri: str = ""


class RollbackEntry(_Entry):
    """A rollback of ``main`` from one version to an older one."""

    from_version: str
    to_version: str
    rolled_back_at: datetime
    reason: str = ""


Entry = TypeVar("Entry", bound=_Entry)


def plan_property(plan_id: str, entry: PlanEntry) -> dict[str, str]:
    """Table property of a plan."""
    return {_PLAN + plan_id: entry.model_dump_json(exclude_defaults=True)}


def version_property(version: str, entry: VersionEntry) -> dict[str, str]:
    """Table property of a version."""
    return {_VERSION + version: entry.model_dump_json(exclude_defaults=True)}


def rollback_property(number: int, entry: RollbackEntry) -> dict[str, str]:
    """Table property of the ``number``-th rollback."""
    return {f"{_ROLLBACK}{number}": entry.model_dump_json(exclude_defaults=True)}


def plan_entry(table: Table, plan_id: str) -> PlanEntry | None:
    """What the ledger knows of a plan."""
    text = table.properties.get(_PLAN + plan_id)
    return None if text is None else PlanEntry.model_validate_json(text)


def plan_entries(table: Table) -> dict[str, PlanEntry]:
    """All plans by id."""
    return _entries(table, _PLAN, PlanEntry)


def version_entries(table: Table) -> dict[str, VersionEntry]:
    """All versions by name (``v1``), oldest first."""
    entries = _entries(table, _VERSION, VersionEntry)
    return dict(sorted(entries.items(), key=lambda item: version_number(item[0])))


def rollback_entries(table: Table) -> list[RollbackEntry]:
    """All rollbacks, oldest first."""
    entries = _entries(table, _ROLLBACK, RollbackEntry)
    return [entries[number] for number in sorted(entries, key=int)]


def version_number(version: str) -> int:
    """3 for ``v3``."""
    return int(version.removeprefix("v"))


def next_version(table: Table) -> str:
    """Name of the next version; a name is never used twice."""
    return f"v{max(map(version_number, version_entries(table)), default=0) + 1}"


def current_version(table: Table, main_snapshot_id: int | None) -> str | None:
    """Version that ``main`` shows, or None when nothing was published yet."""
    for version, entry in reversed(version_entries(table).items()):
        if entry.snapshot_id == main_snapshot_id:
            return version
    return None


def _entries(table: Table, prefix: str, kind: type[Entry]) -> dict[str, Entry]:
    return {
        name.removeprefix(prefix): kind.model_validate_json(text)
        for name, text in table.properties.items()
        if name.startswith(prefix)
    }
