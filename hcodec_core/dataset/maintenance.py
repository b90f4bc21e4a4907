"""Cleaning up behind plans that failed, commits that lost a race, and snapshots that expired.

Nothing else removes such files: Iceberg's expiry leaves data files, catalogs leave the metadata of
losers. Callers hold the dataset's lock; what is younger than an age floor, or belongs to a plan
that may still be committed, is spared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from hcodec_core.config import Config
from hcodec_core.dataset.compaction import CompactionReport, FileSizes, compact
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import PlanState, plan_entries
from hcodec_core.dataset.lock import LockSeeker, Waiting, release
from hcodec_core.dataset.results import try_read_results
from hcodec_core.dataset.table import catalog_errors, load_table, refs_of
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.dataset.versions import expire_versions
from hcodec_core.errors import CommitConflictError, ConfigError, StorageError
from hcodec_core.jobs import JOB_FILE, ShardResult
from hcodec_core.storage import ObjectInfo, Storage, join_uri

if TYPE_CHECKING:
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

LEAST_AGE = timedelta(hours=1)
_CLOSED = (PlanState.PUBLISHED, PlanState.REJECTED)


class SweepReport(BaseModel):
    """Objects that nothing refers to. ``num_bytes`` of them; ``uris``: the first of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_dry_run: bool
    num_kept: int
    num_orphans: int
    num_bytes: int
    uris: list[str]


class Upkeep(BaseModel):
    """Terms of ``maintain``, in days. ``small_file_mib``: files below it are put together.

    ``keep_versions``: how many of the newest versions stay (None: all); pinned ones always do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    expire_after_days: float = Field(default=7.0, ge=0)
    orphan_age_days: float = Field(default=3.0, gt=0)
    open_plan_days: float = Field(default=30.0, gt=0)
    small_file_mib: float = Field(default=32.0, ge=0)
    keep_versions: int | None = Field(default=None, ge=1)


class MaintenanceReport(BaseModel):
    """What was done to one dataset, or would be in a dry run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    encode_id: str
    is_dry_run: bool
    compaction: CompactionReport
    num_expired_snapshots: int
    sweep: SweepReport
    expired_versions: list[str] = []


def maintain(
    config: Config,
    storage: Storage,
    layout: DatasetLayout,
    owner: str,
    terms: Upkeep = Upkeep(),  # noqa: B008 - frozen
    *,
    dry_run: bool = True,
) -> MaintenanceReport:
    """Compact small files, expire snapshots and sweep orphans, on the dataset's lock.

    ``owner`` names the run. A dry run takes no lock and changes nothing. Raises
    ``CommitConflictError`` when another run holds the lock.
    """
    if dry_run:
        return maintain_locked(storage, layout, terms, dry_run=True)
    lock = LockSeeker(config, storage, layout.dataset, owner).acquire()
    if isinstance(lock, Waiting):
        raise CommitConflictError(
            f"Dataset {layout.dataset} is locked by {lock.owner or 'another run'} since "
            f"{lock.since}: try again when it has ended."
        )
    try:
        return maintain_locked(storage, layout, terms, dry_run=False)
    finally:
        release(storage, lock, "maintenance is over")


def maintain_locked(
    storage: Storage, layout: DatasetLayout, terms: Upkeep, *, dry_run: bool
) -> MaintenanceReport:
    """Like ``maintain``, on a lock that the caller holds and keeps alive."""
    sizes = FileSizes(small_bytes=int(terms.small_file_mib * 2**20))
    compaction = compact(storage, layout, sizes, dry_run=dry_run)
    expired: list[str] = []
    if terms.keep_versions is not None:
        expired = expire_versions(layout, terms.keep_versions, dry_run=dry_run)
    cutoff = datetime.now(UTC) - timedelta(days=terms.expire_after_days)
    num_expired = expire_snapshots(layout, cutoff, dry_run=dry_run)
    sweep = sweep_orphans(
        storage,
        layout,
        timedelta(days=terms.orphan_age_days),
        timedelta(days=terms.open_plan_days),
        dry_run=dry_run,
    )
    return MaintenanceReport(
        dataset=layout.dataset,
        encode_id=layout.encode_id,
        is_dry_run=dry_run,
        compaction=compaction,
        num_expired_snapshots=num_expired,
        sweep=sweep,
        expired_versions=expired,
    )


def expire_snapshots(layout: DatasetLayout, older_than: datetime, *, dry_run: bool = False) -> int:
    """Forget snapshots that no version, branch or tag names; returns how many.

    Versions keep their snapshots, and the ledger keeps what was committed. The files stay until
    they are swept.
    """
    table = load_table(layout)
    before = len(table.snapshots())
    if dry_run:
        named = {ref.snapshot_id for ref in refs_of(table).values()}
        cutoff = older_than.timestamp() * 1000
        loose = [s for s in table.snapshots() if s.snapshot_id not in named]
        return sum(snapshot.timestamp_ms < cutoff for snapshot in loose)
    with catalog_errors("expiring snapshots"):
        table.maintenance.expire_snapshots().older_than(older_than).commit()
    return before - len(load_table(layout).snapshots())


def sweep_orphans(
    storage: Storage,
    layout: DatasetLayout,
    min_age: timedelta = timedelta(days=3),
    open_plan_age: timedelta = timedelta(days=30),
    *,
    dry_run: bool = True,
    max_named: int = 1000,
) -> SweepReport:
    """Delete files of the table's folder that no snapshot and no open plan refers to.

    A plan is open until it is published, rejected, or ``open_plan_age`` old. Raises ``ConfigError``
    for a ``min_age`` below one hour: files of running writers would look like orphans. Ages are
    taken by the storage's clock, so that this host's may be wrong (a dry run, which writes nothing,
    takes this host's).
    """
    if min_age < LEAST_AGE:
        raise ConfigError("A sweep needs an age floor of at least one hour: raise min_age.")
    now = datetime.now(UTC) if dry_run else _time_of(storage, layout)
    # Listed before the references are read: what is written in between is not in the list.
    listed = list_folder(storage, layout.table_uri)
    table = load_table(layout)
    spared_folders, spared = _open_plans(storage, layout, table, now - open_plan_age)
    spared |= referenced_uris(table)
    orphans = [
        info
        for info in listed
        if info.uri not in spared
        and not info.uri.startswith(tuple(spared_folders))
        and info.last_modified < now - min_age
    ]
    if not dry_run:
        storage.delete(info.uri for info in orphans)
    logger.info("sweep of %s: %d orphans of %d", layout.table_uri, len(orphans), len(listed))
    return SweepReport(
        is_dry_run=dry_run,
        num_kept=len(listed) - len(orphans),
        num_orphans=len(orphans),
        num_bytes=sum(info.size for info in orphans),
        uris=[info.uri for info in orphans[:max_named]],
    )


def _time_of(storage: Storage, layout: DatasetLayout) -> datetime:
    """The time on the storage's clock: what it says of an object written just now."""
    uri = join_uri(layout.work_uri, "clock")
    storage.write(uri, b"")
    written = storage.head(uri)
    if written is None:
        raise StorageError(
            f"{uri} was written and is not there: the sweep knows no ages; try again."
        )
    return written.last_modified


def referenced_uris(table: Table) -> set[str]:
    """All objects that any snapshot of the table, or the table itself, refers to."""
    with catalog_errors("reading what the table refers to"):
        uris = {table.metadata_location}
        uris |= {entry.metadata_file for entry in table.metadata.metadata_log}
        uris |= {file.statistics_path for file in table.metadata.statistics}
        manifests = {}
        for snapshot in table.snapshots():
            uris.add(snapshot.manifest_list)
            manifests.update({m.manifest_path: m for m in snapshot.manifests(table.io)})
        uris |= manifests.keys()
        for manifest in manifests.values():
            entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
            uris |= {entry.data_file.file_path for entry in entries}
    return uris


def _open_plans(
    storage: Storage, layout: DatasetLayout, table: Table, opened_after: datetime
) -> tuple[list[str], set[str]]:
    """Data folders of open plans, and the files that their results name (also of other plans)."""
    closed = {plan_id for plan_id, entry in plan_entries(table).items() if entry.state in _CLOSED}
    folders: list[str] = []
    named: set[str] = set()
    for plan_id in _plan_ids(list_folder(storage, layout.plans_uri), opened_after):
        if plan_id not in closed:
            folders.append(layout.plan_data_uri(plan_id) + "/")
            # Results that cannot be read name nothing: their shards are done again.
            named.update(*try_read_results(storage, layout.plan_uri(plan_id), _data_uris)[0])
    return folders, named


def _plan_ids(objects: Iterable[ObjectInfo], opened_after: datetime) -> list[str]:
    jobs = [info for info in objects if info.uri.endswith("/" + JOB_FILE)]
    return [info.uri.split("/")[-2] for info in jobs if info.last_modified > opened_after]


def _data_uris(result: ShardResult) -> set[str]:
    return set() if result.data_file is None else {result.data_file.uri}
