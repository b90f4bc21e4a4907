"""Reading workloads: the Job, JobSet or TrainJob of one generation, alike for all kinds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hcodec_airflow.kubernetes.manifest import GENERATION_LABEL, JOB_URI, OWNER, STARTED_AT
from hcodec_airflow.kubernetes.profiles import Object

_COMPLETE = frozenset({"Complete", "Completed"})
_DEADLINE = "DeadlineExceeded"
_POLICY = "PodFailurePolicy"


@dataclass(frozen=True)
class Workload:
    """One generation as the API server holds it."""

    document: Object

    @property
    def name(self) -> str:
        """Name of the object."""
        return str(self.document["metadata"]["name"])

    @property
    def generation(self) -> int:
        """Which start of the job this is, from 0."""
        labels = self.document["metadata"].get("labels") or {}
        text = str(labels.get(GENERATION_LABEL, ""))
        return int(text) if text.isdecimal() else 0

    @property
    def annotations(self) -> dict[str, str]:
        """Annotations, none when it has none."""
        return dict(self.document["metadata"].get("annotations") or {})

    @property
    def owner(self) -> str:
        """The task try that it is stamped with."""
        return self.annotations.get(OWNER, "")

    @property
    def started_at(self) -> str:
        """When the first worker of this owner's first generation started, empty if unknown."""
        own = str((self.document.get("status") or {}).get("startTime") or "")
        return self.annotations.get(STARTED_AT, "") or own

    @property
    def created_at(self) -> str:
        """The API server's time of creation."""
        return str(self.document["metadata"].get("creationTimestamp") or "")

    @property
    def is_being_deleted(self) -> bool:
        """Whether somebody deleted it and its pods are still being removed."""
        return bool(self.document["metadata"].get("deletionTimestamp"))

    @property
    def is_complete(self) -> bool:
        """Whether it ended well."""
        return any(self._condition(kind) is not None for kind in _COMPLETE)

    @property
    def is_failed(self) -> bool:
        """Whether it ended otherwise."""
        return self._condition("Failed") is not None

    @property
    def is_active(self) -> bool:
        """Whether it has not ended and nobody deleted it."""
        return not (self.is_complete or self.is_failed or self.is_being_deleted)

    @property
    def is_suspended(self) -> bool:
        """Whether a queue holds it back."""
        return bool((self.document.get("spec") or {}).get("suspend"))

    @property
    def is_overdue(self) -> bool:
        """Whether its own deadline ended it."""
        failed = self._condition("Failed")
        return failed is not None and failed.get("reason") == _DEADLINE

    @property
    def was_refused(self) -> bool:
        """Whether a worker refused the job (exit code 43)."""
        failed = self._condition("Failed")
        return failed is not None and failed.get("reason") == _POLICY

    @property
    def ending(self) -> str:
        """How it ended, in the words of its controller."""
        for kind in ("Failed", *_COMPLETE):
            condition = self._condition(kind)
            if condition is not None:
                reason, message = condition.get("reason", kind), condition.get("message", "")
                return f"{reason}: {message}".rstrip(": ")
        return "being deleted" if self.is_being_deleted else ""

    @property
    def suspended_at(self) -> str:
        """When it was held back last, empty if unknown."""
        condition = self._condition("Suspended")
        return str((condition or {}).get("lastTransitionTime") or "")

    def is_ours(self, job_uri: str) -> bool:
        """Whether it was made for this job document and not by somebody with the same name."""
        return self.annotations.get(JOB_URI) == job_uri

    def _condition(self, kind: str) -> Object | None:
        for condition in (self.document.get("status") or {}).get("conditions") or []:
            if condition.get("type") == kind and condition.get("status") == "True":
                return dict(condition)
        return None


def newest(documents: Iterable[Object]) -> Workload | None:
    """The latest generation, None when there is none."""
    workloads = [Workload(document) for document in documents]
    return max(workloads, key=lambda workload: workload.generation, default=None)
