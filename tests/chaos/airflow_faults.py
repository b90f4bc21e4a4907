"""Faults of a real Airflow: its components killed, stopped and started again; people who intervene.

Each takes a scene with a dataset of its own (``airflow_house``). Workers are stopped (SIGSTOP)
while things happen that take Airflow longer than so small a corpus takes the workers.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from tests.chaos.airflow_house import (
    API,
    COMPONENTS,
    SCHEDULER,
    SECOND_TRIGGERER,
    TRIGGERER,
    AirflowScene,
)
from tests.chaos.faults import Fault, Inject, expect
from tests.chaos.patience import NotHitError

METADATA = r"PUT .*/{name}__[^/]*/metadata/.*\.metadata\.json"
RECORD = r"PUT .*/datasets/{name}/.*/versions/v"
STARTED = r"PUT .*/datasets/{name}/.*/backend/"
HUNG_SECONDS = 60.0
_DOWN_SECONDS = 15.0

AIRFLOW_FAULTS: list[Fault] = []


def fault(name: str, where: str, recovered_by: str) -> Callable[[Inject], None]:
    def add(inject: Inject) -> None:
        AIRFLOW_FAULTS.append(Fault(name, where, recovered_by, inject, in_airflow=True))

    return add


def _kill_at(
    scene: AirflowScene, component: str, pattern: str, *, down_seconds: float = 0, **options: Any
) -> None:
    """Kill a component while a request is held, and start it again after it was let through."""
    scene.start()
    trap = scene.trap(pattern, **options)
    scene.reach(trap)
    scene.house.kill(component)
    trap.gate.set()
    time.sleep(down_seconds)
    scene.house.start(component)


@fault("scheduler killed while workers encode", "task tokenize deferred",
       "workers and triggerer go on; the next scheduler")  # fmt: skip
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    scene.house.kill(SCHEDULER)
    scene.resume_workers()
    scene.await_results()
    scene.house.start(SCHEDULER)
    scene.await_end()
    expect(scene.state() == "success", f"the run failed: {scene.tasks()}")


@fault("scheduler and its task killed during the commit", "metadata PUT",
       "the next scheduler tries the task again; ledger")  # fmt: skip
def _(scene: AirflowScene) -> None:
    _kill_at(scene, SCHEDULER, METADATA)


@fault("scheduler killed, its task lives on", "metadata PUT of the commit",
       "the task run again beside the first; ledger")  # fmt: skip
def _(scene: AirflowScene) -> None:
    scene.start()
    trap = scene.trap(METADATA, times=1)
    scene.reach(trap)
    second = scene.trap(METADATA, times=1)
    scene.house.kill(SCHEDULER, alone=True)
    scene.house.start(SCHEDULER)
    scene.await_(
        lambda: second.hit.is_set() or scene.tasks().get("commit") not in {None, "running"},
        "the commit is taken up again",
    )
    trap.gate.set()
    second.gate.set()


@fault("scheduler and its task killed between two starts of workers", "record of the backend PUT",
       "the next try finds the worker that runs")  # fmt: skip
def _(scene: AirflowScene) -> None:
    # The record is written before the first start, after it, and after the second.
    _kill_at(scene, SCHEDULER, STARTED, skip=1)


@fault("scheduler and its task killed in publish", "version record PUT",
       "the next scheduler tries the task again; ledger")  # fmt: skip
def _(scene: AirflowScene) -> None:
    _kill_at(scene, SCHEDULER, RECORD)


@fault("triggerer killed while workers encode", "task tokenize deferred",
       "workers go on; the next triggerer")  # fmt: skip
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    scene.house.kill(TRIGGERER)
    scene.resume_workers()
    scene.await_results()
    scene.house.start(TRIGGERER)
    scene.await_end()
    expect(scene.state() == "success", f"the run failed: {scene.tasks()}")


@fault("triggerer stopped for a minute, a second takes over, the first wakes",
       "task tokenize deferred", "the second; the first leaves the workers alone")  # fmt: skip
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    workers = {process.pid for process in scene.workers()}
    scene.house.signal(TRIGGERER, signal.SIGSTOP)
    scene.house.start(SECOND_TRIGGERER)
    time.sleep(HUNG_SECONDS)
    scene.await_(lambda: scene.num_trigger_logs() >= 2, "the second triggerer takes over")
    scene.house.signal(TRIGGERER, signal.SIGCONT)
    time.sleep(_DOWN_SECONDS)
    expect(workers <= {process.pid for process in scene.workers()}, "workers were stopped")
    scene.resume_workers()
    scene.await_end()
    expect(scene.state() == "success", f"the run failed: {scene.tasks()}")


@fault("API server killed while workers encode", "task tokenize deferred",
       "workers go on; the next API server")  # fmt: skip
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    scene.house.kill(API)
    scene.resume_workers()
    scene.await_results()
    scene.house.start(API)


@fault("API server killed during the commit", "metadata PUT",
       "the task tries to report; else tried again; ledger")  # fmt: skip
def _(scene: AirflowScene) -> None:
    _kill_at(scene, API, METADATA, down_seconds=_DOWN_SECONDS)


@fault("API server killed in publish", "version record PUT",
       "the task tries to report; else tried again; ledger")  # fmt: skip
def _(scene: AirflowScene) -> None:
    _kill_at(scene, API, RECORD, down_seconds=_DOWN_SECONDS)


@fault("task cleared while deferred", "task tokenize", "the next try adopts or starts workers")
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    scene.house.api.clear(scene.run_id, "tokenize")
    scene.resume_workers()
    scene.await_end()
    expect(scene.state() == "success", f"the run failed: {scene.tasks()}")


@fault("task marked failed while deferred", "task tokenize", "workers are stopped; the next run")
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    scene.house.api.mark_failed(scene.run_id, "tokenize")
    scene.resume_workers()
    scene.await_(lambda: not scene.workers(), "the workers end")
    scene.await_end()
    if scene.state() != "failed":
        raise NotHitError("the workers were done before the mark")


@fault("DAG run marked failed and deleted while its workers encode", "task tokenize deferred",
       "workers are stopped, teardown gives the lock back; the next run")  # fmt: skip
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    scene.house.api.mark_run_failed(scene.run_id)
    scene.await_end()
    scene.house.api.delete_run(scene.run_id)
    expect(scene.state() == "gone", "the run was not deleted")
    scene.resume_workers()
    scene.await_(lambda: not scene.workers(), "the workers end")


@fault("every worker killed by force", "task tokenize deferred", "the trigger starts them again")
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    for process in scene.workers():
        process.kill()
    scene.await_end()
    expect(scene.state() == "success", f"the run failed: {scene.tasks()}")


@fault("the whole host dies: all of Airflow and all workers", "task tokenize deferred",
       "started again, it goes on where it was")  # fmt: skip
def _(scene: AirflowScene) -> None:
    scene.start()
    scene.pause_workers()
    for name in COMPONENTS:
        scene.house.kill(name)
    for process in scene.workers():
        process.kill()
    for name in COMPONENTS:
        scene.house.start(name)


@fault("two runs of one dataset at once", "from the first task on", "the dataset's lock")
def _(scene: AirflowScene) -> None:
    scene.start()
    first = scene.run_id
    scene.start()
    scene.await_end()
    second, scene.run_id = scene.run_id, first
    scene.await_end()
    expect(scene.state() == "success", f"the first run failed: {scene.tasks()}")
    scene.run_id = second
    expect(scene.state() == "success", f"the second run failed: {scene.tasks()}")
