"""Backend ``kubernetes``: N workers as one Indexed Job, followed by the next one while needed.

Requests go through one asynchronous client. A trigger enters ``following``: then lists are kept up
to date by watches in its event loop, and what other threads ask runs there too. An operator, or a
kill, has no loop: each call gets one of its own, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from hcodec_airflow.backends.base import JobRequest, Observation, Worker
from hcodec_airflow.backends.ownership import Ownership
from hcodec_airflow.kubernetes import observing
from hcodec_airflow.kubernetes.client import ClusterApi, OpenClient, ServerClock
from hcodec_airflow.kubernetes.discovery import JOB, Kind
from hcodec_airflow.kubernetes.events import kueue_reason, last_warning
from hcodec_airflow.kubernetes.losses import Losses, lost_pods
from hcodec_airflow.kubernetes.manifest import (
    CONTAINER,
    GENERATION_LABEL,
    JOB_LABEL,
    as_yaml,
    job_key,
    job_manifest,
)
from hcodec_airflow.kubernetes.pod_logs import LogArchive, last_lines
from hcodec_airflow.kubernetes.pods import PodState, pod_state
from hcodec_airflow.kubernetes.profiles import ClusterConfig, Object
from hcodec_airflow.kubernetes.submission import (
    MakeManifest,
    Place,
    delete_unfinished,
    generations,
    live_pods,
    next_generation,
    submit,
)
from hcodec_airflow.kubernetes.view import Collection, JobView
from hcodec_airflow.kubernetes.workloads import Workload, newest
from hcodec_airflow.logs_page import write_logs_page
from hcodec_airflow.settings import Settings
from hcodec_core.errors import ClusterError, HCodecError
from hcodec_core.storage import Storage

logger = logging.getLogger(__name__)
T = TypeVar("T")
OpenedT = TypeVar("OpenedT", bound="KubernetesBackend")
_READY_SECONDS = 30.0
_ANSWER_SECONDS = 150.0
_REASON_SECONDS = 10.0
_STALE_SECONDS = 600.0


def open_backend(settings: Settings, *, is_offline: bool = False) -> KubernetesBackend:
    """The backend as this installation configures it; offline its connection is not read."""
    return open_as(KubernetesBackend, settings, is_offline)


def open_as(kind: type[OpenedT], settings: Settings, is_offline: bool) -> OpenedT:
    """A backend of ``kind``. Raises ``ConfigError`` when configuration or connection is wrong."""
    from hcodec_airflow.kubernetes.connection import opener, read_extras

    config = settings.load_cluster_config()
    extras = {} if is_offline else read_extras(config.connection)
    namespace = str(extras.get("namespace") or "") or config.namespace
    return kind(settings.open_storage(), config, opener(extras), namespace)


@dataclass
class _Followed:
    """What the trigger's loop keeps: client, lists and the task that keeps them up to date."""

    api: ClusterApi
    kind: Kind
    view: JobView
    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[None]


class KubernetesBackend:
    """See ``Backend``. One object serves one job."""

    def __init__(
        self, storage: Storage, config: ClusterConfig, open_client: OpenClient, namespace: str
    ) -> None:
        """Keep how to reach the cluster; nothing is asked yet."""
        self._storage = storage
        self._config = config
        self._open_client = open_client
        self._namespace = namespace
        self._followed: _Followed | None = None
        self._losses: Losses | None = None
        self._archive: LogArchive | None = None
        self._reason = ""
        self._next_reason = 0.0
        self._last_clock = ServerClock()

    def submit_or_adopt(self, request: JobRequest, owner: str) -> Observation:
        """See ``Backend``. Raises ``ConfigError`` for what the API server refuses."""
        make = self._maker(request, owner)
        make(0, 1)  # a wrong profile or template is refused before anything is asked

        async def work(api: ClusterApi) -> None:
            await submit(await self._place(api, request), owner, make)

        self._run(work)
        return self.observe(request)

    def restart_ended(self, request: JobRequest, owner: str) -> None:
        """See ``Backend``: starts the next generation when the newest one is over."""
        latest, _ = self._seen(request)
        if latest is not None and latest.is_active:
            return  # its own controller starts pods again
        if not Ownership(self._storage, request).is_held_by(owner):
            return
        make = self._maker(request, owner)
        started_at = latest.started_at if latest is not None else ""

        async def work(api: ClusterApi) -> bool:
            place = await self._place(api, request)
            path, selector = self._pods_of(api, request)
            left = await live_pods(place, path, selector)
            if left:
                logger.info("Waiting for %d pods of the Job before to end.", len(left))
                return False
            return await next_generation(place, owner, make, started_at)

        if self._run(work):
            self._refresh()

    def tend(self, request: JobRequest, owner: str) -> None:
        """See ``Backend``; keeps logs of ended pods, and lightens workers after lack of memory."""
        _, pods = self._seen(request)
        # A pod that is taken away takes its log along: keep what there is while it ends.
        self._keep_logs(request, [pod for pod in pods if pod.is_ended or pod.is_disrupted])
        losses = self._losses_of(request)
        holders = losses.holders()
        if any(pod.is_out_of_memory for pod in pods) and losses.lighten(pods):
            for pod in pods:
                if pod.is_out_of_memory:
                    losses.release(holders.get(pod.uid, ()), pod.note)
        if not lost_pods(holders, pods):
            return
        # Before a pod is called gone, the server is asked anew: the lists may be late.
        fresh = self._run(lambda api: self._fresh_pods(api, request))
        for uid, detail in lost_pods(holders, fresh).items():
            number = losses.release(holders[uid], detail)
            if number:
                logger.info("Freed %d shards of pod %s, uncounted: %s", number, uid, detail)

    def observe(self, request: JobRequest) -> Observation:
        """See ``Backend``. Raises ``ClusterError`` while the API server has said nothing yet."""
        workload, pods = self._seen(request)
        records = Ownership(self._storage, request)
        standing = records.read()
        generation = workload.generation if workload else records.last_generation()
        number = max(1, generation - standing.base_generation + 1)
        newest_pods = [p for p in pods if p.generation == generation]
        scene = observing.Scene(
            request=request,
            workload=workload,
            pods=newest_pods,
            older=[p for p in pods if p.generation != generation],
            num_starts=number,
            is_killed=bool(standing.owner) and records.is_killed(standing.owner),
            clock=self._clock,
        )
        return observing.observe(scene, self._reason_for(scene))

    def kill(self, request: JobRequest, owner: str) -> bool:
        """See ``Backend``: keeps logs, then deletes the generations that have not ended."""
        records = Ownership(self._storage, request)
        if records.read().owner != owner:
            return False
        records.mark_killed(owner)
        try:
            self._keep_logs(request, self._seen(request)[1])
        except HCodecError as error:
            logger.warning("Logs could not all be kept: %s", error)

        async def work(api: ClusterApi) -> None:
            await delete_unfinished(await self._place(api, request), owner)

        self._run(work)
        return True

    def logs(self, request: JobRequest, worker: Worker, max_lines: int) -> Sequence[str]:
        """See ``Backend``."""
        container = next((p.container for p in self._pods_named(request, worker.name)), CONTAINER)
        return self._run(lambda api: last_lines(api, worker.name, max_lines, container))

    def conclude(self, request: JobRequest, owner: str) -> Sequence[str]:
        """See ``Backend``."""
        self.kill(request, owner)
        return write_logs_page(self._storage, request.plan_uri)

    @asynccontextmanager
    async def following(self, request: JobRequest) -> AsyncIterator[None]:
        """See ``Backend``: watches the job's objects in the present event loop."""
        async with ClusterApi(self._open_client, self._namespace) as api:
            kind = await self._patiently_find_kind(api, request)
            path, selector = self._pods_of(api, request)
            workloads = Collection(kind.collection(api.namespace), self._selector(request))
            view = JobView(api, workloads, Collection(path, selector))
            task = asyncio.create_task(view.follow())
            self._followed = _Followed(api, kind, view, asyncio.get_running_loop(), task)
            try:
                await view.wait_until_ready(_READY_SECONDS, task)
                yield
            finally:
                self._followed = None
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def manifest(self, request: JobRequest) -> str:
        """See ``Backend``."""
        return as_yaml(self._maker(request, "<id of the task try>")(0, 1))

    def _maker(self, request: JobRequest, owner: str) -> MakeManifest:
        profile = self._config.profile(request.profile)

        def make(generation: int, starts: int) -> Object:
            return job_manifest(request, profile, self._namespace, owner, generation, starts)

        return make

    async def _kind(self, api: ClusterApi, request: JobRequest) -> Kind:
        return JOB

    async def _place(self, api: ClusterApi, request: JobRequest) -> Place:
        kind = self._followed.kind if self._followed else await self._kind(api, request)
        return Place(api, kind, request, Ownership(self._storage, request))

    async def _patiently_find_kind(self, api: ClusterApi, request: JobRequest) -> Kind:
        deadline = time.monotonic() + _STALE_SECONDS
        while True:
            try:
                return await self._kind(api, request)
            except ClusterError as error:
                if time.monotonic() > deadline:
                    raise
                logger.warning("%s Asking again.", error)
                await asyncio.sleep(2.0)

    @staticmethod
    def _selector(request: JobRequest) -> str:
        return f"{JOB_LABEL}={job_key(request)}"

    def _pods_of(self, api: ClusterApi, request: JobRequest) -> tuple[str, str]:
        """Path and label selector of the job's pods, of all generations."""
        return f"/api/v1/namespaces/{api.namespace}/pods", self._selector(request)

    def _generation_of(self, pod: Object) -> int:
        text = str((pod["metadata"].get("labels") or {}).get(GENERATION_LABEL, ""))
        return int(text) if text.isdecimal() else 0

    def _pods_named(self, request: JobRequest, name: str) -> list[PodState]:
        return [pod for pod in self._seen(request)[1] if pod.name == name]

    def _seen(self, request: JobRequest) -> tuple[Workload | None, list[PodState]]:
        """Newest generation and all pods, from the lists kept up to date or asked now."""
        followed = self._followed
        if followed is None:
            return self._run(lambda api: self._ask(api, request))
        _raise_from(followed.task)
        if not followed.view.is_ready:
            raise ClusterError("The Kubernetes API server has not answered yet.")
        if followed.view.silent_seconds > _STALE_SECONDS:
            raise ClusterError("The Kubernetes API server has not answered for ten minutes.")
        documents = list(followed.view.workloads.objects.values())
        return newest(documents), self._states(followed.view.pods.objects.values())

    async def _ask(
        self, api: ClusterApi, request: JobRequest
    ) -> tuple[Workload | None, list[PodState]]:
        place = await self._place(api, request)
        return newest(await generations(place)), await self._fresh_pods(api, request)

    async def _fresh_pods(self, api: ClusterApi, request: JobRequest) -> list[PodState]:
        path, selector = self._pods_of(api, request)
        listed = await api.list_objects(path, labelSelector=selector)
        self._last_clock = api.clock
        return self._states(listed.get("items") or [])

    def _states(self, documents: Iterable[Object]) -> list[PodState]:
        return [pod_state(document, self._generation_of(document)) for document in documents]

    @property
    def _clock(self) -> ServerClock:
        return self._followed.api.clock if self._followed else self._last_clock

    def _refresh(self) -> None:
        """See what was just changed, rather than when its event arrives."""
        followed = self._followed
        if followed is not None:
            self._run(lambda _: followed.view.refresh())

    def _reason_for(self, scene: observing.Scene) -> str:
        """Why nothing runs, where pods do not say it; asked now and then only."""
        workload = scene.workload
        if scene.alive or workload is None or not workload.is_active:
            self._reason, self._next_reason = "", 0.0
            return ""
        if time.monotonic() >= self._next_reason:
            self._next_reason = time.monotonic() + _REASON_SECONDS
            self._reason = self._run(lambda api: _find_reason(api, scene, workload))
        return self._reason

    def _keep_logs(self, request: JobRequest, pods: Sequence[PodState]) -> None:
        archive = self._archive_of(request)
        wanted = archive.missing(pods)
        if wanted:
            archive.keep(self._run(lambda api: archive.fetch(api, wanted)))

    def _archive_of(self, request: JobRequest) -> LogArchive:
        if self._archive is None:
            self._archive = LogArchive(self._storage, request.plan_uri)
        return self._archive

    def _losses_of(self, request: JobRequest) -> Losses:
        if self._losses is None:
            self._losses = Losses(self._storage, request.job_uri, request.plan_uri)
        return self._losses

    def _run(self, work: Callable[[ClusterApi], Awaitable[T]]) -> T:
        """Do asynchronous work from a thread; in the loop that follows, where there is one."""
        followed = self._followed
        if followed is None:
            return _run_apart(lambda: self._with_client(work))

        async def there() -> T:
            return await work(followed.api)

        future = asyncio.run_coroutine_threadsafe(there(), followed.loop)
        try:
            return future.result(timeout=_ANSWER_SECONDS)
        except TimeoutError as error:
            future.cancel()
            raise ClusterError("Kubernetes did not answer in time.") from error

    async def _with_client(self, work: Callable[[ClusterApi], Awaitable[T]]) -> T:
        async with ClusterApi(self._open_client, self._namespace) as api:
            return await work(api)


async def _find_reason(api: ClusterApi, scene: observing.Scene, workload: Workload) -> str:
    if workload.is_suspended:
        return await kueue_reason(api, workload.document)
    stuck = [pod for pod in scene.waiting if pod.scheduled_at]
    return await last_warning(api, stuck[0].name if stuck else workload.name)


def _raise_from(task: asyncio.Task[None]) -> None:
    """Raise what ended the watches: such as a permission that is missing."""
    if not task.done() or task.cancelled():
        return
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error


def _run_apart(make: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine in a loop and a thread of its own.

    A signal handler (``on_kill``) may call this while the main thread is in it already.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    async def run() -> None:
        try:
            results.append(await make())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            errors.append(error)

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="kubernetes", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
