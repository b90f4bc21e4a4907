"""Reading a published dataset as numpy arrays, without torch.

>>> ds = open_dataset("hcodec.toml", "demo")
>>> ds[0].codes["acoustic"].shape
(4, 251)

The order of rows is that of the data files' names and of the rows in them: the same for one version
wherever it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from hcodec_core.config import Config, load_config
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import version_entries
from hcodec_core.dataset.schema import codes_column, columns_of, unflatten_codes
from hcodec_core.dataset.table import catalog_errors, find_layout, load_table
from hcodec_core.dataset.versions import resolve_version
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import CodecManifest, CodecSpec, Codes, EncodeSettings, StreamSpec

if TYPE_CHECKING:
    from pyiceberg.table import FileScanTask, Table


class DatasetInfo(BaseModel):
    """What a view shows. ``sample_rate`` in Hz, ``frame_rate`` in base frames per second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    version: str
    snapshot_id: int
    table: str
    encode_id: str
    codebook_id: str
    codec_name: str
    codec_is_trained: bool
    sample_rate: int
    frame_rate: float
    streams: tuple[StreamSpec, ...]
    num_rows: int
    num_files: int
    published_at: datetime | None


@dataclass(frozen=True)
class TokenRow:
    """Tokens of one audio object.

    ``codes``: per stream int32 [Q, T]; T is ``num_frames``. ``num_samples`` at ``sample_rate`` Hz.
    ``frame_spans``: int32 [T], base frames per token, None unless the rate adapts. ``columns``: all
    other columns of the table by name.
    """

    audio_id: str
    uri: str
    etag: str
    num_samples: int
    sample_rate: int
    num_frames: int
    duration_seconds: float
    codes: Mapping[str, Codes]
    frame_spans: npt.NDArray[np.int32] | None
    metadata: Mapping[str, str]
    columns: Mapping[str, Any] = field(repr=False)


def open_dataset(
    config: Config | Path | str,
    name: str,
    version: str = "latest",
    encode_id: str | None = None,
) -> TokenDatasetView:
    """Open one version of a dataset: ``latest``, ``v3``, or any tag or branch of its table.

    ``config``: a configuration or the path of its file. ``encode_id`` (or its first digits) chooses
    among several codecs of one dataset; without it the one published last is taken.

    Raises ``ConfigError`` when there is no such dataset or version, ``StorageError``.
    """
    config = config if isinstance(config, Config) else load_config(Path(config))
    layout = find_layout(config, name, encode_id)
    table = load_table(layout)
    resolved, snapshot_id = resolve_version(table, version)
    return TokenDatasetView(layout, table, resolved, snapshot_id)


class TokenDatasetView(Sequence[TokenRow]):
    """The rows of one snapshot; made by ``open_dataset``."""

    def __init__(self, layout: DatasetLayout, table: Table, version: str, snapshot_id: int) -> None:
        """List the snapshot's files; rows are read when they are asked for."""
        self._layout = layout
        self._table = table
        self._version = version
        self._snapshot_id = snapshot_id
        properties = table.properties
        self.manifest = CodecManifest.model_validate_json(properties["hcodec.codec"])
        self.settings = EncodeSettings.model_validate_json(properties["hcodec.settings"])
        with catalog_errors("listing the files of a version"):
            tasks = table.scan(snapshot_id=snapshot_id).plan_files()
        self._tasks = sorted(tasks, key=lambda task: task.file.file_path)
        self._ends = np.cumsum([task.file.record_count for task in self._tasks], dtype=np.int64)
        self._cached: tuple[int, pa.Table] | None = None

    @property
    def spec(self) -> CodecSpec:
        """The codec as it was run."""
        return CodecSpec(self.manifest, self.settings)

    @property
    def info(self) -> DatasetInfo:
        """What this view shows."""
        entry = version_entries(self._table).get(self._version)
        return DatasetInfo(
            dataset=self._layout.dataset,
            version=self._version,
            snapshot_id=self._snapshot_id,
            table=".".join(self._layout.table_identifier),
            encode_id=self._layout.encode_id,
            codebook_id=self.spec.codebook_id,
            codec_name=self.manifest.name,
            codec_is_trained=self.manifest.is_trained,
            sample_rate=self.manifest.sample_rate,
            frame_rate=float(self.manifest.frame_rate),
            streams=self.manifest.streams,
            num_rows=len(self),
            num_files=len(self._tasks),
            published_at=None if entry is None else entry.published_at,
        )

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        """One row, or a list of rows for a slice. Raises ``IndexError``."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"Row {index} of a dataset of {len(self)} rows.")
        file_index = int(np.searchsorted(self._ends, position, side="right"))
        rows = self._file(file_index)
        first = int(self._ends[file_index]) - self._tasks[file_index].file.record_count
        return next(self._rows_of(rows.slice(position - first, 1)))

    def __iter__(self) -> Iterator[TokenRow]:
        """All rows in order, one data file in memory at a time."""
        for file_index in range(len(self._tasks)):
            yield from self._rows_of(self._file(file_index))

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows as one Arrow table, in order; ``columns``: only these.

        Raises ``ConfigError`` for a column that there is not.
        """
        known = [column.name for column in columns_of(self.manifest)]
        names = list(known if columns is None else columns)
        for name in names:
            if name not in known:
                raise ConfigError(f"There is no column {name!r}; columns: {', '.join(known)}.")
        return self._read(self._tasks, names)

    def _file(self, file_index: int) -> pa.Table:
        if self._cached is None or self._cached[0] != file_index:
            names = [column.name for column in columns_of(self.manifest)]
            self._cached = file_index, self._read([self._tasks[file_index]], names)
        return self._cached[1]

    def _read(self, tasks: list[FileScanTask], names: list[str]) -> pa.Table:
        from pyiceberg.io.pyarrow import ArrowScan

        with catalog_errors("reading rows"):
            scan = self._table.scan(snapshot_id=self._snapshot_id, selected_fields=tuple(names))
            reader = ArrowScan(
                self._table.metadata, self._table.io, scan.projection(), scan.row_filter
            )
            return reader.to_table(tasks).select(names)

    def _rows_of(self, rows: pa.Table) -> Iterator[TokenRow]:
        streams = {stream.name: codes_column(stream.name) for stream in self.manifest.streams}
        lists = {*streams.values(), "frame_spans"}
        for batch in rows.to_batches():
            flat = {name: _as_arrays(batch.column(name)) for name in lists}
            plain = batch.drop_columns(list(lists)).to_pylist()
            for index, row in enumerate(plain):
                spans = flat["frame_spans"][index]
                row["metadata"] = dict(row["metadata"] or {})
                codes: dict[str, Codes] = {
                    stream: unflatten_codes(flat[name][index], row[f"{name}_num_codebooks"])
                    for stream, name in streams.items()
                }
                yield _row_of(row, codes, spans)


def _as_arrays(lists: pa.Array) -> list[Any]:
    """Lists of int32 as numpy views, None for null."""
    values = lists.values.to_numpy(zero_copy_only=False)
    offsets = lists.offsets.to_numpy()
    is_valid = lists.is_valid().to_numpy(zero_copy_only=False)
    return [
        values[offsets[index] : offsets[index + 1]] if is_valid[index] else None
        for index in range(len(lists))
    ]


def _row_of(
    row: dict[str, Any], codes: dict[str, Codes], spans: npt.NDArray[np.int32] | None
) -> TokenRow:
    worker_build = row.get("worker_build")
    return TokenRow(
        audio_id=row["audio_id"],
        uri=row["uri"],
        etag=row["etag"],
        num_samples=row["num_samples"],
        sample_rate=row["sample_rate"],
        num_frames=row["num_frames"],
        duration_seconds=row["duration_seconds"],
        codes=codes,
        frame_spans=spans,
        metadata=row["metadata"],
        columns=row | {"worker_build": json.loads(worker_build) if worker_build else {}},
    )
