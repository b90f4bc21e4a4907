"""The token table: its columns, their field ids, and how codes are laid out in them.

One row holds the tokens of one audio object. Codes of a stream lie in one flat list, frame by
frame: code of codebook q in frame t is element ``t * Q + q``. Columns come in a fixed order, those
of every codec first, then those of the codec's streams, so that the ids below are the ones that an
Iceberg catalog gives when it numbers a new table itself (top level first, then nested fields).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hcodec_core.errors import ConfigError
from hcodec_core.jobs import DataFileStats
from hcodec_core.tokens import CodecManifest, Codes, StreamSpec

if TYPE_CHECKING:
    from pyiceberg.schema import Schema
    from pyiceberg.types import IcebergType

Kind = Literal["string", "int", "long", "float", "double", "list<int>", "map<string,string>"]

# Arguments of pyarrow.parquet.ParquetWriter: dictionaries keep 16-bit codes at their true size.
WRITER_OPTIONS: dict[str, Any] = {"compression": "zstd", "use_dictionary": True}
ROW_GROUP_BYTES = 96 * 1024**2
# Iceberg keeps 16 characters of text bounds, which all URIs of a bucket have in common.
METRICS_PROPERTIES = {"write.metadata.metrics.column.uri": "full"}


@dataclass(frozen=True)
class Column:
    """One top-level column. ``is_required`` columns are never null."""

    name: str
    kind: Kind
    is_required: bool
    doc: str


_COMMON = (
    Column("audio_id", "string", True, "digest of uri and etag"),
    Column("uri", "string", True, "source object"),
    Column("etag", "string", True, "etag of the source object when it was read"),
    Column("content_sha256", "string", True, "digest of the resampled PCM that was encoded"),
    Column("start_sample", "long", True, "first sample of this row in the object"),
    Column("num_samples", "long", True, "samples at the codec's rate"),
    Column("sample_rate", "int", True, "the codec's rate, Hz"),
    Column("num_frames", "int", True, "token frames (not base frames where the rate adapts)"),
    Column("peak", "float", False, "largest absolute sample"),
    Column("loudness_db", "float", False, "level of the samples, dB of full scale; null if silent"),
    Column("clipped_share", "float", False, "share of samples at full scale"),
    Column("container", "string", False, "container found in the object"),
    Column("native_sample_rate", "int", False, "rate of the object, Hz"),
    Column("native_channels", "int", False, "channels of the object"),
    Column("duration_seconds", "double", True, "length of the decoded audio"),
    Column("shard_id", "string", True, "shard that made this row"),
    Column("plan_id", "string", True, "plan that made this row"),
    Column("worker_build", "string", False, "JSON: device and library versions"),
    Column("metadata", "map<string,string>", False, "columns of the source manifest"),
    Column("frame_spans", "list<int>", False, "base frames per token, adaptive rates only"),
)


def codes_column(stream_name: str) -> str:
    """Column of a stream's codes: its name, or ``codes`` for the one stream of a fused codec."""
    return "codes" if stream_name == "fused" else stream_name


def _stream_columns(stream: StreamSpec) -> tuple[Column, ...]:
    name = codes_column(stream.name)
    return (
        Column(name, "list<int>", True, f"codes below {stream.codebook_size}, flat, frame-major"),
        Column(f"{name}_num_codebooks", "int", True, "codebooks per frame"),
        Column(f"{name}_perplexity", "double", False, "perplexity of the first codebook"),
    )


def columns_of(manifest: CodecManifest) -> tuple[Column, ...]:
    """Columns of the table of one codec, in the order of their field ids (1, 2, ...)."""
    streams = (column for stream in manifest.streams for column in _stream_columns(stream))
    return (*_COMMON, *streams)


def field_ids(manifest: CodecManifest) -> dict[str, int]:
    """Field ids by column name; nested ones as ``name.element``, ``name.key``, ``name.value``."""
    columns = columns_of(manifest)
    ids = {column.name: index for index, column in enumerate(columns, start=1)}
    for column in columns:
        parts = {"list<int>": ("element",), "map<string,string>": ("key", "value")}
        for part in parts.get(column.kind, ()):
            ids[f"{column.name}.{part}"] = len(ids) + 1
    return ids


def token_schema(manifest: CodecManifest) -> Schema:
    """Iceberg schema of the token table of ``manifest``."""
    from pyiceberg.schema import Schema
    from pyiceberg.types import NestedField

    ids = field_ids(manifest)
    return Schema(
        *(
            NestedField(
                field_id=ids[column.name],
                name=column.name,
                field_type=_iceberg_type(column, ids),
                required=column.is_required,
                doc=column.doc,
            )
            for column in columns_of(manifest)
        )
    )


def _iceberg_type(column: Column, ids: dict[str, int]) -> IcebergType:
    from pyiceberg import types

    if column.kind == "list<int>":
        return types.ListType(
            element_id=ids[f"{column.name}.element"],
            element_type=types.IntegerType(),
            element_required=True,
        )
    if column.kind == "map<string,string>":
        return types.MapType(
            key_id=ids[f"{column.name}.key"],
            key_type=types.StringType(),
            value_id=ids[f"{column.name}.value"],
            value_type=types.StringType(),
            value_required=False,
        )
    primitives: dict[str, IcebergType] = {
        "string": types.StringType(),
        "int": types.IntegerType(),
        "long": types.LongType(),
        "float": types.FloatType(),
        "double": types.DoubleType(),
    }
    return primitives[column.kind]


def arrow_schema(manifest: CodecManifest) -> pa.Schema:
    """Arrow schema to write Parquet files with: same columns, ``PARQUET:field_id`` on each."""
    ids = field_ids(manifest)
    return pa.schema([_arrow_field(column, ids) for column in columns_of(manifest)])


def _arrow_field(column: Column, ids: dict[str, int]) -> pa.Field:
    def field(name: str, kind: pa.DataType, path: str, nullable: bool) -> pa.Field:
        return pa.field(name, kind, nullable, {"PARQUET:field_id": str(ids[path])})

    name = column.name
    if column.kind == "list<int>":
        kind = pa.list_(field("element", pa.int32(), f"{name}.element", False))
    elif column.kind == "map<string,string>":
        kind = pa.map_(
            field("key", pa.string(), f"{name}.key", False),
            field("value", pa.string(), f"{name}.value", True),
        )
    else:
        kinds = {
            "string": pa.string(),
            "int": pa.int32(),
            "long": pa.int64(),
            "float": pa.float32(),
            "double": pa.float64(),
        }
        kind = kinds[column.kind]
    return field(name, kind, name, not column.is_required)


def audio_id_of(uri: str, etag: str) -> str:
    """Stable name of one content of one object (32 hex digits)."""
    return hashlib.sha256(f"{uri}\n{etag}".encode()).hexdigest()[:32]


def flatten_codes(codes: Codes) -> npt.NDArray[np.int32]:
    """Codes [Q, T] as the flat list that a row holds, int32 [T * Q]."""
    return np.ascontiguousarray(codes.T, dtype=np.int32).reshape(-1)


def unflatten_codes(flat: npt.NDArray[np.int32], num_codebooks: int) -> Codes:
    """Flat codes of a row as int32 [Q, T]. Raises ``ConfigError`` when Q does not divide them."""
    if num_codebooks < 1 or len(flat) % num_codebooks:
        raise ConfigError(f"{len(flat)} codes cannot be frames of {num_codebooks} codebooks each.")
    return np.ascontiguousarray(flat.reshape(-1, num_codebooks).T)


def stats_of_parquet(metadata: Any, manifest: CodecManifest) -> DataFileStats:
    """What a commit must know of a Parquet file, from the metadata its writer kept.

    ``metadata``: ``pyarrow.parquet.FileMetaData`` of a file written with ``arrow_schema``.
    """
    from pyiceberg.io.pyarrow import (
        compute_statistics_plan,
        data_file_statistics_from_parquet_metadata,
        parquet_path_to_id_mapping,
    )

    schema = token_schema(manifest)
    found = data_file_statistics_from_parquet_metadata(
        parquet_metadata=metadata,
        stats_columns=compute_statistics_plan(schema, METRICS_PROPERTIES),
        parquet_column_mapping=parquet_path_to_id_mapping(schema),
    ).to_serialized_dict()
    return DataFileStats(
        num_rows=found["record_count"],
        column_sizes=found["column_sizes"],
        value_counts=found["value_counts"],
        null_value_counts=found["null_value_counts"],
        lower_bounds=_hex_bounds(found["lower_bounds"]),
        upper_bounds=_hex_bounds(found["upper_bounds"]),
        split_offsets=found["split_offsets"],
    )


def _hex_bounds(bounds: dict[int, bytes | None]) -> dict[int, str]:
    return {field_id: bound.hex() for field_id, bound in bounds.items() if bound is not None}
