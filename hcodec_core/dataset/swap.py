"""Whole-file swaps: how rows leave the table.

Deleting rows by a filter copies files one by one and stops pruning above 200 values; here each
file that holds a row to remove is read, filtered and written again, and swapped in one commit.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hcodec_core.dataset.accounts import Accounts
from hcodec_core.dataset.schema import WRITER_OPTIONS, arrow_schema, stats_of_parquet
from hcodec_core.dataset.table import catalog_errors
from hcodec_core.dataset.tabular import each, is_in, keys_of
from hcodec_core.errors import StorageError
from hcodec_core.jobs import DataFile, Outcome
from hcodec_core.storage import Storage, join_uri, sha256_of_file
from hcodec_core.tokens import CodecManifest

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile as IcebergFile
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """Which rows leave the table when a plan is committed.

    Rows of an object that has new tokens; rows of an older content of an object whose present
    content is in quarantine; rows of objects that are gone.
    """

    replaced_uris: pa.Array
    quarantined_uris: pa.Array
    quarantined_keys: pa.Array
    gone_keys: pa.Array

    @classmethod
    def of(cls, accounts: Accounts, tombstones: pa.Table) -> Removal:
        """What the outcomes of a plan and its tombstones (columns uri, etag) remove."""
        quarantined = accounts.with_outcome(Outcome.QUARANTINED)
        return cls(
            replaced_uris=keys_of(accounts.with_outcome(Outcome.TOKENS), "uri"),
            quarantined_uris=keys_of(quarantined, "uri"),
            quarantined_keys=keys_of(quarantined, "uri", "etag"),
            gone_keys=keys_of(tombstones, "uri", "etag"),
        )

    def flags(self, rows: pa.Table) -> pa.Array:
        """Boolean array: which rows (columns uri, etag) leave."""
        uris, keys = keys_of(rows, "uri"), keys_of(rows, "uri", "etag")
        outdated = pc.and_not(
            is_in(uris, self.quarantined_uris), is_in(keys, self.quarantined_keys)
        )
        return pc.or_(
            pc.or_(is_in(uris, self.replaced_uris), outdated), is_in(keys, self.gone_keys)
        )


@dataclass(frozen=True)
class Swap:
    """One file of the table and what takes its place (None when no row of it stays)."""

    old: IcebergFile
    new: DataFile | None
    num_rows_removed: int


class Swapper:
    """Makes the swaps of one commit; ``discard`` removes what a lost race left behind."""

    def __init__(self, storage: Storage, manifest: CodecManifest, folder_uri: str) -> None:
        """Files are read from and written to ``storage``; new ones go into ``folder_uri``."""
        self._storage = storage
        self._manifest = manifest
        self._folder_uri = folder_uri
        self._written: list[str] = []

    def swap(self, table: Table, files: Sequence[IcebergFile], removal: Removal) -> list[Swap]:
        """Rewrite those of ``files`` that hold rows to remove."""
        counts = each(lambda file: self._num_to_remove(table, file, removal), files)
        touched = [(file, count) for file, count in zip(files, counts, strict=True) if count]
        logger.info("%d of %d files hold rows to remove", len(touched), len(files))
        return [
            Swap(
                file,
                self.rewrite(file.file_path, removal.flags) if count < file.record_count else None,
                count,
            )
            for file, count in touched
        ]

    def discard(self) -> None:
        """Delete the files of this object's swaps: their commit did not happen."""
        self._storage.delete(self._written)
        self._written.clear()

    @staticmethod
    def _num_to_remove(table: Table, file: IcebergFile, removal: Removal) -> int:
        with catalog_errors(f"reading {file.file_path}"):
            with table.io.new_input(file.file_path).open() as source:
                keys = pq.read_table(_as_arrow_file(source), columns=["uri", "etag"])
        return int(pc.sum(removal.flags(keys)).as_py() or 0)

    def rewrite(self, uri: str, flags: Callable[[pa.Table], pa.Array]) -> DataFile:
        """Write a file again without the rows that ``flags`` marks; read back and compared.

        Raises ``StorageError`` when what was written is not what was to stay.
        """
        new_uri = join_uri(self._folder_uri, f"swap-{uuid.uuid4().hex}.parquet")
        with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
            old_path, new_path = Path(folder, "old.parquet"), Path(folder, "new.parquet")
            self._storage.download(uri, old_path)
            with pq.ParquetFile(old_path) as old:
                self._write(old, new_path, flags)
                self._check(old, new_path, flags, uri)
            self._written.append(new_uri)
            info = self._storage.upload(new_path, new_uri)
            return DataFile(
                uri=new_uri,
                size=info.size,
                etag=info.etag,
                sha256=sha256_of_file(new_path),
                stats=stats_of_parquet(pq.read_metadata(new_path), self._manifest),
            )

    def _write(self, old: Any, path: Path, flags: Callable[[pa.Table], pa.Array]) -> None:
        schema = arrow_schema(self._manifest)
        with pq.ParquetWriter(path, schema, **WRITER_OPTIONS) as writer:
            for rows in _kept_rows(old, flags):
                if len(rows):
                    writer.write_table(rows.cast(schema), row_group_size=len(rows))

    @staticmethod
    def _check(old: Any, path: Path, flags: Callable[[pa.Table], pa.Array], uri: str) -> None:
        kept = (rows for rows in _kept_rows(old, flags) if len(rows))
        with pq.ParquetFile(path) as new:
            written = (new.read_row_group(index) for index in range(new.num_row_groups))
            for before, after in itertools.zip_longest(kept, written):
                if before is None or after is None or not before.cast(after.schema).equals(after):
                    raise StorageError(
                        f"What was written for {uri} does not hold the rows that were to stay: "
                        "nothing was changed; check this machine's disk, then try again."
                    )


def _kept_rows(file: Any, flags: Callable[[pa.Table], pa.Array]) -> Iterator[pa.Table]:
    for index in range(file.num_row_groups):
        rows = file.read_row_group(index)
        yield rows.filter(pc.invert(flags(rows)))


def _as_arrow_file(source: Any) -> Any:
    return pa.PythonFile(source, mode="r") if not isinstance(source, pa.NativeFile) else source


def iceberg_file(table: Table, file: DataFile) -> IcebergFile:
    """A file as Iceberg registers it, from the stats that its writer kept."""
    from pyiceberg.manifest import DataFile as IcebergFile
    from pyiceberg.manifest import DataFileContent, FileFormat
    from pyiceberg.typedef import Record

    stats = file.stats
    made = IcebergFile.from_args(
        content=DataFileContent.DATA,
        file_path=file.uri,
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=stats.num_rows,
        file_size_in_bytes=file.size,
        column_sizes=stats.column_sizes,
        value_counts=stats.value_counts,
        null_value_counts=stats.null_value_counts,
        nan_value_counts={},
        lower_bounds={field: bytes.fromhex(bound) for field, bound in stats.lower_bounds.items()},
        upper_bounds={field: bytes.fromhex(bound) for field, bound in stats.upper_bounds.items()},
        split_offsets=stats.split_offsets,
        sort_order_id=None,
        equality_ids=None,
        key_metadata=None,
    )
    made.spec_id = table.spec().spec_id
    return made
