"""Plans over small real files, written as the planner writes them, and reading back what came."""

from __future__ import annotations

import io
import struct
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hcodec_core.codecs import load_manifest
from hcodec_core.dataset.shards import results_by_shard
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.inference.engine import compute_class
from hcodec_core.jobs import FileOutcome, TokenizeJob
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecSpec, EncodeSettings, ShapeRule

SETTINGS = EncodeSettings(
    compute_class=compute_class("cpu"),
    segment_seconds=4.0,
    halo_seconds=0.5,
    shapes=ShapeRule(growth=1.25, batch_seconds=4.0, max_rows=4),
)
FILES_SCHEMA = pa.schema(
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


def wav(seconds: float, seed: int = 0, rate: int = 16_000) -> bytes:
    """A WAV file of tones in noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * f * time) for f in rng.uniform(80, 3000, 3))
    sound = 0.2 * tones + 0.05 * rng.standard_normal(len(time))
    data = np.clip(sound * 20_000, -32_767, 32_767).astype("<i2").tobytes()
    fmt = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVEfmt " + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def speech(num_files: int, seed: int = 0) -> dict[str, bytes]:
    """Files of 0.3 to 3 s."""
    lengths = np.random.default_rng(seed).uniform(0.3, 3.0, num_files)
    return {f"clip {i:02d}.wav": wav(length, seed + i) for i, length in enumerate(lengths)}


def write_plan(
    storage: Storage,
    root_uri: str,
    files: dict[str, bytes],
    num_shards: int = 1,
    plan: str = "plan",
    **changes: object,
) -> TokenizeJob:
    """Put ``files`` under ``root_uri/audio`` (unless there) and write a plan of them."""
    rows = []
    for number, (name, content) in enumerate(sorted(files.items())):
        uri = f"{root_uri}/audio/{name}"
        info = storage.head(uri)
        if info is None:
            storage.write(uri, content)
            info = storage.head(uri)
        assert info is not None
        shard, index = number % num_shards, number // num_shards
        rows.append(
            {
                "shard_index": shard,
                "shard_id": f"shard-{shard}-g0",
                "file_index": index,
                "uri": uri,
                "etag": info.etag,
                "size": info.size,
                "metadata": [("name", name)],
            }
        )
    rows.sort(key=lambda row: (row["shard_index"], row["file_index"]))
    plan_uri = join_uri(root_uri, "plans", plan)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, FILES_SCHEMA), sink)
    storage.write(join_uri(plan_uri, "files.parquet"), sink.getvalue())
    manifest = load_manifest("hcodec-nano")
    values = {
        "plan_id": "plan",
        "dataset": "test",
        "plan_uri": plan_uri,
        "data_uri": join_uri(root_uri, "data", plan),
        "codec_uri": "hcodec-nano",
        "manifest": manifest,
        "settings": SETTINGS,
        "num_shards": num_shards,
        "num_files": len(rows),
        "num_bytes": sum(row["size"] for row in rows),
        "lease_seconds": 6.0,
    }
    values |= changes
    values.setdefault("encode_id", CodecSpec(values["manifest"], values["settings"]).encode_id)
    job = TokenizeJob(**values)
    storage.write(job_uri(job), job.model_dump_json().encode())
    return job


def job_uri(job: TokenizeJob) -> str:
    return join_uri(job.plan_uri, "job.json")


def outcomes(storage: Storage, job: TokenizeJob) -> dict[str, FileOutcome]:
    """Outcome of each file by the last part of its name; every file has exactly one."""
    found = [o for result in results_by_shard(storage, job).values() for o in result.outcomes]
    named = {o.uri.rpartition("/")[2]: o for o in found}
    assert len(named) == len(found) == job.num_files
    return named


def contents(storage: Storage, job: TokenizeJob, max_orphans: int = 0) -> dict[str, str]:
    """Digest of each shard's Parquet file; checks that no other data file lies there.

    A process killed between its upload and its result leaves a file that no result names.
    """
    done = results_by_shard(storage, job).values()
    files = {r.shard_id: r.data_file for r in done if r.data_file is not None}
    listed = {info.uri for info in list_folder(storage, job.data_uri)}
    named = {file.uri for file in files.values()}
    assert named <= listed
    assert len(listed - named) <= max_orphans
    return {shard_id: file.sha256 for shard_id, file in files.items()}


def rows(storage: Storage, job: TokenizeJob) -> dict[str, dict]:
    """Row of each file by the last part of its name."""
    found: list[dict] = []
    for result in results_by_shard(storage, job).values():
        if result.data_file is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "x.parquet")
                storage.download(result.data_file.uri, path, result.data_file.etag)
                found += pq.read_table(path).to_pylist()
    named = {row["uri"].rpartition("/")[2]: row for row in found}
    assert len(named) == len(found)
    return named
