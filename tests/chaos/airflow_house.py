"""A real Airflow for the test bed: each component in a process group of its own, killed by name.

Its tasks, its triggerer and the workers that they start reach storage through one proxy, so that
faults come at named requests here, too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from hcodec_airflow.demo.airflow_api import FINISHED, AirflowApi
from hcodec_airflow.demo.services import (
    AIRFLOW,
    DemoError,
    Services,
    airflow_environment,
    free_port,
    wait_until_answers,
)
from hcodec_core.codecs import load_manifest
from hcodec_core.config import Config, load_config
from hcodec_core.dataset.inventory import take_inventory
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.plan import PlanRequest, make_plan
from hcodec_core.jobs import JOB_FILE, read_job
from hcodec_core.storage import Storage, join_uri, open_storage
from hcodec_core.tokens import CodecSpec, EncodeSettings
from tests.chaos.bed import CONFIG, Server, clips
from tests.chaos.books import Bookkeeper, Books, Row
from tests.chaos.patience import NotHitError, wait_until
from tests.chaos.proxy import Trap, TrapProxy

ROOT = Path(__file__).parent.parent.parent
DAG = "tokenize_corpus"
API, SCHEDULER, TRIGGERER = "api-server", "scheduler", "triggerer"
SECOND_TRIGGERER, DAG_PROCESSOR = "triggerer-2", "dag-processor"
COMPONENTS = (API, SCHEDULER, DAG_PROCESSOR, TRIGGERER)
NUM_WORKERS = 2
_START_SECONDS = 900.0
_QUARANTINED = {"0/notes.wav"}
_COMMANDS = {
    API: [API],
    SCHEDULER: [SCHEDULER, "--skip-serve-logs"],
    DAG_PROCESSOR: [DAG_PROCESSOR],
    TRIGGERER: [TRIGGERER, "--skip-serve-logs"],
    SECOND_TRIGGERER: [TRIGGERER, "--skip-serve-logs"],
}
# Airflow looks for tasks of the dead every five minutes by itself; the table has no time for that.
_HASTE = {
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
    "AIRFLOW__CORE__PARALLELISM": "3",
    # Parsing the same file every half minute is no part of any fault.
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
    "OMP_NUM_THREADS": "1",
}


class Api(AirflowApi):
    """What people do in the UI."""

    def clear(self, run_id: str, task_id: str) -> None:
        """Clear a task and all after it."""
        body = {
            "dry_run": False,
            "only_failed": False,
            "dag_run_id": run_id,
            "task_ids": [task_id],
            "include_downstream": True,
        }
        self.call("POST", f"/api/v2/dags/{DAG}/clearTaskInstances", body)

    def mark_failed(self, run_id: str, task_id: str) -> None:
        """Mark a task as failed."""
        path = f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances/{task_id}"
        self.call("PATCH", path, {"new_state": "failed"})

    def mark_run_failed(self, run_id: str) -> None:
        """Mark a run as failed; its teardown still runs."""
        self.call("PATCH", f"/api/v2/dags/{DAG}/dagRuns/{run_id}", {"state": "failed"})

    def delete_run(self, run_id: str) -> None:
        """Delete a run; Airflow refuses that while it runs."""
        # The answer has no body.
        with contextlib.suppress(ValueError):
            self.call("DELETE", f"/api/v2/dags/{DAG}/dagRuns/{run_id}")


class House:
    """The running Airflow with a bucket of clips. Use as a context manager."""

    def __init__(self, server: Server) -> None:
        """Nothing is started yet."""
        self.server = server
        self.bucket = server.make_bucket()
        self.state_path = Path(tempfile.mkdtemp(prefix="hcodec-chaos-airflow-"))
        self.proxy = TrapProxy(server.url)
        self.services = Services(self.state_path)
        self.config_path = self.state_path / "hcodec.toml"
        root = f"s3://{self.bucket}"
        text = CONFIG.format(endpoint=self.proxy.url, root=root, folder=self.state_path)
        self.config_path.write_text(text)
        self.config: Config = load_config(self.config_path)
        # What this process reads goes past the proxy: traps are for the pipeline.
        self.storage: Storage = open_storage(
            self.config.storage.model_copy(update={"endpoint_url": server.url})
        )
        self.audio_uri = f"{root}/audio/"
        port = free_port(0)
        self.api = Api(f"http://127.0.0.1:{port}")
        dags_path = self.state_path / "dags"
        dags_path.mkdir()
        shutil.copy(ROOT / "dags" / f"{DAG}.py", dags_path)
        environment = airflow_environment(self.state_path, dags_path, self.config_path, port)
        self._environment = {**os.environ, **environment, **_HASTE}
        self.settings: EncodeSettings | None = None
        self.reference: dict[str, Row] = {}
        self._num_scenes = 0

    def __enter__(self) -> House:
        try:
            for name, content in clips().items():
                self.storage.write(self.audio_uri + name, content)
            self.services.start("db", [*AIRFLOW, "db", "migrate"], self._environment)
            self.services.wait_for("db", _START_SECONDS)
            for name in COMPONENTS:
                self.start(name)
            wait_until_answers(f"{self.api.base_url}/api/v2/version", self.services, _START_SECONDS)
            self.api.login()
            self.api.wait_for_dag(DAG, self.services, _START_SECONDS)
            self._make_reference()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything that was started; again does no harm."""
        self.proxy.close()
        self.services.stop()
        shutil.rmtree(self.state_path, ignore_errors=True)
        self.server.drop_bucket(self.bucket)

    def start(self, name: str) -> None:
        """Start a component; its log goes on."""
        self.services.start(name, [*AIRFLOW, *_COMMANDS[name]], self._environment)

    def signal(self, name: str, number: signal.Signals, *, alone: bool = False) -> None:
        """Send a component a signal, with its session (its tasks) or ``alone``.

        Workers of jobs are in sessions of their own: they outlive it, as on any host.
        """
        leader = self.services._processes[name].pid
        members = [leader] if alone else [pid for pid in psutil.pids() if _session(pid) == leader]
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, name: str, *, alone: bool = False) -> None:
        """End a component by force and wait until it is gone."""
        self.signal(name, signal.SIGKILL, alone=alone)
        self.services._processes.pop(name).wait()

    def is_running(self, name: str) -> bool:
        """Whether a component was started and has not ended."""
        process = self.services._processes.get(name)
        return process is not None and process.poll() is None

    def mend(self) -> None:
        """Everything runs again, and only once."""
        if self.is_running(SECOND_TRIGGERER):
            self.kill(SECOND_TRIGGERER)
        for name in COMPONENTS:
            if self.is_running(name):
                self.signal(name, signal.SIGCONT)
            else:
                self.services._processes.pop(name, None)
                self.start(name)
        wait_until_answers(f"{self.api.base_url}/api/v2/version", self.services, _START_SECONDS)

    def log_sizes(self) -> int:
        """Grows as long as any component says anything."""
        return sum(path.stat().st_size for path in (self.state_path / "logs").glob("*.log"))

    @contextlib.contextmanager
    def scene(self, name: str = "") -> Iterator[AirflowScene]:
        """A dataset of its own, and all components well before and after."""
        self._num_scenes += 1
        scene = AirflowScene(self, name or f"d{self._num_scenes}")
        try:
            yield scene
        finally:
            scene.close()

    def _make_reference(self) -> None:
        with self.scene("clean") as scene:
            scene.start()
            scene.await_end()
            if scene.state() != "success":
                raise AssertionError(f"a run without faults failed: {scene.tasks()}")
            planned = self.api.xcom(DAG, scene.run_id, "plan")
            self.settings = read_job(self.storage.read(planned["job_uri"])).settings
            self.reference = {row["etag"]: row for row in scene.bookkeeper.rows()}
            if len(self.reference) != len(clips()) - len(_QUARANTINED):
                raise AssertionError(f"the reference has {len(self.reference)} rows")


class AirflowScene:
    """One dataset that a fault is made on."""

    def __init__(self, house: House, dataset: str) -> None:
        """Nothing runs yet."""
        self.house = house
        self.dataset = dataset
        self.run_id = ""
        self.deeds: list[str] = []

    def close(self) -> None:
        """Let everything go and take the traps away."""
        self._free()
        self.house.proxy.traps = ()
        for process in self.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.house.mend()

    # What a person does -----------------------------------------------------------------------

    def start(self) -> None:
        """Trigger a run from the form."""
        form = {
            "source": self.house.audio_uri,
            "dataset": self.dataset,
            "shards": 3,
            "workers": NUM_WORKERS,
            "max_bad_share": 0.5,
        }
        self.run_id = self.house.api.trigger(DAG, form)

    def state(self) -> str:
        """State of the run; "" while the API server does not answer, "gone" once deleted."""
        return self._ask(lambda: self.house.api.run_state(DAG, self.run_id)) or ""

    def tasks(self) -> dict[str, str]:
        """State of each task, empty while the API server does not answer."""
        return self._ask(lambda: self.house.api.task_states(DAG, self.run_id)) or {}

    @staticmethod
    def _ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except DemoError as error:
            return "gone" if " 404 " in str(error) else None

    def await_task(self, task_id: str, *states: str) -> None:
        """Wait until a task is in one of these states. Raises ``NotHitError`` if the run ends."""
        self.await_(
            lambda: self.tasks().get(task_id) in states or self.state() in FINISHED,
            f"{task_id} is {' or '.join(states)}",
        )
        if self.tasks().get(task_id) not in states:
            raise NotHitError(f"the run ended before {task_id} was {' or '.join(states)}")

    def await_end(self) -> None:
        """Wait until the run has ended."""
        self.await_(lambda: self.state() in {*FINISHED, "gone"}, f"the run {self.run_id} ends")

    def await_(self, condition: Callable[[], object], what: str) -> None:
        """Wait as long as anything moves."""
        try:
            wait_until(condition, f"{what} ({self.dataset})", self._pulse, poll_seconds=1.0)
        except AssertionError as error:
            raise AssertionError(f"{error}; tasks: {self.tasks()}") from error

    def _pulse(self) -> object:
        house = self.house
        return house.proxy.num_requests, house.log_sizes(), str(self.tasks())

    # Traps and workers ------------------------------------------------------------------------

    def trap(self, pattern: str, deed: str = "hold", **options: Any) -> Trap:
        """Set a trap on requests for this dataset, which ``{name}`` stands for."""
        trap = Trap(pattern.format(name=self.dataset), deed, **{"times": 99, **options})
        self.house.proxy.traps += (trap,)
        return trap

    def reach(self, trap: Trap) -> None:
        """Wait until a trap has struck. Raises ``NotHitError`` when the run ends before."""
        self.await_(lambda: trap.hit.is_set() or self.state() in FINISHED, trap.pattern)
        if not trap.hit.is_set():
            raise NotHitError(f"the run ended before a request like {trap.pattern}")

    def pause_workers(self) -> None:
        """Stop all workers after the task has deferred and before their first claim."""
        trap = self.trap(r"PUT .*/datasets/{name}/.*/leases/")
        self.reach(trap)
        self.await_task("tokenize", "deferred")
        for process in self.workers():
            process.suspend()
        trap.gate.set()

    def resume_workers(self) -> None:
        """Let them go on."""
        for process in self.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def workers(self) -> list[psutil.Process]:
        """Processes that run jobs of this dataset, and their children."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(f"/datasets/{self.dataset}/" in word for word in words) and "run" in words:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found += [process, *process.children(recursive=True)]
        return list({process.pid: process for process in found}.values())

    def num_trigger_logs(self) -> int:
        """How many triggerers have watched the workers: each writes a log of its own."""
        folder = self.house.state_path / "airflow" / "logs"
        logs = folder.glob(f"*/run_id={self.run_id}/task_id=tokenize/*.trigger.*.log")
        return len(list(logs))

    def await_results(self) -> None:
        """Wait until every shard has a result in storage."""
        self.await_(lambda: self._num_results() >= self._num_shards(), "all results are there")

    def _num_results(self) -> int:
        prefix = f"{self.layout.plans_uri}/"
        return sum("/results/" in info.uri for info in self.house.storage.list_objects(prefix))

    def _num_shards(self) -> int:
        jobs = [
            info.uri
            for info in self.house.storage.list_objects(f"{self.layout.plans_uri}/")
            if info.uri.endswith("/" + JOB_FILE)
        ]
        return sum(read_job(self.house.storage.read(uri)).num_shards for uri in jobs)

    # Recovery and books -----------------------------------------------------------------------

    def struck(self) -> list[str]:
        """What was done, for people."""
        return [str(trap) for trap in self.house.proxy.traps if trap.hits]

    def recover(self) -> None:
        """What people and schedules do: start what is dead, then run until nothing is new."""
        self._free()
        self.house.mend()
        if self.state() != "gone":
            self.await_end()
        for _ in range(4):
            if self._is_current():
                return
            self.start()
            self.await_end()
        raise AssertionError(f"the dataset does not become current: {self.tasks()}")

    def _free(self) -> None:
        for trap in self.house.proxy.traps:
            trap.gate.set()
        self.resume_workers()

    def _is_current(self) -> bool:
        house, name = self.house, f"{self.dataset}-{time.monotonic_ns()}"
        assert house.settings is not None
        inventory_uri = join_uri(house.config.work.work_uri, "inventories", "checks", name)
        take_inventory(house.config, house.storage, [house.audio_uri], inventory_uri)
        request = PlanRequest(
            dataset=self.dataset,
            inventory_uri=inventory_uri,
            codec_uri="hcodec-nano",
            manifest=load_manifest("hcodec-nano"),
            settings=house.settings,
        )
        return make_plan(house.config, house.storage, request, dry_run=True).is_empty

    def books(self) -> Books:
        """Rows, quarantine, orphans; a worker process that is left counts as an orphan."""
        books = self.bookkeeper.make(self.house.reference, _QUARANTINED)
        _, left = psutil.wait_procs(self.workers(), timeout=30)
        books.orphans += len(left)
        books.details += [f"process {process.pid} is left" for process in left]
        return books

    @property
    def bookkeeper(self) -> Bookkeeper:
        """Knows this dataset."""
        house = self.house
        return Bookkeeper(house.server, house.bucket, house.storage, self.layout, house.audio_uri)

    @property
    def layout(self) -> DatasetLayout:
        """Where the dataset lies; read from storage while its encode id is not known."""
        house = self.house
        if house.settings is not None:
            spec = CodecSpec(load_manifest("hcodec-nano"), house.settings)
            return DatasetLayout(house.config, self.dataset, spec.encode_id)
        planned = house.api.xcom(DAG, self.run_id, "plan")
        job = read_job(house.storage.read(planned["job_uri"]))
        return DatasetLayout(house.config, self.dataset, job.encode_id)


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None
