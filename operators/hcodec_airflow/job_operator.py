"""``CodecJobOperator``: one operator for all jobs of the product, on any backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from hcodec_airflow.failures import task_failures
from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from airflow.sdk import Context

    from hcodec_airflow.backends.base import Backend, JobRequest, WorkerResources
    from hcodec_airflow.progress import Progress
    from hcodec_airflow.settings import Settings
    from hcodec_core.jobs import TokenizeJob

logger = logging.getLogger(__name__)


class CodecJobOperator(BaseOperator):
    """Runs the workers of a job document and waits for its results, without holding a slot.

    Submitted -> Queued -> Scheduling -> Running(n/N) -> Done / Failed / Killed

    A job is done when every shard of its plan has a result in storage, whatever became of the
    workers. Workers that end earlier are started again up to ``max_restarts`` times each; one that
    refuses the job (exit code 43) fails the task at once with its own sentence. A retry of the
    task, or a triggerer that was restarted, adopts running workers. Do not set
    ``execution_timeout``: Airflow ends such a task without ``on_kill``.

    Args:
        job: URI of the job document (templated).
        backend: Where workers run; empty: option ``backend`` of section ``[hcodec]`` (templated).
        workers: How many (templated, so it may be text).
        device: Torch device of a worker; None: option ``local_device``.
        threads: CPU threads of a worker; None: option ``local_threads``.
        decoders: Decoding processes of a worker; None: option ``local_decoders``.
        max_restarts: Starts of one worker after its first, per try.
        lock: What the task ``lock`` returned, to keep the dataset's lock alive (templated).
        poll_seconds: Time between two looks at the storage.
    """

    template_fields: Sequence[str] = ("job", "backend", "workers", "lock")
    ui_color = "#d5e8f7"

    def __init__(
        self,
        *,
        job: str,
        backend: str = "",
        workers: int | str = 2,
        device: str | None = None,
        threads: int | None = None,
        decoders: int | None = None,
        max_restarts: int = 3,
        lock: Any = None,
        poll_seconds: float = 3.0,
        **kwargs: Any,
    ) -> None:
        """Keep what is asked for; nothing is read yet."""
        super().__init__(**kwargs)
        self.job = job
        self.backend = backend
        self.workers = workers
        self.device = device
        self.threads = threads
        self.decoders = decoders
        self.max_restarts = max_restarts
        self.lock = lock
        self.poll_seconds = poll_seconds
        self._submitted: tuple[Backend, JobRequest, str] | None = None

    def execute(self, context: Context) -> Any:
        """Start or adopt the workers, then wait in the triggerer."""
        with task_failures():
            from hcodec_airflow.settings import read_settings

            settings = read_settings()
            job = self._read_job(settings)
            request = self._request(job, settings)
            name = self._backend_name(settings)
            progress = self._progress(job, settings)
            if progress.num_shards_done >= job.num_shards:
                logger.info("All %d shards are accounted for already.", job.num_shards)
                return self._sums(asdict(progress))
            self._submit(name, request, context, settings)
        self._wait(name, request, job, str(context["ti"].id))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Judge the trigger's verdict; returns the sums over the job's workers."""
        if event["state"] == "done":
            logger.info("%s", event["message"])
            return self._sums(event["progress"])
        if not event["is_retryable"]:
            self._stop_leftovers(event["backend"], event["request"], str(context["ti"].id))
        kind = AirflowException if event["is_retryable"] else AirflowFailException
        raise kind(f"Job {event['state']}: {event['message']}")

    def on_kill(self) -> None:
        """Stop the workers that this try has just started or adopted."""
        if self._submitted is not None:
            backend, request, owner = self._submitted
            backend.kill(request, owner)

    def _submit(self, name: str, request: JobRequest, context: Context, settings: Settings) -> None:
        from hcodec_airflow.backends import open_backend

        backend = open_backend(name, settings)
        if name == "local":
            self._refuse_split_hosts()
        owner = str(context["ti"].id)
        self._submitted = (backend, request, owner)
        logger.info("Job %s: submitted to backend %s", request.name, name)
        backend.submit_or_adopt(request, owner)

    def _refuse_split_hosts(self) -> None:
        from airflow.sdk import conf

        from hcodec_airflow.backends.local import refuse_remote_executor

        refuse_remote_executor(self.executor or conf.get("core", "executor"))

    def _wait(self, name: str, request: JobRequest, job: TokenizeJob, owner: str) -> None:
        from hcodec_airflow.triggers import CodecJobTrigger, request_as_values

        trigger = CodecJobTrigger(
            backend=name,
            request=request_as_values(request),
            size={"num_shards": job.num_shards, "num_files": job.num_files},
            owner=owner,
            lock=self.lock if isinstance(self.lock, dict) else None,
            poll_seconds=self.poll_seconds,
        )
        # No timeout here: Airflow would end the trigger without on_kill and leave the workers.
        self.defer(trigger=trigger, method_name="execute_complete")

    def _sums(self, progress: dict[str, Any]) -> dict[str, Any]:
        names = ("num_shards_done", "num_files", "audio_seconds", "num_tokens")
        return {"job_uri": self.job, **{name: progress[name] for name in names}}

    @staticmethod
    def _progress(job: TokenizeJob, settings: Settings) -> Progress:
        from hcodec_airflow.progress import JobSize, ProgressReader, add_totals

        progress = ProgressReader(settings.open_storage(), job.plan_uri).read()
        is_done = progress.num_shards_done >= job.num_shards
        size = JobSize(job.num_shards, job.num_files)
        return add_totals(progress, size) if is_done else progress

    def _read_job(self, settings: Settings) -> TokenizeJob:
        from hcodec_core.jobs import read_job

        return read_job(settings.open_storage().read(self.job))

    def _request(self, job: TokenizeJob, settings: Settings) -> JobRequest:
        from hcodec_airflow.backends.base import JobRequest

        return JobRequest(
            # One set of workers per plan, whichever try or run asks for it.
            name=f"{job.kind}-{job.plan_id}",
            job_uri=self.job,
            plan_uri=job.plan_uri,
            num_workers=min(self._num_workers(), max(job.num_shards, 1)),
            resources=self._resources(settings),
            max_restarts=self.max_restarts,
            lease_seconds=job.lease_seconds,
        )

    def _resources(self, settings: Settings) -> WorkerResources:
        from hcodec_airflow.backends.base import WorkerResources

        return WorkerResources(
            device=self.device or settings.local_device,
            threads=self.threads or settings.local_threads,
            decoders=self.decoders or settings.local_decoders,
        )

    def _num_workers(self) -> int:
        try:
            number = int(self.workers)
        except ValueError:
            number = 0
        if number < 1:
            raise ConfigError(f"workers is {self.workers!r}: write a count of at least 1.")
        return number

    def _backend_name(self, settings: Settings) -> str:
        from hcodec_airflow.backends import check_backend_name

        name = self.backend or settings.backend
        check_backend_name(name)
        return name

    @staticmethod
    def _stop_leftovers(backend: str, values: dict[str, Any], owner: str) -> None:
        from hcodec_airflow.backends import open_backend
        from hcodec_airflow.settings import read_settings
        from hcodec_airflow.triggers import request_from

        with task_failures():
            open_backend(backend, read_settings()).kill(request_from(values), owner)
