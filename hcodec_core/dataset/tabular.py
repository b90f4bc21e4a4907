"""Small Parquet documents in object storage: inventories, file lists, quarantine."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hcodec_core.errors import FolderMissingError, StorageError
from hcodec_core.storage import ObjectInfo, Storage

Item = TypeVar("Item")
Answer = TypeVar("Answer")
_THREADS = 16
_CHUNK_ITEMS = 64
_ROW_GROUP_ROWS = 1 << 16  # a worker that looks for its shard's files reads few others


class TableSink(Protocol):
    """What takes the tables of one Parquet object, in order."""

    def write_table(self, table: pa.Table) -> None:
        """Append rows."""


def read_table(storage: Storage, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet object.

    Raises ``ObjectMissingError``, and ``StorageError`` when it is not Parquet.
    """
    data = storage.read(uri)
    try:
        return pq.read_table(pa.BufferReader(data), columns=columns)
    except pa.ArrowInvalid as error:
        raise StorageError(f"{uri} is not readable as Parquet: {error}.") from error


def write_table(storage: Storage, uri: str, table: pa.Table) -> None:
    """Create or replace a Parquet object; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    storage.write(uri, sink.getvalue())


@contextmanager
def open_table_writer(storage: Storage, uri: str, schema: pa.Schema) -> Iterator[TableSink]:
    """Write a Parquet object of any size; it appears whole at the end, or not at all."""
    with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
        path = Path(folder, "table.parquet")
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            yield writer
        storage.upload(path, uri)


def each(call: Any, items: Iterable[Item]) -> list[Any]:
    """Results of ``call`` on each item, in order, from a few threads (storage waits, not CPU)."""
    items = list(items)
    # Handing items over one by one costs as much as a small call on a local disk.
    size = max(1, min(_CHUNK_ITEMS, len(items) // (4 * _THREADS)))
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hcodec-storage") as pool:
        parts = pool.map(lambda chunk: [call(item) for item in chunk], chunks)
        return [answer for part in parts for answer in part]


def keys_of(table: pa.Table, *columns: str) -> pa.Array:
    """One comparable string per row from string columns (``uri``, ``etag``)."""
    # Large strings: the URIs of one table may be more than 2 GiB of text.
    text = pa.large_string()
    parts = [pc.cast(table[column], text).combine_chunks() for column in columns]
    return pc.binary_join_element_wise(*parts, pa.scalar("\n", text)) if parts[1:] else parts[0]


def is_in(values: pa.Array, known: pa.Array) -> pa.Array:
    """Boolean array: which of ``values`` are among ``known``."""
    return pc.is_in(values, value_set=known)


def list_folder(storage: Storage, folder_uri: str) -> list[ObjectInfo]:
    """Objects below a folder of ours; none when it was never written to."""
    try:
        return list(storage.list_objects(folder_uri.rstrip("/") + "/"))
    except FolderMissingError:
        return []
