"""Data files of a version on a local disk, decoded once, mapped into memory by every reader.

A Parquet file is fetched whole, and the columns that are read are written as an Arrow file beside
its name: rows are then found by their number without decoding, by all processes of the machine.
The folder is held to a number of bytes by removing the files used longest ago; a reader that has
one open keeps it until it lets go.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hcodec_core.config import StorageConfig
from hcodec_core.errors import StorageError
from hcodec_core.storage import Storage, local_write_failed, open_storage

logger = logging.getLogger(__name__)

_SUFFIX = ".arrow"
_BATCH_ROWS = 4096
_NUM_OPEN = 64


class FileCache:
    """Decoded data files below ``folder_path``, in at most ``max_bytes`` once a file is written.

    One file is always kept, the one just asked for. May be copied to other processes.
    """

    def __init__(
        self, storage_config: StorageConfig, folder_path: Path, max_bytes: int, columns: pa.Schema
    ) -> None:
        """``columns``: what is kept of each file, narrower integers allowed."""
        self._storage_config = storage_config
        self._folder_path = folder_path
        self._max_bytes = max_bytes
        self._columns = columns
        self._open: OrderedDict[str, pa.Table] = OrderedDict()
        self._storage: tuple[int, Storage] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without maps and connections, which belong to one process."""
        return self.__dict__ | {"_open": OrderedDict(), "_storage": None}

    def table(self, uri: str) -> pa.Table:
        """The columns of one data file, mapped. Raises ``StorageError``."""
        found = self._open.get(uri)
        if found is None:
            found = self._open[uri] = self._load(uri)
            if len(self._open) > _NUM_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(uri)
        return found

    def _load(self, uri: str) -> pa.Table:
        path = self._folder_path / (self._name(uri) + _SUFFIX)
        self._folder_path.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                os.utime(path)
                return table
            except FileNotFoundError:
                self._fill(uri, path)

    def _name(self, uri: str) -> str:
        kept = ",".join(f"{field.name}:{field.type}" for field in self._columns)
        return hashlib.sha256(f"{uri}\n{kept}".encode()).hexdigest()[:32]

    def _fill(self, uri: str, path: Path) -> None:
        with _locked(path.with_suffix(".lock")):
            if path.exists():
                return
            part_path = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}.part")
            try:
                self._decode(uri, part_path)
                part_path.rename(path)
            except OSError as error:
                raise local_write_failed(error, path) from error
            finally:
                part_path.unlink(missing_ok=True)
        self._shrink(path)

    def _decode(self, uri: str, part_path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="hcodec-", dir=self._folder_path) as folder:
            source_path = Path(folder, "data.parquet")
            self._own_storage().download(uri, source_path)
            try:
                file = pq.ParquetFile(source_path)
                batches = file.iter_batches(_BATCH_ROWS, columns=self._columns.names)
                with pa.OSFile(str(part_path), "wb") as sink:
                    self._write(sink, batches)
            except pa.ArrowInvalid as error:
                raise StorageError(f"{uri} is not readable as Parquet: {error}.") from error

    def _write(self, sink: pa.NativeFile, batches: Iterator[pa.RecordBatch]) -> None:
        with pa.ipc.new_file(sink, self._columns) as writer:
            for batch in batches:
                kept = pa.Table.from_batches([batch]).select(self._columns.names)
                writer.write_table(kept.cast(self._columns))

    def _own_storage(self) -> Storage:
        """A client of this very process: connections do not survive a fork."""
        if self._storage is None or self._storage[0] != os.getpid():
            self._storage = os.getpid(), open_storage(self._storage_config)
        return self._storage[1]

    def _shrink(self, kept_path: Path) -> None:
        found = sorted(_facts(self._folder_path), key=lambda fact: fact[1])
        total = sum(size for _, _, size in found)
        for path, _, size in found:
            if total <= self._max_bytes:
                return
            if path != kept_path:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                total -= size


def _facts(folder_path: Path) -> Iterator[tuple[Path, float, int]]:
    for path in folder_path.glob(f"*{_SUFFIX}"):
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue  # another process was quicker
        yield path, facts.st_mtime, facts.st_size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time decode a file; the kernel frees the lock of a dead one."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_schema(schema: pa.Schema, narrow: Sequence[str]) -> pa.Schema:
    """``schema`` with the lists of the columns ``narrow`` as unsigned 16-bit codes."""
    fields = [
        pa.field(field.name, pa.list_(pa.uint16()) if field.name in narrow else _plain(field.type))
        for field in schema
    ]
    return pa.schema(fields)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Types without the field ids of their children."""
    if pa.types.is_list(kind):
        return pa.list_(kind.value_type)
    return pa.map_(kind.key_type, kind.item_type) if pa.types.is_map(kind) else kind
