"""The states of a job and the moves between them, as the operator and its trigger report them.

Submitted -> Queued -> Scheduling -> Running(n/N) -> Done / Failed / Killed
"""

from __future__ import annotations

from enum import StrEnum

from hcodec_airflow.backends.base import Observation, Phase, Timeouts
from hcodec_core.errors import EXIT_BAD_CONFIG


class JobState(StrEnum):
    """Where a job stands. The last three are final."""

    SUBMITTED = "submitted"
    QUEUED = "queued"
    SCHEDULING = "scheduling"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    KILLED = "killed"

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return not MOVES[self]


_UNFINISHED = {JobState.QUEUED, JobState.SCHEDULING, JobState.RUNNING}
_FINAL = {JobState.DONE, JobState.FAILED, JobState.KILLED}

# Workers that are all restarted, or taken away by a queue, lead back from Running.
MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.SUBMITTED: frozenset(_UNFINISHED | _FINAL),
    JobState.QUEUED: frozenset((_UNFINISHED | _FINAL) - {JobState.QUEUED}),
    JobState.SCHEDULING: frozenset((_UNFINISHED | _FINAL) - {JobState.SCHEDULING}),
    JobState.RUNNING: frozenset((_UNFINISHED | _FINAL) - {JobState.RUNNING}),
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.KILLED: frozenset(),
}


def judge(observation: Observation, *, is_accounted: bool, max_restarts: int) -> JobState:
    """State that follows from the results in storage first, and from the processes second.

    Args:
        observation: What the backend sees.
        is_accounted: Whether every shard of the plan has a result.
        max_restarts: Starts of one worker after its first that are allowed.
    """
    if is_accounted:
        return JobState.DONE
    if observation.phase is Phase.KILLED:
        return JobState.KILLED
    if any(worker.exit_code == EXIT_BAD_CONFIG for worker in observation.workers):
        return JobState.FAILED
    if observation.phase is Phase.RUNNING:
        return JobState.RUNNING
    if observation.phase is Phase.QUEUED:
        return JobState.QUEUED
    has_ended = observation.phase is Phase.ENDED and bool(observation.workers)
    if has_ended and not can_restart(observation, max_restarts):
        return JobState.FAILED
    return JobState.SCHEDULING


def overdue(observation: Observation, timeouts: Timeouts) -> str:
    """Which time-out has passed, in one clause; empty when none has."""
    times = observation.times
    limits = (
        (times.queued_seconds, timeouts.queue_seconds, "No worker was given resources"),
        (times.starting_seconds, timeouts.startup_seconds, "No worker started"),
        (times.running_seconds, timeouts.run_seconds, "The workers were not done"),
    )
    for seconds, limit, what in limits:
        if seconds is not None and limit is not None and seconds > limit:
            reason = f" ({observation.reason})" if observation.reason else ""
            return f"{what} within {limit:.0f} s{reason}"
    return ""


def can_restart(observation: Observation, max_restarts: int) -> bool:
    """Whether a worker that ended may be started again."""
    return any(w.num_starts <= max_restarts for w in observation.workers if not w.is_alive)


class JobStateMachine:
    """Holds the state of one job and refuses moves that are no part of the machine."""

    def __init__(self, state: JobState = JobState.SUBMITTED) -> None:
        """Begin in ``state``."""
        self.state = state

    def move(self, state: JobState) -> bool:
        """Go to ``state``; true when that is a change."""
        if state is self.state:
            return False
        assert state in MOVES[self.state], f"no move from {self.state} to {state}"
        self.state = state
        return True
