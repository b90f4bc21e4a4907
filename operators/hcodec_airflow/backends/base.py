"""The seam between the operator and whatever runs workers: four verbs on a named job.

A backend starts N workers that run ``hcodec run JOB_URI`` and says what became of the processes.
It never judges the work: the truth about that is the result objects in storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


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
class JobRequest:
    """The workers that are wanted for a job document.

    ``name`` is deterministic, so that every try of a task means the same workers. ``max_restarts``
    counts starts of one worker after its first, within one owner.
    """

    name: str
    job_uri: str
    plan_uri: str
    num_workers: int
    resources: WorkerResources = field(default_factory=WorkerResources)
    max_restarts: int = 3
    lease_seconds: float = 60.0


@dataclass(frozen=True)
class Worker:
    """One worker as observed. ``exit_code`` is None while it runs or when it was killed hard."""

    index: int
    is_alive: bool
    num_starts: int
    exit_code: int | None = None


@dataclass(frozen=True)
class Observation:
    """What a backend sees of a job; ``reason`` says why workers wait."""

    phase: Phase
    workers: tuple[Worker, ...] = ()
    reason: str = ""

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

    def observe(self, request: JobRequest) -> Observation:
        """Look at the workers without changing anything."""

    def kill(self, request: JobRequest, owner: str) -> bool:
        """Stop the workers if ``owner`` still owns them; true when it did."""

    def logs(self, request: JobRequest, index: int, max_lines: int) -> Sequence[str]:
        """Last lines of one worker's log, oldest first; empty when there is none."""

    def archive_logs(self, request: JobRequest) -> Sequence[str]:
        """Copy the logs to ``<plan_uri>/logs/``, return their URIs; workers have ended."""
