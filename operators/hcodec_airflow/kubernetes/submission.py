"""Creating, adopting and deleting the generations of a job: never a second set of workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.backends.ownership import Ownership
from hcodec_airflow.kubernetes.client import ClusterApi, ConflictError, NotFoundError
from hcodec_airflow.kubernetes.discovery import Kind
from hcodec_airflow.kubernetes.manifest import (
    JOB_LABEL,
    OWNER,
    STARTED_AT,
    annotations_of,
    as_yaml,
    job_key,
)
from hcodec_airflow.kubernetes.pods import pod_state
from hcodec_airflow.kubernetes.profiles import Object
from hcodec_airflow.kubernetes.workloads import Workload, newest
from hcodec_core.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

_ROUNDS = 40
_ENDING_POLL_SECONDS = 2.0
_ENDING_PATIENCE_SECONDS = 180.0

MakeManifest = Callable[[int, int], Object]
"""(generation, starts for this owner) -> manifest."""


@dataclass(frozen=True)
class Place:
    """Where the generations of one job are: API, kind, selectors and records."""

    api: ClusterApi
    kind: Kind
    request: JobRequest
    records: Ownership

    @property
    def collection(self) -> str:
        """Path of the workloads."""
        return self.kind.collection(self.api.namespace)

    @property
    def selector(self) -> str:
        """Label selector of the workloads."""
        return f"{JOB_LABEL}={job_key(self.request)}"


async def generations(place: Place) -> list[Object]:
    """All generations that the API server knows, as of now."""
    listed = await place.api.list_objects(place.collection, labelSelector=place.selector)
    return list(listed.get("items") or [])


async def live_pods(place: Place, path: str, selector: str) -> list[str]:
    """Names of the job's pods that have not ended, whatever generation they are of."""
    listed = await place.api.list_objects(path, labelSelector=selector)
    states = map(pod_state, listed.get("items") or [])
    return [state.name for state in states if not state.is_ended]


async def submit(place: Place, owner: str, make: MakeManifest) -> None:
    """Adopt the newest generation if it runs or is complete, else start the next, for ``owner``.

    Raises ``ClusterError`` when an older generation does not go away.
    """
    waited = 0.0
    for _ in range(_ROUNDS + int(_ENDING_PATIENCE_SECONDS / _ENDING_POLL_SECONDS)):
        latest = newest(await generations(place))
        if latest is not None and latest.is_being_deleted:
            waited = await _wait_for_end(latest, waited)
            continue
        if latest is not None and _may_be_adopted(latest, place.request):
            place.records.claim(owner, latest.generation)
            if await _adopt(place, latest, owner):
                return
            continue
        number = _next_generation(place, latest)
        place.records.claim(owner, number)
        if await create_generation(place, make(number, 1)):
            return
    raise ClusterError(
        f"Job {place.request.name} could not be submitted: others change it all the time."
    )


async def create_generation(place: Place, manifest: Object) -> bool:
    """Create one; false when its name is taken: look again. Keeps the manifest in storage."""
    name = manifest["metadata"]["name"]
    try:
        await place.api.create(place.collection, manifest)
    except ConflictError:
        await _refuse_foreign(place, name)
        return False
    except NotFoundError as error:
        raise ConfigError(
            f"{error}: namespace {place.api.namespace} does not exist, or the API server does not "
            f"serve {place.kind.plural}; correct namespace in the file of kubernetes_file."
        ) from error
    generation = Workload(manifest).generation
    uri = place.records.keep_manifest(generation, as_yaml(manifest))
    logger.info("Created %s %s; manifest: %s", place.kind.name, name, uri)
    return True


async def next_generation(place: Place, owner: str, make: MakeManifest, started_at: str) -> bool:
    """Start the generation after one that ended or is gone; true when one was started.

    Nothing happens while the newest one runs or any of its pods does.
    """
    latest = newest(await generations(place))
    if latest is not None and not (latest.is_complete or latest.is_failed):
        return False
    number = _next_generation(place, latest)
    starts = number - place.records.read().base_generation + 1
    manifest = make(number, starts)
    if started_at:
        manifest["metadata"]["annotations"][STARTED_AT] = started_at
    if not place.records.is_held_by(owner):
        return False
    return await create_generation(place, manifest)


async def delete_unfinished(place: Place, owner: str) -> None:
    """Delete the generations that have not ended, while they carry ``owner``'s stamp."""
    for _ in range(_ROUNDS):
        found = [Workload(document) for document in await generations(place)]
        mine = [one for one in found if one.is_active and one.owner == owner]
        if not mine:
            return
        for workload in mine:
            await _delete(place, workload)
    raise ClusterError(f"Job {place.request.name} could not be deleted: others change it.")


async def _delete(place: Place, workload: Workload) -> None:
    try:
        await place.api.delete(place.collection, workload.document)
        logger.info("Deleted %s %s.", place.kind.name, workload.name)
    except NotFoundError:
        logger.info("%s %s is gone already.", place.kind.name, workload.name)
    except ConflictError:
        # It changed since it was read: perhaps it has a new owner. Look again.
        await asyncio.sleep(0.2)


def _may_be_adopted(workload: Workload, request: JobRequest) -> bool:
    return workload.is_ours(request.job_uri) and (workload.is_active or workload.is_complete)


async def _adopt(place: Place, workload: Workload, owner: str) -> bool:
    """Stamp a generation with its new owner; false when it changed meanwhile."""
    if workload.owner == owner:
        return True
    stamp: Mapping[str, str] = annotations_of(place.request, owner, 1)
    version = workload.document["metadata"]["resourceVersion"]
    change = {"metadata": {"resourceVersion": version, "annotations": dict(stamp)}}
    try:
        await place.api.patch(place.collection, workload.name, change)
    except (ConflictError, NotFoundError):
        return False
    logger.info("Adopted %s %s of an earlier try.", place.kind.name, workload.name)
    return True


async def _wait_for_end(workload: Workload, waited: float) -> float:
    if waited >= _ENDING_PATIENCE_SECONDS:
        raise ClusterError(
            f"{workload.name} is being deleted for {waited:.0f} s and does not go: see its pods "
            "and finalizers."
        )
    if not waited:
        logger.info("%s is being deleted: waiting until it is gone.", workload.name)
    await asyncio.sleep(_ENDING_POLL_SECONDS)
    return waited + _ENDING_POLL_SECONDS


def _next_generation(place: Place, latest: Workload | None) -> int:
    # Names are not used again: a pod of an older generation may still be there.
    known = -1 if latest is None else latest.generation
    return max(known, place.records.last_generation()) + 1


async def _refuse_foreign(place: Place, name: str) -> None:
    try:
        found = Workload(await place.api.read(place.collection, name))
    except NotFoundError:
        return
    if not found.is_ours(place.request.job_uri):
        raise ConfigError(
            f"{place.kind.name} {name} exists in namespace {place.api.namespace} and is not of "
            f"this job ({OWNER} or job-uri differ): remove it."
        )
