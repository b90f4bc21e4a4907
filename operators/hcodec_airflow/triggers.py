"""Triggers: they wait in the triggerer, off its event loop, and hold no worker slot."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from hcodec_airflow.backends import open_backend
from hcodec_airflow.backends.base import (
    Backend,
    JobRequest,
    TaskOrigin,
    Timeouts,
    WorkerResources,
)
from hcodec_airflow.leftovers import stop_workers, task_state
from hcodec_airflow.locking import LockWait, renewer
from hcodec_airflow.progress import JobSize, ProgressReader
from hcodec_airflow.settings import read_settings
from hcodec_airflow.states import JobState
from hcodec_airflow.watch import JobWatch, Verdict
from hcodec_core.errors import HCodecError, StorageError

logger = logging.getLogger(__name__)
_DEFERRED = "deferred"
_REMARK_SECONDS = 60.0
# The event loop itself holds tasks weakly.
_UNDISTURBED: set[asyncio.Task[None]] = set()


class CodecJobTrigger(BaseTrigger):
    """Waits for a job, restarts its workers, reports their progress in the task's log.

    ``owner`` is the id of the task try that deferred. ``lock``: the dataset's lock to keep alive,
    as the task ``lock`` returned it.
    """

    def __init__(
        self,
        backend: str,
        request: dict[str, Any],
        size: dict[str, int],
        owner: str,
        lock: dict[str, Any] | None = None,
        poll_seconds: float = 3.0,
    ) -> None:
        """Keep plain values only: a trigger is rebuilt from them in another process."""
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow leaves it untyped
        self.backend = backend
        self.request = request
        self.size = size
        self.owner = owner
        self.lock = lock
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See ``BaseTrigger``."""
        names = ("backend", "request", "size", "owner", "lock", "poll_seconds")
        return f"{__name__}.CodecJobTrigger", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event: ``backend``, ``request`` and the entries of ``watch.Verdict``."""
        try:
            verdict = await self._watch()
        except HCodecError as error:
            verdict = Verdict(JobState.FAILED, str(error), is_retryable=error.retryable)
        # Names what it speaks of: ``dag.test`` hands a resumed task nothing but the event.
        job = {"backend": self.backend, "request": self.request}
        yield TriggerEvent(verdict.as_event() | job)  # type: ignore[no-untyped-call]  # as above

    async def on_kill(self) -> None:
        """Stop the workers, if this try's task is really no longer deferred.

        Airflow calls this also in a triggerer that hung, lost its triggers to another one and came
        back: then the task is still deferred, and the work is another trigger's.
        """
        # Airflow 3.3 cancels a trigger anew every second until it has ended, also while this runs.
        work = asyncio.create_task(self._stop_workers())
        _UNDISTURBED.add(work)
        work.add_done_callback(_UNDISTURBED.discard)
        await asyncio.shield(work)

    async def _stop_workers(self) -> None:
        if await self._task_state() == _DEFERRED:
            logger.info("The task is still deferred: another triggerer watches it; workers go on.")
            return
        killed = await asyncio.to_thread(self._kill)
        logger.info("Workers stopped." if killed else "The workers belong to a newer try.")

    async def _watch(self) -> Verdict:
        request = request_from(self.request)
        backend, watch = await asyncio.to_thread(self._make_watch, request)
        async with backend.following(request):
            while True:
                verdict = await asyncio.to_thread(watch.step)
                if verdict is not None:
                    return verdict
                await asyncio.sleep(self.poll_seconds)

    def _make_watch(self, request: JobRequest) -> tuple[Backend, JobWatch]:
        settings = read_settings()
        backend = open_backend(self.backend, settings)
        return backend, JobWatch(
            backend,
            ProgressReader(settings.open_storage(), request.plan_uri),
            request,
            self.owner,
            JobSize(**self.size),
            renew=renewer(self.lock),
        )

    def _kill(self) -> bool:
        return stop_workers(self.backend, self.request, self.owner)

    async def _task_state(self) -> str | None:
        """State of this task in Airflow's database, None once it was cleared."""
        task = self.task_instance
        assert task is not None
        return await asyncio.to_thread(
            task_state, task.dag_id, task.run_id, task.task_id, task.map_index
        )


class DatasetLockTrigger(BaseTrigger):
    """Waits until a run holds a dataset's lock; says in the task's log who holds it meanwhile."""

    def __init__(self, dataset: str, owner: str, poll_seconds: float = 5.0) -> None:
        """``owner`` names the run, as for ``LockWait``."""
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow leaves it untyped
        self.dataset = dataset
        self.owner = owner
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """See ``BaseTrigger``."""
        names = ("dataset", "owner", "poll_seconds")
        return f"{__name__}.DatasetLockTrigger", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event: ``lock`` and ``message``, or ``error`` when asking is of no use."""
        try:
            event = await self._wait()
        except HCodecError as error:
            event = {"error": str(error)}
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]  # as above

    async def _wait(self) -> dict[str, Any]:
        wait = await asyncio.to_thread(LockWait, self.dataset, self.owner)
        said, next_remark = "", 0.0
        while True:
            try:
                lock, message = await asyncio.to_thread(wait.ask)
            except StorageError as error:
                lock, message = None, f"{error} Asking again."
            if lock is not None:
                return {"lock": lock, "message": message}
            if message != said or time.monotonic() >= next_remark:
                logger.info("%s", message)
                said, next_remark = message, time.monotonic() + _REMARK_SECONDS
            await asyncio.sleep(self.poll_seconds)


def request_as_values(request: JobRequest) -> dict[str, Any]:
    """A request as plain JSON values."""
    return asdict(request)


def request_from(values: dict[str, Any]) -> JobRequest:
    """The request that ``request_as_values`` was given."""
    nested = {"resources": WorkerResources, "timeouts": Timeouts, "origin": TaskOrigin}
    made = {name: kind(**values[name]) for name, kind in nested.items() if name in values}
    return JobRequest(**{**values, **made})
