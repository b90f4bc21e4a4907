"""Logs of worker pods: their last lines for the task's log, all of them into object storage."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from hcodec_airflow.kubernetes.client import ClusterApi, NotFoundError
from hcodec_airflow.kubernetes.manifest import CONTAINER
from hcodec_airflow.kubernetes.pods import PodState
from hcodec_airflow.logs_page import logs_uri
from hcodec_core.errors import ClusterError, ConfigError
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)

MAX_LOG_BYTES = 64 * 1024**2
_AT_ONCE = 8
_LOG_SECONDS = 30.0


async def last_lines(
    api: ClusterApi, pod_name: str, max_lines: int, container: str = CONTAINER
) -> list[str]:
    """Last lines of a pod's log, oldest first; empty when the pod or its container is gone."""
    try:
        text = await api.text(_path(api, pod_name), container=container, tailLines=str(max_lines))
    except (NotFoundError, ConfigError):
        return []  # never started, or removed since
    return text.splitlines()[-max_lines:]


class LogArchive:
    """Copies each pod's log once when it has ended, and once more by name at the end."""

    def __init__(self, storage: Storage, plan_uri: str) -> None:
        """Nothing is copied yet."""
        self._storage = storage
        self._folder_uri = logs_uri(plan_uri)
        self._kept: set[str] = set()

    def missing(self, pods: Iterable[PodState]) -> list[PodState]:
        """Those of ``pods`` whose log was not kept when they had ended, and that have one."""
        begun = [pod for pod in pods if pod.is_alive or pod.is_ended]
        return [pod for pod in begun if pod.uid not in self._kept]

    async def fetch(self, api: ClusterApi, pods: Iterable[PodState]) -> dict[str, str]:
        """Whole logs by pod name, of those that can be read within their time."""
        turn = asyncio.Semaphore(_AT_ONCE)

        async def one(pod: PodState) -> tuple[PodState, str]:
            async with turn:
                return pod, await self._text(api, pod)

        found = await asyncio.gather(*(one(pod) for pod in pods))
        self._kept |= {pod.uid for pod, _ in found if pod.is_ended}
        return {pod.name: text for pod, text in found if text}

    @staticmethod
    async def _text(api: ClusterApi, pod: PodState) -> str:
        query = {"container": pod.container, "limitBytes": str(MAX_LOG_BYTES)}
        try:
            async with asyncio.timeout(_LOG_SECONDS):
                return await api.text(_path(api, pod.name), **query)
        except (NotFoundError, ConfigError, ClusterError, TimeoutError) as error:
            logger.debug("No log of %s: %s", pod.name, error)
            return ""

    def keep(self, texts: dict[str, str]) -> None:
        """Write logs into the plan's folder."""
        for name, text in texts.items():
            self._storage.write(join_uri(self._folder_uri, f"{name}.log"), text.encode())


def _path(api: ClusterApi, pod_name: str) -> str:
    return f"/api/v1/namespaces/{api.namespace}/pods/{pod_name}/log"
