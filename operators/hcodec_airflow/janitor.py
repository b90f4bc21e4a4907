"""``python -m hcodec_airflow.janitor``: deletes Jobs that no task of Airflow wants any more.

The operator ends its Jobs itself, and the last task of our DAGs what it left. This program is for
what no task can see: a run deleted while no triggerer was up, other people's DAGs. It looks at the
Jobs that carry our labels, asks Airflow's REST API about the task instance that each names, and
deletes one only when it is older than an age floor and its task has ended for good, or its run no
longer exists.
A task that may go on (running, deferred, waiting for a retry, cleared) keeps its Job, and so does
everything that cannot be told: an Airflow that does not answer, a DAG that this Airflow does not
know. The deletion names UID and resource version, so a Job that changed meanwhile is spared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hcodec_airflow.leftovers import ENDED_STATES
from hcodec_core.errors import EXIT_FAILURE, EXIT_OK, ConfigError, HCodecError, StorageError

if TYPE_CHECKING:
    from hcodec_airflow.kubernetes.client import ClusterApi

logger = logging.getLogger(__name__)

_SELECTOR = "app.kubernetes.io/managed-by=hcodec"
_ENDED_CONDITIONS = {"Complete", "Failed", "SuccessCriteriaMet", "FailureTarget"}


class AirflowSilentError(StorageError):
    """Airflow did not answer, or not as it should: nothing can be told now."""


@dataclass(frozen=True)
class TaskName:
    """The task instance that a Job names; ``map_index`` -1: not mapped."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1

    @property
    def path(self) -> str:
        """Below ``/api/v2``."""
        dag, run, task = (quote(part, safe="") for part in (self.dag_id, self.run_id, self.task_id))
        path = f"dags/{dag}/dagRuns/{run}/taskInstances/{task}"
        return path if self.map_index < 0 else f"{path}/{self.map_index}"


class Verdict(StrEnum):
    """What is to become of a Job, and why."""

    YOUNG = "younger than the age floor"
    OVER = "it has ended by itself"
    FOREIGN = "it names no task of Airflow"
    UNKNOWN_DAG = "this Airflow does not know its DAG"
    WANTED = "its task may go on"
    ENDED = "its task has ended"
    DELETED_RUN = "its DAG run was deleted"

    @property
    def is_orphan(self) -> bool:
        """Whether the Job may be deleted."""
        return self in {Verdict.ENDED, Verdict.DELETED_RUN}


@dataclass
class AirflowState:
    """Airflow's REST API, as far as the state of a task instance goes.

    Args:
        base_url: Address of the API server, without ``/api/v2``.
        token: Bearer token; made from ``login`` when empty.
        login: Name and password for ``/auth/token``.
    """

    base_url: str
    token: str = ""
    login: tuple[str, str] | None = None
    _seconds: float = field(default=30.0, repr=False)

    def judge(self, task: TaskName) -> Verdict:
        """Whether a task may still want its Job. Raises ``AirflowSilentError``."""
        answer = self._get(f"/api/v2/{task.path}")
        if answer is not None:
            is_over = answer["state"] in ENDED_STATES
            return Verdict.ENDED if is_over else Verdict.WANTED
        # Another Airflow's Job, or a DAG whose file is gone, must not be taken for an orphan.
        if self._get(f"/api/v2/dags/{quote(task.dag_id, safe='')}") is None:
            return Verdict.UNKNOWN_DAG
        return Verdict.DELETED_RUN

    def _get(self, path: str) -> dict[str, Any] | None:
        """A JSON answer; None for 404."""
        if not self.token and self.login is not None:
            self.token = self._log_in(*self.login)
        request = urllib.request.Request(self.base_url.rstrip("/") + path)
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            return self._send(request)
        except urllib.error.HTTPError as error:
            if error.code == 404 and _is_from_airflow(error):
                return None
            raise AirflowSilentError(f"Airflow answered {error.code} to GET {path}.") from error

    def _log_in(self, name: str, password: str) -> str:
        body = json.dumps({"username": name, "password": password}).encode()
        headers = {"Content-Type": "application/json"}
        url = f"{self.base_url.rstrip('/')}/auth/token"
        try:
            answer = self._send(urllib.request.Request(url, data=body, headers=headers))
        except urllib.error.HTTPError as error:
            raise AirflowSilentError(
                f"Airflow refused the log-in at {url} ({error.code})."
            ) from error
        return str(answer["access_token"])

    def _send(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                document: dict[str, Any] = json.load(answer)
                return document
        except urllib.error.HTTPError:
            raise
        except (OSError, ValueError) as error:
            raise AirflowSilentError(
                f"Airflow at {self.base_url} gave no usable answer ({type(error).__name__})."
            ) from error


def _is_from_airflow(error: urllib.error.HTTPError) -> bool:
    """A proxy's 404 for a wrong address says nothing about a task."""
    try:
        return "detail" in json.load(error)
    except ValueError:
        return False


@dataclass(frozen=True)
class JanitorOptions:
    """Namespace of the workers, and from which age (seconds, server time) on a Job may go."""

    namespace: str
    min_age_seconds: float
    is_dry_run: bool = False


async def sweep(api: ClusterApi, airflow: AirflowState, options: JanitorOptions) -> dict[str, str]:
    """Judge every Job of ours and delete orphans.

    Returns why each Job, by name, was left or deleted. Raises ``AirflowSilentError`` at the first
    question without an answer, and what ``ClusterApi`` raises.
    """
    collection = f"/apis/batch/v1/namespaces/{options.namespace}/jobs"
    listed = await api.list_objects(collection, labelSelector=_SELECTOR)
    report = {}
    for job in listed["items"]:
        verdict = await _judge(job, api, airflow, options)
        name = job["metadata"]["name"]
        report[name] = str(verdict)
        logger.info("%s: %s%s", name, verdict, _consequence(verdict, options))
        if verdict.is_orphan and not options.is_dry_run:
            await _delete(api, collection, job)
    return report


def _consequence(verdict: Verdict, options: JanitorOptions) -> str:
    if not verdict.is_orphan:
        return ", left alone"
    return ", would be deleted" if options.is_dry_run else ", deleting it"


async def _judge(
    job: dict[str, Any], api: ClusterApi, airflow: AirflowState, options: JanitorOptions
) -> Verdict:
    if _has_ended(job):
        return Verdict.OVER  # its own time to live removes it
    if api.clock.seconds_since(job["metadata"]["creationTimestamp"]) < options.min_age_seconds:
        return Verdict.YOUNG
    task = task_of(job)
    if task is None:
        return Verdict.FOREIGN
    return await asyncio.to_thread(airflow.judge, task)


async def _delete(api: ClusterApi, collection: str, job: dict[str, Any]) -> None:
    from hcodec_airflow.kubernetes.client import ConflictError, NotFoundError

    try:
        await api.delete(collection, job)
    except (ConflictError, NotFoundError):
        logger.info("%s changed or went meanwhile: left alone.", job["metadata"]["name"])


def task_of(job: dict[str, Any]) -> TaskName | None:
    """The task instance that a Job's annotations name; None when they name none."""
    from hcodec_airflow.kubernetes.manifest import DOMAIN

    notes = job["metadata"].get("annotations") or {}
    parts = [notes.get(f"{DOMAIN}/{name}", "") for name in ("dag-id", "run-id", "task-id")]
    if not all(parts):
        return None
    return TaskName(parts[0], parts[1], parts[2], int(notes.get(f"{DOMAIN}/map-index", "-1")))


def _has_ended(job: dict[str, Any]) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(c["type"] in _ENDED_CONDITIONS and c["status"] == "True" for c in conditions)


async def _run(airflow: AirflowState, options: JanitorOptions) -> dict[str, str]:
    from hcodec_airflow.kubernetes.client import ClusterApi
    from hcodec_airflow.kubernetes.connection import opener

    async with ClusterApi(opener({}), options.namespace) as api:
        return await sweep(api, airflow, options)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hcodec_airflow.janitor", description=__doc__)
    parser.add_argument("--namespace", required=True, help="of the workers")
    parser.add_argument("--airflow-url", required=True, help="address of Airflow's API server")
    parser.add_argument("--min-age-seconds", type=float, default=30.0)
    parser.add_argument("--dry-run", action="store_true", help="say it, do not do it")
    return parser.parse_args(arguments)


def _airflow(url: str) -> AirflowState:
    token = os.environ.get("HCODEC_AIRFLOW_TOKEN", "")
    name = os.environ.get("HCODEC_AIRFLOW_USERNAME", "")
    password = os.environ.get("HCODEC_AIRFLOW_PASSWORD", "")
    if not token and not (name and password):
        raise ConfigError(
            "Airflow answers only with a log-in: set HCODEC_AIRFLOW_TOKEN, or "
            "HCODEC_AIRFLOW_USERNAME and HCODEC_AIRFLOW_PASSWORD."
        )
    return AirflowState(url, token, (name, password) if name else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run once; exit code 0 unless something could not be told or done."""
    options = _options(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    wanted = JanitorOptions(options.namespace, options.min_age_seconds, options.dry_run)
    try:
        report = asyncio.run(_run(_airflow(options.airflow_url), wanted))
    except HCodecError as error:
        logger.error("%s", error)
        return error.exit_code or EXIT_FAILURE
    logger.info("%d Jobs looked at.", len(report))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
