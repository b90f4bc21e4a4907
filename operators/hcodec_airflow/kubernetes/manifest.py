"""The Indexed Job of N workers, and the pod that all backends on Kubernetes run.

A worker leases shards from storage, so the Job only keeps N of them alive: an index is a starting
point, and a Job that ended is followed by the next *generation* while results are missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.kubernetes.pod_template import merge, refuse_incomplete, refuse_loosened
from hcodec_airflow.kubernetes.profiles import GpuProfile, Object
from hcodec_core.errors import EXIT_BAD_CONFIG, EXIT_PREEMPTED

CONTAINER = "worker"
DOMAIN = "hcodec.dev"
JOB_LABEL = f"{DOMAIN}/job"
GENERATION_LABEL = f"{DOMAIN}/generation"
OWNER = f"{DOMAIN}/owner"
JOB_URI = f"{DOMAIN}/job-uri"
STARTS = f"{DOMAIN}/starts"
STARTED_AT = f"{DOMAIN}/started-at"
MANAGED = {"app.kubernetes.io/managed-by": "hcodec", "app.kubernetes.io/name": "hcodec-worker"}

_USER_ID = 10001
_CONFIG_VOLUME = "hcodec-config"
_TMP_SIZE = "1Gi"


def job_key(request: JobRequest) -> str:
    """Name of a job among Kubernetes objects, the same for every try and run that means it."""
    kind = "".join(c if c.isalnum() else "-" for c in request.name.partition("-")[0].lower())
    return f"{kind[:12] or 'job'}-{hashlib.sha256(request.name.encode()).hexdigest()[:16]}"


def object_name(request: JobRequest, generation: int) -> str:
    """Name of the Kubernetes object of one generation."""
    return f"hcodec-{job_key(request)}-g{generation}"


def labels_of(request: JobRequest, profile: GpuProfile, generation: int) -> dict[str, str]:
    """Labels of the Job and its pods."""
    own = {**MANAGED, JOB_LABEL: job_key(request), GENERATION_LABEL: str(generation)}
    return {**profile.labels, **own}


def annotations_of(request: JobRequest, owner: str, starts: int) -> dict[str, str]:
    """Who asked for the Job and how often it was started for them."""
    origin = request.origin
    return {
        OWNER: owner,
        JOB_URI: request.job_uri,
        STARTS: str(starts),
        f"{DOMAIN}/dag-id": origin.dag_id,
        f"{DOMAIN}/run-id": origin.run_id,
        f"{DOMAIN}/task-id": origin.task_id,
        f"{DOMAIN}/map-index": str(origin.map_index),
    }


def job_manifest(
    request: JobRequest,
    profile: GpuProfile,
    namespace: str,
    owner: str,
    generation: int = 0,
    starts: int = 1,
) -> Object:
    """The Indexed Job as sent to the API server.

    Raises ``ConfigError`` when a pod template loosens the pods' security.
    """
    labels = labels_of(request, profile, generation)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": object_name(request, generation),
            "namespace": namespace,
            "labels": {**labels, **queue_labels(profile)},
            "annotations": {**profile.annotations, **annotations_of(request, owner, starts)},
        },
        "spec": {
            **_indexed(request, profile),
            "suspend": bool(profile.kueue_queue),
            "template": pod_template(request, profile, labels, worker_command(request, profile)),
        },
    }


def _indexed(request: JobRequest, profile: GpuProfile) -> Object:
    number = request.num_workers
    return {
        "completionMode": "Indexed",
        "completions": number,
        "parallelism": number,
        "backoffLimitPerIndex": request.max_restarts,
        # When most workers have failed for good, a new generation does better than the rest alone.
        "maxFailedIndexes": number // 2,
        "podFailurePolicy": failure_policy(),
        "podReplacementPolicy": "Failed",
        "ttlSecondsAfterFinished": profile.ttl_seconds_after_finished,
        "activeDeadlineSeconds": profile.active_deadline_seconds,
    }


def failure_policy() -> Object:
    """The exit-code contract: 43 ends the Job, disruptions and preemption are not counted."""

    def on_exit(action: str, code: int) -> Object:
        match = {"containerName": CONTAINER, "operator": "In", "values": [code]}
        return {"action": action, "onExitCodes": match}

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "rules": [
            on_exit("FailJob", EXIT_BAD_CONFIG),
            {"action": "Ignore", "onPodConditions": disrupted},
            on_exit("Ignore", EXIT_PREEMPTED),
        ]
    }


def queue_labels(profile: GpuProfile) -> dict[str, str]:
    """Labels by which Kueue takes a workload up; none without a queue."""
    if not profile.kueue_queue:
        return {}
    labels = {"kueue.x-k8s.io/queue-name": profile.kueue_queue}
    if profile.kueue_priority_class:
        labels["kueue.x-k8s.io/priority-class"] = profile.kueue_priority_class
    return labels


def worker_command(request: JobRequest, profile: GpuProfile) -> list[str]:
    """What a pod runs; its index and identity come from its environment."""
    wanted = request.resources
    options = {
        "--config": profile.config_path,
        "--scratch": profile.scratch_path,
        "--device": wanted.device,
        "--threads": wanted.threads,
        "--decoders": wanted.decoders,
    }
    words = [str(word) for option in options.items() for word in option]
    return [*profile.command, "run", request.job_uri, *words]


def pod_template(
    request: JobRequest, profile: GpuProfile, labels: Mapping[str, str], command: list[str]
) -> Object:
    """Template of a worker pod, with the templates of profile and request merged in.

    Raises ``ConfigError`` naming the field by which a template loosens the pods' security.
    """
    template: Object = {
        "metadata": {"labels": dict(labels), "annotations": dict(profile.annotations)},
        "spec": _pod_spec(profile, command),
    }
    for patch, where in (
        (profile.pod_template, f"pod_template of profile {request.profile or 'default'}"),
        (request.pod_template, "pod_template of the task"),
    ):
        refuse_loosened(patch, where)
        template = merge(template, patch)
        refuse_incomplete(template, where)
    # A template may add labels, but not take away those by which pods are found.
    template["metadata"]["labels"].update(labels)
    return template


def _pod_spec(profile: GpuProfile, command: list[str]) -> Object:
    spec: Object = {
        "restartPolicy": "Never",
        "serviceAccountName": profile.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": profile.termination_grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER_ID,
            "runAsGroup": _USER_ID,
            "fsGroup": _USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(profile, command)],
        "volumes": [*_own_volumes(profile), *profile.volumes],
    }
    optional: Object = {
        "nodeSelector": profile.node_selector,
        "tolerations": profile.tolerations,
        "affinity": profile.affinity,
        "runtimeClassName": profile.runtime_class,
        "priorityClassName": profile.priority_class,
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
    }
    return {**spec, **{name: value for name, value in optional.items() if value}}


def _container(profile: GpuProfile, command: list[str]) -> Object:
    resources = {"cpu": profile.cpu, "memory": profile.memory}
    if profile.gpus:
        resources[profile.gpu_resource] = str(profile.gpus)
    container: Object = {
        "name": CONTAINER,
        "image": profile.image,
        "imagePullPolicy": profile.image_pull_policy,
        "command": command,
        "env": _environment(profile),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        # The last lines stay readable in the pod's status after its log is gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "scratch", "mountPath": profile.scratch_path},
            {"name": _CONFIG_VOLUME, "mountPath": "/etc/hcodec", "readOnly": True},
            *profile.volume_mounts,
        ],
    }
    if profile.env_from_secrets:
        secrets = [{"secretRef": {"name": name}} for name in profile.env_from_secrets]
        container["envFrom"] = secrets
    return container


def _environment(profile: GpuProfile) -> list[Object]:
    identity = {"fieldRef": {"fieldPath": "metadata.uid"}}
    fixed = {"HOME": "/tmp", "TMPDIR": profile.scratch_path, **profile.env}
    return [
        {"name": "HCODEC_WORKER_ID", "valueFrom": identity},
        *({"name": name, "value": value} for name, value in fixed.items()),
    ]


def _own_volumes(profile: GpuProfile) -> list[Object]:
    return [
        {"name": "tmp", "emptyDir": {"sizeLimit": _TMP_SIZE}},
        {"name": "scratch", "emptyDir": {"sizeLimit": profile.scratch_size}},
        {"name": _CONFIG_VOLUME, "configMap": {"name": profile.config_map}},
    ]


def as_yaml(manifest: Mapping[str, Any]) -> str:
    """A manifest for people."""
    import yaml  # type: ignore[import-untyped]  # its stubs are no dependency of ours

    return str(yaml.safe_dump(dict(manifest), sort_keys=False, allow_unicode=True))
