"""Versions: publishing what was validated, going back, and telling two versions apart.

Publishing is one metadata commit: ``main`` moves to the validated snapshot, the tag ``v<N>`` and
the ledger entries appear, the audit branch goes. It requires ``main`` at the base on which the plan
was committed. Record and quarantine file follow from the tag and the plan alone, so a publisher
that died in between is simply run again.
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import Config, describe
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import (
    CommitCounts,
    PlanEntry,
    PlanState,
    RollbackEntry,
    VersionEntry,
    compacted,
    current_version,
    plan_entry,
    plan_property,
    rollback_entries,
    rollback_property,
    version_entries,
    version_number,
    version_of,
    version_property,
)
from hcodec_core.dataset.plan_documents import Plan, read_plan
from hcodec_core.dataset.quarantine import write_quarantine
from hcodec_core.dataset.results import read_results
from hcodec_core.dataset.table import MAIN, RefChange, held_objects, load_table, main_snapshot_id
from hcodec_core.dataset.tabular import is_in, keys_of
from hcodec_core.errors import (
    CommitConflictError,
    ConfigError,
    ObjectMissingError,
    PlanIncompleteError,
    ValidationFailedError,
)
from hcodec_core.jobs import (
    JOB_FILE,
    FileOutcome,
    ModeAgreement,
    Outcome,
    ShardResult,
    TokenizeJob,
    read_job,
)
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecSpec, EncodeSettings

if TYPE_CHECKING:
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

_TRIES = 20
_VERSION_NAME = re.compile(r"v[1-9][0-9]*")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PurgeNote(_Document):
    """Objects were erased from a version: how many of its rows went, never which."""

    purge_id: str
    purged_at: datetime
    num_rows: int


class VersionRecord(_Document):
    """A published version. ``quarantine_uri`` is empty when every file gave tokens.

    ``agreement``: of the plan's codes with those of mode exact, where its mode is fast. ``purges``:
    rows erased since; ``counts`` are of the day of publishing, but for ``num_total_rows``.
    """

    format_version: Literal[1] = 1
    version: str
    previous_version: str | None
    dataset: str
    encode_id: str
    codebook_id: str
    decode_id: str
    table: str
    snapshot_id: int
    base_snapshot_id: int
    published_at: datetime
    plan_id: str
    plan_uri: str
    sources: tuple[str, ...]
    codec_name: str
    codec_uri: str
    codec_digest: str
    codec_is_trained: bool
    settings: EncodeSettings
    counts: CommitCounts
    num_tombstones: int
    num_remaining_files: int
    remaining_hours: float
    quarantine_uri: str
    report_uri: str
    agreement: ModeAgreement | None = None
    purges: tuple[PurgeNote, ...] = ()


class VersionSummary(_Document):
    """A line in the list of versions; ``is_current``: what readers of the latest version see.

    ``num_rows`` is None for a version that retention took.
    """

    version: str
    snapshot_id: int
    plan_id: str
    published_at: datetime
    is_current: bool
    num_rows: int | None
    is_pinned: bool = False
    pin_reason: str = ""


class VersionDiff(_Document):
    """How version ``new`` differs from ``old``: numbers of objects, and the first URIs of each."""

    old: str
    new: str
    num_added: int
    num_changed: int
    num_removed: int
    num_kept: int
    added: list[str]
    changed: list[str]
    removed: list[str]


class Rejection(_Document):
    """A commit that will not be published; ``tag`` keeps its rows readable."""

    plan_id: str
    snapshot_id: int
    tag: str
    reason: str


def publish(
    config: Config, storage: Storage, plan_uri: str, snapshot_id: int, report_uri: str = ""
) -> VersionRecord:
    """Make the validated snapshot of a plan the next version.

    Called again for the same plan, it returns the same version. ``report_uri`` is recorded.

    Raises ``CommitConflictError`` when ``main`` moved since the plan was committed, or the plan's
    commit is another one than ``snapshot_id``: commit and validate again. ``PlanIncompleteError``
    when the plan was not committed, ``ValidationFailedError`` when it was rejected.
    """
    job = read_job(storage.read(join_uri(plan_uri, JOB_FILE)))
    layout = DatasetLayout(config, job.dataset, job.encode_id)
    for _ in range(_TRIES):
        table = load_table(layout)
        entry = _entry_of(table, job.plan_id)
        if entry.state is PlanState.PUBLISHED:
            plan = read_plan(storage, plan_uri)
            return _write_record(storage, layout, table, job, plan, entry)
        _check_publishable(table, entry, job.plan_id, snapshot_id)
        try:
            _move_main(table, job.plan_id, entry, report_uri)
        except CommitConflictError as error:
            logger.info("plan %s: %s", job.plan_id, error)
    raise CommitConflictError(
        f"Plan {job.plan_id} could not be published: other writers of {layout.table_name} were "
        f"first {_TRIES} times; try again."
    )


def _entry_of(table: Table, plan_id: str) -> PlanEntry:
    entry = plan_entry(table, plan_id)
    if entry is None:
        raise PlanIncompleteError(f"Plan {plan_id} was not committed: commit and validate it.")
    return entry


def _check_publishable(table: Table, entry: PlanEntry, plan_id: str, snapshot_id: int) -> None:
    if entry.state is PlanState.REJECTED:
        raise ValidationFailedError(
            f"Plan {plan_id} was rejected: commit it again if it should have another chance."
        )
    if entry.snapshot_id != snapshot_id:
        raise CommitConflictError(
            f"Snapshot {snapshot_id} was validated, but plan {plan_id} is committed as "
            f"{entry.snapshot_id}: validate that one."
        )
    if main_snapshot_id(table) != entry.base_snapshot_id:
        raise CommitConflictError(
            f"Another version was published since plan {plan_id} was committed: commit it again, "
            "which builds on that version, and validate the new snapshot."
        )


def _move_main(table: Table, plan_id: str, entry: PlanEntry, report_uri: str) -> None:
    version = _next_version(table)
    published = entry.model_copy(update={"state": PlanState.PUBLISHED, "version": version})
    record = VersionEntry(
        plan_id=plan_id,
        snapshot_id=entry.snapshot_id,
        base_snapshot_id=entry.base_snapshot_id,
        published_at=datetime.now(UTC),
        report_uri=report_uri,
    )
    change = RefChange(table).require(MAIN, entry.base_snapshot_id)
    change.set_branch(MAIN, entry.snapshot_id).create_tag(version, entry.snapshot_id)
    change.remove(entry.branch)
    change.set_properties(compacted(table))
    change.set_properties(plan_property(plan_id, published))
    change.set_properties(version_property(version, record))
    change.commit()
    logger.info("plan %s is %s (snapshot %d)", plan_id, version, entry.snapshot_id)


def _next_version(table: Table) -> str:
    """A name that neither a version nor a tag ever had: a tag of that name would be moved."""
    names = [*version_entries(table), *filter(_VERSION_NAME.fullmatch, table.refs())]
    return f"v{max(map(version_number, names), default=0) + 1}"


def _write_record(
    storage: Storage,
    layout: DatasetLayout,
    table: Table,
    job: TokenizeJob,
    plan: Plan,
    entry: PlanEntry,
) -> VersionRecord:
    """Quarantine file, then record: where the record is, all is done."""
    try:
        known = version_record(storage, layout, entry.version)
    except ObjectMissingError:
        known = None  # this publisher, or one that died, has it still to do
    # Where an older catalog was restored, a record may be of a version that it does not know.
    if known is not None and (known.plan_id, known.snapshot_id) == (job.plan_id, entry.snapshot_id):
        return known
    results = read_results(storage, job.plan_uri, _kept)
    outcomes = [outcome for quarantined, _ in results for outcome in quarantined]
    quarantine_uri = write_quarantine(storage, layout, job.plan_id, entry.version, outcomes)
    record = _record_of(layout, table, job, plan, entry).model_copy(
        update={
            "quarantine_uri": quarantine_uri,
            "agreement": ModeAgreement.total(part for _, part in results if part is not None),
        }
    )
    text = record.model_dump_json(indent=1).encode()
    storage.write(layout.version_uri(entry.version), text)
    return record


def _kept(result: ShardResult) -> tuple[list[FileOutcome], ModeAgreement | None]:
    """What a version record says of a shard: its quarantined files, its agreement."""
    bad = [outcome for outcome in result.outcomes if outcome.outcome is Outcome.QUARANTINED]
    return bad, result.agreement


def _record_of(
    layout: DatasetLayout, table: Table, job: TokenizeJob, plan: Plan, entry: PlanEntry
) -> VersionRecord:
    published = version_entries(table)[entry.version]
    spec = CodecSpec(job.manifest, job.settings)
    return VersionRecord(
        version=entry.version,
        previous_version=version_of(table, entry.base_snapshot_id),
        dataset=job.dataset,
        encode_id=job.encode_id,
        codebook_id=spec.codebook_id,
        decode_id=spec.decode_id,
        table=".".join(layout.table_identifier),
        snapshot_id=entry.snapshot_id,
        base_snapshot_id=entry.base_snapshot_id,
        published_at=published.published_at,
        plan_id=job.plan_id,
        plan_uri=job.plan_uri,
        sources=plan.sources,
        codec_name=job.manifest.name,
        codec_uri=job.codec_uri,
        codec_digest=job.manifest.digest,
        codec_is_trained=job.manifest.is_trained,
        settings=job.settings,
        counts=entry.counts,
        num_tombstones=plan.num_tombstones,
        num_remaining_files=plan.num_remaining_files,
        remaining_hours=plan.remaining_hours,
        quarantine_uri="",
        report_uri=published.report_uri,
    )


def drop_branch(config: Config, storage: Storage, plan_uri: str, reason: str = "") -> Rejection:
    """Reject what a plan committed: its branch becomes a tag, readers keep the version they have.

    Called again, it changes nothing. The tag (``rejected_<plan_id>_<attempt>``) keeps the rows for
    whoever looks into the failure. Raises ``ConfigError`` when the plan is published already,
    ``PlanIncompleteError`` when it was never committed.
    """
    job = read_job(storage.read(join_uri(plan_uri, JOB_FILE)))
    layout = DatasetLayout(config, job.dataset, job.encode_id)
    for _ in range(_TRIES):
        table = load_table(layout)
        entry = _entry_of(table, job.plan_id)
        tag = f"rejected_{job.plan_id}_{entry.attempt}"
        if entry.state is PlanState.PUBLISHED:
            raise ConfigError(
                f"Plan {job.plan_id} is published as {entry.version}: roll back instead."
            )
        if entry.state is PlanState.REJECTED:
            return Rejection(
                plan_id=job.plan_id, snapshot_id=entry.snapshot_id, tag=tag, reason=reason
            )
        rejected = entry.model_copy(update={"state": PlanState.REJECTED})
        change = RefChange(table).create_tag(tag, entry.snapshot_id).remove(entry.branch)
        try:
            change.set_properties(plan_property(job.plan_id, rejected)).commit()
        except CommitConflictError as error:
            logger.info("plan %s: %s", job.plan_id, error)
    raise CommitConflictError(f"The branch of plan {job.plan_id} could not be dropped; try again.")


def version_record(storage: Storage, layout: DatasetLayout, version: str) -> VersionRecord:
    """The record of one version. Raises ``ObjectMissingError`` when there is none."""
    uri = layout.version_uri(version)
    try:
        return VersionRecord.model_validate_json(storage.read(uri))
    except ValidationError as error:
        raise ConfigError(f"{uri} is no version record of ours: {describe(error)}.") from error


def list_versions(layout: DatasetLayout) -> list[VersionSummary]:
    """All versions, oldest first. Raises ``ConfigError`` when there is no such table."""
    table = load_table(layout)
    current = current_version(table, main_snapshot_id(table))
    return [
        VersionSummary(
            version=version,
            snapshot_id=entry.snapshot_id,
            plan_id=entry.plan_id,
            published_at=entry.published_at,
            is_current=version == current,
            num_rows=_num_rows(table, entry.snapshot_id),
            is_pinned=_pin_tag(version) in table.refs(),
            pin_reason=entry.pin_reason,
        )
        for version, entry in version_entries(table).items()
    ]


def _num_rows(table: Table, snapshot_id: int) -> int | None:
    snapshot = table.snapshot_by_id(snapshot_id)
    summary = None if snapshot is None else snapshot.summary
    total = None if summary is None else summary["total-records"]
    return None if total is None else int(total)


def resolve_version(table: Table, version: str) -> tuple[str, int]:
    """Name and snapshot of ``latest``, ``v3``, or another tag or branch.

    The latest version is read from its compacted files where there are such.
    Raises ``ConfigError`` naming the versions that there are.
    """
    if version == "latest":
        main_id = main_snapshot_id(table)
        name = current_version(table, main_id)
        if name is not None and main_id is not None and version_of(table, main_id) == name:
            return name, main_id
        if name is not None:
            return name, version_entries(table)[name].snapshot_id
    ref = None if version in {MAIN, "latest"} else table.refs().get(version)
    if ref is not None:
        return version, int(ref.snapshot_id)
    names = ", ".join(version_entries(table)) or "none yet"
    raise ConfigError(
        f"There is no version {version!r} of this dataset; versions: {names}."
        if version not in version_entries(table)
        else f"Version {version} was taken by retention, its rows are gone: pin what is to stay."
    )


def pin(layout: DatasetLayout, version: str, reason: str = "") -> None:
    """Keep a version from retention until it is unpinned; again, it renews the reason.

    Raises ``ConfigError`` when there is no such version (any more), ``CommitConflictError``.
    """
    _set_pin(layout, version, reason, is_pinned=True)


def unpin(layout: DatasetLayout, version: str) -> None:
    """Leave a version to retention again. Raises like ``pin``."""
    _set_pin(layout, version, "", is_pinned=False)


def _set_pin(layout: DatasetLayout, version: str, reason: str, *, is_pinned: bool) -> None:
    for _ in range(_TRIES):
        table = load_table(layout)
        _, snapshot_id = resolve_version(table, version)
        entries = version_entries(table)
        if version not in entries:
            raise ConfigError(f"{version} is no version: name one of {', '.join(entries)}.")
        change = RefChange(table).require(version, snapshot_id)
        # A tag of its own, which retention requires not to exist: properties could be raced over.
        if is_pinned and _pin_tag(version) not in table.refs():
            change.create_tag(_pin_tag(version), snapshot_id)
        elif not is_pinned:
            change.remove(_pin_tag(version))
        entry = entries[version].model_copy(update={"pin_reason": reason})
        try:
            change.set_properties(version_property(version, entry)).commit()
        except CommitConflictError as error:
            logger.info("pin of %s: %s", version, error)
        else:
            return
    raise CommitConflictError(f"The pin of {version} could not be changed; try again.")


def _pin_tag(version: str) -> str:
    return f"pin_{version}"


def expire_versions(layout: DatasetLayout, keep: int, *, dry_run: bool = False) -> list[str]:
    """Give up all but the newest ``keep`` versions, on the caller's lock; returns their names.

    Pinned ones and the one that readers see stay. Rows go when their snapshots expire. Raises
    ``CommitConflictError`` when one was pinned meanwhile.
    """
    table = load_table(layout)
    entries = version_entries(table)
    current = current_version(table, main_snapshot_id(table))
    old = list(entries)[: max(0, len(entries) - max(1, keep))]
    going = [
        name
        for name in old
        if name != current and name in table.refs() and _pin_tag(name) not in table.refs()
    ]
    if dry_run or not going:
        return going
    now = datetime.now(UTC)
    change = RefChange(table)
    for name in going:
        change.require(name, table.refs()[name].snapshot_id).require(_pin_tag(name), None)
        change.remove(name)
        entry = entries[name].model_copy(update={"expired_at": now})
        change.set_properties(version_property(name, entry))
    change.commit()
    logger.info("retention took %s of %s", ", ".join(going), layout.table_name)
    return going


def rollback(layout: DatasetLayout, to_version: str, reason: str = "") -> RollbackEntry | None:
    """Let readers see an older version again; None when they do already.

    The versions in between stay, and their numbers are not used again. Raises ``ConfigError`` for a
    version that does not exist, ``CommitConflictError`` when another writer was first.
    """
    table = load_table(layout)
    if to_version not in version_entries(table):
        raise ConfigError(f"There is no version {to_version!r}: see the list of versions.")
    _, snapshot_id = resolve_version(table, to_version)
    current_id = main_snapshot_id(table)
    if current_id == snapshot_id or version_of(table, current_id) == to_version:
        return None
    entry = RollbackEntry(
        from_version=current_version(table, current_id) or "",
        to_version=to_version,
        rolled_back_at=datetime.now(UTC),
        reason=reason,
    )
    number = len(rollback_entries(table)) + 1
    change = RefChange(table).require(MAIN, current_id).set_branch(MAIN, snapshot_id)
    change.set_properties(rollback_property(number, entry)).commit()
    logger.info("rolled back from %s to %s", entry.from_version, to_version)
    return entry


def diff_versions(
    layout: DatasetLayout, old: str, new: str, max_examples: int = 100
) -> VersionDiff:
    """Which objects version ``new`` has, lost, or has in another content than ``old``."""
    table = load_table(layout)
    before, after = (
        held_objects(table, resolve_version(table, version)[1]).sort_by("uri")
        for version in (old, new)
    )
    is_known = is_in(keys_of(after, "uri"), keys_of(before, "uri"))
    is_same = is_in(keys_of(after, "uri", "etag"), keys_of(before, "uri", "etag"))
    added = after["uri"].filter(pc.invert(is_known))
    changed = after["uri"].filter(pc.and_not(is_known, is_same))
    is_gone = pc.invert(is_in(keys_of(before, "uri"), keys_of(after, "uri")))
    removed = before["uri"].filter(is_gone)
    return VersionDiff(
        old=old,
        new=new,
        num_added=len(added),
        num_changed=len(changed),
        num_removed=len(removed),
        num_kept=len(after) - len(added) - len(changed),
        added=_first(added, max_examples),
        changed=_first(changed, max_examples),
        removed=_first(removed, max_examples),
    )


def _first(uris: pa.ChunkedArray, count: int) -> list[str]:
    found: list[str] = uris.slice(0, count).to_pylist()
    return found
