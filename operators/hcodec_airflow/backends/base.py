"""The seam between the operator and whatever runs workers: four verbs on a named job.

A backend starts N workers that run ``hcodec run JOB_URI`` and says what became of the processes.
It never judges the work: the truth about that is the result objects in storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Phase(StrEnum):
    """Where the workers of a job are, as their backend sees them."""

    QUEUED = "queued"  # admitted later; nothing was started yet
    SCHEDULING = "scheduling"  # wanted, none is alive yet
    RUNNING = "running"  # at least one is alive
    ENDED = "ended"  # none is alive
    KILLED = "killed"  # ended because somebody asked for it


@dataclass(frozen=True)
class WorkerResources:
    """What one worker may use: torch device, CPU threads, decoder processes."""

    device: str = "cpu"
    threads: int = 1
    decoders: int = 1


@dataclass(frozen=True)
class TaskOrigin:
    """The task of Airflow that wants the workers; ``map_index`` is -1 when it is not mapped."""

    dag_id: str = ""
    run_id: str = ""
    task_id: str = ""
    map_index: int = -1


@dataclass(frozen=True)
class Timeouts:
    """Seconds by the clock of whoever runs the workers; None: no limit.

    queue_seconds: until resources are given to the first worker. startup_seconds: from then until
    it runs. run_seconds: from the first start, all restarts included.
    """

    queue_seconds: float | None = None
    startup_seconds: float | None = 1800.0
    run_seconds: float | None = None


@dataclass(frozen=True)
class JobRequest:
    """The workers that are wanted for a job document.

    ``name`` is deterministic, so that every try of a task means the same workers. ``max_restarts``
    counts starts of one worker after its first, within one owner. ``profile`` and ``pod_template``
    say how a pod looks. ``processes_per_node``: 0 for independent workers; else every one of
    ``num_workers`` is a node on which torchrun starts so many processes.
    """

    name: str
    job_uri: str
    plan_uri: str
    num_workers: int
    resources: WorkerResources = field(default_factory=WorkerResources)
    max_restarts: int = 3
    lease_seconds: float = 60.0
    profile: str = ""
    pod_template: Mapping[str, Any] = field(default_factory=dict)
    processes_per_node: int = 0
    timeouts: Timeouts = field(default_factory=Timeouts)
    origin: TaskOrigin = field(default_factory=TaskOrigin)


@dataclass(frozen=True)
class Worker:
    """One worker as observed. ``exit_code`` is None while it runs or when it was killed hard.

    ``name``: of its pod, where it has one. ``note``: why it ended, as its backend knows it.
    """

    index: int
    is_alive: bool
    num_starts: int
    exit_code: int | None = None
    name: str = ""
    note: str = ""


@dataclass(frozen=True)
class PhaseTimes:
    """How long a job has been queued, starting, running, in seconds; None while it is not."""

    queued_seconds: float | None = None
    starting_seconds: float | None = None
    running_seconds: float | None = None


@dataclass(frozen=True)
class Observation:
    """What a backend sees of a job; ``reason`` says why workers wait."""

    phase: Phase
    workers: tuple[Worker, ...] = ()
    reason: str = ""
    times: PhaseTimes = field(default_factory=PhaseTimes)

    @property
    def num_alive(self) -> int:
        """Workers that run now."""
        return sum(worker.is_alive for worker in self.workers)


class Backend(Protocol):
    """Runs the workers of jobs. Methods block and may be called from any thread.

    ``owner`` is the task try that the workers belong to. A newer try takes them over by submitting;
    what an older one asks afterwards has no effect.
    """

    def submit_or_adopt(self, request: JobRequest, owner: str) -> Observation:
        """Make ``owner`` the owner and start the workers that are missing, never a second set.

        Raises ``ConfigError`` when this backend cannot run here, ``StorageError`` for what may
        pass.
        """

    def restart_ended(self, request: JobRequest, owner: str) -> None:
        """Start workers again that ended with a restart left, if ``owner`` still owns them."""

    def tend(self, request: JobRequest, owner: str) -> None:
        """Free the shards of workers that were taken away, so that others go on at once.

        Called at every look; what was done for a worker is not done again.
        """

    def observe(self, request: JobRequest) -> Observation:
        """Look at the workers without changing anything."""

    def kill(self, request: JobRequest, owner: str) -> bool:
        """Stop the workers if ``owner`` still owns them; true when it did."""

    def logs(self, request: JobRequest, worker: Worker, max_lines: int) -> Sequence[str]:
        """Last lines of one worker's log, oldest first; empty when there is none."""

    def conclude(self, request: JobRequest, owner: str) -> Sequence[str]:
        """Keep the logs in ``<plan_uri>/logs/`` and stop what is left, if ``owner`` owns it.

        Returns the URIs of the logs.
        """

    def following(self, request: JobRequest) -> AbstractAsyncContextManager[None]:
        """While this is entered, ``observe`` may answer from what an event loop keeps up to date.

        Entered by the trigger, in its loop, around all other calls.
        """

    def manifest(self, request: JobRequest) -> str:
        """What would be submitted, as YAML; asks nobody."""
