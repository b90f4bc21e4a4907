"""The token table's schema: fixed ids, Arrow and Iceberg alike, stats without footers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.conversions import from_bytes
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.types import StringType

from hcodec_core.dataset import schema
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import CodecManifest, PartDigests, StreamSpec


def make_manifest(*streams: tuple[str, int]) -> CodecManifest:
    return CodecManifest(
        name="toy",
        family="toy",
        sample_rate=16000,
        hop_length=320,
        streams=tuple(StreamSpec(name=n, num_codebooks=q, codebook_size=64) for n, q in streams),
        architecture={},
        parts=PartDigests(encoder="e" * 32, codebooks="c" * 32, decoder="d" * 32),
        weights_sha256="0" * 64,
        is_trained=False,
        num_parameters=1,
        weights_licence="Apache-2.0",
    )


TWO_STREAMS = make_manifest(("semantic", 1), ("acoustic", 4))
FUSED = make_manifest(("fused", 8))


def test_field_ids_are_frozen() -> None:
    ids = schema.field_ids(TWO_STREAMS)
    common = {"audio_id": 1, "uri": 2, "etag": 3, "num_frames": 8, "plan_id": 17, "frame_spans": 20}
    streams = {"semantic": 21, "acoustic": 24, "acoustic_perplexity": 26}
    nested = {"metadata.key": 27, "frame_spans.element": 29, "acoustic.element": 31}
    assert {name: ids[name] for name in common | streams | nested} == common | streams | nested
    assert schema.field_ids(FUSED)["codes"] == 21


@pytest.mark.parametrize("manifest", [TWO_STREAMS, FUSED])
def test_a_catalog_keeps_the_ids(manifest: CodecManifest, tmp_path: Path) -> None:
    catalog = SqlCatalog("t", uri=f"sqlite:///{tmp_path}/c.db", warehouse=f"file://{tmp_path}/w")
    catalog.create_namespace("n")
    ours = schema.token_schema(manifest)
    assert catalog.create_table("n.t", schema=ours).schema().as_struct() == ours.as_struct()


@pytest.mark.parametrize("manifest", [TWO_STREAMS, FUSED])
def test_arrow_schema_agrees_with_iceberg(manifest: CodecManifest) -> None:
    theirs = schema_to_pyarrow(schema.token_schema(manifest), include_field_ids=True)
    ours = schema.arrow_schema(manifest)
    assert ours.names == theirs.names
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.nullable == other.nullable, mine.name
        assert mine.metadata[b"PARQUET:field_id"] == other.metadata[b"PARQUET:field_id"]
    name = schema.codes_column(manifest.streams[-1].name)
    nested, other = (s.field(name).type.value_field.metadata for s in (ours, theirs))
    assert nested[b"PARQUET:field_id"] == other[b"PARQUET:field_id"]


def test_codes_are_frame_major_and_come_back() -> None:
    codes = np.arange(12, dtype=np.int32).reshape(4, 3)
    flat = schema.flatten_codes(codes)
    assert flat[:4].tolist() == codes[:, 0].tolist()
    assert np.array_equal(schema.unflatten_codes(flat, 4), codes)
    with pytest.raises(ConfigError, match="12 codes"):
        schema.unflatten_codes(flat, 5)


def test_audio_id_separates_uri_and_etag() -> None:
    assert schema.audio_id_of("a", "b") == schema.audio_id_of("a", "b")
    assert len({schema.audio_id_of(*pair) for pair in [("a", "bc"), ("ab", "c"), ("a", "b")]}) == 3


def test_stats_come_from_the_writer() -> None:
    rows = {
        "audio_id": "i", "etag": "e", "content_sha256": "s", "start_sample": 0, "num_samples": 640,
        "sample_rate": 16000, "num_frames": 2, "duration_seconds": 0.04, "shard_id": "x",
        "plan_id": "p", "codes": [1, 2, 3, 4], "codes_num_codebooks": 2,
    }  # fmt: skip
    arrow = schema.arrow_schema(make_manifest(("fused", 2)))
    table = pa.Table.from_pylist(
        [rows | {"uri": u} for u in ("s3://bucket/long/name/a", "s3://bucket/long/name/z")], arrow
    )
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, arrow, **schema.WRITER_OPTIONS) as writer:
        writer.write_table(table)
    stats = schema.stats_of_parquet(pq.read_metadata(sink), make_manifest(("fused", 2)))
    assert stats.num_rows == 2
    assert (
        from_bytes(StringType(), bytes.fromhex(stats.lower_bounds[2])) == "s3://bucket/long/name/a"
    )
    assert (
        from_bytes(StringType(), bytes.fromhex(stats.upper_bounds[2])) == "s3://bucket/long/name/z"
    )
    assert stats.null_value_counts[9] == 2
    assert 9 not in stats.lower_bounds
    assert set(stats.column_sizes) <= set(schema.field_ids(make_manifest(("fused", 2))).values())
