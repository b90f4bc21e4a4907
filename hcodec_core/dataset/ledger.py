"""The ledger: what was committed, published, rejected and rolled back, in table properties.

Properties outlive compaction and the expiry of snapshots, and change in the same commit as the
snapshot or ref that they speak of.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pyiceberg.table import Table

_PLAN = "hcodec.plan."
_VERSION = "hcodec.version."
_ROLLBACK = "hcodec.rollback."
_COMPACTION = "hcodec.compaction."
_NUM_DETAILED = 50


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
    """A published version.

    Once ``expired_at`` is set, retention took it: its tag and rows are gone, its record stays.
    ``pin_reason``: why it is pinned, if it is.
    """

    plan_id: str
    snapshot_id: int
    base_snapshot_id: int
    published_at: datetime
    report_uri: str = ""
    pin_reason: str = ""
    expired_at: datetime | None = None


class RollbackEntry(_Entry):
    """A rollback of ``main`` from one version to an older one."""

    from_version: str
    to_version: str
    rolled_back_at: datetime
    reason: str = ""


class CompactionEntry(_Entry):
    """A snapshot that holds the rows of ``base_snapshot_id`` in fewer files."""

    snapshot_id: int
    base_snapshot_id: int
    compacted_at: datetime
    num_files_before: int
    num_files_after: int


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


def compaction_property(entry: CompactionEntry) -> dict[str, str]:
    """Table property of a compaction."""
    return {f"{_COMPACTION}{entry.snapshot_id}": entry.model_dump_json(exclude_defaults=True)}


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


def uncompacted(table: Table, snapshot_id: int | None) -> int | None:
    """The snapshot that was published with the rows of this one, before any compaction."""
    origin = {
        entry.snapshot_id: entry.base_snapshot_id
        for entry in _entries(table, _COMPACTION, CompactionEntry).values()
    }
    while snapshot_id in origin:
        snapshot_id = origin[snapshot_id]
    return snapshot_id


def version_number(version: str) -> int:
    """3 for ``v3``."""
    return int(version.removeprefix("v"))


def compacted(table: Table) -> dict[str, str]:
    """Properties to set so that plans of old versions take little room: their counts are dropped.

    Version records keep the counts.
    """
    newest = max(map(version_number, version_entries(table)), default=0)
    old = {
        plan_id: entry
        for plan_id, entry in plan_entries(table).items()
        if entry.version
        and entry.counts != CommitCounts()
        and version_number(entry.version) <= newest - _NUM_DETAILED
    }
    properties: dict[str, str] = {}
    for plan_id, entry in old.items():
        properties |= plan_property(plan_id, entry.model_copy(update={"counts": CommitCounts()}))
    return properties


def moved_properties(
    table: Table, moved: Mapping[int, int], num_rows: Mapping[int, int]
) -> tuple[dict[str, str], list[str]]:
    """Properties to set and to remove so that the ledger speaks of snapshots written again.

    ``moved``: new snapshot id by old one; ``num_rows``: rows of the new snapshot, by the old id.
    """
    properties: dict[str, str] = {}
    removed: list[str] = []
    for plan_id, plan in plan_entries(table).items():
        properties |= plan_property(plan_id, _moved_plan(plan, moved, num_rows))
    for version, entry in version_entries(table).items():
        properties |= version_property(version, _moved(entry, moved))
    for number, compaction in _entries(table, _COMPACTION, CompactionEntry).items():
        new = _moved(compaction, moved)
        properties |= compaction_property(new)
        removed += [_COMPACTION + number] * (str(new.snapshot_id) != number)
    changed = {n: text for n, text in properties.items() if table.properties.get(n) != text}
    return changed, removed


def _moved_plan(
    entry: PlanEntry, moved: Mapping[int, int], num_rows: Mapping[int, int]
) -> PlanEntry:
    if entry.snapshot_id in num_rows and entry.counts != CommitCounts():
        counts = {"num_total_rows": num_rows[entry.snapshot_id]}
        entry = entry.model_copy(update={"counts": entry.counts.model_copy(update=counts)})
    return _moved(entry, moved)


def _moved(entry: Entry, moved: Mapping[int, int]) -> Entry:
    names = ("snapshot_id", "base_snapshot_id")
    return entry.model_copy(
        update={name: moved.get(getattr(entry, name), getattr(entry, name)) for name in names}
    )


def version_of(table: Table, snapshot_id: int | None) -> str | None:
    """Version that was published as a snapshot, or as what it was compacted from, or None."""
    snapshot_id = uncompacted(table, snapshot_id)
    found = [v for v, entry in version_entries(table).items() if entry.snapshot_id == snapshot_id]
    return found[-1] if found else None


def current_version(table: Table, main_snapshot_id: int | None) -> str | None:
    """Version that readers see, or None when nothing was published yet.

    Where ``main`` was moved by other tools, it is what was published or rolled back
    to last: readers see only what was validated.
    """
    version = version_of(table, main_snapshot_id)
    return version or last_change(table)[1] or None


def last_change(table: Table) -> tuple[datetime, str]:
    """When a version was last published or rolled back to, and which (a time long ago if never)."""
    events = [(entry.published_at, name) for name, entry in version_entries(table).items()]
    events += [(entry.rolled_back_at, entry.to_version) for entry in rollback_entries(table)]
    return max(events, default=(datetime.min.replace(tzinfo=UTC), ""))


def _entries(table: Table, prefix: str, kind: type[Entry]) -> dict[str, Entry]:
    return {
        name.removeprefix(prefix): kind.model_validate_json(text)
        for name, text in table.properties.items()
        if name.startswith(prefix)
    }
