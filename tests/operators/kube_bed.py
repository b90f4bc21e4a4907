"""A backend on the test API server, whose pods are processes of this machine, and a real plan."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from hcodec_airflow.backends.base import JobRequest, TaskOrigin, Timeouts
from hcodec_airflow.backends.kubernetes import KubernetesBackend
from hcodec_airflow.kubernetes.connection import opener
from hcodec_airflow.kubernetes.manifest import JOB_LABEL, job_key
from hcodec_airflow.kubernetes.profiles import ClusterConfig
from hcodec_airflow.progress import JobSize, ProgressReader
from hcodec_airflow.watch import JobWatch, Pace, Verdict
from hcodec_core.config import StorageConfig
from hcodec_core.storage import Storage, open_storage
from tests.kube.server import KubeServer

CONFIG = """
[access]
source_prefixes = ["file:///"]
destination_prefixes = ["file:///"]
[catalog]
uri = "sqlite:///{folder}/catalog.db"
warehouse_uri = "file://{folder}/warehouse"
[work]
work_uri = "file://{folder}/work"
"""
LEASE_SECONDS = 6.0


class Bed:
    """One cluster, one storage, one plan; watches of several triggerers when asked."""

    def __init__(self, kube: KubeServer, folder: Path, **profile: Any) -> None:
        self.kube = kube
        self.folder = folder
        self.storage: Storage = open_storage(StorageConfig())
        self.kubeconfig = kube.write_kubeconfig(folder / "kubeconfig")
        self.config = ClusterConfig.model_validate(
            {
                "connection": "",
                "namespace": "default",
                "profiles": {"cpu": {"image": "worker:test", "cpu": "1", **profile}},
            }
        )
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "hcodec-config"},
            "data": {"hcodec.toml": CONFIG.format(folder=folder)},
        }
        kube.create(body)

    def backend(self) -> KubernetesBackend:
        """A backend as another process would open it: it knows nothing but storage and cluster."""
        open_client = opener({"kube_config_path": str(self.kubeconfig)})
        return KubernetesBackend(self.storage, self.config, open_client, "default")

    def request(self, plan_uri: str, num_workers: int = 2, **options: Any) -> JobRequest:
        return replace(
            JobRequest(
                name="tokenize-plan",
                job_uri=f"{plan_uri}/job.json",
                plan_uri=plan_uri,
                num_workers=num_workers,
                lease_seconds=LEASE_SECONDS,
                timeouts=Timeouts(startup_seconds=600),
                origin=TaskOrigin("dag", "run", "tokenize"),
            ),
            **options,
        )

    def jobs(self, request: JobRequest) -> list[dict[str, Any]]:
        from tests.kube import kinds

        found = self.kube.store.list(kinds.JOB, "default")
        key = job_key(request)
        return [j for j in found if (j["metadata"].get("labels") or {}).get(JOB_LABEL) == key]

    def active_jobs(self, request: JobRequest) -> list[dict[str, Any]]:
        from hcodec_airflow.kubernetes.workloads import Workload

        return [job for job in self.jobs(request) if Workload(job).is_active]


class Triggerer:
    """Runs a watch in a loop of its own, as a triggerer does; can die without a word."""

    def __init__(
        self, bed: Bed, request: JobRequest, owner: str, size: JobSize, poll_seconds: float = 0.3
    ) -> None:
        self.verdict: Verdict | None = None
        self.error: BaseException | None = None
        self._bed, self._request, self._owner, self._size = bed, request, owner, size
        self._poll_seconds = poll_seconds
        self._go = threading.Event()
        self._go.set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def hang(self) -> None:
        """Stop looking, with everything kept in memory."""
        self._go.clear()

    def wake(self) -> None:
        self._go.set()

    def die(self) -> None:
        """End without concluding anything."""
        self._stopped.set()
        self._go.set()
        self._thread.join(timeout=60)

    @property
    def is_dead(self) -> bool:
        """Whether it was made to die."""
        return self._stopped.is_set()

    def wait(self, seconds: float = 180.0) -> Verdict:
        self._thread.join(timeout=seconds)
        if self.error is not None:
            raise self.error
        assert self.verdict is not None, "no verdict in time"
        return self.verdict

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:  # noqa: BLE001 - told by wait()
            self.error = error

    async def _run(self) -> None:
        backend = self._bed.backend()
        reader = ProgressReader(self._bed.storage, self._request.plan_uri)
        watch = JobWatch(
            backend, reader, self._request, self._owner, self._size, pace=Pace(2.0, 60.0)
        )
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(backend.following(self._request))
            while not self._stopped.is_set():
                await asyncio.to_thread(self._go.wait)
                if self._stopped.is_set():
                    return
                self.verdict = await asyncio.to_thread(watch.step)
                if self.verdict is not None:
                    return
                await asyncio.sleep(self._poll_seconds)


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what or condition} did not come true in time"
        time.sleep(0.1)
    return found
