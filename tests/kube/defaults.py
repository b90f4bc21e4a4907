"""What the server fills in before it validates and stores an object."""

from __future__ import annotations

from typing import Any

from tests.kube.errors import Object

MAX_INT32 = 2**31 - 1
CONTROLLER_UID = "batch.kubernetes.io/controller-uid"
JOB_NAME = "batch.kubernetes.io/job-name"


def _fill(target: Object, values: Object) -> None:
    for name, value in values.items():
        if target.get(name) is None:
            target[name] = value


def default_job(job: Object) -> None:
    """As ``SetDefaults_Job``: counts, limits and policies."""
    spec = job.setdefault("spec", {})
    # The order matters: only when both are absent do completions default, to 1.
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec["completions"] = 1
    limit = 6 if spec.get("backoffLimitPerIndex") is None else MAX_INT32
    has_policy = spec.get("podFailurePolicy") is not None
    _fill(
        spec,
        {
            "parallelism": 1,
            "backoffLimit": limit,
            "completionMode": "NonIndexed",
            "suspend": False,
            "manualSelector": False,
            "podReplacementPolicy": "Failed" if has_policy else "TerminatingOrFailed",
        },
    )
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    # A Job without labels takes those of its pods, before the server adds its own to them.
    if not job["metadata"].get("labels") and template["metadata"].get("labels"):
        job["metadata"]["labels"] = dict(template["metadata"]["labels"])
    # Without one a pod restarts always, which validation then refuses for Jobs.
    default_pod_spec(template.setdefault("spec", {}))


def label_job(job: Object) -> None:
    """As ``generateSelector``: pods of a Job are known by its uid, unless chosen by hand."""
    spec = job["spec"]
    if spec.get("manualSelector"):
        return
    uid, name = job["metadata"]["uid"], job["metadata"]["name"]
    labels = spec["template"]["metadata"].setdefault("labels", {})
    labels.update({CONTROLLER_UID: uid, "controller-uid": uid, JOB_NAME: name, "job-name": name})
    selector = spec.setdefault("selector", {})
    selector.setdefault("matchLabels", {})[CONTROLLER_UID] = uid


def default_pod(pod: Object) -> None:
    default_pod_spec(pod.setdefault("spec", {}))
    _fill(
        pod["spec"],
        {
            "serviceAccountName": "default",
            "serviceAccount": "default",
            "enableServiceLinks": True,
            "priority": 0,
            "preemptionPolicy": "PreemptLowerPriority",
        },
    )
    # Of pods only: a template keeps limits without requests.
    for container in [
        *(pod["spec"].get("initContainers") or []),
        *(pod["spec"].get("containers") or []),
    ]:
        _default_requests(container["resources"])
    tolerations = pod["spec"].setdefault("tolerations", [])
    # DefaultTolerationSeconds admission: pods stay on a lost node for five minutes.
    for taint in ("not-ready", "unreachable"):
        key = f"node.kubernetes.io/{taint}"
        if not any(t.get("key") in (key, None) for t in tolerations):
            tolerations.append(
                {
                    "key": key,
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 300,
                }
            )


def default_pod_spec(spec: Object) -> None:
    _fill(
        spec,
        {
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst",
            "schedulerName": "default-scheduler",
            "securityContext": {},
        },
    )
    if "serviceAccountName" in spec:
        _fill(spec, {"serviceAccount": spec["serviceAccountName"]})
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        _default_container(container)
    for volume in spec.get("volumes") or []:
        if set(volume) == {"name"}:
            volume["emptyDir"] = {}  # SetDefaults_Volume
        for source in ("configMap", "secret", "projected", "downwardAPI"):
            if source in volume:
                _fill(volume[source], {"defaultMode": 0o644})


def _default_container(container: Object) -> None:
    image = container.get("image") or ""
    is_latest = ":" not in image.rpartition("/")[2] or image.endswith(":latest")
    _fill(
        container,
        {
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
            "imagePullPolicy": "Always" if is_latest and "@" not in image else "IfNotPresent",
            "resources": {},
        },
    )
    for variable in container.get("env") or []:
        reference = (variable.get("valueFrom") or {}).get("fieldRef")
        if reference is not None:
            _fill(reference, {"apiVersion": "v1"})


def _default_requests(resources: dict[str, Any]) -> None:
    if resources.get("limits"):
        requests = resources.setdefault("requests", {})
        for name, amount in resources["limits"].items():
            requests.setdefault(name, amount)
