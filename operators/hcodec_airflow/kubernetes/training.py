"""Manifests for processes that train together: TrainJob, JobSet, or an Indexed Job of one node.

All three run the worker's command under torchrun, once a node. Kubeflow Trainer v2 sets the
``PET_*`` variables that torchrun reads (number of nodes, rank, address); in a JobSet the address is
the first pod's, by the headless service that JobSet makes.
"""

from __future__ import annotations

from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.kubernetes.discovery import JOB, JOB_SET, TRAIN_JOB, Kind
from hcodec_airflow.kubernetes.manifest import (
    annotations_of,
    failure_policy,
    labels_of,
    object_name,
    pod_template,
    queue_labels,
    worker_command,
)
from hcodec_airflow.kubernetes.profiles import GpuProfile, Object

RUNTIME = "torch-distributed"
NODE_JOB = "node"
_PORT = 29500
_REFUSED = {
    "name": "refused",
    "action": "FailJobSet",
    "onJobFailureReasons": ["PodFailurePolicy"],
}
_INDEX_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def training_manifest(
    kind: Kind,
    request: JobRequest,
    profile: GpuProfile,
    namespace: str,
    owner: str,
    generation: int,
    starts: int,
) -> Object:
    """The object of ``kind`` for ``request.num_workers`` nodes.

    Raises ``ConfigError`` when a pod template loosens the pods' security.
    """
    labels = labels_of(request, profile, generation)
    build = {JOB: _job, JOB_SET: _job_set, TRAIN_JOB: _train_job}[kind]
    return {
        "apiVersion": f"{kind.group}/{kind.version}",
        "kind": kind.name,
        "metadata": {
            "name": object_name(request, generation),
            "namespace": namespace,
            "labels": {**labels, **queue_labels(profile)},
            "annotations": {**profile.annotations, **annotations_of(request, owner, starts)},
        },
        "spec": {"suspend": bool(profile.kueue_queue), **build(request, profile, labels)},
    }


def _job(request: JobRequest, profile: GpuProfile, labels: dict[str, str]) -> Object:
    command = [*_torchrun(request, "--standalone"), *_module(request, profile)]
    return {
        **_node_job(request, pod_template(request, profile, labels, command), 1),
        "ttlSecondsAfterFinished": profile.ttl_seconds_after_finished,
        "activeDeadlineSeconds": profile.active_deadline_seconds,
    }


def _job_set(request: JobRequest, profile: GpuProfile, labels: dict[str, str]) -> Object:
    nodes, name = request.num_workers, labels["hcodec.dev/job"]
    generation = labels["hcodec.dev/generation"]
    first = f"hcodec-{name}-g{generation}-{NODE_JOB}-0-0.hcodec-{name}-g{generation}"
    rendezvous = (
        f"--nnodes={nodes}",
        "--node-rank=$(HCODEC_NODE_RANK)",
        f"--master-addr={first}",
        f"--master-port={_PORT}",
    )
    command = [*_torchrun(request, *rendezvous), *_module(request, profile)]
    template = pod_template(request, profile, labels, command)
    rank = {"name": "HCODEC_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX_FIELD}}}
    template["spec"]["containers"][0]["env"].append(rank)
    job = {**_node_job(request, template, nodes)}
    job["activeDeadlineSeconds"] = profile.active_deadline_seconds
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        # A node that is lost takes the others with it; all start again from the checkpoint. A
        # refused job (exit code 43) is not started again.
        "failurePolicy": {"maxRestarts": request.max_restarts, "rules": [_REFUSED]},
        "successPolicy": {"operator": "All"},
        "ttlSecondsAfterFinished": profile.ttl_seconds_after_finished,
        "replicatedJobs": [{"name": NODE_JOB, "replicas": 1, "template": {"spec": job}}],
    }


def _node_job(request: JobRequest, template: Object, nodes: int) -> Object:
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": request.max_restarts if nodes == 1 else 0,
        "podFailurePolicy": failure_policy(),
        "podReplacementPolicy": "Failed",
        "template": template,
    }


def _train_job(request: JobRequest, profile: GpuProfile, labels: dict[str, str]) -> Object:
    command = [*_torchrun(request), *_module(request, profile)]
    template = pod_template(request, profile, labels, command)
    container = template["spec"]["containers"][0]
    resources = container["resources"]
    return {
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "ClusterTrainingRuntime",
            "name": RUNTIME,
        },
        "labels": labels,
        "trainer": {
            "image": container["image"],
            "command": command,
            "numNodes": request.num_workers,
            "numProcPerNode": request.processes_per_node or 1,
            "resourcesPerNode": resources,
            "env": container["env"],
        },
        "podTemplateOverrides": [_override(template["spec"])],
    }


def _override(spec: Object) -> Object:
    """What a TrainJob lets its pods differ in from the runtime's template."""
    names = (
        "nodeSelector",
        "affinity",
        "tolerations",
        "serviceAccountName",
        "volumes",
        "imagePullSecrets",
    )
    container = spec["containers"][0]
    return {
        "targetJobs": [{"name": NODE_JOB}],
        "spec": {
            **{name: spec[name] for name in names if name in spec},
            "containers": [{"name": NODE_JOB, "volumeMounts": container["volumeMounts"]}],
        },
    }


def _torchrun(request: JobRequest, *options: str) -> list[str]:
    processes = request.processes_per_node or 1
    # torchrun's own command would turn every exit code into 1.
    launch = ["python3", "-m", "hcodec_core.training.launch"]
    return [*launch, *options, f"--nproc-per-node={processes}"]


def _module(request: JobRequest, profile: GpuProfile) -> list[str]:
    """The worker's command as a module: torchrun starts Python, not a console script."""
    words = worker_command(request, profile)
    return ["-m", "hcodec_core.cli", *words[len(profile.command) :]]
