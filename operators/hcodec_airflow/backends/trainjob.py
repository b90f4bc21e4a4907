"""Backend ``trainjob``: nodes of processes that train together, by what the API server serves.

TrainJob (Kubeflow Trainer v2) where it is served, else JobSet, else, for one node, an Indexed Job.
In all of them torchrun starts the processes of a node. A node that fails ends the others (they
cannot go on without it), and the next generation goes on from the last checkpoint.
"""

from __future__ import annotations

from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.backends.kubernetes import KubernetesBackend, open_as
from hcodec_airflow.kubernetes.client import ClusterApi
from hcodec_airflow.kubernetes.discovery import JOB, TRAIN_JOB, Kind, training_kind
from hcodec_airflow.kubernetes.manifest import as_yaml, object_name
from hcodec_airflow.kubernetes.profiles import Object
from hcodec_airflow.kubernetes.submission import MakeManifest
from hcodec_airflow.kubernetes.training import training_manifest
from hcodec_airflow.settings import Settings

_KNOWN_GENERATIONS = 64


def open_backend(settings: Settings, *, is_offline: bool = False) -> TrainJobBackend:
    """The backend as this installation configures it; offline its connection is not read."""
    return open_as(TrainJobBackend, settings, is_offline)


class TrainJobBackend(KubernetesBackend):
    """See ``Backend``; differs from ``kubernetes`` in what it submits."""

    _chosen: Kind | None = None

    def manifest(self, request: JobRequest) -> str:
        """See ``Backend``: for all three kinds, since nobody is asked what is served."""
        from hcodec_airflow.kubernetes.discovery import JOB_SET

        kinds = [TRAIN_JOB, JOB_SET, *([JOB] if request.num_workers == 1 else [])]
        parts = []
        for kind in kinds:
            made = self._made(request, "<id of the task try>", kind, 0, 1)
            parts.append(f"# where {kind.group}/{kind.version} is served\n{as_yaml(made)}")
        return "---\n".join(parts)

    def _maker(self, request: JobRequest, owner: str) -> MakeManifest:
        def make(generation: int, starts: int) -> Object:
            kind = self._chosen or JOB
            return self._made(request, owner, kind, generation, starts)

        return make

    def _made(
        self, request: JobRequest, owner: str, kind: Kind, generation: int, starts: int
    ) -> Object:
        profile = self._config.profile(request.profile)
        return training_manifest(kind, request, profile, self._namespace, owner, generation, starts)

    async def _kind(self, api: ClusterApi, request: JobRequest) -> Kind:
        if self._chosen is None:
            self._chosen = await training_kind(api, request)
        return self._chosen

    def _pods_of(self, api: ClusterApi, request: JobRequest) -> tuple[str, str]:
        path, selector = super()._pods_of(api, request)
        if self._chosen is not TRAIN_JOB:
            return path, selector
        # Trainer puts no labels of ours on pods, but the name of the JobSet that it makes.
        names = (object_name(request, number) for number in range(_KNOWN_GENERATIONS))
        return path, f"{TRAIN_JOB.pod_label} in ({','.join(names)})"

    def _generation_of(self, pod: Object) -> int:
        if self._chosen is not TRAIN_JOB:
            return super()._generation_of(pod)
        name = str((pod["metadata"].get("labels") or {}).get(TRAIN_JOB.pod_label, ""))
        number = name.rpartition("-g")[2]
        return int(number) if number.isdecimal() else 0
