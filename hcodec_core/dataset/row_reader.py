"""Rows of a pinned version by file and number, as numpy arrays."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hcodec_core.dataset.file_cache import FileCache, cached_schema
from hcodec_core.dataset.pinned import Snapshot
from hcodec_core.dataset.schema import arrow_schema, codes_column, unflatten_codes
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import CodecManifest, Codes

_NARROW_SIZE = 2**16
_MAX_VIEWS = 64


@dataclass(frozen=True)
class Sample:
    """One row. ``codes``: per stream int32 [Q, T]; ``columns``: those asked for."""

    audio_id: str
    num_frames: int
    codes: Mapping[str, Codes]
    frame_spans: npt.NDArray[np.int32] | None
    columns: Mapping[str, Any]


class RowReader:
    """Rows of the data files of a snapshot by number, through a local cache."""

    def __init__(
        self,
        snapshot: Snapshot,
        streams: Sequence[str] | None,
        columns: Sequence[str],
        cache_path: Path | None,
        cache_bytes: int,
    ) -> None:
        """``streams``, ``columns``: what is read. ``cache_path`` None: a folder of its own.

        Raises ``ConfigError`` for streams or columns that there are not.
        """
        self._snapshot = snapshot
        self._streams = _chosen_streams(snapshot.manifest, streams, columns)
        self._columns = tuple(columns)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if cache_path is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="hcodec-cache-")
        folder = cache_path or Path(self._scratch.name if self._scratch else "")
        schema = self._schema()
        self._cache = FileCache(snapshot.config.storage, folder, cache_bytes, schema)
        self._views: dict[int, _FileView] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the folder stays with the first one."""
        return self.__dict__ | {"_scratch": None, "_views": {}}

    def _schema(self) -> pa.Schema:
        manifest = self._snapshot.manifest
        counts = [f"{column}_num_codebooks" for column in self._streams.values()]
        names = dict.fromkeys(
            ["audio_id", "num_frames", *self._streams.values(), *counts, *self._columns]
        )
        if manifest.is_variable_rate:
            names["frame_spans"] = None
        full = arrow_schema(manifest)
        narrow = [
            codes_column(stream.name)
            for stream in manifest.streams
            if stream.codebook_size <= _NARROW_SIZE
        ]
        return cached_schema(pa.schema([full.field(name) for name in names]), narrow)

    def sample(self, file: int, row: int) -> Sample:
        """One row. Raises ``StorageError``."""
        view = self._view(file)
        codes: dict[str, Codes] = {
            stream: unflatten_codes(
                view.flat(column, row), view.plain(f"{column}_num_codebooks", row)
            )
            for stream, column in self._streams.items()
        }
        spans = view.flat("frame_spans", row) if view.has("frame_spans") else None
        return Sample(
            audio_id=view.plain("audio_id", row),
            num_frames=view.plain("num_frames", row),
            codes=codes,
            frame_spans=spans,
            columns={name: view.plain(name, row) for name in self._columns},
        )

    def _view(self, file: int) -> _FileView:
        view = self._views.get(file)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.pop(next(iter(self._views)))
            view = self._views[file] = _FileView(self._cache.table(self._snapshot.uris[file]))
        return view


class _FileView:
    """Values of one mapped file by row number, lists without copying."""

    def __init__(self, table: pa.Table) -> None:
        batches = table.to_batches()
        self._ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)
        self._batches = batches
        self._lists: dict[tuple[str, int], tuple[Any, Any]] = {}
        self._names = frozenset(table.schema.names)

    def has(self, name: str) -> bool:
        return name in self._names

    def _find(self, row: int) -> tuple[int, int]:
        index = int(np.searchsorted(self._ends, row, side="right"))
        return index, row - int(self._ends[index]) + len(self._batches[index])

    def plain(self, name: str, row: int) -> Any:
        index, offset = self._find(row)
        value = self._batches[index].column(name)[offset].as_py()
        return dict(value) if isinstance(value, list) and name == "metadata" else value

    def flat(self, name: str, row: int) -> npt.NDArray[np.int32]:
        index, offset = self._find(row)
        known = self._lists.get((name, index))
        if known is None:
            lists = self._batches[index].column(name)
            known = lists.offsets.to_numpy(), lists.values.to_numpy()
            self._lists[name, index] = known
        offsets, values = known
        found: npt.NDArray[np.int32] = values[offsets[offset] : offsets[offset + 1]].astype(
            np.int32
        )
        return found


def _chosen_streams(
    manifest: CodecManifest, streams: Sequence[str] | None, columns: Sequence[str]
) -> dict[str, str]:
    """Columns of the streams that are read, by stream."""
    known: dict[str, str] = {stream.name: codes_column(stream.name) for stream in manifest.streams}
    names = tuple(known) if streams is None else streams
    for name in names:
        if name not in known:
            raise ConfigError(f"There is no stream {name!r}; streams: {', '.join(known)}.")
    held = arrow_schema(manifest).names
    for column in columns:
        if column not in held:
            raise ConfigError(f"There is no column {column!r}; columns: {', '.join(held)}.")
    return {name: known[name] for name in names}
