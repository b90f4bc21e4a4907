"""Workers that were taken away: their shards become free at once and uncounted.

Evictions, preemption, deleted pods and lost nodes say nothing about the work. A worker that was
ended for want of memory does; it is followed by one with the next *batch class* of the job document
(fewer batches held, fewer shards at once: never other tokens).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from hcodec_airflow.kubernetes.pods import PodState
from hcodec_airflow.progress import list_folder
from hcodec_core.dataset.batch_choice import read_batch_choice, write_batch_choice
from hcodec_core.dataset.leases import Ending, EndingKind, end_attempt
from hcodec_core.errors import ObjectMissingError
from hcodec_core.jobs import TokenizeJob, WorkerProgress, read_any_job
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)

_POD_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Losses:
    """What is known of the workers of one plan that hold shards."""

    def __init__(self, storage: Storage, job_uri: str, plan_uri: str) -> None:
        """Nothing is read yet."""
        self._storage = storage
        self._job_uri = job_uri
        self._plan_uri = plan_uri
        self._reports: dict[str, tuple[str, WorkerProgress]] = {}
        self._released: set[tuple[str, str, int]] = set()
        self._lightened_for: set[str] = set()

    def holders(self) -> dict[str, list[WorkerProgress]]:
        """Reports of workers that hold shards, by the UID of their pod."""
        found: dict[str, list[WorkerProgress]] = {}
        for info in list_folder(self._storage, join_uri(self._plan_uri, "workers") + "/"):
            report = self._report(info.uri, info.etag)
            uid = _pod_uid(report.worker_id) if report is not None else ""
            if report is not None and uid and report.held_shards:
                found.setdefault(uid, []).append(report)
        return found

    def release(self, reports: Iterable[WorkerProgress], detail: str) -> int:
        """Release what these workers hold, once; how many shards."""
        number = 0
        for report in reports:
            for shard_id, attempt in report.held_shards.items():
                key = (report.worker_id, shard_id, attempt)
                if key in self._released:
                    continue
                ending = Ending(kind=EndingKind.RELEASED, detail=detail, worker_id=report.worker_id)
                prefix = join_uri(self._plan_uri, "leases", shard_id)
                end_attempt(self._storage, prefix, attempt, ending)
                self._released.add(key)
                number += 1
        return number

    def lighten(self, pods: Iterable[PodState]) -> bool:
        """Choose the next batch class when a pod ran out of memory; false when none is left."""
        killed = {pod.uid for pod in pods if pod.is_out_of_memory} - self._lightened_for
        if not killed:
            return True
        self._lightened_for |= killed
        job = read_any_job(self._storage.read(self._job_uri))
        if not isinstance(job, TokenizeJob):
            return False
        choice = read_batch_choice(self._storage, self._plan_uri)
        fresh = killed - set(choice.because)
        if not fresh:
            return True
        chosen = choice.following(fresh, len(job.batch_classes))
        if chosen.index == choice.index:
            logger.error(
                "A worker ran out of memory in the last of %d batch classes: give workers more "
                "memory in the profile.",
                len(job.batch_classes),
            )
            return False
        write_batch_choice(self._storage, self._plan_uri, chosen)
        logger.warning(
            "A worker ran out of memory: workers that start from now on use batch class %d (%s).",
            chosen.index,
            job.batch_classes[chosen.index].for_people,
        )
        return True

    def _report(self, uri: str, etag: str) -> WorkerProgress | None:
        known = self._reports.get(uri)
        if known is not None and known[0] == etag:
            return known[1]
        try:
            report = WorkerProgress.model_validate_json(self._storage.read(uri))
        except (ObjectMissingError, ValidationError):
            return None
        self._reports[uri] = (etag, report)
        return report


def lost_pods(holders: Mapping[str, object], pods: Iterable[PodState]) -> dict[str, str]:
    """UIDs of pods that hold shards and were taken away, with how that came about."""
    known = {pod.uid: pod for pod in pods}
    lost = {}
    for uid in holders:
        pod = known.get(uid)
        if pod is None:
            lost[uid] = "its pod is gone"
        elif pod.is_disrupted and not pod.is_alive:
            lost[uid] = pod.note or "its pod was taken away"
    return lost


def _pod_uid(worker_id: str) -> str:
    """The pod's UID in a worker's name; empty for workers of other backends."""
    match = _POD_UID.match(worker_id)
    return match[0] if match else ""
