"""Facts about each row of a token table, batch by batch: what the checks then count.

Codes are read as numpy views of Arrow's own buffers, because unnesting the lists in SQL takes
several times as long; all that is not a list is left to SQL (see ``summary``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hcodec_core.dataset.schema import codes_column, columns_of
from hcodec_core.tokens import CodecManifest, StreamSpec

Flags = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_CODES_PER_SLICE = 1 << 22  # bounds the temporaries of one slice to about 100 MB
_OPTIONAL_COLUMNS = ("peak", "loudness_db", "clipped_share")
_KEPT_COLUMNS = (
    "audio_id",
    "uri",
    "etag",
    "shard_id",
    "content_sha256",
    "num_samples",
    "sample_rate",
    "num_frames",
    "duration_seconds",
    *_OPTIONAL_COLUMNS,
)


@dataclass
class CodeCounter:
    """How often each code of a stream was seen: ``counts`` int64 [Q, codebook_size]."""

    stream: StreamSpec
    counts: Ints = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        self.counts = np.zeros((self.stream.num_codebooks, self.stream.codebook_size), np.int64)

    @property
    def column(self) -> str:
        """Column of the stream's codes."""
        return codes_column(self.stream.name)

    def scan(self, batch: pa.RecordBatch, num_frames: Ints) -> tuple[Flags, Flags]:
        """Count the codes of a batch; per row: has it codes out of range, has it a wrong length.

        Rows of a wrong length are not counted: which codebook a code belongs to is not known.
        """
        codes = batch.column(self.column)
        books = _ints(batch.column(f"{self.column}_num_codebooks"))
        lengths = _ints(pc.list_value_length(codes))
        wrong_length = (lengths != num_frames * books) | (books != self.stream.num_codebooks)
        flat = _flat(codes)
        out_of_range = self._is_out_of_range(flat)
        self._count(_flat(codes.filter(pa.array(~wrong_length))) if wrong_length.any() else flat)
        return _any_per_row(out_of_range, lengths), wrong_length

    def _is_out_of_range(self, codes: npt.NDArray[np.int32]) -> Flags:
        # Seen as unsigned, a negative code is a very large one: one comparison finds both kinds.
        return codes.view(np.uint32) >= self.stream.codebook_size

    def _count(self, flat: npt.NDArray[np.int32]) -> None:
        frames = flat.reshape(-1, self.stream.num_codebooks)
        has_strays = bool(self._is_out_of_range(flat).any())
        for book in range(self.stream.num_codebooks):
            codes = frames[:, book]
            if has_strays:
                codes = codes[~self._is_out_of_range(np.ascontiguousarray(codes))]
            self.counts[book] += np.bincount(codes, minlength=self.stream.codebook_size)


def needed_columns(manifest: CodecManifest) -> list[str]:
    """Columns that ``row_facts`` reads: all required ones, statistics, and spans where used."""
    required = [column.name for column in columns_of(manifest) if column.is_required]
    spans = ["frame_spans"] if manifest.is_variable_rate else []
    return [*required, *_OPTIONAL_COLUMNS, *spans]


def flag_columns(manifest: CodecManifest) -> list[str]:
    """Boolean columns that ``row_facts`` adds, one per check of a row; true is a fault."""
    streams = [stream.name for stream in manifest.streams]
    return [
        "required_values",
        "sample_rate_agrees",
        "frames_match_samples",
        *(f"codes_in_range_{name}" for name in streams),
        *(f"codes_length_{name}" for name in streams),
    ]


def row_facts(
    batch: pa.RecordBatch, manifest: CodecManifest, counters: Iterable[CodeCounter]
) -> pa.Table:
    """Plain columns of a batch and its flags; adds its codes to ``counters``.

    ``batch`` holds ``needed_columns``. Nulls where a value is required are flagged, not raised.
    """
    num_frames = _ints(batch.column("num_frames"))
    facts: dict[str, pa.Array | Flags] = {name: batch.column(name) for name in _KEPT_COLUMNS}
    facts["required_values"] = _has_null(batch, manifest)
    facts["sample_rate_agrees"] = _ints(batch.column("sample_rate")) != manifest.sample_rate
    facts["frames_match_samples"] = _wrong_frames(batch, manifest, num_frames)
    for counter in counters:
        out_of_range, wrong_length = counter.scan(batch, num_frames)
        facts[f"codes_in_range_{counter.stream.name}"] = out_of_range
        facts[f"codes_length_{counter.stream.name}"] = wrong_length
    return pa.table(facts)


def slices(batches: Iterable[pa.RecordBatch], manifest: CodecManifest) -> Iterator[pa.RecordBatch]:
    """Cut batches so that a piece holds a bounded number of codes and at most one row more."""
    columns = [codes_column(stream.name) for stream in manifest.streams]
    for batch in batches:
        if not batch.num_rows:
            continue
        lengths = sum(_ints(pc.list_value_length(batch.column(name))) for name in columns)
        piece = np.cumsum(lengths) // _CODES_PER_SLICE
        starts = np.flatnonzero(np.diff(piece, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], batch.num_rows], strict=True):
            yield batch.slice(int(start), int(stop - start))


def _wrong_frames(batch: pa.RecordBatch, manifest: CodecManifest, num_frames: Ints) -> Flags:
    samples = _ints(batch.column("num_samples"))
    base_frames = manifest.num_frames(samples)
    too_short = samples < manifest.min_tail_samples
    if not manifest.is_variable_rate:
        return np.asarray((num_frames != base_frames) | too_short)
    spans = batch.column("frame_spans")
    lengths = _ints(pc.list_value_length(spans))
    flat = _flat(spans)
    empty_span = _any_per_row(flat < 1, lengths)
    wrong = (_sum_per_row(flat, lengths) != base_frames) | (lengths != num_frames)
    return np.asarray(wrong | empty_span | too_short)


def _has_null(batch: pa.RecordBatch, manifest: CodecManifest) -> Flags:
    found = np.zeros(batch.num_rows, np.bool_)
    for column in columns_of(manifest):
        if column.is_required and batch.column(column.name).null_count:
            found |= batch.column(column.name).is_null().to_numpy(zero_copy_only=False)
    return found


def _ints(values: pa.Array) -> Ints:
    """Integers with -1 for null: no count or rate is negative, so a null fails its check."""
    filled = values.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.asarray(filled, np.int64)


def _flat(lists: pa.Array) -> npt.NDArray[np.int32]:
    """Elements of all lists in a row, -1 for null elements; null lists have none."""
    return np.asarray(lists.flatten().fill_null(-1).to_numpy(zero_copy_only=False))


def _any_per_row(flags: Flags, lengths: Ints) -> Flags:
    if not flags.any():
        return np.zeros(len(lengths), np.bool_)
    return _sum_per_row(flags, lengths) > 0


def _sum_per_row(values: npt.NDArray[np.int32] | Flags, lengths: Ints) -> Ints:
    # reduceat gives the next row's value for an empty row, differences of a running sum do not.
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(np.maximum(lengths, 0))
    starts = ends - np.maximum(lengths, 0)
    return np.asarray(running[ends] - running[starts])
