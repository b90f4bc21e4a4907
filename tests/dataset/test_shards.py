from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.dataset.schema import (
    METRICS_PROPERTIES,
    WRITER_OPTIONS,
    token_schema,
    unflatten_codes,
)
from hcodec_core.dataset.shards import (
    AudioFacts,
    ShardFile,
    ShardRef,
    ShardWriter,
    TokenRow,
    data_file_uri,
    fetch_plan_files,
    pending_shards,
    perplexity,
    publish_result,
    results_by_shard,
    upload_shard,
)
from hcodec_core.errors import ConfigError, StorageError
from hcodec_core.jobs import ShardResult, TokenizeJob
from hcodec_core.storage import Storage, file_uri, open_storage, sha256_of_file
from hcodec_core.tokens import (
    CodecManifest,
    CodecSpec,
    EncodeSettings,
    PartDigests,
    StreamSpec,
)

SHARD = ShardRef(0, "0123456789abcdef-g0")
BUILD = json.dumps({"device": "cpu"})


def manifest(is_variable_rate: bool = False, codebook_size: int = 1024) -> CodecManifest:
    return CodecManifest(
        name="toy",
        family="toy",
        sample_rate=16000,
        hop_length=320,
        streams=(
            StreamSpec(name="semantic", num_codebooks=1, codebook_size=codebook_size),
            StreamSpec(name="acoustic", num_codebooks=3, codebook_size=codebook_size),
        ),
        is_variable_rate=is_variable_rate,
        architecture={},
        parts=PartDigests(encoder="e" * 32, codebooks="c" * 32, decoder="d" * 32),
        weights_sha256="0" * 64,
        is_trained=False,
        num_parameters=1,
        weights_licence="Apache-2.0",
    )


def make_job(root_uri: str, codec: CodecManifest | None = None, **changes) -> TokenizeJob:
    codec = codec or manifest()
    settings = EncodeSettings(compute_class="cpu-test")
    values = {
        "plan_id": "plan1",
        "dataset": "speech",
        "plan_uri": root_uri + "/plans/plan1",
        "data_uri": root_uri + "/data/plan1",
        "codec_uri": "toy",
        "manifest": codec,
        "settings": settings,
        "encode_id": CodecSpec(codec, settings).encode_id,
        "num_shards": 2,
        "num_files": 5,
        "num_bytes": 50,
    }
    return TokenizeJob(**(values | changes))


def make_row(index: int, num_frames: int = 50, **changes) -> TokenRow:
    rng = np.random.default_rng(index)
    facts = AudioFacts(
        content_sha256=f"{index:064x}",
        num_samples=num_frames * 320,
        duration_seconds=num_frames / 50,
        peak=0.25,
        loudness_db=None if index == 1 else -20.5,
        clipped_share=0.0,
        container="flac",
        native_sample_rate=44100,
        native_channels=2,
    )
    file = ShardFile(index, f"s3://audio/ä {index}%.flac", f"etag{index}", 1000, None)
    row = TokenRow(
        file,
        facts,
        {
            "semantic": rng.integers(0, 1024, (1, num_frames), dtype=np.int32),
            "acoustic": rng.integers(0, 1024, (3, num_frames), dtype=np.int32),
        },
    )
    return replace(row, **changes)


def write(path: Path, job: TokenizeJob, rows: list[TokenRow], **options) -> ShardWriter:
    with ShardWriter(path, job, SHARD, BUILD, **options) as writer:
        for row in rows:
            writer.add(row)
    return writer


def test_rows_come_back_whole(tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path))
    rows = [make_row(index) for index in range(4)]
    rows[2] = replace(rows[2], file=replace(rows[2].file, metadata={"speaker": "a", "x": None}))
    writer = write(tmp_path / "shard.parquet", job, rows)
    assert writer.num_rows == 4
    table = pq.read_table(tmp_path / "shard.parquet").to_pylist()
    for row, back in zip(rows, table, strict=True):
        assert (back["uri"], back["etag"]) == (row.file.uri, row.file.etag)
        assert back["num_frames"] == 50
        for name in ("semantic", "acoustic"):
            books = back[f"{name}_num_codebooks"]
            flat = np.array(back[name], np.int32)
            np.testing.assert_array_equal(unflatten_codes(flat, books), row.codes[name])
            assert back[f"{name}_perplexity"] == pytest.approx(perplexity(row.codes[name][0]))
        assert back["frame_spans"] is None
        assert back["worker_build"] == BUILD
        assert (back["shard_id"], back["plan_id"]) == (SHARD.shard_id, "plan1")
    assert [back["loudness_db"] for back in table] == [-20.5, None, -20.5, -20.5]
    assert table[0]["metadata"] is None
    assert dict(table[2]["metadata"]) == {"speaker": "a", "x": None}


def test_spans_of_adaptive_rates_are_kept(tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path), manifest(is_variable_rate=True))
    spans = np.array([1, 2, 3, 1, 1], np.int32)
    rows = [make_row(0, 5, frame_spans=spans), make_row(1, 3, frame_spans=spans[:3])]
    write(tmp_path / "shard.parquet", job, rows)
    back = pq.read_table(tmp_path / "shard.parquet")
    assert back["frame_spans"].to_pylist() == [[1, 2, 3, 1, 1], [1, 2, 3]]


def test_equal_rows_give_equal_files(tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path))
    for name in ("a", "b"):
        write(tmp_path / name, job, [make_row(i) for i in range(50)], row_group_bytes=10_000)
    assert sha256_of_file(tmp_path / "a") == sha256_of_file(tmp_path / "b")


def test_row_groups_are_bounded(tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path))
    rows = [make_row(index, 250) for index in range(40)]
    write(tmp_path / "shard.parquet", job, rows, row_group_bytes=50_000)
    footer = pq.read_metadata(tmp_path / "shard.parquet")
    sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    # 4 streams' codes of 4 bytes and 512 bytes for the rest: 4512 bytes a row.
    assert sizes == [12, 12, 12, 4]


def test_codes_are_stored_small(tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path))
    write(tmp_path / "shard.parquet", job, [make_row(index, 30_000) for index in range(5)])
    num_codes = 5 * 30_000 * 4
    assert (tmp_path / "shard.parquet").stat().st_size * 8 / num_codes < 10.3
    column = pq.read_metadata(tmp_path / "shard.parquet").row_group(0)
    codecs = {column.column(i).compression for i in range(column.num_columns)}
    assert codecs == {"ZSTD"}
    assert WRITER_OPTIONS["use_dictionary"]


@pytest.mark.parametrize("is_variable_rate", [False, True])
def test_stats_are_those_that_the_catalog_reads_from_the_footer(
    tmp_path: Path, is_variable_rate: bool
) -> None:
    from pyiceberg.catalog.sql import SqlCatalog

    codec = manifest(is_variable_rate)
    job = make_job(file_uri(tmp_path), codec)
    rows = [make_row(index, 40 + index) for index in range(30)]
    if is_variable_rate:
        rows = [replace(r, frame_spans=np.ones(r.num_frames, np.int32)) for r in rows]
    writer = write(tmp_path / "shard.parquet", job, rows, row_group_bytes=10_000)
    uri = data_file_uri(job, SHARD.shard_id, 1)
    data_file = upload_shard(open_storage(StorageConfig()), writer, uri, job)
    catalog = SqlCatalog("t", uri="sqlite:///:memory:", warehouse=file_uri(tmp_path / "warehouse"))
    catalog.create_namespace("n")
    table = catalog.create_table("n.t", token_schema(codec), properties=METRICS_PROPERTIES)
    table.add_files([data_file.uri])
    (read,) = [task.file for task in table.scan().plan_files()]
    stats = data_file.stats
    assert stats.num_rows == read.record_count == 30
    assert stats.column_sizes == read.column_sizes
    assert stats.value_counts == read.value_counts
    assert stats.null_value_counts == read.null_value_counts
    assert stats.split_offsets == read.split_offsets
    assert len(stats.split_offsets) > 1
    hexed = {key: value.hex() for key, value in read.lower_bounds.items()}
    assert stats.lower_bounds == hexed
    assert stats.upper_bounds == {key: value.hex() for key, value in read.upper_bounds.items()}
    assert data_file.size == read.file_size_in_bytes
    assert table.scan().to_arrow().num_rows == 30
    # Single-value form of Iceberg, by hand: int 40 (num_frames) is little-endian.
    frames_id = table.schema().find_field("num_frames").field_id
    assert stats.lower_bounds[frames_id] == (40).to_bytes(4, "little").hex()


def test_a_full_scratch_disk_is_typed(tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path))
    with pytest.raises(StorageError, match="scratch disk"):
        ShardWriter(tmp_path / "missing" / "x.parquet", job, SHARD, BUILD)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="scratch disk"):
        write(tmp_path / "full", job, [make_row(i, 20_000) for i in range(3)], row_group_bytes=1)


def result_of(job: TokenizeJob, **changes) -> ShardResult:
    values = {
        "plan_id": job.plan_id,
        "shard_id": SHARD.shard_id,
        "shard_index": 0,
        "attempt": 1,
        "worker_id": "w1",
        "status": "done",
    }
    return ShardResult(**(values | changes))


@pytest.mark.parametrize("where", ["s3", "file"])
def test_of_two_results_one_stands_and_only_the_losers_file_goes(
    request: pytest.FixtureRequest, s3_storage: Storage, tmp_path: Path, where: str
) -> None:
    root = request.getfixturevalue("bucket_uri") if where == "s3" else file_uri(tmp_path)
    job = make_job(root)
    results = []
    for attempt in (1, 2):
        writer = write(tmp_path / f"{attempt}.parquet", job, [make_row(0)])
        uri = data_file_uri(job, SHARD.shard_id, attempt)
        data_file = upload_shard(s3_storage, writer, uri, job)
        results.append(result_of(job, attempt=attempt, data_file=data_file))
    assert publish_result(s3_storage, job, results[0])
    assert not publish_result(s3_storage, job, results[1])
    assert publish_result(s3_storage, job, results[0]), "a repeated call is the same result"
    left = [info.uri for info in s3_storage.list_objects(job.data_uri + "/")]
    assert left == [results[0].data_file.uri]
    assert results_by_shard(s3_storage, job) == {SHARD.shard_id: results[0]}
    late_failure = result_of(job, attempt=3, status="failed", error="gave up")
    assert not publish_result(s3_storage, job, late_failure)


def test_a_result_whose_answer_was_lost_keeps_its_file(
    fault_proxy, s3_storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    behind_proxy = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    job = make_job(bucket_uri)
    writer = write(tmp_path / "x.parquet", job, [make_row(0)])
    data_file = upload_shard(s3_storage, writer, data_file_uri(job, SHARD.shard_id, 1), job)
    result = result_of(job, data_file=data_file)
    fault_proxy.rule = lambda method, *_: "lose" if method == "PUT" else None
    with pytest.raises(StorageError):
        publish_result(behind_proxy, job, result)
    assert s3_storage.head(data_file.uri) is not None
    assert results_by_shard(s3_storage, job) == {SHARD.shard_id: result}


def write_plan_files(storage: Storage, job: TokenizeJob, tmp_path: Path) -> None:
    rows = [
        {
            "shard_index": shard,
            "shard_id": f"shard{shard}",
            "file_index": index,
            "uri": f"s3://audio/{shard}/{index} ü.wav",
            "etag": "e",
            "size": 10,
            "metadata": [("speaker", "s")] if index else None,
        }
        for shard, count in ((0, 2), (1, 3))
        for index in range(count)
    ]
    schema = pa.schema(
        [
            ("shard_index", pa.int32()),
            ("shard_id", pa.string()),
            ("file_index", pa.int32()),
            ("uri", pa.string()),
            ("etag", pa.string()),
            ("size", pa.int64()),
            ("metadata", pa.map_(pa.string(), pa.string())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "f.parquet", row_group_size=2)
    storage.upload(tmp_path / "f.parquet", job.plan_uri + "/files.parquet")


def test_files_of_a_shard(s3_storage: Storage, tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path))
    write_plan_files(s3_storage, job, tmp_path)
    plan = fetch_plan_files(s3_storage, job, tmp_path / "local.parquet")
    shards = plan.shards()
    assert shards == [ShardRef(0, "shard0"), ShardRef(1, "shard1")]
    files = plan.files(shards[1])
    assert [(f.file_index, f.uri) for f in files] == [
        (i, f"s3://audio/1/{i} ü.wav") for i in range(3)
    ]
    assert [f.metadata for f in files] == [None, {"speaker": "s"}, {"speaker": "s"}]
    assert pending_shards(s3_storage, job, shards) == shards
    publish_result(s3_storage, job, result_of(job, shard_id="shard1"))
    assert pending_shards(s3_storage, job, shards) == shards[:1]


def test_a_file_list_of_another_plan_is_refused(s3_storage: Storage, tmp_path: Path) -> None:
    job = make_job(file_uri(tmp_path), num_files=6)
    write_plan_files(s3_storage, job, tmp_path)
    with pytest.raises(ConfigError, match="5 files in 2 shards"):
        fetch_plan_files(s3_storage, job, tmp_path / "local.parquet")


def test_perplexity() -> None:
    assert perplexity(np.zeros(10, np.int32)) == 1.0
    assert perplexity(np.arange(8, dtype=np.int32).repeat(3)) == pytest.approx(8.0)
