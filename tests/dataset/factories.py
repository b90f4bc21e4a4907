"""A small dataset with everything real but the audio: objects, plans, Parquet shards, catalog.

``World.work`` does what workers do, with codes drawn from each object's content, so that tests of
commit, publish and checks need neither codec nor audio.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hcodec_core.config import AccessConfig, CatalogConfig, Config, StorageConfig, WorkConfig
from hcodec_core.dataset.commit import CommitInfo, commit_plan
from hcodec_core.dataset.inventory import InventoryInfo, take_inventory
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.plan import Plan, PlanRequest, make_plan
from hcodec_core.dataset.results import result_uri
from hcodec_core.dataset.schema import (
    WRITER_OPTIONS,
    arrow_schema,
    audio_id_of,
    codes_column,
    flatten_codes,
    stats_of_parquet,
)
from hcodec_core.dataset.tabular import read_table
from hcodec_core.dataset.versions import VersionRecord, publish
from hcodec_core.errors import QuarantineReason
from hcodec_core.jobs import (
    FILES_FILE,
    JOB_FILE,
    DataFile,
    FileOutcome,
    Outcome,
    ShardResult,
    TokenizeJob,
    read_job,
)
from hcodec_core.storage import Storage, join_uri, sha256_of_file
from hcodec_core.tokens import CodecManifest, CodecSpec, EncodeSettings, PartDigests, StreamSpec

SETTINGS = EncodeSettings(compute_class="cpu-test")
Verdict = Callable[[str], Outcome]


def toy_manifest(name: str = "toy", encoder: str = "e", streams: Any = None) -> CodecManifest:
    return CodecManifest(
        name=name,
        family="toy",
        sample_rate=16000,
        hop_length=320,
        streams=tuple(
            StreamSpec(name=stream, num_codebooks=books, codebook_size=64)
            for stream, books in (streams or {"semantic": 1, "acoustic": 4}).items()
        ),
        architecture={"width": 8},
        parts=PartDigests(encoder=encoder * 32, codebooks="c" * 32, decoder="d" * 32),
        weights_sha256="0" * 64,
        is_trained=False,
        num_parameters=1,
        weights_licence="Apache-2.0",
    )


def toy_row(job: TokenizeJob, shard_id: str, file: dict[str, Any]) -> dict[str, Any]:
    """A row whose codes follow from the object's uri and etag."""
    seed = int(hashlib.sha256(f"{file['uri']}{file['etag']}".encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(seed)
    num_frames = int(rng.integers(5, 40))
    row = {
        "audio_id": audio_id_of(file["uri"], file["etag"]),
        "uri": file["uri"],
        "etag": file["etag"],
        "content_sha256": hashlib.sha256(file["etag"].encode()).hexdigest(),
        "start_sample": 0,
        "num_samples": num_frames * 320,
        "sample_rate": 16000,
        "num_frames": num_frames,
        "peak": 0.5,
        "loudness_db": -20.0,
        "clipped_share": 0.0,
        "container": "wav",
        "native_sample_rate": 16000,
        "native_channels": 1,
        "duration_seconds": num_frames * 0.02,
        "shard_id": shard_id,
        "plan_id": job.plan_id,
        "worker_build": json.dumps({"device": "cpu"}),
        "metadata": file.get("metadata"),
    }
    for stream in job.manifest.streams:
        codes = rng.integers(0, 64, (stream.num_codebooks, num_frames), dtype=np.int32)
        name = codes_column(stream.name)
        row |= {
            name: flatten_codes(codes).tolist(),
            f"{name}_num_codebooks": stream.num_codebooks,
            f"{name}_perplexity": 12.0,
        }
    return row


def write_shard(
    storage: Storage, job: TokenizeJob, shard_id: str, rows: list[dict[str, Any]], attempt: int = 1
) -> DataFile | None:
    """A real Parquet file of rows, as a worker writes it."""
    if not rows:
        return None
    schema = arrow_schema(job.manifest)
    uri = join_uri(job.data_uri, f"{shard_id}-{attempt}.parquet")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shard.parquet")
        with pq.ParquetWriter(path, schema, **WRITER_OPTIONS) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema))
        info = storage.upload(path, uri)
        return DataFile(
            uri=uri,
            size=info.size,
            etag=info.etag,
            sha256=sha256_of_file(path),
            stats=stats_of_parquet(pq.read_metadata(path), job.manifest),
        )


def files_of(storage: Storage, plan_uri: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(storage, join_uri(plan_uri, FILES_FILE)).to_pylist()
    return rows


def job_of(storage: Storage, plan_uri: str) -> TokenizeJob:
    return read_job(storage.read(join_uri(plan_uri, JOB_FILE)))


def finish_shard(
    storage: Storage,
    job: TokenizeJob,
    files: list[dict[str, Any]],
    verdict: Verdict = lambda uri: Outcome.TOKENS,
) -> ShardResult:
    """Write one shard's Parquet file and result. ``files``: its rows of files.parquet."""
    shard_id, shard_index = files[0]["shard_id"], files[0]["shard_index"]
    outcomes, rows = [], []
    for file in files:
        outcome = verdict(file["uri"])
        bad = {"reason": QuarantineReason.UNDECODABLE, "detail": "noise"}
        extra = bad if outcome is Outcome.QUARANTINED else {}
        if outcome is Outcome.TOKENS:
            rows.append(toy_row(job, shard_id, file))
            extra = {"audio_seconds": rows[-1]["duration_seconds"]}
        outcomes.append(FileOutcome(uri=file["uri"], etag=file["etag"], outcome=outcome, **extra))
    result = ShardResult(
        plan_id=job.plan_id,
        shard_id=shard_id,
        shard_index=shard_index,
        attempt=1,
        worker_id="worker",
        status="done",
        data_file=write_shard(storage, job, shard_id, rows),
        outcomes=outcomes,
        audio_seconds=sum(row["duration_seconds"] for row in rows),
        num_tokens=sum(row["num_frames"] * 5 for row in rows),
    )
    write_result(storage, job.plan_uri, result)
    return result


def write_result(storage: Storage, plan_uri: str, result: ShardResult) -> None:
    text = result.model_dump_json().encode()
    assert storage.create(result_uri(plan_uri, result.shard_id), text)


def fail_shard(storage: Storage, job: TokenizeJob, files: list[dict[str, Any]]) -> None:
    result = ShardResult(
        plan_id=job.plan_id,
        shard_id=files[0]["shard_id"],
        shard_index=files[0]["shard_index"],
        attempt=3,
        worker_id="worker",
        status="failed",
        error="out of memory",
    )
    write_result(storage, job.plan_uri, result)


def by_shard(files: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of files.parquet, one list per shard."""
    return [list(group) for _, group in itertools.groupby(files, lambda file: file["shard_id"])]


@dataclass
class World:
    """A source folder, a destination, a catalog; ``root_uri`` is a bucket or a local folder."""

    root_uri: str
    local_path: Path
    storage: Storage
    storage_config: StorageConfig = field(default_factory=StorageConfig)
    manifest: CodecManifest = field(default_factory=toy_manifest)
    num_inventories: int = 0

    @property
    def source_uri(self) -> str:
        return join_uri(self.root_uri, "audio") + "/"

    @property
    def config(self) -> Config:
        return Config(
            storage=self.storage_config,
            access=AccessConfig(
                source_prefixes=(self.source_uri,),
                destination_prefixes=(join_uri(self.root_uri, "out"),),
            ),
            catalog=CatalogConfig(
                uri=f"sqlite:///{self.local_path}/catalog.db",
                warehouse_uri=join_uri(self.root_uri, "out", "warehouse"),
            ),
            work=WorkConfig(work_uri=join_uri(self.root_uri, "out", "work")),
        )

    def write_config(self) -> Path:
        """The configuration as a file, for commands and tasks; storage is this machine's."""
        config, path = self.config, self.local_path / "hcodec.toml"
        path.write_text(
            f"[access]\nsource_prefixes = {json.dumps(config.access.source_prefixes)}\n"
            f"destination_prefixes = {json.dumps(config.access.destination_prefixes)}\n"
            f'[catalog]\nuri = "{config.catalog.uri}"\n'
            f'warehouse_uri = "{config.catalog.warehouse_uri}"\n'
            f'[work]\nwork_uri = "{config.work.work_uri}"\n'
        )
        return path

    @property
    def layout(self) -> DatasetLayout:
        return DatasetLayout(self.config, "demo", CodecSpec(self.manifest, SETTINGS).encode_id)

    def put(self, *names: str, data: str = "audio") -> None:
        for name in names:
            self.storage.write(self.uri(name), f"{name} {data}".encode())

    def delete(self, *names: str) -> None:
        self.storage.delete([self.uri(name) for name in names])

    def uri(self, name: str) -> str:
        return self.source_uri + name

    def inventory(self, *sources: str) -> InventoryInfo:
        self.num_inventories += 1
        out_uri = join_uri(self.root_uri, "out", "inventories", str(self.num_inventories))
        return take_inventory(self.config, self.storage, sources or [self.source_uri], out_uri)

    def request(self, **changes: Any) -> PlanRequest:
        request: dict[str, Any] = {
            "dataset": "demo",
            "codec_uri": "s3://models/toy",
            "manifest": self.manifest,
            "settings": SETTINGS,
            "min_shards": 2,
        }
        if "inventory_uri" not in changes:
            changes["inventory_uri"] = self.inventory().inventory_uri
        return PlanRequest(**(request | changes))

    def plan(self, *, dry_run: bool = False, **changes: Any) -> Plan:
        return make_plan(self.config, self.storage, self.request(**changes), dry_run=dry_run)

    def files(self, plan: Plan) -> list[dict[str, Any]]:
        return files_of(self.storage, plan.plan_uri)

    def work(self, plan: Plan, verdict: Verdict = lambda uri: Outcome.TOKENS) -> list[ShardResult]:
        """Finish all shards of a plan. ``verdict``: what becomes of a file, by its URI."""
        job = job_of(self.storage, plan.plan_uri)
        shards = by_shard(self.files(plan))
        return [finish_shard(self.storage, job, files, verdict) for files in shards]

    def commit(self, plan: Plan) -> CommitInfo:
        return commit_plan(self.config, self.storage, plan.plan_uri)

    def publish(self, plan: Plan, info: CommitInfo) -> VersionRecord:
        return publish(self.config, self.storage, plan.plan_uri, info.snapshot_id)

    def version(
        self, verdict: Verdict = lambda uri: Outcome.TOKENS, **changes: Any
    ) -> VersionRecord:
        """Plan, work, commit and publish what is in the source folder now."""
        plan = self.plan(**changes)
        self.work(plan, verdict)
        return self.publish(plan, self.commit(plan))
