"""What an API server serves, and which of it runs processes on several nodes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.kubernetes.client import ClusterApi
from hcodec_core.errors import ConfigError

logger = logging.getLogger(__name__)

TRAINER = ("trainer.kubeflow.org", "v1alpha1")
JOBSET = ("jobset.x-k8s.io", "v1alpha2")


@dataclass(frozen=True)
class Kind:
    """A kind of object that runs pods. ``pod_label``: by which its pods carry its name."""

    name: str
    group: str
    version: str
    plural: str
    pod_label: str = ""

    def collection(self, namespace: str) -> str:
        """Path of the objects of a namespace."""
        return f"/apis/{self.group}/{self.version}/namespaces/{namespace}/{self.plural}"


JOB = Kind("Job", "batch", "v1", "jobs")
TRAIN_JOB = Kind("TrainJob", *TRAINER, "trainjobs", "jobset.sigs.k8s.io/jobset-name")
JOB_SET = Kind("JobSet", *JOBSET, "jobsets")


async def served_groups(api: ClusterApi) -> dict[str, set[str]]:
    """Versions by API group."""
    listed = await api.list_objects("/apis")
    return {
        group["name"]: {version["version"] for version in group.get("versions", [])}
        for group in listed.get("groups", [])
    }


async def training_kind(api: ClusterApi, request: JobRequest) -> Kind:
    """The kind for a training of ``request``: TrainJob where served, else JobSet, else a Job.

    Logs which and why. Raises ``ConfigError`` for several nodes where only a Job is served.
    """
    served = await served_groups(api)
    kind, why = choose_kind(served, request.num_workers)
    logger.info("Training runs as a %s: %s", kind.name, why)
    return kind


def choose_kind(served: dict[str, set[str]], num_nodes: int) -> tuple[Kind, str]:
    """The kind and, in one sentence, why. Raises ``ConfigError`` as ``training_kind``."""
    if TRAINER[1] in served.get(TRAINER[0], set()):
        return TRAIN_JOB, f"the API server serves {_path(TRAINER)} (Kubeflow Trainer v2)."
    absent = _absent(served, TRAINER, "Kubeflow Trainer v2")
    if JOBSET[1] in served.get(JOBSET[0], set()):
        return JOB_SET, f"{absent}, but {_path(JOBSET)}."
    absent = f"{absent}, and {_absent(served, JOBSET, 'JobSet')}"
    if num_nodes > 1:
        raise ConfigError(
            f"{num_nodes} nodes need Kubeflow Trainer or JobSet: {absent}. Install one of them, or "
            "train on one node."
        )
    return JOB, f"{absent}; one node needs neither: torchrun in an Indexed Job."


def _path(group_version: tuple[str, str]) -> str:
    return "/".join(group_version)


def _absent(served: dict[str, set[str]], wanted: tuple[str, str], product: str) -> str:
    group, version = wanted
    others = sorted(served.get(group, set()))
    if others:
        return f"the API server serves {group} only as {', '.join(others)}, not {version}"
    return f"the API server does not serve {group}/{version} ({product})"
