"""What a pod's failure means to its Job (pkg/controller/job/pod_failure_policy.go)."""

from __future__ import annotations

from dataclasses import dataclass

from tests.kube import pods
from tests.kube.errors import Object


@dataclass(frozen=True)
class Verdict:
    """``action`` is None when no rule matched; the failure then counts."""

    action: str | None = None
    is_counted: bool = True
    message: str = ""


def only_replaces_failed(job: Object) -> bool:
    spec = job["spec"]
    return bool(spec.get("podReplacementPolicy") == "Failed" or spec.get("podFailurePolicy"))


def is_failed(job: Object, pod: Object) -> bool:
    """A pod that is only terminating counts as failed, unless just failed ones are replaced."""
    if pods.phase(pod) == "Failed":
        return True
    if only_replaces_failed(job):
        return False
    return pods.is_terminating(pod) and pods.phase(pod) != "Succeeded"


def judge(job: Object, pod: Object) -> Verdict:
    """The first rule that matches decides."""
    for index, rule in enumerate((job["spec"].get("podFailurePolicy") or {}).get("rules") or []):
        message = _match(rule, pod, index)
        if message:
            action = rule["action"]
            return Verdict(action, action != "Ignore", message if action == "FailJob" else "")
    return Verdict()


def _match(rule: Object, pod: Object, index: int) -> str:
    metadata = pod["metadata"]
    name = f"{metadata['namespace']}/{metadata['name']}"
    if codes := rule.get("onExitCodes"):
        container, code = _matching_exit(codes, pod)
        if container:
            return (
                f"Container {container} for pod {name} failed with exit code {code} matching "
                f"{rule['action']} rule at index {index}"
            )
        return ""
    for pattern in rule.get("onPodConditions") or []:
        if pods.condition_status(pod, pattern["type"]) == pattern["status"]:
            return (
                f"Pod {name} has condition {pattern['type']} matching {rule['action']} rule at "
                f"index {index}"
            )
    return ""


def _matching_exit(codes: Object, pod: Object) -> tuple[str, int]:
    """Containers that ended well never match, whatever the operator."""
    for container, state in pods.terminated_states(pod):
        code = state["exitCode"]
        is_meant = codes.get("containerName") in (None, container)
        if is_meant and code != 0 and (code in codes["values"]) == (codes["operator"] == "In"):
            return container, code
    return "", 0
