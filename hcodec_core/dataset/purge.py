"""Erasing objects from a dataset: from every version, tag, snapshot, file and document, with proof.

    lock       the dataset's lock, in a name that the same purge run again has too
    plans      unfinished ones that name the objects are refused, or dropped when asked
    exclude    salted digests, so that no later plan brings the objects back
    tables     see ``purge_table``; versions keep their names and all other rows
    documents  plans, results, listings, quarantine, reports, logs; version records get a note
    proof      every object is read again, to the last; a record of counts is left

A purge that was killed is simply run again. What it cannot reach: sources, exports, local caches,
copies that the bucket keeps of deleted objects, backups (see docs/erasure.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import Config
from hcodec_core.dataset.exclusions import Exclusions, ensure_exclusions, exclude, readmit
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import PlanState, plan_entries, version_entries, version_of
from hcodec_core.dataset.lock import LockSeeker, Waiting, release
from hcodec_core.dataset.mentions import Targets
from hcodec_core.dataset.plan_documents import TOMBSTONES_FILE, Plan
from hcodec_core.dataset.purge_documents import (
    FileSwap,
    Proof,
    PurgeState,
    Searcher,
    TableState,
    clean_documents,
    list_all,
    merged,
)
from hcodec_core.dataset.purge_table import TablePurge
from hcodec_core.dataset.results import try_read_results
from hcodec_core.dataset.table import dataset_names, find_layouts, find_table, load_file_io
from hcodec_core.dataset.tabular import each, list_folder, read_table
from hcodec_core.dataset.versions import PurgeNote, version_record
from hcodec_core.errors import (
    CommitConflictError,
    ConfigError,
    ObjectMissingError,
    PlanIncompleteError,
    ValidationFailedError,
)
from hcodec_core.jobs import FILES_FILE, JOB_FILE, ShardResult, read_job
from hcodec_core.storage import ObjectInfo, Storage, file_uri, join_uri, split_uri

logger = logging.getLogger(__name__)

_ABANDONED = timedelta(days=30)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PurgeRequest(_Document):
    """What to erase: objects by URI, or with ``is_prefix`` all whose URI begins so.

    ``drop_open_plans``: delete unfinished plans that name one of them, with what their workers did.
    """

    dataset: str
    uris: tuple[str, ...]
    is_prefix: bool = False
    drop_open_plans: bool = False


class PurgeRecord(_Document):
    """What is left of a purge: counts and salted digests. ``versions``: rows taken, by table."""

    format_version: Literal[1] = 1
    purge_id: str
    dataset: str
    started_at: datetime
    finished_at: datetime
    is_prefix: bool
    digests: tuple[str, ...]
    num_rows: int
    num_files: int
    num_documents: int
    versions: dict[str, dict[str, int]]
    proof: Proof


class PurgeSurvey(_Document):
    """What a purge would change. ``open_plans``: unfinished ones that name an object."""

    dataset: str
    num_rows: int
    num_files: int
    num_documents: int
    versions: dict[str, dict[str, int]]
    open_plans: list[str]


def survey_purge(config: Config, storage: Storage, request: PurgeRequest) -> PurgeSurvey:
    """Say what ``purge`` would change, and change nothing."""
    world = _World.of(config, storage, request)
    tables = {layout.table_name: world.table(layout).survey() for layout in world.layouts}
    documents = world.documents()
    counts = each(lambda info: world.searcher.count(info, world.targets), documents)
    return PurgeSurvey(
        dataset=request.dataset,
        num_rows=sum(table.num_rows for table in tables.values()),
        num_files=sum(table.num_files for table in tables.values()),
        num_documents=sum(bool(count) for count in counts),
        versions={name: table.versions for name, table in tables.items()},
        open_plans=[uri for uri, _ in world.open_plans(documents)],
    )


def purge(config: Config, storage: Storage, request: PurgeRequest) -> PurgeRecord:
    """Erase objects from a dataset in all of its encode ids, and prove it.

    Run again after it was killed, it goes on; run again when it is over, it only proves.

    Raises ``ConfigError`` for an unknown dataset, ``CommitConflictError`` when another run holds
    the dataset's lock or was first, ``PlanIncompleteError`` when an unfinished plan names an
    object, ``ValidationFailedError`` when a name is still found at the end, ``StorageError``.
    """
    world = _World.of(config, storage, request)
    owner = f"purge/{world.purge_id}"
    lock = LockSeeker(config, storage, request.dataset, owner).acquire()
    if isinstance(lock, Waiting):
        raise CommitConflictError(
            f"Dataset {request.dataset} is locked by {lock.owner or 'another run'} since "
            f"{lock.since}: purge again when it has ended."
        )
    try:
        return _Purge(world).run()
    finally:
        release(storage, lock, "the purge is over")


def readmit_objects(config: Config, storage: Storage, request: PurgeRequest) -> int:
    """Let later plans take erased objects again; returns how many entries were lifted.

    Entries are lifted as they were made: what was purged by a prefix is readmitted by that prefix.
    """
    uris = _spelled(request.uris)
    known = ensure_exclusions(storage, config, request.dataset)
    return readmit(storage, config, request.dataset, known.entries_of(uris, request.is_prefix, ""))


def _spelled(uris: tuple[str, ...]) -> tuple[str, ...]:
    """URIs as listings give them. Raises ``ConfigError`` when there are none, or no URIs."""
    if not uris:
        raise ConfigError("Name at least one object to erase.")

    def spell(uri: str) -> str:
        scheme, _, key = split_uri(uri)
        if not key.strip("/"):
            raise ConfigError(f"{uri} names everything: write an object or a folder in it.")
        return file_uri(unquote(key, errors="surrogateescape")) if scheme == "file" else uri

    return tuple(sorted(set(map(spell, uris))))


@dataclass(frozen=True)
class _World:
    """Where the dataset lies, and what is to be erased from it."""

    config: Config
    storage: Storage
    request: PurgeRequest
    targets: Targets
    exclusions: Exclusions
    layouts: tuple[DatasetLayout, ...]
    searcher: Searcher

    @classmethod
    def of(cls, config: Config, storage: Storage, request: PurgeRequest) -> _World:
        layouts = tuple(find_layouts(config, request.dataset))
        world = cls(
            config=config,
            storage=storage,
            request=request,
            targets=Targets(_spelled(request.uris), request.is_prefix),
            exclusions=ensure_exclusions(storage, config, request.dataset)
            if layouts
            else Exclusions(salt=""),
            layouts=tuple(layout for layout in layouts if find_table(layout) is not None),
            searcher=Searcher(storage, _opener(config)),
        )
        if not layouts:
            names = ", ".join(dataset_names(config)) or "none yet"
            raise ConfigError(f"There is no dataset {request.dataset!r}; datasets: {names}.")
        return world

    @property
    def purge_id(self) -> str:
        """The same for the same objects; tells nobody which."""
        names = "\n".join([str(self.request.is_prefix), *self.targets.uris])
        return self.exclusions.digest(names)[:16]

    @property
    def folder_uri(self) -> str:
        """Folder of all documents of the dataset but its inventories."""
        return join_uri(self.config.work.work_uri, "datasets", self.request.dataset)

    @property
    def state_uri(self) -> str:
        return join_uri(self.folder_uri, "purges", f"{self.purge_id}.begun.json")

    def table(self, layout: DatasetLayout) -> TablePurge:
        return TablePurge(self.storage, layout, self.targets, self.purge_id)

    def documents(self) -> list[ObjectInfo]:
        """All documents: of plans, versions, reports, and the inventories that plans came from."""
        own = list_folder(self.storage, self.folder_uri)
        inventories = join_uri(self.config.work.work_uri, "inventories", self.request.dataset)
        plans = [info.uri for info in own if info.uri.endswith("/plan.json")]
        known = {uri for uri in each(self._inventory_of, plans) if uri}
        listed = list_all(self.storage, [inventories, *sorted(known)])
        return [*own, *(info for info in listed if not info.uri.startswith(self.folder_uri + "/"))]

    def _inventory_of(self, plan_uri: str) -> str:
        with suppress(ValidationError, ObjectMissingError):
            return Plan.model_validate_json(self.storage.read(plan_uri)).inventory_uri
        return ""

    def table_objects(self) -> list[ObjectInfo]:
        """Everything below the folders of the dataset's tables."""
        return list_all(self.storage, [layout.table_uri for layout in self.layouts])

    def open_plans(self, documents: list[ObjectInfo]) -> list[tuple[str, bool]]:
        """Unfinished plans that name an object: (folder, whether it was abandoned long ago)."""
        closed = self._closed_plans()
        found = []
        for info in documents:
            plan_uri, _, name = info.uri.rpartition("/")
            if name != JOB_FILE or plan_uri.rpartition("/")[2] in closed:
                continue
            if self._is_unfinished(plan_uri) and self._names(plan_uri):
                found.append((plan_uri, info.last_modified < datetime.now(UTC) - _ABANDONED))
        return found

    def _closed_plans(self) -> set[str]:
        closed = set()
        for layout in self.layouts:
            table = find_table(layout)
            if table is not None:
                entries = plan_entries(table).items()
                closed |= {i for i, entry in entries if entry.state is not PlanState.COMMITTED}
        return closed

    def _is_unfinished(self, plan_uri: str) -> bool:
        job = read_job(self.storage.read(join_uri(plan_uri, JOB_FILE)))
        results = list_folder(self.storage, join_uri(plan_uri, "results"))
        return len(results) < job.num_shards

    def _names(self, plan_uri: str) -> bool:
        uris = [join_uri(plan_uri, name) for name in (FILES_FILE, TOMBSTONES_FILE)]
        columns = (read_table(self.storage, uri, ["uri"])["uri"] for uri in uris)
        return any(bool(self.targets.flags(column).true_count) for column in columns)


def _opener(config: Config) -> Callable[[str], Any]:
    io = load_file_io(config)
    return lambda uri: io.new_input(uri).open()


class _Purge:
    """The steps, in order; each may be repeated."""

    def __init__(self, world: _World) -> None:
        self._world = world
        self._storage = world.storage
        self._state = self._known_state()

    def run(self) -> PurgeRecord:
        self._settle_plans()
        self._exclude()
        self._learn_ids()
        for layout in self._world.layouts:
            self._purge_table(layout)
        num_documents = self._clean_documents()
        for layout in self._world.layouts:
            self._note_in_records(layout)
            self._renew_cards(layout)
        return self._prove(num_documents)

    def _known_state(self) -> PurgeState:
        """What an earlier try wrote down."""
        try:
            return PurgeState.model_validate_json(self._storage.read(self._world.state_uri))
        except ObjectMissingError:
            return PurgeState(purge_id=self._world.purge_id, started_at=datetime.now(UTC))

    def _keep(self, state: PurgeState) -> None:
        self._state = state
        self._storage.write(self._world.state_uri, state.model_dump_json(indent=1).encode())

    def _settle_plans(self) -> None:
        found = self._world.open_plans(self._world.documents())
        live = [uri for uri, is_abandoned in found if not is_abandoned]
        if live and not self._world.request.drop_open_plans:
            raise PlanIncompleteError(
                f"Plan {live[0]} names what is to be erased and is not finished "
                f"({len(live)} such plans): let it finish and publish it, or end its workers and "
                "purge with --drop-open-plans, which deletes it."
            )
        for uri, _ in found:
            self._drop(uri)

    def _drop(self, plan_uri: str) -> None:
        job = read_job(self._storage.read(join_uri(plan_uri, JOB_FILE)))
        # First what workers look for: none begins on half a plan.
        self._storage.delete([join_uri(plan_uri, JOB_FILE)])
        self._storage.delete(info.uri for info in list_folder(self._storage, plan_uri))
        self._storage.delete(info.uri for info in list_folder(self._storage, job.data_uri))
        logger.info("dropped unfinished plan %s", plan_uri)

    def _exclude(self) -> None:
        world = self._world
        entries = world.exclusions.entries_of(
            world.targets.uris, world.request.is_prefix, world.purge_id
        )
        exclude(self._storage, world.config, world.request.dataset, entries)

    def _learn_ids(self) -> None:
        """Audio ids of all contents that any table or listing knows, kept over a kill."""
        world = self._world
        infos = [*world.documents(), *world.table_objects()]
        known = Targets(
            world.targets.uris, world.targets.is_prefix, frozenset(self._state.audio_ids)
        )
        targets = known.with_keys(world.searcher.keys_in_tables(infos, known))
        self._world = replace(world, targets=targets)
        ids = tuple(sorted(targets.audio_ids))
        if ids != self._state.audio_ids or not self._storage.head(world.state_uri):
            self._keep(self._state.model_copy(update={"audio_ids": ids}))

    def _purge_table(self, layout: DatasetLayout) -> None:
        name = layout.table_name

        def keep(swaps: Mapping[str, FileSwap], versions: Mapping[str, int]) -> None:
            known = self._state.tables.get(name, TableState())
            tables = self._state.tables | {name: merged(known, swaps, versions)}
            self._keep(self._state.model_copy(update={"tables": tables}))

        known = self._state.tables.get(name, TableState()).swaps
        self._world.table(layout).run(known, self._named_by_results, keep)

    def _named_by_results(self) -> set[str]:
        """Data files that shard results name."""

        def data_uri(result: ShardResult) -> str:
            return "" if result.data_file is None else result.data_file.uri

        jobs = [i.uri for i in self._world.documents() if i.uri.endswith(f"/{JOB_FILE}")]
        plans = [uri.rpartition("/")[0] for uri in jobs]
        return {
            uri for plan in plans for uri in try_read_results(self._storage, plan, data_uri)[0]
        } - {""}

    def _clean_documents(self) -> int:
        swaps = {u: s for state in self._state.tables.values() for u, s in state.swaps.items()}
        kept = [i for i in self._world.documents() if i.uri != self._world.state_uri]
        return clean_documents(self._storage, kept, self._world.targets, swaps)

    def _note_in_records(self, layout: DatasetLayout) -> None:
        """Version records speak of the snapshots that stand now, and of how many rows went."""
        table = find_table(layout)
        taken = self._state.tables.get(layout.table_name, TableState()).versions
        assert table is not None, "only layouts with a table are purged"
        plans = plan_entries(table)
        for version, entry in version_entries(table).items():
            try:
                record = version_record(self._storage, layout, version)
            except ObjectMissingError:
                continue  # its publisher died before; who publishes again writes it
            notes = record.purges
            if version in taken and all(note.purge_id != self._world.purge_id for note in notes):
                note = PurgeNote(
                    purge_id=self._world.purge_id,
                    purged_at=datetime.now(UTC),
                    num_rows=taken[version],
                )
                notes = (*notes, note)
            total = plans[entry.plan_id].counts.num_total_rows or record.counts.num_total_rows
            new = record.model_copy(
                update={
                    "snapshot_id": entry.snapshot_id,
                    "base_snapshot_id": entry.base_snapshot_id,
                    "counts": record.counts.model_copy(update={"num_total_rows": total}),
                    "purges": notes,
                }
            )
            if new != record:
                text = new.model_dump_json(indent=1).encode()
                self._storage.write(layout.version_uri(version), text)

    def _renew_cards(self, layout: DatasetLayout) -> None:
        """Cards count rows and codes: those of versions that lost rows are made again."""
        from hcodec_core.dataset.card import CARD_JSON_FILE, write_card

        taken = self._state.tables.get(layout.table_name, TableState()).versions
        table = find_table(layout)
        assert table is not None, "only layouts with a table are purged"
        for version, entry in version_entries(table).items():
            before = version_of(table, entry.base_snapshot_id)
            card_uri = join_uri(layout.card_uri(version), CARD_JSON_FILE)
            if taken.keys() & {version, before} and self._storage.head(card_uri) is not None:
                write_card(self._storage, layout, version)

    def _prove(self, num_documents: int) -> PurgeRecord:
        world, state = self._world, self._state
        infos = [i for i in world.documents() if i.uri != world.state_uri]
        proof = world.searcher.prove([*infos, *world.table_objects()], world.targets)
        if proof.num_mentions:
            raise ValidationFailedError(
                f"What was to be erased is still named {proof.num_mentions} times, first in "
                f"{', '.join(proof.named_in[:3])}: end whatever still writes there and purge "
                "again; names in the metadata of other objects go with those objects."
            )
        swaps = [s for table in state.tables.values() for s in table.swaps.values()]
        record = PurgeRecord(
            purge_id=state.purge_id,
            dataset=world.request.dataset,
            started_at=state.started_at,
            finished_at=datetime.now(UTC),
            is_prefix=world.request.is_prefix,
            digests=tuple(world.exclusions.digest(uri) for uri in world.targets.uris),
            num_rows=sum(swap.num_rows for swap in swaps),
            num_files=len(swaps),
            num_documents=num_documents,
            versions={name: table.versions for name, table in state.tables.items()},
            proof=proof,
        )
        name = f"{record.finished_at:%Y%m%dT%H%M%S%f}-{record.purge_id}.json"
        uri = join_uri(world.folder_uri, "purges", name)
        self._storage.write(uri, record.model_dump_json(indent=1).encode())
        self._storage.delete([world.state_uri])
        return record
