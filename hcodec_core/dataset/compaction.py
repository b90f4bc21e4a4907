"""Compaction: many small data files become few, and no row changes.

Small files are written together again on a branch of their own, read back and compared row by row
with what they replace, and only then does ``main`` move, required to be where the compaction began.
Versions keep their tags and files; readers of the latest version, and the versions that follow,
get the larger files. A plan that was committed meanwhile is committed once more, on top.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import CompactionEntry, compaction_property
from hcodec_core.dataset.schema import (
    ROW_GROUP_BYTES,
    WRITER_OPTIONS,
    arrow_schema,
    stats_of_parquet,
)
from hcodec_core.dataset.swap import iceberg_file
from hcodec_core.dataset.table import (
    MAIN,
    RefChange,
    SnapshotChange,
    data_files,
    load_table,
    main_snapshot_id,
    refs_of,
)
from hcodec_core.errors import CommitConflictError, StorageError
from hcodec_core.jobs import DataFile
from hcodec_core.storage import Storage, join_uri, sha256_of_file
from hcodec_core.tokens import CodecManifest

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile as IcebergFile
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

BRANCH_PREFIX = "compact_"
_COMPARED_ROWS = 1024


@dataclass(frozen=True)
class FileSizes:
    """Files below ``small_bytes`` are put together to files of about ``target_bytes``."""

    small_bytes: int = 32 * 1024**2
    target_bytes: int = 128 * 1024**2


class CompactionReport(BaseModel):
    """What a compaction did, or would do: ``num_files_before`` small files become fewer.

    ``snapshot_id`` is None in a dry run and when there was nothing to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_dry_run: bool
    num_files_before: int
    num_files_after: int
    num_rows: int
    num_bytes: int
    snapshot_id: int | None = None


def compact(
    storage: Storage,
    layout: DatasetLayout,
    sizes: FileSizes = FileSizes(),
    *,
    dry_run: bool = True,
) -> CompactionReport:
    """Write the small files of ``main`` together, on the caller's dataset lock.

    Raises ``CommitConflictError`` when another writer moved ``main`` meanwhile (nothing changed:
    run it again), ``StorageError`` when what was written is not what was read.
    """
    table = load_table(layout)
    base_id = main_snapshot_id(table)
    assert base_id is not None, "load_table returns tables with a main branch only"
    groups = _groups(data_files(table, base_id), sizes)
    old = [file for group in groups for file in group]
    report = CompactionReport(
        is_dry_run=dry_run,
        num_files_before=len(old),
        num_files_after=len(groups),
        num_rows=sum(file.record_count for file in old),
        num_bytes=sum(file.file_size_in_bytes for file in old),
    )
    if dry_run or not groups:
        return report
    writer = _Writer(storage, layout, _manifest_of(table))
    try:
        new = [writer.merge(group) for group in groups]
        table = _without_leftovers(table, layout)
        branch, snapshot_id = _commit(table, base_id, old, new)
    except CommitConflictError:
        writer.discard()
        raise
    # From here on the branch names the files: if main moved, the next compaction removes both.
    _move_main(
        load_table(layout),
        branch,
        CompactionEntry(
            snapshot_id=snapshot_id,
            base_snapshot_id=base_id,
            compacted_at=datetime.now(UTC),
            num_files_before=len(old),
            num_files_after=len(new),
        ),
    )
    logger.info("%d files of %s became %d", len(old), layout.table_name, len(new))
    return report.model_copy(update={"snapshot_id": snapshot_id})


def _manifest_of(table: Table) -> CodecManifest:
    return CodecManifest.model_validate_json(table.properties["hcodec.codec"])


def _groups(files: Sequence[IcebergFile], sizes: FileSizes) -> list[list[IcebergFile]]:
    """Small files in the order of their names, dealt into groups of two and more."""
    small = sorted(
        (file for file in files if file.file_size_in_bytes < sizes.small_bytes),
        key=lambda file: file.file_path,
    )
    groups: list[list[IcebergFile]] = [[]]
    num_bytes = 0
    for file in small:
        if num_bytes >= sizes.target_bytes:
            groups.append([])
            num_bytes = 0
        groups[-1].append(file)
        num_bytes += file.file_size_in_bytes
    return [group for group in groups if len(group) > 1]


def _without_leftovers(table: Table, layout: DatasetLayout) -> Table:
    """Remove branches of compactions that died; their files are then swept."""
    branches = [name for name in refs_of(table) if name.startswith(BRANCH_PREFIX)]
    if not branches:
        return table
    change = RefChange(table)
    for branch in branches:
        change.require(branch, refs_of(table)[branch].snapshot_id).remove(branch)
    change.commit()
    return load_table(layout)


def _commit(
    table: Table, base_id: int, old: Sequence[IcebergFile], new: Sequence[DataFile]
) -> tuple[str, int]:
    """Branch and snapshot in which ``new`` stand for ``old``."""
    if main_snapshot_id(table) != base_id:
        raise CommitConflictError("Another version was published meanwhile: compact again.")
    branch = f"{BRANCH_PREFIX}{uuid.uuid4().hex[:12]}"
    change = SnapshotChange(table, branch, base_id)
    added = [iceberg_file(table, file) for file in new]
    snapshot_id = change.stage(added, list(old), {"hcodec.compaction-of": str(base_id)})
    change.commit({})
    return branch, snapshot_id


def _move_main(table: Table, branch: str, entry: CompactionEntry) -> None:
    """``main`` to the new snapshot, if it still is where the compaction began."""
    change = RefChange(table).require(MAIN, entry.base_snapshot_id)
    change.require(branch, entry.snapshot_id).set_branch(MAIN, entry.snapshot_id).remove(branch)
    change.set_properties(compaction_property(entry)).commit()


class _Writer:
    """Writes groups of files together; ``discard`` removes what a lost race left behind."""

    def __init__(self, storage: Storage, layout: DatasetLayout, manifest: CodecManifest) -> None:
        self._storage = storage
        self._folder_uri = join_uri(layout.data_uri, "compacted")
        self._manifest = manifest
        self._written: list[str] = []

    def merge(self, group: Sequence[IcebergFile]) -> DataFile:
        """One file with the rows of ``group``, in order; read back and compared."""
        uri = join_uri(self._folder_uri, f"{uuid.uuid4().hex}.parquet")
        with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
            paths = [Path(folder, f"{index}.parquet") for index in range(len(group))]
            for file, path in zip(group, paths, strict=True):
                self._storage.download(file.file_path, path)
            merged_path, back_path = Path(folder, "merged.parquet"), Path(folder, "back.parquet")
            self._write(paths, merged_path)
            self._written.append(uri)
            info = self._storage.upload(merged_path, uri)
            self._storage.download(uri, back_path, info.etag)
            self._check_same(paths, back_path, uri)
            return DataFile(
                uri=uri,
                size=info.size,
                etag=info.etag,
                sha256=sha256_of_file(back_path),
                stats=stats_of_parquet(pq.read_metadata(back_path), self._manifest),
            )

    def discard(self) -> None:
        """Delete what was written: its commit did not happen."""
        self._storage.delete(self._written)

    def _write(self, paths: Sequence[Path], merged_path: Path) -> None:
        schema = arrow_schema(self._manifest)
        held: list[pa.Table] = []
        with pq.ParquetWriter(merged_path, schema, **WRITER_OPTIONS) as writer:
            for piece in self._pieces(paths):
                held.append(piece)
                if sum(table.nbytes for table in held) >= ROW_GROUP_BYTES:
                    rows = pa.concat_tables(held)
                    writer.write_table(rows, row_group_size=len(rows))
                    held.clear()
            if held:
                rows = pa.concat_tables(held)
                writer.write_table(rows, row_group_size=max(1, len(rows)))

    def _pieces(self, paths: Sequence[Path]) -> Iterator[pa.Table]:
        schema = arrow_schema(self._manifest)
        for path in paths:
            with pq.ParquetFile(path) as file:
                for index in range(file.num_row_groups):
                    yield file.read_row_group(index).select(schema.names).cast(schema)

    def _check_same(self, old_paths: Sequence[Path], new_path: Path, uri: str) -> None:
        pairs = itertools.zip_longest(
            _slices(self._pieces(old_paths)), _slices(self._pieces([new_path]))
        )
        for before, after in pairs:
            if before is None or after is None or not before.equals(after):
                raise StorageError(
                    f"{uri} does not hold the rows that it was made from: nothing was changed; "
                    "check the storage and this machine, then compact again."
                )


def _slices(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, in tables of ``_COMPARED_ROWS``."""
    held = next(tables, None)
    while held is not None:
        while len(held) < _COMPARED_ROWS and (more := next(tables, None)) is not None:
            held = pa.concat_tables([held, more])
        yield held.slice(0, _COMPARED_ROWS)
        held = held.slice(_COMPARED_ROWS) if len(held) > _COMPARED_ROWS else next(tables, None)
