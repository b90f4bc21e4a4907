"""How the dataset layer scales, measured: ``make bench-dataset``.

Every part runs in a process of its own, on synthetic data in a scratch folder:

    plan       1 000 000 objects in an inventory -> a plan
    commit     10 000 finished shards -> a snapshot, from the workers' statistics
    validate   1 000 000 rows checked as before a publish; then planned again, 1 % of them changed
    read       samples a second of our reader, WebDataset, Hugging Face streaming, MDS: the same
               rows, one process, int16 on disk and arrays [Q, T] in hand
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hcodec_core.config import StorageConfig
from hcodec_core.dataset.inventory import INVENTORY_SCHEMA, InventoryInfo, InventoryPart
from hcodec_core.dataset.plan import Plan
from hcodec_core.dataset.results import result_uri
from hcodec_core.dataset.schema import (
    WRITER_OPTIONS,
    arrow_schema,
    audio_id_of,
    stats_of_parquet,
)
from hcodec_core.dataset.tabular import read_table, write_table
from hcodec_core.jobs import FILES_FILE, DataFile, FileOutcome, Outcome, ShardResult
from hcodec_core.storage import file_uri, join_uri, open_storage, sha256_of_file
from tests.dataset.factories import World, job_of, toy_manifest

SCALE = {"objects": 1_000_000, "shards": 10_000, "rows": 1_000_000, "samples": 4_000}
READ_STREAMS = {"semantic": 2, "acoustic": 6}
READ_FRAMES = 750
Results = dict[str, Any]


def new_world(folder: Path, streams: dict[str, int] | None = None) -> World:
    root = folder / "root"
    (root / "audio").mkdir(parents=True)
    manifest = toy_manifest(streams=streams)
    return World(file_uri(root), folder, open_storage(StorageConfig()), manifest=manifest)


def path_of(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def write_inventory(world: World, count: int, changed: int = 0) -> str:
    """An inventory of objects that were never written; the first ``changed`` have other etags."""
    world.num_inventories += 1
    out_uri = join_uri(world.root_uri, "out", "inventories", str(world.num_inventories))
    part_uri = join_uri(out_uri, "part-00000.parquet")
    numbers = np.arange(count)
    uris = [f"{world.source_uri}{n % 997:03d}/utterance-{n:09d}.flac" for n in numbers]
    etags = [f"{n * 2654435761 % 2**64 + (n < changed):032x}" for n in numbers.tolist()]
    columns = {
        "uri": pa.array(uris),
        "etag": pa.array(etags),
        "size": pa.array(60_000 + numbers * 7919 % 400_000),
        "last_modified": pa.nulls(count, pa.timestamp("us", tz="UTC")),
        "metadata": pa.nulls(count, pa.map_(pa.string(), pa.string())),
    }
    write_table(world.storage, part_uri, pa.table(columns, schema=INVENTORY_SCHEMA))
    part = InventoryPart(
        source=world.source_uri, uri=part_uri, kind="folder", num_files=count, num_bytes=count
    )
    now = datetime.now(UTC)
    info = InventoryInfo(
        inventory_uri=out_uri,
        sources=(world.source_uri,),
        is_complete=True,
        parts=(part,),
        started_at=now,
        finished_at=now,
    )
    text = info.model_dump_json().encode()
    world.storage.write(join_uri(out_uri, "inventory.json"), text)
    return out_uri


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_plan(folder: Path) -> Results:
    world = new_world(folder)
    request = world.request(inventory_uri=write_inventory(world, SCALE["objects"]))
    before = peak_mib()
    from hcodec_core.dataset.plan import make_plan

    seconds, plan = timed(lambda: make_plan(world.config, world.storage, request))
    assert plan.num_files == SCALE["objects"]
    return {"seconds": seconds, "peak_mib": peak_mib(), "before_mib": before}


def shard_table(world: World, plan: Plan, files: pa.Table, num_frames: int) -> pa.Table:
    """Rows of one shard, without a loop over codes."""
    count = len(files)
    rng = np.random.default_rng(int(files["shard_index"][0].as_py()))
    uris, etags = files["uri"].to_pylist(), files["etag"].to_pylist()
    ids = [audio_id_of(uri, etag) for uri, etag in zip(uris, etags, strict=True)]
    schema = arrow_schema(world.manifest)
    constants: dict[str, Any] = {
        "start_sample": 0,
        "num_samples": num_frames * 320,
        "sample_rate": 16000,
        "num_frames": num_frames,
        "peak": 0.5,
        "loudness_db": -20.0,
        "clipped_share": 0.0,
        "container": "flac",
        "native_sample_rate": 16000,
        "native_channels": 1,
        "duration_seconds": num_frames * 0.02,
        "shard_id": files["shard_id"][0].as_py(),
        "plan_id": plan.plan_id,
        "worker_build": "{}",
    }
    columns: dict[str, Any] = {
        "audio_id": ids,
        "uri": uris,
        "etag": etags,
        "content_sha256": [2 * audio_id for audio_id in ids],
    }
    for stream in world.manifest.streams:
        width = stream.num_codebooks * num_frames
        codes = pa.array(rng.integers(0, 64, count * width, dtype=np.int32))
        offsets = pa.array(np.arange(count + 1, dtype=np.int32) * width)
        kind = schema.field(stream.name).type
        columns[stream.name] = pa.ListArray.from_arrays(offsets, codes, type=kind)
        constants[f"{stream.name}_num_codebooks"] = stream.num_codebooks
        constants[f"{stream.name}_perplexity"] = 60.0
    arrays = []
    for field in schema:
        if field.name in columns:
            arrays.append(pa.array(columns[field.name], field.type))
        elif field.name in constants:
            arrays.append(pa.repeat(pa.scalar(constants[field.name], field.type), count))
        else:
            arrays.append(pa.nulls(count, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def shards_of(files: pa.Table) -> Iterator[pa.Table]:
    index = files["shard_index"].to_numpy()
    bounds = np.searchsorted(index, np.arange(index[-1] + 2))
    for start, end in itertools.pairwise(bounds):
        yield files.slice(start, end - start)


def finish(world: World, plan: Plan, num_frames: int, *, same_file: bool = False) -> None:
    """Parquet files and results of all shards. ``same_file``: copies of one, never to be read."""
    job = job_of(world.storage, plan.plan_uri)
    known: DataFile | None = None
    for files in shards_of(read_table(world.storage, join_uri(plan.plan_uri, FILES_FILE))):
        shard_id = files["shard_id"][0].as_py()
        uri = join_uri(job.data_uri, f"{shard_id}-1.parquet")
        path_of(uri).parent.mkdir(parents=True, exist_ok=True)
        if known is None or not same_file:
            table = shard_table(world, plan, files, num_frames)
            pq.write_table(table, path_of(uri), **WRITER_OPTIONS)
            known = described(world, uri)
        else:
            os.link(path_of(known.uri), path_of(uri))
            info = world.storage.head(uri)
            known = known.model_copy(update={"uri": uri, "etag": info.etag if info else ""})
        write_shard_result(world, plan, files, known, num_frames)


def described(world: World, uri: str) -> DataFile:
    path = path_of(uri)
    info = world.storage.head(uri)
    assert info is not None
    return DataFile(
        uri=uri,
        size=info.size,
        etag=info.etag,
        sha256=sha256_of_file(path),
        stats=stats_of_parquet(pq.read_metadata(path), world.manifest),
    )


def write_shard_result(
    world: World, plan: Plan, files: pa.Table, data_file: DataFile, num_frames: int
) -> None:
    seconds = num_frames * 0.02
    outcomes = [
        FileOutcome(uri=uri, etag=etag, outcome=Outcome.TOKENS, audio_seconds=seconds)
        for uri, etag in zip(files["uri"].to_pylist(), files["etag"].to_pylist(), strict=True)
    ]
    width = sum(stream.num_codebooks for stream in world.manifest.streams)
    result = ShardResult(
        plan_id=plan.plan_id,
        shard_id=files["shard_id"][0].as_py(),
        shard_index=files["shard_index"][0].as_py(),
        attempt=1,
        worker_id="bench",
        status="done",
        data_file=data_file,
        outcomes=outcomes,
        audio_seconds=seconds * len(files),
        num_tokens=num_frames * width * len(files),
    )
    path = path_of(result_uri(plan.plan_uri, result.shard_id))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(result.model_dump_json().encode())


def bench_commit(folder: Path) -> Results:
    world = new_world(folder)
    inventory_uri = write_inventory(world, SCALE["shards"])
    plan = world.plan(inventory_uri=inventory_uri, num_shards=SCALE["shards"])
    finish(world, plan, 20, same_file=True)
    seconds, info = timed(lambda: world.commit(plan))
    assert plan.num_shards == SCALE["shards"] == info.counts.num_rows
    return {"seconds": seconds, "peak_mib": peak_mib()}


def bench_validate(folder: Path) -> Results:
    from hcodec_core.dataset.checks import validate_plan

    world = new_world(folder)
    inventory_uri = write_inventory(world, SCALE["rows"])
    plan = world.plan(inventory_uri=inventory_uri, num_shards=100)
    finish(world, plan, 20)
    commit_seconds, info = timed(lambda: world.commit(plan))
    import_seconds, _ = timed(lambda: __import__("great_expectations"))
    work = folder / "report"
    work.mkdir()
    seconds, result = timed(lambda: validate_plan(world.config, world.storage, info, work))
    assert result.passed
    world.publish(plan, info)
    changed = SCALE["rows"] // 100
    request = world.request(inventory_uri=write_inventory(world, SCALE["rows"], changed))
    from hcodec_core.dataset.plan import make_plan

    again, second = timed(lambda: make_plan(world.config, world.storage, request))
    assert second.num_changed_files == changed == second.num_files
    return {
        "seconds": seconds,
        "import_seconds": import_seconds,
        "commit_seconds": commit_seconds,
        "incremental_seconds": again,
        "peak_mib": peak_mib(),
    }


def bench_read(folder: Path) -> Results:
    from hcodec_core.dataset.export import export_dataset

    count = SCALE["samples"]
    world = new_world(folder, READ_STREAMS)
    plan = world.plan(inventory_uri=write_inventory(world, count), num_shards=8)
    finish(world, plan, READ_FRAMES)
    world.publish(plan, world.commit(plan))
    found: Results = own_reader(world)
    kinds = ["webdataset", *(["huggingface"] if has("datasets") else [])]
    kinds += ["mds"] if has("streaming") else []
    for kind in kinds:
        out = folder / kind
        export_dataset(
            world.config, world.storage, "demo", kind, file_uri(out), rows_per_file=count // 8
        )
        found[kind] = best_rate(READERS[kind], out)
    return {"rates": found}


def has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def own_reader(world: World) -> Results:
    from hcodec_core.dataset.stream import StreamOptions, open_stream

    options = StreamOptions(cache_path=world.local_path / "cache")
    stream = open_stream(world.config, "demo", options=options)
    cold = rate(lambda: (sample.codes for sample in stream))
    warm = max(rate(lambda: (sample.codes for sample in stream)) for _ in range(3))
    plain = open_stream(
        world.config,
        "demo",
        options=StreamOptions(cache_path=world.local_path / "cache", shuffle=None),
    )
    in_order = max(rate(lambda: (sample.codes for sample in plain)) for _ in range(3))
    return {"ours, first epoch": cold, "ours, later epochs": warm, "ours, in order": in_order}


def rate(samples: Callable[[], Iterator[Any]]) -> float:
    start = time.perf_counter()
    count = total = 0
    for codes in samples():
        count += 1
        total += codes["acoustic"].shape[1] + codes["semantic"].shape[1]
    assert total == count * 2 * READ_FRAMES
    assert count == SCALE["samples"]
    return count / (time.perf_counter() - start)


def best_rate(read: Callable[[Path], Iterator[Any]], folder: Path) -> float:
    return max(rate(lambda: read(folder)) for _ in range(3))


def read_webdataset(folder: Path) -> Iterator[Any]:
    import webdataset

    paths = sorted(str(path) for path in folder.glob("*.tar"))
    for sample in webdataset.WebDataset(paths, shardshuffle=8).shuffle(1000).decode():
        yield {name: sample[f"{name}.npy"] for name in READ_STREAMS}


def read_huggingface(folder: Path) -> Iterator[Any]:
    import datasets

    stream = datasets.load_dataset(str(folder), split="train", streaming=True)
    for sample in stream.with_format("numpy").shuffle(seed=0, buffer_size=1000):
        yield {name: np.stack(sample[name]) for name in READ_STREAMS}


def read_mds(folder: Path) -> Iterator[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    yield from StreamingDataset(local=str(folder), shuffle=True, batch_size=1)


READERS = {"webdataset": read_webdataset, "huggingface": read_huggingface, "mds": read_mds}
PARTS = {
    "plan": bench_plan,
    "commit": bench_commit,
    "validate": bench_validate,
    "read": bench_read,
}


def run_part(name: str) -> Results:
    """One part in a fresh process, so that its memory is its own."""
    with tempfile.TemporaryDirectory(prefix="hcodec-bench-") as folder:
        command = [sys.executable, "-m", "tests.benchmarks.bench_dataset"]
        output = Path(folder, "result.json")
        # Libraries under comparison print to both streams: the result goes through a file.
        subprocess.run([*command, "--part", name, "--folder", folder], check=True)
        result: Results = json.loads(output.read_text())
        return result


def report(results: dict[str, Results]) -> str:
    plan, commit, check = results["plan"], results["commit"], results["validate"]
    rows = [
        ("plan 1 000 000 objects", plan["seconds"], "30 s, 1024 MiB", plan["peak_mib"]),
        ("plan them again, 1 % changed", check["incremental_seconds"], "", check["peak_mib"]),
        ("commit 10 000 files", commit["seconds"], "5 s", commit["peak_mib"]),
        ("validate 1 000 000 rows", check["seconds"], "15 s", check["peak_mib"]),
    ]
    lines = [
        "# Scale of the dataset layer",
        "",
        f"`make bench-dataset` on {datetime.now(UTC):%Y-%m-%d}; {machine()}.",
        "",
        "| What | seconds | aim | peak memory, MiB |",
        "|---|---|---|---|",
        *(f"| {name} | {sec:.1f} | {aim} | {mib:.0f} |" for name, sec, aim, mib in rows),
        "",
        "Peaks are of the whole process, with the making of synthetic data; the last and second",
        f"row share one. Importing Great Expectations took {check['import_seconds']:.1f} s more.",
        "Validated rows hold 100 codes each.",
        "",
        f"Readers: {SCALE['samples']} rows of {8 * READ_FRAMES} codes, one process, shuffled",
        "unless in order, data in the page cache; best of three but for the first epoch, which",
        "decodes.",
        "",
        "| Reader | samples/s |",
        "|---|---|",
        *(f"| {name} | {value:.0f} |" for name, value in results["read"]["rates"].items()),
        "",
    ]
    return "\n".join(lines)


def machine() -> str:
    with open("/proc/meminfo") as file:
        gib = int(file.readline().split()[1]) / 1024**2
    names = ("pyarrow", "pyiceberg", "duckdb", "numpy", "webdataset", "datasets")
    versions = [platform.python_version()]
    for name in (*names, "mosaicml-streaming"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {gib:.0f} GiB, local disk, load average "
        f"{load} at the end; Python {', '.join(versions)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/dataset.md"))
    options = parser.parse_args()
    if options.part:
        result = PARTS[options.part](options.folder)
        (options.folder / "result.json").write_text(json.dumps(result))
        return
    results = {}
    for name in PARTS:
        results[name] = run_part(name)
        print(name, results[name], flush=True)
    text = report(results)
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
