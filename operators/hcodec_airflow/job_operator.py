"""``CodecJobOperator``: one operator for all jobs of the product, on any backend."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from hcodec_airflow.failures import task_failures
from hcodec_airflow.leftovers import WORKERS_KEY, stop_workers
from hcodec_airflow.links import (
    LOGS_URL_KEY,
    MANIFEST_URL_KEY,
    JobManifestLink,
    WorkerLogsLink,
)
from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from airflow.sdk import Context

    from hcodec_airflow.backends.base import Backend, JobRequest, TaskOrigin, WorkerResources
    from hcodec_airflow.progress import Progress
    from hcodec_airflow.settings import Settings
    from hcodec_core.jobs import Job

logger = logging.getLogger(__name__)
_PROFILED = frozenset({"kubernetes", "trainjob"})


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
        workers: How many; with ``processes_per_node`` nodes (templated, so it may be text).
        profile: GPU profile of backends kubernetes and trainjob; empty: the default (templated).
        pod_template: Merged into the pods of those by strategic merge; may not loosen their
            security (templated).
        processes_per_node: For training: torchrun starts so many on each node. 0: independent
            workers (templated).
        device: Torch device of a worker; None: as profile or option ``local_device`` say.
        threads: CPU threads of a worker; None: as profile or option ``local_threads`` say.
        decoders: Decoding processes of a worker; None: as for threads.
        max_restarts: Starts of one worker after its first, per try.
        queue_seconds: Limit until resources are given to the first worker; None: none.
        startup_seconds: Limit from then until it runs.
        run_seconds: Limit from its first start, restarts included; None: none. All three are
            measured by the cluster's clock, and end the try with the workers stopped.
        lock: What the task ``lock`` returned, to keep the dataset's lock alive (templated).
        poll_seconds: Time between two looks at the storage.
    """

    template_fields: Sequence[str] = (
        "job",
        "backend",
        "workers",
        "profile",
        "processes_per_node",
        "pod_template",
        "lock",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"pod_template": "yaml"}
    operator_extra_links = (WorkerLogsLink(), JobManifestLink())
    ui_color = "#d5e8f7"

    def __init__(
        self,
        *,
        job: str,
        backend: str = "",
        workers: int | str = 2,
        profile: str = "",
        pod_template: Mapping[str, Any] | None = None,
        processes_per_node: int | str = 0,
        device: str | None = None,
        threads: int | None = None,
        decoders: int | None = None,
        max_restarts: int = 3,
        queue_seconds: float | None = None,
        startup_seconds: float | None = 1800.0,
        run_seconds: float | None = None,
        lock: Any = None,
        poll_seconds: float = 3.0,
        **kwargs: Any,
    ) -> None:
        """Keep what is asked for; nothing is read yet."""
        super().__init__(**kwargs)
        self.job = job
        self.backend = backend
        self.workers = workers
        self.profile = profile
        self.pod_template = pod_template
        self.processes_per_node = processes_per_node
        self.device = device
        self.threads = threads
        self.decoders = decoders
        self.max_restarts = max_restarts
        self.queue_seconds = queue_seconds
        self.startup_seconds = startup_seconds
        self.run_seconds = run_seconds
        self.lock = lock
        self.poll_seconds = poll_seconds
        self._submitted: tuple[Backend, JobRequest, str] | None = None

    def execute(self, context: Context) -> Any:
        """Start or adopt the workers, then wait in the triggerer."""
        with task_failures():
            from hcodec_airflow.settings import read_settings

            settings = read_settings()
            job = self._read_job(settings)
            name = self._backend_name(settings)
            request = self._request(job, settings, name, _origin_of(context))
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
            with task_failures():
                stop_workers(event["backend"], event["request"], str(context["ti"].id))
        kind = AirflowException if event["is_retryable"] else AirflowFailException
        raise kind(f"Job {event['state']}: {event['message']}")

    def dry_run(self) -> None:
        """Print what would be submitted, as YAML; needs the job document, but no cluster."""
        from hcodec_airflow.backends import open_backend
        from hcodec_airflow.backends.base import TaskOrigin
        from hcodec_airflow.settings import read_settings

        settings = read_settings()
        name = self._backend_name(settings)
        origin = TaskOrigin(self.dag_id, "<run>", self.task_id)
        request = self._request(self._read_job(settings), settings, name, origin)
        sys.stdout.write(open_backend(name, settings, is_offline=True).manifest(request))

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """For Airflow's OpenLineage provider: which job document was run, by which backend."""
        from hcodec_airflow.lineage import lineage_of_job

        return lineage_of_job(str(self.job))

    def on_kill(self) -> None:
        """Stop the workers that this try has just started or adopted."""
        if self._submitted is not None:
            backend, request, owner = self._submitted
            backend.kill(request, owner)

    def _submit(self, name: str, request: JobRequest, context: Context, settings: Settings) -> None:
        from hcodec_airflow.backends import open_backend
        from hcodec_airflow.triggers import request_as_values

        backend = open_backend(name, settings)
        if name == "local":
            self._refuse_split_hosts()
        owner = str(context["ti"].id)
        self._submitted = (backend, request, owner)
        # Before anything is started, so that there are no workers that the run's end cannot name.
        noted = {"backend": name, "request": request_as_values(request), "owner": owner}
        context["ti"].xcom_push(key=WORKERS_KEY, value=noted)
        logger.info("Job %s: submitted to backend %s", request.name, name)
        backend.submit_or_adopt(request, owner)
        self._push_links(request, context, settings)

    def _push_links(self, request: JobRequest, context: Context, settings: Settings) -> None:
        """Addresses for the buttons; they hold for all restarts of the try."""
        from hcodec_airflow.backends.ownership import Ownership, manifest_uri
        from hcodec_airflow.logs_page import PAGE, logs_uri
        from hcodec_core.storage import join_uri

        page_uri = join_uri(logs_uri(request.plan_uri), PAGE)
        context["ti"].xcom_push(key=LOGS_URL_KEY, value=settings.browser_url(page_uri))
        generation = Ownership(settings.open_storage(), request).last_generation()
        if generation >= 0:
            url = settings.browser_url(manifest_uri(request, generation))
            context["ti"].xcom_push(key=MANIFEST_URL_KEY, value=url)

    def _refuse_split_hosts(self) -> None:
        from airflow.sdk import conf

        from hcodec_airflow.backends.local import refuse_remote_executor

        refuse_remote_executor(self.executor or conf.get("core", "executor"))

    def _wait(self, name: str, request: JobRequest, job: Job, owner: str) -> None:
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
    def _progress(job: Job, settings: Settings) -> Progress:
        from hcodec_airflow.progress import JobSize, ProgressReader, add_totals

        progress = ProgressReader(settings.open_storage(), job.plan_uri).read()
        is_done = progress.num_shards_done >= job.num_shards
        size = JobSize(job.num_shards, job.num_files)
        return add_totals(progress, size) if is_done else progress

    def _read_job(self, settings: Settings) -> Job:
        from hcodec_core.jobs import read_any_job

        return read_any_job(settings.open_storage().read(self.job))

    def _request(
        self, job: Job, settings: Settings, backend: str, origin: TaskOrigin
    ) -> JobRequest:
        from hcodec_airflow.backends.base import JobRequest, Timeouts

        wanted = _count(self.workers, "workers", 1)
        processes_per_node = _count(self.processes_per_node, "processes_per_node", 0)
        return JobRequest(
            # One set of workers per plan, whichever try or run asks for it.
            name=f"{job.kind}-{job.plan_id}",
            job_uri=self.job,
            plan_uri=job.plan_uri,
            num_workers=wanted if processes_per_node else min(wanted, max(job.num_shards, 1)),
            resources=self._resources(settings, backend),
            max_restarts=self.max_restarts,
            lease_seconds=job.lease_seconds,
            profile=str(self.profile or ""),
            pod_template=dict(self.pod_template or {}),
            processes_per_node=processes_per_node,
            timeouts=Timeouts(self.queue_seconds, self.startup_seconds, self.run_seconds),
            origin=origin,
        )

    def _resources(self, settings: Settings, backend: str) -> WorkerResources:
        from hcodec_airflow.backends.base import WorkerResources

        if backend in _PROFILED:
            profile = settings.load_cluster_config().profile(self.profile)
            usual = (profile.torch_device, profile.threads, profile.decoders)
        else:
            usual = (settings.local_device, settings.local_threads, settings.local_decoders)
        return WorkerResources(
            device=self.device or usual[0],
            threads=self.threads or usual[1],
            decoders=self.decoders or usual[2],
        )

    def _backend_name(self, settings: Settings) -> str:
        from hcodec_airflow.backends import check_backend_name

        name = self.backend or settings.backend
        check_backend_name(name)
        return name


def _origin_of(context: Context) -> TaskOrigin:
    from hcodec_airflow.backends.base import TaskOrigin

    task = context["ti"]
    index = -1 if task.map_index is None else task.map_index
    return TaskOrigin(task.dag_id, task.run_id, task.task_id, index)


def _count(value: int | str, name: str, least: int) -> int:
    """A count that a template may have given as text. Raises ``ConfigError`` naming it."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name} is {value!r}: write a count of at least {least}.")
    return number
