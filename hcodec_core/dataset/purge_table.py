"""Taking objects out of one Iceberg table: out of every snapshot, and out of every file.

    rewrite   each data file that holds rows of the objects, once, without them
    branches  each snapshot that a version, branch or tag names and that knows such a file is
              written again, without a past, so that no manifest names the old file
    move      one table change: all refs to the new snapshots, the ledger with them, old ones gone
    delete    manifests that name the objects, then the old data files

Each step may be repeated, and finds what is left to do in storage and table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hcodec_core.dataset.compaction import BRANCH_PREFIX as COMPACTION_BRANCHES
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import moved_properties, version_entries
from hcodec_core.dataset.maintenance import referenced_uris
from hcodec_core.dataset.mentions import Targets, count_in_document
from hcodec_core.dataset.purge_documents import FileSwap
from hcodec_core.dataset.swap import Swapper, iceberg_file
from hcodec_core.dataset.table import (
    RefChange,
    catalog_errors,
    data_files,
    load_table,
    refs_of,
    write_detached,
)
from hcodec_core.dataset.tabular import each, list_folder
from hcodec_core.errors import ObjectMissingError
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecManifest

if TYPE_CHECKING:
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

_AUDIT_BRANCHES = "audit_"
_PURGE_BRANCHES = "purge_"

Keep = Callable[[Mapping[str, FileSwap], Mapping[str, int]], None]


@dataclass(frozen=True)
class _Held:
    """Rows of the objects in one data file."""

    num_file_rows: int
    num_rows: int
    audio_seconds: float
    num_tokens: int


@dataclass(frozen=True)
class TableReport:
    """What a purge changed in one table, or would. ``versions``: rows that leave each."""

    num_files: int
    num_rows: int
    versions: dict[str, int]


class TablePurge:
    """A purge of one table. ``named_by_results``: data files that shard results name."""

    def __init__(
        self, storage: Storage, layout: DatasetLayout, targets: Targets, purge_id: str
    ) -> None:
        """Keep the parts; nothing is read yet."""
        self._storage = storage
        self._layout = layout
        self._targets = targets
        self._branches = f"{_PURGE_BRANCHES}{purge_id}_"

    def survey(self) -> TableReport:
        """What would change."""
        table = load_table(self._layout)
        held = self._held(table)
        return TableReport(
            num_files=len(held),
            num_rows=sum(found.num_rows for found in held.values()),
            versions=self._versions(table, held, _Files(table)),
        )

    def run(
        self, known: Mapping[str, FileSwap], named_by_results: Callable[[], set[str]], keep: Keep
    ) -> None:
        """All steps. ``known``: swaps of an earlier try; ``keep`` writes down what was found."""
        table = load_table(self._layout)
        held = self._held(table)
        if held:
            files = _Files(table)
            wanted = set(held) & files.of_kept(self._is_doomed)
            loose = set(held) - wanted
            if loose:
                wanted |= loose & named_by_results()
            swaps = self._rewrite(table, held, wanted, known)
            keep(swaps, self._versions(table, held, files))
            table = self._branch(table, files, swaps)
            self._move(table, _Files(table), set(held))
        self._delete(set(held))

    # Finding --------------------------------------------------------------------------------

    def _held(self, table: Table) -> dict[str, _Held]:
        """Data files below the table's folder, or referred to, that hold rows of the objects."""
        listed = {info.uri for info in list_folder(self._storage, self._layout.table_uri)}
        uris = sorted(uri for uri in listed | referenced_uris(table) if uri.endswith(".parquet"))
        found = each(lambda uri: self._rows_in(table, uri), uris)
        return {uri: held for uri, held in zip(uris, found, strict=True) if held is not None}

    def _rows_in(self, table: Table, uri: str) -> _Held | None:
        try:
            with table.io.new_input(uri).open() as source:
                file = pq.ParquetFile(source)
                if not self._names_in(file):
                    return None
                return self._counted(file)
        except (FileNotFoundError, ObjectMissingError, pa.ArrowInvalid):
            return None  # gone, or cut off: the proof reads it again and says so

    def _names_in(self, file: Any) -> bool:
        groups = range(file.num_row_groups)
        uris = (file.read_row_group(index, columns=["uri"])["uri"] for index in groups)
        return any(pc.any(self._targets.flags(column)).as_py() for column in uris)

    def _counted(self, file: Any) -> _Held:
        books = [n for n in file.schema_arrow.names if n.endswith("_num_codebooks")]
        rows = file.read(columns=["uri", "num_frames", "duration_seconds", *books])
        gone = rows.filter(self._targets.flags(rows["uri"]))
        codes = (pc.sum(pc.multiply(gone["num_frames"], gone[name])).as_py() for name in books)
        return _Held(
            num_file_rows=len(rows),
            num_rows=len(gone),
            audio_seconds=float(pc.sum(gone["duration_seconds"]).as_py() or 0),
            num_tokens=sum(int(count or 0) for count in codes),
        )

    def _versions(self, table: Table, held: Mapping[str, _Held], files: _Files) -> dict[str, int]:
        counts = {
            version: sum(held[uri].num_rows for uri in files.live(entry.snapshot_id) if uri in held)
            for version, entry in version_entries(table).items()
            if table.snapshot_by_id(entry.snapshot_id) is not None
        }
        return {version: count for version, count in counts.items() if count}

    def _is_doomed(self, branch: str) -> bool:
        """Branches that whoever made them makes again, or that a purge left."""
        return branch.startswith((_AUDIT_BRANCHES, COMPACTION_BRANCHES, _PURGE_BRANCHES))

    # Changing -------------------------------------------------------------------------------

    def _rewrite(
        self,
        table: Table,
        held: Mapping[str, _Held],
        wanted: set[str],
        known: Mapping[str, FileSwap],
    ) -> dict[str, FileSwap]:
        manifest = CodecManifest.model_validate_json(table.properties["hcodec.codec"])
        folder_uri = join_uri(self._layout.data_uri, "purged")
        swapper = Swapper(self._storage, manifest, folder_uri)

        def swap(uri: str) -> FileSwap:
            if uri in known and self._stands(known[uri]):
                return known[uri]
            found = held[uri]
            is_empty = found.num_rows == found.num_file_rows
            new = None if is_empty else swapper.rewrite(uri, self._flags)
            return FileSwap(
                new=new,
                num_rows=found.num_rows,
                audio_seconds=found.audio_seconds,
                num_tokens=found.num_tokens,
            )

        uris = sorted(wanted)
        return dict(zip(uris, map(swap, uris), strict=True))

    def _flags(self, rows: pa.Table) -> pa.Array:
        return self._targets.flags(rows["uri"])

    def _stands(self, swap: FileSwap) -> bool:
        if swap.new is None:
            return True
        info = self._storage.head(swap.new.uri)
        return info is not None and (info.size, info.etag) == (swap.new.size, swap.new.etag)

    def _branch(self, table: Table, files: _Files, swaps: Mapping[str, FileSwap]) -> Table:
        """A snapshot without a past for each that knows a file that goes."""
        refs = refs_of(table)
        wanted = {
            ref.snapshot_id
            for name, ref in refs.items()
            if not self._is_doomed(name) and files.knows(ref.snapshot_id, set(swaps))
        }
        made = {f"{self._branches}{snapshot_id}": snapshot_id for snapshot_id in sorted(wanted)}
        snapshots = {
            branch: self._files_of(table, snapshot_id, swaps)
            for branch, snapshot_id in made.items()
            if branch not in refs
        }
        if not snapshots:
            return table
        write_detached(table, snapshots, {"hcodec.purge": self._branches.split("_")[1]})
        return load_table(self._layout)

    def _files_of(self, table: Table, snapshot_id: int, swaps: Mapping[str, FileSwap]) -> list[Any]:
        kept = []
        for file in data_files(table, snapshot_id):
            swap = swaps.get(file.file_path)
            if swap is None:
                kept.append(file)
            elif swap.new is not None:
                kept.append(iceberg_file(table, swap.new))
        return kept

    def _move(self, table: Table, files: _Files, held: set[str]) -> None:
        """All refs to the new snapshots, and the ledger with them, in one change."""
        refs = refs_of(table)
        moved = {
            int(name.removeprefix(self._branches)): ref.snapshot_id
            for name, ref in refs.items()
            if name.startswith(self._branches)
        }
        change = RefChange(table)
        stays: set[int] = set()
        for name, ref in refs.items():
            if self._is_doomed(name) and (
                name.startswith(_PURGE_BRANCHES) or files.knows(ref.snapshot_id, held)
            ):
                change.require(name, ref.snapshot_id).remove(name)
            elif ref.snapshot_id in moved:
                change.move(name, moved[ref.snapshot_id])
                stays.add(moved[ref.snapshot_id])
            else:
                change.require(name, ref.snapshot_id)
                stays.add(ref.snapshot_id)
        gone = [
            snapshot.snapshot_id
            for snapshot in table.snapshots()
            if snapshot.snapshot_id not in stays
            and (snapshot.snapshot_id in moved.values() or files.knows(snapshot.snapshot_id, held))
        ]
        if not moved and not gone:
            return
        new, old = moved_properties(table, moved, self._num_rows(table, moved))
        change.set_properties(new).remove_properties(old).forget(gone).commit()
        logger.info("%s: %d refs' snapshots written again", self._layout.table_name, len(moved))

    @staticmethod
    def _num_rows(table: Table, moved: Mapping[int, int]) -> dict[int, int]:
        """Rows of each new snapshot by the id of the old one."""
        counts = {}
        for old_id, new_id in moved.items():
            snapshot = table.snapshot_by_id(new_id)
            summary = None if snapshot is None else snapshot.summary
            total = None if summary is None else summary["total-records"]
            counts[old_id] = int(total or 0)
        return counts

    def _delete(self, held: set[str]) -> None:
        """Manifests that name the objects or their old files, then the old files themselves."""
        table = load_table(self._layout)
        needed = referenced_uris(table)
        infos = list_folder(self._storage, self._layout.table_uri)
        loose = [i.uri for i in infos if i.uri.endswith(".avro") and i.uri not in needed]
        paths = Targets(tuple(sorted(held))) if held else None

        def tells(uri: str) -> bool:
            try:
                data = self._storage.read(uri)
            except ObjectMissingError:
                return False
            named = count_in_document(uri, data, self._targets)
            return bool(named or (paths is not None and count_in_document(uri, data, paths)))

        self._storage.delete(
            [u for u, is_so in zip(loose, each(tells, loose), strict=True) if is_so]
        )
        # Last: they tell the next try, should this one be killed, what there is to do.
        self._storage.delete(sorted(held - needed))


class _Files:
    """Which data files the manifests of each snapshot know, live or as deleted."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._by_manifest: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self._known: dict[int, tuple[set[str], set[str]]] = {}

    def live(self, snapshot_id: int) -> set[str]:
        """Files whose rows a snapshot shows."""
        return self._of(snapshot_id)[0]

    def knows(self, snapshot_id: int, uris: set[str]) -> bool:
        """Whether a snapshot's manifests speak of any of these files."""
        live, deleted = self._of(snapshot_id)
        return not uris.isdisjoint(live) or not uris.isdisjoint(deleted)

    def of_kept(self, is_doomed: Callable[[str], bool]) -> set[str]:
        """Files that snapshots named by refs know, leaving out doomed branches."""
        names = {n: r.snapshot_id for n, r in refs_of(self._table).items() if not is_doomed(n)}
        found: set[str] = set()
        for snapshot_id in set(names.values()):
            found.update(*self._of(snapshot_id))
        return found

    def _of(self, snapshot_id: int) -> tuple[set[str], set[str]]:
        if snapshot_id not in self._known:
            live: set[str] = set()
            deleted: set[str] = set()
            snapshot = self._table.snapshot_by_id(snapshot_id)
            assert snapshot is not None, "refs name snapshots that are there"
            with catalog_errors("reading manifests"):
                for manifest in snapshot.manifests(self._table.io):
                    parts = self._in_manifest(manifest)
                    live |= parts[0]
                    deleted |= parts[1]
            self._known[snapshot_id] = live, deleted
        return self._known[snapshot_id]

    def _in_manifest(self, manifest: Any) -> tuple[frozenset[str], frozenset[str]]:
        from pyiceberg.manifest import ManifestEntryStatus

        path = manifest.manifest_path
        if path not in self._by_manifest:
            entries = manifest.fetch_manifest_entry(self._table.io, discard_deleted=False)
            gone = {
                e.data_file.file_path for e in entries if e.status is ManifestEntryStatus.DELETED
            }
            known = {e.data_file.file_path for e in entries}
            self._by_manifest[path] = frozenset(known - gone), frozenset(gone)
        return self._by_manifest[path]
