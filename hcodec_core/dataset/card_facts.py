"""What a dataset card says, gathered in one pass over a version and what it replaced.

Files of rows that both versions share are read once and count for both. Rows lie in a DuckDB file,
codes are counted as they stream by, and of ids only those of replaced files are held (32 bytes a
row): memory stays bounded by what a version replaced, not by what it holds. All sums are of
integers, so they do not depend on the order in which files are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hcodec_core.dataset.card_drift import FileSample, Ints
from hcodec_core.dataset.facts import RowReader
from hcodec_core.dataset.rowfacts import CodeCounter, slices
from hcodec_core.dataset.schema import codes_column
from hcodec_core.dataset.scratch import insert, open_scratch
from hcodec_core.tokens import CodecManifest

Ids = npt.NDArray[np.bytes_]
Flags = npt.NDArray[np.bool_]

# Names under which manifests carry what a card counts, in the order in which they are looked for.
LANGUAGE_KEYS = ("language", "lang", "locale")
LICENCE_KEYS = ("licence", "license")
SPEAKER_KEYS = ("speaker", "speaker_id", "spk", "spk_id")

_PLAIN_COLUMNS = (
    "audio_id",
    "uri",
    "etag",
    "num_samples",
    "num_frames",
    "peak",
    "loudness_db",
    "clipped_share",
    "container",
    "native_sample_rate",
    "native_channels",
    "worker_build",
    "metadata",
)
_SILENT_BELOW_DB = -60.0
_TABLES = {
    "files": "uri VARCHAR, num_samples BIGINT, num_frames BIGINT, is_new BOOLEAN,"
    " has_level BOOLEAN, is_silent BOOLEAN, clipped_share FLOAT, container VARCHAR,"
    " native_sample_rate INT, native_channels INT, worker_build VARCHAR, language VARCHAR,"
    " licence VARCHAR, speaker VARCHAR",
    "metadata_keys": "key VARCHAR",
    "sides": "is_after BOOLEAN, uri VARCHAR, etag VARCHAR",
    "quarantined": "uri VARCHAR, etag VARCHAR, reason VARCHAR, version_number INT",
}


def _text_of(keys: Sequence[str]) -> str:
    return f"coalesce({', '.join(_given(key) for key in keys)})"


def _given(key: str) -> str:
    return f"nullif(trim(metadata['{key}']), '')"


_FILE_COLUMNS = (
    "uri, num_samples, num_frames, is_new, peak IS NOT NULL AS has_level,"
    # A silent file has a peak and no loudness.
    f" coalesce(loudness_db, '-inf'::FLOAT) < {_SILENT_BELOW_DB} AS is_silent,"
    " clipped_share, container, native_sample_rate, native_channels, worker_build,"
    f" {_text_of(LANGUAGE_KEYS)} AS language, {_text_of(LICENCE_KEYS)} AS licence,"
    f" {_text_of(SPEAKER_KEYS)} AS speaker"
)


@dataclass(frozen=True)
class VersionFiles:
    """Data files of a version beside those of the one before: of both, only after, only before."""

    kept: Collection[str]
    added: Collection[str]
    dropped: Collection[str]


class CardFacts:
    """A context manager around the DuckDB file; ``gather`` fills it, then it can be asked.

    Tables: ``files`` (rows of the version), ``metadata_keys``, ``sides`` (uri and etag of what
    differs by data file), ``quarantined``. ``num_before``: rows of the previous version;
    ``sample``: of its files; ``spans``: how often tokens cover 0, 1, 2... base frames, empty for a
    fixed rate.
    """

    def __init__(self, manifest: CodecManifest, work_path: Path) -> None:
        """Open an empty database in ``work_path``, which the caller removes."""
        self._manifest = manifest
        self._kept, self._added, self._new, self._dropped = (
            [CodeCounter(stream) for stream in manifest.streams] for _ in range(4)
        )
        self.sample = FileSample(manifest.streams)
        self.num_before = 0
        self.spans: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._dropped_ids: Ids = np.zeros(0, "S32")  # sorted
        self._db: Any = open_scratch(work_path, "card")
        for name, columns in _TABLES.items():
            self._db.execute(f"CREATE TABLE {name} ({columns})")

    def __enter__(self) -> CardFacts:
        """Nothing more to open."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the database."""
        self._db.close()

    @property
    def now(self) -> list[Ints]:
        """Counts of the version's codes, one array per codebook, in the order of the streams."""
        return _sums(self._kept, self._added)

    @property
    def new(self) -> list[Ints]:
        """Counts of the codes of rows that the previous version does not have."""
        return _sums(self._new)

    @property
    def before(self) -> list[Ints]:
        """Counts of the previous version's codes."""
        return _sums(self._kept, self._dropped)

    def ask(self, query: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that a query gives."""
        answer: list[tuple[Any, ...]] = self._db.execute(query, list(arguments)).fetchall()
        return answer

    def gather(self, now: RowReader, before: RowReader, files: VersionFiles) -> None:
        """Read all rows; ``before`` reads the previous version, of which only dropped files."""
        ids = [self._add_dropped(batch) for batch in self._batches(before, files.dropped)]
        self._dropped_ids = np.sort(np.concatenate([self._dropped_ids, *ids]))
        for batch in self._batches(now, files.kept):
            self._add_kept(batch)
        for batch in self._batches(now, files.added):
            self._add_added(batch)

    def add_quarantine(self, rows: pa.Table) -> None:
        """Take quarantined files: columns uri, etag, reason, version_number."""
        insert(self._db, "quarantined", rows)

    def _batches(self, rows: RowReader, uris: Collection[str]) -> Iterator[pa.RecordBatch]:
        columns = list(_PLAIN_COLUMNS)
        for stream in self._manifest.streams:
            name = codes_column(stream.name)
            columns += [name, f"{name}_num_codebooks"]
        if self._manifest.is_variable_rate:
            columns.append("frame_spans")
        return slices(rows(columns, uris), self._manifest) if uris else iter(())

    def _add_dropped(self, batch: pa.RecordBatch) -> Ids:
        _count(self._dropped, batch)
        self.num_before += batch.num_rows
        self.sample.add(batch)
        self._add_side(batch, is_after=False)
        return _ids(batch)

    def _add_kept(self, batch: pa.RecordBatch) -> None:
        _count(self._kept, batch)
        self.num_before += batch.num_rows
        self.sample.add(batch)
        self._add_rows(batch, np.zeros(batch.num_rows, np.bool_))

    def _add_added(self, batch: pa.RecordBatch) -> None:
        is_new = ~self._was_dropped(batch)
        _count(self._added, batch)
        _count(self._new, batch if is_new.all() else batch.filter(pa.array(is_new)))
        self._add_side(batch, is_after=True)
        self._add_rows(batch, is_new)

    def _was_dropped(self, batch: pa.RecordBatch) -> Flags:
        """Which rows are known from a replaced file: they were only written again."""
        if not len(self._dropped_ids):
            return np.zeros(batch.num_rows, np.bool_)
        ids = _ids(batch)
        places = np.searchsorted(self._dropped_ids, ids).clip(max=len(self._dropped_ids) - 1)
        return np.asarray(self._dropped_ids[places] == ids)

    def _add_side(self, batch: pa.RecordBatch, *, is_after: bool) -> None:
        rows = pa.table({"uri": batch.column("uri"), "etag": batch.column("etag")})
        insert(self._db, "sides", rows, f"*, {is_after} AS is_after")

    def _add_rows(self, batch: pa.RecordBatch, is_new: Flags) -> None:
        rows = pa.Table.from_batches([batch]).select(_PLAIN_COLUMNS)
        rows = rows.append_column("is_new", pa.array(is_new))
        insert(self._db, "files", rows, _FILE_COLUMNS)
        insert(self._db, "metadata_keys", rows, "unnest(map_keys(metadata)) AS key")
        if self._manifest.is_variable_rate:
            spans = batch.column("frame_spans").flatten().to_numpy()
            found = np.bincount(spans, minlength=len(self.spans))
            found[: len(self.spans)] += self.spans
            self.spans = found.astype(np.int64)


def _count(counters: Sequence[CodeCounter], batch: pa.RecordBatch) -> None:
    if not batch.num_rows:
        return
    num_frames = batch.column("num_frames").cast(pa.int64()).to_numpy()
    for counter in counters:
        counter.scan(batch, num_frames)


def _sums(*groups: Sequence[CodeCounter]) -> list[Ints]:
    """Counts of groups added up: one array per codebook of each stream."""
    streams = zip(*groups, strict=True)
    return [counts for parts in streams for counts in sum(part.counts for part in parts)]


def _ids(batch: pa.RecordBatch) -> Ids:
    return np.asarray(batch.column("audio_id").to_pylist(), dtype="S32")
