"""Watching one job until it is over: what the trigger does, free of Airflow and of event loops."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from hcodec_airflow.backends.base import Backend, JobRequest, Observation, Worker
from hcodec_airflow.progress import JobSize, Progress, ProgressMeter, ProgressReader, add_totals
from hcodec_airflow.states import JobState, JobStateMachine, can_restart, judge, overdue
from hcodec_core.errors import EXIT_BAD_CONFIG, ClusterError, HCodecError, StorageError

logger = logging.getLogger(__name__)

MAX_LOG_LINES = 20
MAX_LINE_LENGTH = 400
MAX_SHOWN_LOGS = 8
ENDING_GRACE_SECONDS = 15.0
STORAGE_PATIENCE_SECONDS = 600.0
REASON_SECONDS = 15.0
_REMARK_SECONDS = 30.0
_ENDING_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Verdict:
    """How a job ended; ``is_retryable`` says whether another try may end better."""

    state: JobState
    message: str
    is_retryable: bool = True
    progress: Progress = field(default_factory=Progress)

    def as_event(self) -> dict[str, object]:
        """The verdict as plain JSON values."""
        return {**asdict(self), "state": self.state.value}


@dataclass(frozen=True)
class Pace:
    """How often a watch speaks and renews, seconds."""

    report_seconds: float = 10.0
    renew_seconds: float = 60.0


class JobWatch:
    """Looks at one job again and again; ``step`` returns a ``Verdict`` when it is over.

    ``renew`` is called now and then to keep what the job holds, such as the dataset's lock.
    """

    def __init__(
        self,
        backend: Backend,
        reader: ProgressReader,
        request: JobRequest,
        owner: str,
        size: JobSize,
        renew: Callable[[], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Begin as submitted; nothing is looked at yet."""
        self._backend = backend
        self._reader = reader
        self._request = request
        self._owner = owner
        self._size = size
        self._renew = renew
        self._pace = pace or Pace()
        self._machine = JobStateMachine()
        self._meter = ProgressMeter(size)
        self._told_ends: set[tuple[str, int, int]] = set()
        self._told_reason = ""
        self._next_reason = 0.0
        self._next_remark = 0.0
        self._next_report = 0.0
        self._next_renewal = 0.0
        self._storage_failed_since: float | None = None

    @property
    def state(self) -> JobState:
        """State seen last."""
        return self._machine.state

    def step(self) -> Verdict | None:
        """Look once, start ended workers again, report; a verdict when the job is over.

        Storage or cluster that do not answer are waited for. Raises other errors of both.
        """
        try:
            verdict = self._step()
        except (StorageError, ClusterError) as error:
            return self._wait_for_answers(error)
        self._storage_failed_since = None
        return verdict

    def _step(self) -> Verdict | None:
        self._renew_if_due()
        observation = self._backend.observe(self._request)
        # Read after the look: workers that were seen to have ended well have left all results.
        progress = self._reader.read()
        state = judge(
            observation,
            is_accounted=progress.num_shards_done >= self._size.num_shards,
            max_restarts=self._request.max_restarts,
        )
        late = "" if state.is_final else overdue(observation, self._request.timeouts)
        state = JobState.FAILED if late else state
        self._tell_ends(observation)
        self._tell_state(state, observation)
        if state.is_final:
            return self._conclude(state, observation, progress, late)
        self._backend.tend(self._request, self._owner)
        if can_restart(observation, self._request.max_restarts):
            self._backend.restart_ended(self._request, self._owner)
        self._report_if_due(progress, observation)
        return None

    def _tell_state(self, state: JobState, observation: Observation) -> None:
        """Log a new state, and while nothing runs why, whenever that changes."""
        now = time.monotonic()
        has_moved = self._machine.move(state)
        is_news = observation.reason != self._told_reason and now >= self._next_reason
        if has_moved or (is_news and observation.reason and state is not JobState.RUNNING):
            logger.info("Job %s: %s", self._request.name, self._describe(observation))
            self._told_reason = observation.reason
            self._next_reason = now + REASON_SECONDS

    def _describe(self, observation: Observation) -> str:
        state = self._machine.state
        if state is JobState.RUNNING:
            return f"running ({observation.num_alive}/{self._request.num_workers})"
        return f"{state} ({observation.reason})" if observation.reason else str(state)

    def _report_if_due(self, progress: Progress, observation: Observation) -> None:
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + self._pace.report_seconds
        line = self._meter.line(
            progress, now, observation.num_alive, max(self._request.num_workers, 1)
        )
        logger.info("%s", line)

    def _renew_if_due(self) -> None:
        now = time.monotonic()
        if self._renew is not None and now >= self._next_renewal:
            self._renew()
            self._next_renewal = now + self._pace.renew_seconds

    def _tell_ends(self, observation: Observation) -> None:
        for worker in observation.workers:
            key = (worker.name, worker.index, worker.num_starts)
            if worker.is_alive or worker.exit_code == 0 or key in self._told_ends:
                continue
            self._told_ends.add(key)
            name = f"{worker.index} ({worker.name})" if worker.name else str(worker.index)
            ending = worker.note or _ending(worker.exit_code)
            logger.warning("Worker %s %s; its last lines:", name, ending)
            for line in self._tail(worker):
                logger.warning("worker %d | %s", worker.index, line)

    def _tail(self, worker: Worker) -> list[str]:
        lines = self._backend.logs(self._request, worker, MAX_LOG_LINES)
        return [readable(line)[:MAX_LINE_LENGTH] for line in lines]

    def _conclude(
        self, state: JobState, observation: Observation, progress: Progress, late: str
    ) -> Verdict:
        if state is not JobState.DONE:
            # First, for it quotes a log that may go with its worker.
            verdict = self._verdict(state, observation, progress, late)
            self._stop_and_keep_logs()
            return verdict
        try:
            self._await_end()
            self._stop_and_keep_logs()
        except HCodecError as error:
            # Results are what counts; workers that find all done end by themselves.
            logger.warning("%s What is left of the workers is left to itself.", error)
        return self._verdict(state, observation, add_totals(progress, self._size))

    def _stop_and_keep_logs(self) -> None:
        uris = self._backend.conclude(self._request, self._owner)
        shown = ", ".join(uris[:MAX_SHOWN_LOGS]) or "none"
        logger.info("Logs of %d workers are kept: %s", len(uris), shown)

    def _await_end(self) -> None:
        """Give workers time to see for themselves that nothing is left to do."""
        deadline = time.monotonic() + ENDING_GRACE_SECONDS
        while time.monotonic() < deadline:
            if not self._backend.observe(self._request).num_alive:
                return
            time.sleep(_ENDING_POLL_SECONDS)

    def _verdict(
        self, state: JobState, observation: Observation, progress: Progress, late: str = ""
    ) -> Verdict:
        done, total = progress.num_shards_done, self._size.num_shards
        if state is JobState.DONE:
            return Verdict(state, f"All {total} shards are accounted for.", progress=progress)
        if state is JobState.KILLED:
            message = f"The workers were stopped on request, {done} of {total} shards done."
            return Verdict(state, message, progress=progress)
        if late:
            return Verdict(state, f"{late}, {done} of {total} shards done.", progress=progress)
        refused = [w for w in observation.workers if w.exit_code == EXIT_BAD_CONFIG]
        if refused:
            sentence = last_sentence(self._backend.logs(self._request, refused[0], 1))
            message = f"Worker {refused[0].index} refused the job: {sentence}"
            return Verdict(state, message, is_retryable=False, progress=progress)
        message = (
            f"All workers ended with {total - done} of {total} shards pending, after "
            f"{self._request.max_restarts} restarts each: see their last lines above."
        )
        return Verdict(state, message, progress=progress)

    def _wait_for_answers(self, error: HCodecError) -> Verdict | None:
        now = time.monotonic()
        if self._storage_failed_since is None:
            self._storage_failed_since = now
        if now - self._storage_failed_since < STORAGE_PATIENCE_SECONDS:
            if now >= self._next_remark:
                self._next_remark = now + _REMARK_SECONDS
                logger.warning("%s Workers go on; looking again.", error)
            return None
        # Workers are left alone: the next try adopts them.
        return Verdict(JobState.FAILED, f"{error} It did not answer for ten minutes.")


def _ending(exit_code: int | None) -> str:
    if exit_code in {None, 128 + signal.SIGKILL}:
        return "was ended by force (by hand, or by the system for want of memory)"
    return f"ended with exit code {exit_code}"


def readable(line: str) -> str:
    """A line of a worker's log for people: JSON lines become level and message."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "message" not in entry:
        return line
    return f"{entry.get('level', 'info')}: {entry['message']}"


def last_sentence(lines: Sequence[str]) -> str:
    """What a worker said last, without the program's name in front."""
    if not lines:
        return "it left no log."
    return readable(lines[-1]).removeprefix("hcodec: ")[:MAX_LINE_LENGTH]
