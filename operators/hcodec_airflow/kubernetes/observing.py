"""From workloads and pods to what a backend observes: phase, workers, why they wait, how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hcodec_airflow.backends.base import JobRequest, Observation, Phase, PhaseTimes, Worker
from hcodec_airflow.kubernetes.client import ServerClock
from hcodec_airflow.kubernetes.pods import PodState, why_waiting
from hcodec_airflow.kubernetes.workloads import Workload
from hcodec_core.errors import EXIT_BAD_CONFIG


@dataclass(frozen=True)
class Scene:
    """All that is known of a job at one moment.

    ``pods`` are those of the newest generation, ``older`` those of earlier ones. ``num_starts``:
    generations of the present owner. ``is_killed``: that owner asked to stop.
    """

    request: JobRequest
    workload: Workload | None
    pods: Sequence[PodState]
    older: Sequence[PodState]
    num_starts: int
    is_killed: bool
    clock: ServerClock

    @property
    def alive(self) -> list[PodState]:
        """Pods of any generation whose worker runs."""
        return [pod for pod in (*self.pods, *self.older) if pod.is_alive]

    @property
    def waiting(self) -> list[PodState]:
        """Pods of the newest generation whose worker has not begun."""
        return [pod for pod in self.pods if not pod.is_alive and not pod.is_ended]


def observe(scene: Scene, reason: str = "") -> Observation:
    """What a backend says of a scene; ``reason``: why it waits, where the pods do not say it."""
    workload = scene.workload
    workers = _workers(scene)
    if scene.alive:
        return Observation(Phase.RUNNING, workers, times=_times(scene, Phase.RUNNING))
    if workload is None or not workload.is_active:
        return _ended(scene, workers)
    phase = _waiting_phase(scene, workload, reason)
    said = why_waiting(scene.waiting) or reason or _ordinary_reason(scene)
    return Observation(phase, workers, said, _times(scene, phase))


def _waiting_phase(scene: Scene, workload: Workload, reason: str) -> Phase:
    if workload.is_suspended:
        return Phase.QUEUED
    if any(pod.scheduled_at for pod in scene.waiting):
        return Phase.SCHEDULING
    # Not yet on a node, or not even made (a quota): resources are what is waited for.
    return Phase.QUEUED if scene.waiting or reason else Phase.SCHEDULING


def _ended(scene: Scene, workers: tuple[Worker, ...]) -> Observation:
    workload = scene.workload
    phase = Phase.KILLED if scene.is_killed else Phase.ENDED
    if workload is None:
        note, code = "is gone: its Job was deleted", None
    else:
        note = f"has ended ({workload.ending})"
        code = EXIT_BAD_CONFIG if workload.was_refused else None
    exhausted = workload is not None and workload.is_overdue
    num_starts = scene.request.max_restarts + 1 if exhausted else scene.num_starts
    if workload is not None and workload.is_being_deleted and scene.waiting:
        # Its pods are on their way out; nothing is started before they are gone.
        return Observation(phase, workers, "the Job is being deleted")
    if code is None and any(not worker.is_alive for worker in workers) and not exhausted:
        return Observation(phase, workers, note)
    name = workload.name if workload is not None else scene.request.name
    return Observation(
        phase, (*workers, Worker(0, False, num_starts, code, name=name, note=note)), note
    )


def _ordinary_reason(scene: Scene) -> str:
    failed = sum(pod.is_ended and pod.exit_code != 0 for pod in scene.pods)
    if failed and not scene.waiting:
        return f"{failed} pods ended; their replacements come after the usual back-off"
    return "pods are being started" if scene.waiting else "pods are being made"


def _workers(scene: Scene) -> tuple[Worker, ...]:
    # A pod that only waits is no worker yet; how older generations ended is history.
    begun = [pod for pod in scene.pods if pod.is_alive or pod.is_ended]
    left = [pod for pod in scene.older if pod.is_alive]
    return tuple(_worker(pod, scene.num_starts) for pod in (*begun, *left))


def _worker(pod: PodState, num_starts: int) -> Worker:
    return Worker(
        index=pod.index,
        is_alive=pod.is_alive,
        num_starts=num_starts,
        exit_code=pod.exit_code,
        name=pod.name,
        note=pod.note,
    )


def _times(scene: Scene, phase: Phase) -> PhaseTimes:
    clock, workload = scene.clock, scene.workload
    started = [pod.running_at for pod in (*scene.pods, *scene.older) if pod.running_at]
    if workload is not None and workload.started_at and started:
        started.append(workload.started_at)
    running = clock.seconds_since(min(started)) if started else None
    if phase is Phase.RUNNING or workload is None:
        return PhaseTimes(running_seconds=running)
    if phase is Phase.QUEUED:
        since = _queued_since(scene, workload)
        queued = clock.seconds_since(since) if since else None
        return PhaseTimes(queued_seconds=queued, running_seconds=running)
    scheduled = [pod.scheduled_at for pod in scene.waiting if pod.scheduled_at]
    starting = clock.seconds_since(min(scheduled)) if scheduled else None
    return PhaseTimes(starting_seconds=starting, running_seconds=running)


def _queued_since(scene: Scene, workload: Workload) -> str:
    if workload.is_suspended:
        return workload.suspended_at or workload.created_at
    return min((pod.created_at for pod in scene.waiting), default=workload.created_at)
