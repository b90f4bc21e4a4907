"""The test bed: a bucket with clips, real worker processes, and the books after a fault."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from hcodec_core.codecs import load_manifest
from hcodec_core.config import Config, load_config
from hcodec_core.dataset.inventory import take_inventory
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.plan import Plan, PlanRequest, make_plan
from hcodec_core.dataset.plan_documents import BadFileBudget
from hcodec_core.dataset.table import ensure_table
from hcodec_core.inference.engine import compute_class
from hcodec_core.jobs import JOB_FILE, read_job
from hcodec_core.storage import Storage, join_uri, open_storage
from hcodec_core.tokens import CodecSpec, EncodeSettings, ShapeRule
from tests.chaos import clocks, steps
from tests.chaos.books import Bookkeeper, Books, Row
from tests.chaos.clocks import JumpingClock
from tests.chaos.patience import (
    STILL_SECONDS,
    NotHereError,
    NotHitError,
    patiently,
    wait_until,
)
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
MAX_ATTEMPTS = 30
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
        self._folder = tempfile.TemporaryDirectory(prefix="hcodec-chaos-server-")
        self.has_clocks = False
        # Torch and its friends are loaded once; each worker is a process of its own nevertheless.
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(_PRELOADED))
        self._start_fork_server()
        self.reference: dict[str, Row] = {}
        self.processes: list[ForkServerProcess] = []

    def _start_fork_server(self) -> None:
        library = clocks.build_library(Path(self._folder.name))
        if library is not None:
            os.environ["LD_PRELOAD"] = str(library)
        forkserver.ensure_running()
        self.has_clocks = library is not None
        os.environ.pop("LD_PRELOAD", None)

    def close(self) -> None:
        """End the server, and processes that beds could not end any more."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        self._server.stop()
        self._folder.cleanup()

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

    def wait(self, still_seconds: float = STILL_SECONDS) -> int | None:
        """Exit code, negative for a signal; waits as long as the process asks storage anything."""
        try:
            wait_until(self._has_ended, "a process ends", self.pulse, still_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log()}") from error
        return self.process.exitcode

    def killed_by(self, *traps: Trap) -> None:
        """Wait for its end, which must be that of a trap."""
        code = self.wait()
        if not any(trap.hits for trap in traps):
            raise NotHitError(f"no request was like {' or '.join(t.pattern for t in traps)}")
        if code != -9:
            raise AssertionError(f"it ended with {code} and not by force:\n{self.log()}")

    def reach(self, trap: Trap) -> None:
        """Wait until a trap has struck. Raises ``NotHitError`` when the process ends before."""
        wait_until(lambda: trap.hit.is_set() or self._has_ended(), trap.pattern, self.pulse)
        if not trap.hit.is_set():
            raise NotHitError(f"it ended before a request like {trap.pattern}:\n{self.log()}")

    def wait_or_stop(self) -> None:
        """Wait until it has ended, or a trap has stopped it (SIGSTOP)."""
        stops = [trap for trap in self.proxy.traps if trap.deed == "stop"]
        wait_until(
            lambda: self._has_ended() or any(trap.hit.is_set() for trap in stops),
            "a process ends or is stopped",
            self.pulse,
        )

    def pulse(self) -> object:
        """Changes as long as the process does anything that can be seen from outside."""
        size = self.log_path.stat().st_size if self.log_path.exists() else 0
        return self.proxy.num_requests, size

    def resume(self) -> None:
        os.kill(self._pid(), signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self._pid(), signal.SIGKILL)

    def _has_ended(self) -> bool:
        return not self.process.is_alive()

    def _pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text()[-3000:] if self.log_path.exists() else ""


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
        self.mounts: list[Path] = []
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
            # Attempts that only a loaded machine takes from a slow worker are not what is tested.
            max_attempts=MAX_ATTEMPTS,
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
        for path in self.mounts:
            steps.unmount(path)
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
        self,
        plan: Plan,
        *traps: Trap,
        index: int = 0,
        terms: steps.WorkTerms = steps.WorkTerms(),  # noqa: B008 - frozen
        **spawning: Any,
    ) -> Running:
        job_uri = join_uri(plan.plan_uri, JOB_FILE)
        return self._spawn(steps.work, traps, job_uri, index, terms, **spawning)

    def publisher(self, plan: Plan, *traps: Trap, **spawning: Any) -> Running:
        return self._spawn(steps.publish_step, traps, plan.plan_uri, **spawning)

    def maintainer(self, *traps: Trap, **spawning: Any) -> Running:
        return self._spawn(steps.maintain_step, traps, "demo", **spawning)

    def sweeper(self, *traps: Trap, **spawning: Any) -> Running:
        return self._spawn(steps.sweep_step, traps, "demo", **spawning)

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
        patiently(lambda: steps.finish(self.config, self.storage, plan.plan_uri))

    def clock(self, hours: float = 0.0) -> JumpingClock:
        """A wall clock for a process. Raises ``NotHereError`` where none can be made."""
        if not self.server.has_clocks:
            raise NotHereError("needs a C compiler (cc) for clocks that jump")
        return JumpingClock(self.folder, hours)

    def small_disk(self, num_kibibytes: int) -> Path:
        """A file system of so much room. Raises ``NotHereError`` without the right to mount one."""
        path = self.folder / f"disk-{len(self.mounts)}"
        path.mkdir()
        steps.mount_small(path, num_kibibytes)
        self.mounts.append(path)
        return path

    def _spawn(
        self,
        step: Callable[..., None],
        traps: tuple[Trap, ...],
        *values: Any,
        clock: JumpingClock | None = None,
        checks_clock: bool = False,
        tmp_path: Path | None = None,
    ) -> Running:
        self.traps += traps
        proxy = TrapProxy(self.server.url, traps, checks_clock)
        self.proxies.append(proxy)
        name = f"{step.__name__}-{len(self.running)}"
        config_path = self._write_config(proxy.url, name)
        log_path = self.folder / f"{name}.log"
        place = steps.Place(clock.path if clock else None, tmp_path or self.folder)
        # Traps wait for nobody: the process starts only when the proxy knows whom to hit.
        process = self.server.context.Process(
            target=steps.in_place,
            args=(place, step, config_path, log_path, *values),
            daemon=False,
        )
        process.start()
        self.server.processes.append(process)
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
            self._let_end(running)
        for _ in range(8):
            if not self.next_run():
                return
        raise AssertionError("the dataset does not become current")

    def next_run(self) -> bool:
        """What a scheduled run does; false when it found nothing to do."""
        plan = self.plan(allow_many_deletes=True)
        if plan.is_empty:
            return False
        self.worker(plan).wait()
        if not self._has_failed_shards(plan):
            self.finish(plan)
        return True

    @staticmethod
    def _let_end(running: Running) -> None:
        for trap in running.proxy.traps:
            trap.gate.set()
        with contextlib.suppress(ProcessLookupError):
            running.resume()
        try:
            running.wait(60)
        except AssertionError:
            running.kill()

    def _has_failed_shards(self, plan: Plan) -> bool:
        from hcodec_core.dataset.results import read_results

        return "failed" in read_results(self.storage, plan.plan_uri, lambda r: r.status)

    def rows(self) -> list[Row]:
        """All rows that readers see, in plain form."""
        return self.bookkeeper.rows()

    def books(self) -> Books:
        """Rows, quarantine and orphans beside those of the dataset without faults."""
        return self.bookkeeper.make(self.server.reference, self.quarantined)

    def struck(self) -> list[str]:
        """What the traps have done so far."""
        return [str(trap) for trap in self.traps if trap.hits]

    @property
    def bookkeeper(self) -> Bookkeeper:
        return Bookkeeper(self.server, self.bucket, self.storage, self.layout, self.uri(""))


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
