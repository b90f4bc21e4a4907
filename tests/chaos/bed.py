"""The test bed: a bucket with clips, real worker processes, and the books after a fault."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hcodec_core.codecs import load_manifest
from hcodec_core.config import Config, load_config
from hcodec_core.dataset.inventory import take_inventory
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.maintenance import expire_snapshots, sweep_orphans
from hcodec_core.dataset.plan import Plan, PlanRequest, make_plan
from hcodec_core.dataset.plan_documents import BadFileBudget
from hcodec_core.dataset.quarantine import read_quarantine
from hcodec_core.dataset.schema import audio_id_of
from hcodec_core.dataset.table import ensure_table, load_table, main_snapshot_id
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.inference.engine import compute_class
from hcodec_core.jobs import JOB_FILE, read_job
from hcodec_core.storage import Storage, join_uri, open_storage
from hcodec_core.tokens import CodecSpec, EncodeSettings, ShapeRule
from tests.chaos import steps
from tests.chaos.proxy import Trap, TrapProxy
from tests.inference.plans import wav

CONFIG = """
[storage]
endpoint_url = "{endpoint}"
[access]
source_prefixes = ["{root}/audio/"]
destination_prefixes = ["{root}/out/"]
[catalog]
uri = "sqlite:///{folder}/catalog.db"
warehouse_uri = "{root}/out/warehouse"
[work]
work_uri = "{root}/out/work"
"""
NUM_CLIPS = 20
LEASE_SECONDS = 3.0
_BOOKKEEPING = ("shard_id", "plan_id", "worker_build")
_PRELOADED = (
    "tests.chaos.steps",
    "hcodec_core.inference.worker",
    "hcodec_core.models.hcodec.model",
    "pyiceberg.catalog.sql",
    "pyiceberg.io.pyarrow",
    "duckdb",
    "boto3",
    "obstore",
)

Row = dict[str, Any]


def clips() -> dict[str, bytes]:
    """Twenty short clips and one text that no decoder takes."""
    found = {f"{i % 2}/clip {i:02d}.wav": wav(0.3 + 0.04 * i, seed=i) for i in range(NUM_CLIPS)}
    return found | {"0/notes.wav": b"this is no audio at all " * 20}


def new_clip(seed: int) -> bytes:
    """A clip that ``clips`` does not have; ``seed`` 0 to 3."""
    return wav(0.5 + 0.1 * seed, seed=1000 + seed)


class Server:
    """A real S3 server, and where processes of the pipeline are forked from."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "OMP_NUM_THREADS": "1",
        }
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        # Torch and its friends are loaded once; each worker is a process of its own nevertheless.
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(_PRELOADED))
        self.reference: dict[str, Row] = {}

    def close(self) -> None:
        self._server.stop()

    def make_bucket(self) -> str:
        import boto3

        name = f"chaos-{uuid.uuid4().hex[:10]}"
        client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")
        client.create_bucket(Bucket=name)
        return name

    def age(self, bucket: str, days: float) -> None:
        """Let so many days pass for all objects of a bucket."""
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys
        for key in list(keys.values()):
            key.last_modified -= timedelta(days=days)

    def drop_bucket(self, bucket: str) -> None:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets.pop(bucket, None)


@dataclass
class Running:
    """A process of the pipeline behind a proxy of its own."""

    process: ForkServerProcess
    proxy: TrapProxy
    log_path: Path

    def wait(self, seconds: float = 90.0) -> int | None:
        """Exit code, negative for a signal."""
        self.process.join(seconds)
        if self.process.is_alive():
            raise AssertionError(f"a process does not end:\n{self.log()}")
        return self.process.exitcode

    def resume(self) -> None:
        os.kill(self._pid(), signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self._pid(), signal.SIGKILL)

    def _pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text()[-3000:] if self.log_path.exists() else ""


@dataclass
class Books:
    """What is left after a fault and its recovery; all four must be 0."""

    lost: int
    doubled: int
    differing: int
    orphans: int
    details: list[str] = field(default_factory=list)

    @property
    def are_right(self) -> bool:
        return not (self.lost or self.doubled or self.differing or self.orphans)


class Bed:
    """One dataset in a bucket of its own. Use as a context manager."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.bucket = server.make_bucket()
        self.root_uri = f"s3://{self.bucket}"
        self.folder = Path(tempfile.mkdtemp(prefix="hcodec-chaos-"))
        self.config_path = self._write_config(server.url, "direct")
        self.config: Config = load_config(self.config_path)
        self.storage: Storage = open_storage(self.config.storage)
        self.running: list[Running] = []
        self.proxies: list[TrapProxy] = []
        self.traps: list[Trap] = []
        self.quarantined = {"0/notes.wav"}
        manifest = load_manifest("hcodec-nano")
        settings = EncodeSettings(
            compute_class=compute_class("cpu"),
            shapes=ShapeRule(growth=1.5, batch_seconds=4.0, max_rows=4),
        )
        self.request = PlanRequest(
            dataset="demo",
            inventory_uri=self.root_uri,
            codec_uri="hcodec-nano",
            manifest=manifest,
            settings=settings,
            num_shards=3,
            lease_seconds=LEASE_SECONDS,
            bad_files=BadFileBudget(max_share=0.5),
        )
        self.layout = DatasetLayout(self.config, "demo", CodecSpec(manifest, settings).encode_id)

    def __enter__(self) -> Bed:
        for name, content in clips().items():
            self.put(name, content)
        return self

    def __exit__(self, *_: object) -> None:
        for running in self.running:
            if running.process.is_alive():
                running.resume()
                running.kill()
        for proxy in self.proxies:
            proxy.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.server.drop_bucket(self.bucket)

    # Sources ----------------------------------------------------------------------------------

    def uri(self, name: str) -> str:
        return f"{self.root_uri}/audio/{name}"

    def put(self, name: str, content: bytes) -> None:
        self.storage.write(self.uri(name), content)

    def delete(self, name: str) -> None:
        self.storage.delete([self.uri(name)])

    # Steps ------------------------------------------------------------------------------------

    def plan(self, prefix: str = "", **changes: Any) -> Plan:
        """List and plan; ``prefix`` bounds the source."""
        request = self.new_request(**changes)
        source = f"{self.root_uri}/audio/{prefix}"
        take_inventory(self.config, self.storage, [source], request.inventory_uri)
        return make_plan(self.config, self.storage, request)

    def new_request(self, **changes: Any) -> PlanRequest:
        name = uuid.uuid4().hex[:8]
        inventory_uri = join_uri(self.config.work.work_uri, "inventories", name)
        return self.request.model_copy(update={"inventory_uri": inventory_uri, **changes})

    def planner(self, *traps: Trap) -> Running:
        return self._spawn(steps.plan_step, traps, self.new_request(), f"{self.root_uri}/audio/")

    def worker(
        self, plan: Plan, *traps: Trap, index: int = 0, max_file_bytes: int | None = None
    ) -> Running:
        job_uri = join_uri(plan.plan_uri, JOB_FILE)
        return self._spawn(steps.work, traps, job_uri, index, max_file_bytes)

    def publisher(self, plan: Plan, *traps: Trap) -> Running:
        return self._spawn(steps.publish_step, traps, plan.plan_uri)

    def committer(self, plan: Plan, *traps: Trap) -> Running:
        return self._spawn(steps.commit_step, traps, plan.plan_uri)

    def sole_publisher(self, plan: Plan, snapshot_id: int, *traps: Trap) -> Running:
        return self._spawn(steps.publish_alone_step, traps, plan.plan_uri, snapshot_id)

    def compactor(self, *traps: Trap) -> Running:
        return self._spawn(steps.compact_step, traps, "demo")

    def worked_plan(self, prefix: str = "", **changes: Any) -> Plan:
        """A plan of which all shards are done."""
        plan = self.plan(prefix, **changes)
        self.work(plan)
        return plan

    def work(self, plan: Plan) -> None:
        worker = self.worker(plan)
        code = worker.wait()
        if code:
            raise AssertionError(f"a worker without a fault ended with {code}:\n{worker.log()}")

    def commit_root(self, plan: Plan) -> None:
        """Make the table, so that traps on metadata find the plan's commit first."""
        ensure_table(self.layout, read_job(self.storage.read(join_uri(plan.plan_uri, JOB_FILE))))

    def finish(self, plan: Plan) -> None:
        steps.finish(self.config, self.storage, plan.plan_uri)

    def _spawn(self, step: Callable[..., None], traps: tuple[Trap, ...], *values: Any) -> Running:
        self.traps += traps
        proxy = TrapProxy(self.server.url, traps)
        self.proxies.append(proxy)
        name = f"{step.__name__}-{len(self.running)}"
        config_path = self._write_config(proxy.url, name)
        log_path = self.folder / f"{name}.log"
        # Traps wait for nobody: the process starts only when the proxy knows whom to hit.
        process = self.server.context.Process(
            target=step, args=(config_path, log_path, *values), daemon=False
        )
        process.start()
        proxy.owner_pid = process.pid
        running = Running(process, proxy, log_path)
        self.running.append(running)
        return running

    def _write_config(self, endpoint: str, name: str) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(CONFIG.format(endpoint=endpoint, root=self.root_uri, folder=self.folder))
        return path

    # Recovery and books -----------------------------------------------------------------------

    def recover(self) -> None:
        """What the next scheduled runs do, until a plan is empty."""
        for running in self.running:
            for trap in running.proxy.traps:
                trap.gate.set()
            with contextlib.suppress(AssertionError):
                running.wait(30)
        for _ in range(6):
            plan = self.plan(allow_many_deletes=True)
            if plan.is_empty:
                return
            self.worker(plan).wait()
            if not self._has_failed_shards(plan):
                self.finish(plan)
        raise AssertionError("the dataset does not become current")

    def _has_failed_shards(self, plan: Plan) -> bool:
        from hcodec_core.dataset.results import read_results

        return "failed" in read_results(self.storage, plan.plan_uri, lambda r: r.status)

    def rows(self) -> list[Row]:
        """All rows that readers see, in plain form."""
        table = load_table(self.layout)
        rows = table.scan(snapshot_id=main_snapshot_id(table)).to_arrow().to_pylist()
        return [self._plain(row) for row in rows]

    def _plain(self, row: Row) -> Row:
        if row["audio_id"] != audio_id_of(row["uri"], row["etag"]):
            raise AssertionError(f"{row['uri']} has the audio_id of something else")
        kept = {name: row[name] for name in row if name not in (*_BOOKKEEPING, "audio_id")}
        return kept | {"uri": row["uri"].removeprefix(self.uri(""))}

    def books(self) -> Books:
        """Clean up as maintenance does, then compare with the fault-free dataset."""
        self.server.age(self.bucket, days=40)
        expire_snapshots(self.layout, datetime.now(UTC))
        sweep_orphans(self.storage, self.layout, dry_run=False)
        rows = self.rows()
        counts = Counter(row["uri"] for row in rows)
        expected = self._expected()
        books = Books(
            lost=len(expected.keys() - counts.keys()),
            doubled=sum(count - 1 for count in counts.values()),
            differing=sum(row != expected.get(row["uri"]) for row in rows),
            orphans=0,
        )
        orphans = [*self._orphans(), *self._wrong_quarantine()]
        books.orphans = len(orphans)
        books.details = orphans[:3]
        return books

    def _expected(self) -> dict[str, Row]:
        """What a run without faults gives: codes of an object follow from its content alone."""
        wanted = {}
        for info in list_folder(self.storage, self.uri("")):
            name = info.uri.removeprefix(self.uri(""))
            if name not in self.quarantined:
                wanted[name] = self.server.reference[info.etag] | {"uri": name}
        return wanted

    def _orphans(self) -> Iterator[str]:
        table = load_table(self.layout)
        known = {table.metadata_location, *(e.metadata_file for e in table.metadata.metadata_log)}
        known |= {snapshot.manifest_list for snapshot in table.snapshots()}
        for snapshot in table.snapshots():
            for manifest in snapshot.manifests(table.io):
                known.add(manifest.manifest_path)
                entries = manifest.fetch_manifest_entry(table.io)
                known |= {entry.data_file.file_path for entry in entries}
        listed = {info.uri for info in list_folder(self.storage, self.layout.table_uri)}
        yield from (f"orphan {uri}" for uri in sorted(listed - known))

    def _wrong_quarantine(self) -> Iterator[str]:
        held = Counter(read_quarantine(self.storage, self.layout)["uri"].to_pylist())
        wanted = {self.uri(name) for name in self.quarantined}
        for uri in wanted:
            if held[uri] < 1:
                yield f"{unquote(uri)} is missing from the quarantine"


def make_reference(server: Server) -> None:
    """Run the pipeline without faults over every content that a fault may bring."""
    with Bed(server) as bed:
        for seed in range(4):
            bed.put(f"new/{seed}.wav", new_clip(seed))
        plan = bed.worked_plan()
        bed.finish(plan)
        server.reference = {row["etag"]: row for row in bed.rows()}
        if len(server.reference) != NUM_CLIPS + 4:
            raise AssertionError(f"the reference has {len(server.reference)} rows")


def wait_for(event: Any, what: str, seconds: float = 60.0) -> None:
    if not event.wait(seconds):
        raise AssertionError(f"it did not happen in time: {what}")


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not happen in time: {what}")
        time.sleep(0.05)
