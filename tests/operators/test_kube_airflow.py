"""Faults that need a whole Airflow: what becomes of the Job and its rows. Real triggerers.

One Airflow for all rows; each has a plan, and so a Job, of its own. Beside it the janitor sweeps as
often as the chart's CronJob lets it. The last test prints the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from hcodec_airflow import janitor
from hcodec_airflow.demo.airflow_api import FINISHED
from hcodec_airflow.demo.services import (
    AIRFLOW,
    Services,
    airflow_environment,
    free_port,
    wait_until_answers,
)
from hcodec_airflow.kubernetes.losses import Losses
from hcodec_airflow.kubernetes.manifest import JOB_LABEL, job_key
from hcodec_core.dataset.shards import results_by_shard
from tests.inference.plans import wav, write_plan
from tests.kube.server import KubeServer
from tests.operators.airflow_calls import Calls
from tests.operators.kube_bed import CONFIG, Bed, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.airflow]

DAG_ID, TASK = "kube_faults", "tokenize"
ALONE = "kube_faults_alone"  # without the task that ends our DAGs
START_SECONDS, RUN_SECONDS, LEFT_SECONDS = 900.0, 600.0, 120.0
NUM_SHARDS, NUM_FILES, CLIP_SECONDS = 6, 12, 40.0
TABLE: list[tuple[str, int, int, int, int]] = []
DAG_FILE = """
from datetime import UTC, datetime, timedelta
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param
from hcodec_airflow.dataset_operators import ReleaseLockOperator
from hcodec_airflow.job_operator import CodecJobOperator

for dag_id in ("kube_faults", "kube_faults_alone"):
    with DAG(
        dag_id,
        schedule=None,
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        params={"job_uri": Param("", type="string")},
        default_args={"retries": 1, "retry_delay": timedelta(seconds=5)},
    ):
        tokenize = CodecJobOperator(
            task_id="tokenize", job="{{ params.job_uri }}", workers=2, poll_seconds=1.0
        )
        if dag_id == "kube_faults":
            lock = EmptyOperator(task_id="lock")
            release = ReleaseLockOperator(task_id="release", job_tasks=["tokenize"])
            lock >> tokenize >> release.as_teardown(setups=lock)
"""
SWEEP = "while sleep 60; do %s -m %s --namespace=default --airflow-url=%s & done"
AGE_FLOOR_SECONDS = 30.0  # the janitor's
PROFILES = """
namespace = "default"
[profiles.cpu]
image = "worker:test"
env = { OMP_NUM_THREADS = "1" }
termination_grace_seconds = 5
"""
COMMANDS = {
    "api-server": ["api-server"],
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
}


class House:
    """A running Airflow, its cluster and its storage."""

    def __init__(self, folder: Path, kube: KubeServer) -> None:
        self.folder, self.kube = folder, kube
        self.bed = Bed(kube, folder)
        self.services = Services(folder)
        (folder / "hcodec.toml").write_text(CONFIG.format(folder=folder))
        (folder / "kubernetes.toml").write_text(PROFILES)
        (folder / "dags").mkdir()
        (folder / "dags" / "faults.py").write_text(DAG_FILE)
        port = free_port(0)
        self.api = Calls(f"http://127.0.0.1:{port}")
        connection = {"kube_config_path": str(self.bed.kubeconfig)}
        self._environment = {
            **os.environ,
            **airflow_environment(folder, folder / "dags", folder / "hcodec.toml", port),
            "AIRFLOW__HCODEC__BACKEND": "kubernetes",
            "AIRFLOW__HCODEC__KUBERNETES_FILE": str(folder / "kubernetes.toml"),
            "AIRFLOW_CONN_HCODEC_KUBERNETES": json.dumps(
                {"conn_type": "hcodec_kubernetes", "extra": connection}
            ),
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            "OMP_NUM_THREADS": "1",
        }

    def open(self) -> None:
        self.services.start("db", [*AIRFLOW, "db", "migrate"], self._environment)
        self.services.wait_for("db", START_SECONDS)
        for name in COMMANDS:
            self.start(name)
        url = f"{self.api.base_url}/api/v2/version"
        wait_until_answers(url, self.services, START_SECONDS)
        self.api.login()
        for dag_id in (DAG_ID, ALONE):
            self.api.wait_for_dag(dag_id, self.services, START_SECONDS)
        self._start_janitor()

    def _start_janitor(self) -> None:
        """What the chart's CronJob does, with its default for the age floor."""
        environment = {
            **self._environment,
            "HCODEC_AIRFLOW_TOKEN": self.api.token,
            "KUBECONFIG": str(self.bed.kubeconfig),
        }
        command = ["sh", "-c", SWEEP % (sys.executable, janitor.__name__, self.api.base_url)]
        self.services.start("janitor", command, environment)

    def start(self, name: str, as_name: str = "") -> None:
        command = [*AIRFLOW, *COMMANDS[name]]
        self.services.start(as_name or name, command, self._environment)

    def signal(self, name: str, number: signal.Signals) -> None:
        leader = psutil.Process(self.services._processes[name].pid)
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        self.services._processes.pop(name).wait()


@dataclass
class Scene:
    """One run with its Job."""

    house: House
    job: object
    request: object
    run_id: str
    dag_id: str

    @property
    def kube(self) -> KubeServer:
        return self.house.kube

    def pods(self) -> list[dict]:
        key = job_key(self.request)
        found = self.kube.running_pods()
        return [pod for pod in found if pod["metadata"]["labels"].get(JOB_LABEL) == key]

    def state(self) -> str:
        return self.house.api.task_states(self.dag_id, self.run_id)[TASK]

    def wait_for_work(self) -> None:
        """Until the task is deferred and a worker holds a shard."""

        def is_working() -> bool:
            holders = Losses(
                self.house.bed.storage, self.request.job_uri, self.job.plan_uri
            ).holders()
            return bool(holders) and self.state() == "deferred"

        wait_until(is_working, "work", RUN_SECONDS)

    def wait_for_run(self) -> str:
        def ended() -> str:
            state = self.house.api.run_state(self.dag_id, self.run_id)
            return state if state in FINISHED else ""

        return wait_until(ended, "the run's end", RUN_SECONDS)

    def wait_for_no_pods(self) -> int:
        deadline = time.monotonic() + LEFT_SECONDS
        while self.pods() and time.monotonic() < deadline:
            time.sleep(0.5)
        return len(self.pods())


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with KubeServer() as kube:
        made = House(tmp_path_factory.mktemp("house"), kube)
        try:
            made.open()
            yield made
        finally:
            made.services.stop()


def marked_failed(scene: Scene) -> None:
    scene.house.api.mark_failed(scene.dag_id, scene.run_id, TASK)


def cleared(scene: Scene) -> None:
    scene.house.api.clear(scene.dag_id, scene.run_id, TASK)
    assert scene.wait_for_run() == "success"


def run_deleted(scene: Scene) -> None:
    """Airflow deletes no run that still runs, not even its last task."""
    scene.house.api.mark_run_failed(scene.dag_id, scene.run_id)
    assert scene.wait_for_run() == "failed"
    scene.house.api.delete_run(scene.dag_id, scene.run_id)


def triggerer_dies(scene: Scene) -> None:
    scene.house.kill("triggerer")
    scene.house.start("triggerer")
    assert scene.wait_for_run() == "success"


def triggerer_hangs(scene: Scene) -> None:
    """A minute of silence; a second triggerer takes over; the first wakes up and finds out.

    Workers are paused until then, so that there is a Job that it could wrongly delete.
    """
    house = scene.house
    paused = [pod["metadata"]["name"] for pod in scene.pods()]
    for name in paused:
        house.kube.faults.pause(name)
    house.signal("triggerer", signal.SIGSTOP)
    house.start("triggerer", "triggerer-2")
    time.sleep(60.0)
    house.signal("triggerer", signal.SIGCONT)
    time.sleep(20.0)
    assert [pod["metadata"]["name"] for pod in scene.pods()] == paused
    for name in paused:
        house.kube.faults.wake(name)
    assert scene.wait_for_run() == "success"
    house.kill("triggerer-2")


def no_triggerer_when_marked_failed(scene: Scene) -> None:
    """Nobody runs ``on_kill``: the run's last task stops the workers."""
    with no_triggerer(scene):
        scene.house.api.mark_failed(scene.dag_id, scene.run_id, TASK)


def no_triggerer_when_run_is_marked_failed(scene: Scene) -> None:
    with no_triggerer(scene):
        scene.house.api.mark_run_failed(scene.dag_id, scene.run_id)


def no_triggerer_when_run_is_deleted(scene: Scene) -> None:
    """No task of the run is left to do anything: the janitor finds the Job."""
    with no_triggerer(scene):
        time.sleep(AGE_FLOOR_SECONDS)
        run_deleted(scene)


@contextlib.contextmanager
def no_triggerer(scene: Scene) -> Iterator[None]:
    """Without one until the pods are gone, or had their time to go.

    Workers hang meanwhile, lest they end by themselves; and the janitor rests where the run's last
    task is to be seen at work.
    """
    house = scene.house
    house.kill("triggerer")
    if scene.dag_id != ALONE:
        house.signal("janitor", signal.SIGSTOP)
    names = [pod["metadata"]["name"] for pod in scene.pods()]
    for name in names:
        house.kube.faults.pause(name)
    assert names
    try:
        yield
        scene.wait_for_no_pods()
        assert scene.pods() == []
    finally:
        house.signal("janitor", signal.SIGCONT)
        house.start("triggerer")


def scheduler_dies(scene: Scene) -> None:
    scene.house.kill("scheduler")
    time.sleep(5.0)
    scene.house.start("scheduler")
    assert scene.wait_for_run() == "success"


FINISHING = {
    "task cleared while deferred": cleared,
    "triggerer dies, a new one starts": triggerer_dies,
    "triggerer hangs 60 s, a second one takes over": triggerer_hangs,
    "scheduler dies": scheduler_dies,
}
WITHOUT_LAST_TASK = {"no triggerer up when the run is deleted"}
STOPPING = {
    "task marked failed while deferred": marked_failed,
    "DAG run deleted": run_deleted,
    "no triggerer up when the task is marked failed": no_triggerer_when_marked_failed,
    "no triggerer up when the run is marked failed": no_triggerer_when_run_is_marked_failed,
    "no triggerer up when the run is deleted": no_triggerer_when_run_is_deleted,
}


@pytest.mark.parametrize("name", [*STOPPING, *FINISHING])
def test_fault(name, house):
    bed = house.bed
    slug = "".join(c if c.isalnum() else "-" for c in name)
    files = {f"clip {i:02d}.wav": wav(CLIP_SECONDS, i) for i in range(NUM_FILES)}
    root = f"file://{house.folder}/data"
    job = write_plan(bed.storage, root, files, NUM_SHARDS, plan=slug, plan_id=slug)
    request = bed.request(job.plan_uri, name=f"tokenize-{slug}")
    dag_id = ALONE if name in WITHOUT_LAST_TASK else DAG_ID
    run_id = house.api.trigger(dag_id, {"job_uri": f"{job.plan_uri}/job.json"})
    scene = Scene(house, job, request, run_id, dag_id)
    most, stopped = [0], threading.Event()
    census = threading.Thread(target=_count, args=(scene, most, stopped), daemon=True)
    census.start()
    scene.wait_for_work()
    {**STOPPING, **FINISHING}[name](scene)
    left = scene.wait_for_no_pods()
    stopped.set()
    census.join()
    lost, doubled = _account(bed.storage, job)
    if name in STOPPING:
        lost = 0  # nothing was promised: what was done stays, the rest is left for the next run
    TABLE.append((name, left, most[0], lost, doubled))
    assert (left, lost, doubled) == (0, 0, 0)
    assert most[0] <= 1


def _count(scene: Scene, most: list[int], stopped: threading.Event) -> None:
    while not stopped.wait(0.1):
        most[0] = max(most[0], len(scene.house.bed.active_jobs(scene.request)))


def _account(storage, job) -> tuple[int, int]:
    found = Counter(o.uri for r in results_by_shard(storage, job).values() for o in r.outcomes)
    return job.num_files - len(found), sum(found.values()) - len(found)


def test_table(capsys):
    with capsys.disabled():
        print("\n| fault | pods left | Jobs at once | rows lost | rows doubled |")
        print("|---|---|---|---|---|")
        for row in TABLE:
            print("| " + " | ".join(map(str, row)) + " |")
    assert TABLE
