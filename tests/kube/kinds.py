"""The resources the server knows: what discovery lists and paths mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_ALL = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
BATCH = "batch/v1"
JOBSET = "jobset.x-k8s.io/v1alpha2"
TRAINER = "trainer.kubeflow.org/v1alpha1"
KUEUE = "kueue.x-k8s.io/v1beta1"
BUILT_IN_GROUPS = frozenset({"v1", BATCH, "authorization.k8s.io/v1", "coordination.k8s.io/v1"})


@dataclass(frozen=True)
class Kind:
    """One kind of object and where it is served."""

    group: str
    version: str
    kind: str
    plural: str
    is_namespaced: bool = True
    subresources: tuple[str, ...] = ()
    verbs: tuple[str, ...] = _ALL
    has_schema: bool = True
    short_names: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def has_name(self) -> bool:
        """Reviews are answered, never stored."""
        return self.group != "authorization.k8s.io"

    @property
    def resource(self) -> str:
        """As in messages and RBAC: ``jobs.batch``, ``pods``."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


NAMESPACE = Kind("", "v1", "Namespace", "namespaces", False, ("status",), short_names=("ns",))
NODE = Kind("", "v1", "Node", "nodes", False, ("status",), short_names=("no",))
POD = Kind("", "v1", "Pod", "pods", True, ("status", "log", "eviction"), short_names=("po",))
EVENT = Kind("", "v1", "Event", "events", short_names=("ev",))
CONFIG_MAP = Kind("", "v1", "ConfigMap", "configmaps", short_names=("cm",))
SECRET = Kind("", "v1", "Secret", "secrets")
SERVICE = Kind("", "v1", "Service", "services", True, ("status",), short_names=("svc",))
SERVICE_ACCOUNT = Kind("", "v1", "ServiceAccount", "serviceaccounts", short_names=("sa",))
QUOTA = Kind("", "v1", "ResourceQuota", "resourcequotas", True, ("status",), short_names=("quota",))
JOB = Kind("batch", "v1", "Job", "jobs", True, ("status",))
LEASE = Kind("coordination.k8s.io", "v1", "Lease", "leases")
ACCESS_REVIEW = Kind(
    "authorization.k8s.io",
    "v1",
    "SelfSubjectAccessReview",
    "selfsubjectaccessreviews",
    False,
    verbs=("create",),
)
RULES_REVIEW = Kind(
    "authorization.k8s.io",
    "v1",
    "SelfSubjectRulesReview",
    "selfsubjectrulesreviews",
    False,
    verbs=("create",),
)
JOB_SET = Kind("jobset.x-k8s.io", "v1alpha2", "JobSet", "jobsets", True, ("status",), _ALL, False)
TRAIN_JOB = Kind(
    "trainer.kubeflow.org", "v1alpha1", "TrainJob", "trainjobs", True, ("status",), _ALL, False
)
TRAINING_RUNTIME = Kind(
    "trainer.kubeflow.org", "v1alpha1", "TrainingRuntime", "trainingruntimes", True, (), _ALL, False
)
CLUSTER_TRAINING_RUNTIME = Kind(
    "trainer.kubeflow.org",
    "v1alpha1",
    "ClusterTrainingRuntime",
    "clustertrainingruntimes",
    False,
    (),
    _ALL,
    False,
)
WORKLOAD = Kind(
    "kueue.x-k8s.io", "v1beta1", "Workload", "workloads", True, ("status",), _ALL, False
)
LOCAL_QUEUE = Kind(
    "kueue.x-k8s.io", "v1beta1", "LocalQueue", "localqueues", True, ("status",), _ALL, False
)
CLUSTER_QUEUE = Kind(
    "kueue.x-k8s.io", "v1beta1", "ClusterQueue", "clusterqueues", False, ("status",), _ALL, False
)

KINDS = (
    NAMESPACE, NODE, POD, EVENT, CONFIG_MAP, SECRET, SERVICE, SERVICE_ACCOUNT, QUOTA, JOB, LEASE,
    ACCESS_REVIEW, RULES_REVIEW, JOB_SET, TRAIN_JOB, TRAINING_RUNTIME, CLUSTER_TRAINING_RUNTIME,
    WORKLOAD, LOCAL_QUEUE, CLUSTER_QUEUE,
)  # fmt: skip


def find(group: str, version: str, plural: str) -> Kind | None:
    for kind in KINDS:
        if (kind.group, kind.version, kind.plural) == (group, version, plural):
            return kind
    return None


def by_owner(api_version: str, name: str) -> Kind | None:
    """The kind an owner reference names."""
    for kind in KINDS:
        if (kind.api_version, kind.kind) == (api_version, name):
            return kind
    return None


def served(groups: Iterable[str]) -> list[Kind]:
    wanted = set(groups)
    return [kind for kind in KINDS if kind.api_version in wanted]
