"""``CodecJobOperator`` beside ``KubernetesJobOperator``: five faults on the test API server.

``python -m tests.benchmarks.compare_operators`` prints the table of docs/kubernetes.md. Both run
two workers of the same plan with the same command; the foreign operator is used by its documented
parameters (Indexed, deferrable, backoff_limit 3). Its workers lease shards as ours do, so rows are
safe with both; what differs is what becomes of the task and of the pods.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="hcodec-airflow-"))

from hcodec_airflow.kubernetes.losses import Losses
from hcodec_airflow.kubernetes.manifest import worker_command
from hcodec_airflow.kubernetes.workloads import Workload
from hcodec_airflow.progress import JobSize, list_folder
from hcodec_airflow.states import JobState
from hcodec_core.dataset.results import results_uri
from tests.inference.plans import wav, write_plan
from tests.kube import kinds
from tests.kube.server import ALL_GROUPS, KubeServer
from tests.operators.kube_bed import Bed, Triggerer, wait_until

NUM_SHARDS, NUM_FILES, CLIP_SECONDS = 6, 12, 40.0
RUN_SECONDS, LEFT_SECONDS = 300.0, 60.0


class Foreign:
    """Tries of a ``KubernetesJobOperator``: execute, defer, wait in a loop of a thread."""

    name = "KubernetesJobOperator"

    def __init__(self, bed: Bed, request: Any, queue: str) -> None:
        self._bed, self._request, self._queue = bed, request, queue
        extra = {"kube_config_path": str(bed.kubeconfig)}
        connection = json.dumps({"conn_type": "kubernetes", "extra": extra})
        os.environ["AIRFLOW_CONN_COMPARE"] = connection
        self.ends: list[str] = []
        self._loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
        self._threads: list[threading.Thread] = []

    def start(self, number: int) -> None:
        from airflow.sdk.exceptions import TaskDeferred

        operator = self._operator()
        task = SimpleNamespace(
            dag_id="d",
            task_id="t",
            run_id="r",
            try_number=number,
            map_index=-1,
            start_date=None,
        )
        task.xcom_push = lambda **_: None
        try:
            operator.execute(self._context(task))
        except TaskDeferred as deferred:
            self._wait_in_thread(deferred.trigger)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the task's end
            self.ends.append(f"failed: {str(error)[:60]}")

    def _operator(self) -> Any:
        from airflow.providers.cncf.kubernetes.operators.job import KubernetesJobOperator
        from kubernetes.client import models as k8s

        profile = self._bed.config.profile("")
        config = k8s.V1ConfigMapVolumeSource(name="hcodec-config")
        volume = k8s.V1Volume(name="hcodec-config", config_map=config)
        scratch = k8s.V1Volume(name="scratch", empty_dir=k8s.V1EmptyDirVolumeSource())
        uid = k8s.V1ObjectFieldSelector(field_path="metadata.uid")
        identity = k8s.V1EnvVarSource(field_ref=uid)
        queue = {"kueue.x-k8s.io/queue-name": self._queue} if self._queue else {}
        return KubernetesJobOperator(
            task_id="t",
            name="foreign",
            namespace="default",
            kubernetes_conn_id="compare",
            image="worker:test",
            cmds=worker_command(self._request, profile),
            env_vars=[
                k8s.V1EnvVar(name="HCODEC_WORKER_ID", value_from=identity),
                k8s.V1EnvVar(name="OMP_NUM_THREADS", value="1"),
            ],
            volumes=[volume, scratch],
            volume_mounts=[
                k8s.V1VolumeMount(name="hcodec-config", mount_path="/etc/hcodec"),
                k8s.V1VolumeMount(name="scratch", mount_path=profile.scratch_path),
            ],
            labels=queue,
            suspend=bool(self._queue),
            completion_mode="Indexed",
            completions=2,
            parallelism=2,
            backoff_limit=3,
            wait_until_job_complete=True,
            deferrable=True,
            get_logs=False,
            job_poll_interval=1.0,
        )

    @staticmethod
    def _context(task: Any) -> dict[str, Any]:
        run = SimpleNamespace(run_id="r", logical_date=None, run_after=None)
        return {"ti": task, "dag": None, "dag_run": run, "run_id": "r"}

    def _wait_in_thread(self, trigger: Any) -> None:
        started = threading.Event()

        async def watch() -> None:
            self._loops.append((asyncio.get_running_loop(), asyncio.current_task()))  # type: ignore[arg-type]
            started.set()
            try:
                event = await anext(trigger.run())
                text = "" if event.payload["status"] == "success" else event.payload["message"]
                self.ends.append("success" if not text else f"failed: {text[:60]}")
            except asyncio.CancelledError:
                # What Airflow does with a trigger whose task was marked: on_kill, where it has one.
                on_kill = getattr(trigger, "on_kill", None)
                if on_kill is not None:
                    await on_kill()
                self.ends.append("marked failed")

        thread = threading.Thread(target=lambda: asyncio.run(watch()), daemon=True)
        thread.start()
        self._threads.append(thread)
        started.wait(30)

    def mark_failed(self) -> None:
        for loop, task in self._loops:
            loop.call_soon_threadsafe(task.cancel)

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(timeout=RUN_SECONDS)

    def jobs(self) -> list[Any]:
        return self._bed.kube.store.list(kinds.JOB, "default")


class Own:
    """Tries of ``CodecJobOperator``, as its backend and trigger see them."""

    name = "CodecJobOperator"

    def __init__(self, bed: Bed, request: Any, queue: str) -> None:
        self._bed, self._request = bed, request
        self.ends: list[str] = []
        self._watches: list[Triggerer] = []
        self._owner = ""

    def start(self, number: int) -> None:
        self._owner = f"try-{number}"
        self._bed.backend().submit_or_adopt(self._request, self._owner)
        size = JobSize(NUM_SHARDS, NUM_FILES)
        self._watches.append(Triggerer(self._bed, self._request, self._owner, size))

    def mark_failed(self) -> None:
        for watch in self._watches:
            watch.die()
        self._bed.backend().kill(self._request, self._owner)
        self.ends.append("marked failed")

    def wait(self) -> None:
        for watch in [] if self.ends else self._watches:
            verdict = watch.wait(RUN_SECONDS)
            done = verdict.state is JobState.DONE
            self.ends.append("success" if done else f"{verdict.state}: {verdict.message[:60]}")

    def jobs(self) -> list[Any]:
        return self._bed.jobs(self._request)


@dataclass
class Scene:
    """One operator at one fault."""

    bed: Bed
    job: Any
    request: Any
    tries: Any
    most: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)

    def num_active(self) -> int:
        return sum(Workload(job).is_active for job in self.tries.jobs())

    def count(self) -> None:
        while not self._stopped.wait(0.05):
            self.most = max(self.most, self.num_active())

    def stop_counting(self) -> None:
        self._stopped.set()

    def num_results(self) -> int:
        return sum(1 for _ in list_folder(self.bed.storage, results_uri(self.job.plan_uri)))

    def pod_at_work(self) -> str:
        losses = Losses(self.bed.storage, self.request.job_uri, self.job.plan_uri)

        def holder() -> str:
            holders = losses.holders()
            pods = self.bed.kube.running_pods()
            return next(
                (p["metadata"]["name"] for p in pods if p["metadata"]["uid"] in holders), ""
            )

        return str(wait_until(holder, "a pod at work"))


def worker_killed(scene: Scene) -> None:
    scene.tries.start(1)
    scene.bed.kube.faults.kill_process(scene.pod_at_work())


def evicted(scene: Scene) -> None:
    scene.tries.start(1)
    for _ in range(5):
        pods = wait_until(
            lambda: scene.bed.kube.running_pods() or scene.tries.ends or scene.num_results() == 6
        )
        if pods is True or isinstance(pods[0], str):
            return
        name = pods[0]["metadata"]["name"]
        scene.bed.kube.faults.evict(name)
        scene.bed.kube.wait_until(lambda name=name: name not in _running(scene))


def _running(scene: Scene) -> set[str]:
    return {pod["metadata"]["name"] for pod in scene.bed.kube.running_pods()}


def retried(scene: Scene) -> None:
    scene.tries.start(1)
    scene.pod_at_work()
    scene.tries.start(2)


def queued(scene: Scene) -> None:
    scene.tries.start(1)
    time.sleep(5.0)
    scene.bed.kube.add_queue("tokens", {"pods": 4})


def marked_failed(scene: Scene) -> None:
    scene.tries.start(1)
    scene.pod_at_work()
    scene.tries.mark_failed()


FAULTS: dict[str, tuple[Callable[[Scene], None], str]] = {
    "worker killed (SIGKILL)": (worker_killed, ""),
    "5 evictions in a row": (evicted, ""),
    "task retried while its Job runs": (retried, ""),
    "queued by Kueue for a while": (queued, "tokens"),
    "marked failed while deferred": (marked_failed, ""),
}


def run(kind: type[Any], fault: str, folder: Path) -> list[Any]:
    """One row of the table, as ``main`` names its columns."""
    act, queue = FAULTS[fault]
    with KubeServer(groups=ALL_GROUPS) as kube:
        bed = Bed(kube, folder, env={"OMP_NUM_THREADS": "1"}, kueue_queue=queue)
        files = {f"clip {i:02d}.wav": wav(CLIP_SECONDS, i) for i in range(NUM_FILES)}
        job = write_plan(bed.storage, f"file://{folder}/data", files, NUM_SHARDS)
        request = bed.request(job.plan_uri)
        scene = Scene(bed, job, request, kind(bed, request, queue))
        counter = threading.Thread(target=scene.count, daemon=True)
        counter.start()
        act(scene)
        scene.tries.wait()
        deadline = time.monotonic() + LEFT_SECONDS
        is_over = act is marked_failed
        while kube.running_pods() and not is_over and time.monotonic() < deadline:
            time.sleep(0.5)
        time.sleep(8.0 if is_over else 0.0)  # longer than a polite end takes
        scene.stop_counting()
        left = (scene.num_active(), len(kube.running_pods()))
        done = f"{scene.num_results()}/{NUM_SHARDS}"
    return [fault, kind.name, "; ".join(scene.tries.ends), scene.most, *left, done]


def main() -> None:
    """Print the table."""
    import logging

    logging.disable(logging.WARNING)
    heads = (
        "fault",
        "operator",
        "end of the tries",
        "Jobs at once",
        "Jobs left",
        "pods left",
        "shards",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    wanted = sys.argv[1:] or list(FAULTS)
    for fault in wanted:
        for kind in (Foreign, Own):
            with tempfile.TemporaryDirectory(prefix="hcodec-compare-") as folder:
                row = run(kind, fault, Path(folder))
            lines.append("| " + " | ".join(str(value).replace("|", "/") for value in row) + " |")
            print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
