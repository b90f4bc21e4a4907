"""Small Jobs and pods for the tests of the server; commands are shell scripts, which start fast."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

RESTRICTED_POD = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}
# Until SIGTERM; the trap runs at once because `wait` is interrupted by it.
FOREVER = "trap 'exit 143' TERM; while :; do sleep 0.05 & wait $!; done"
# Never goes on SIGTERM; says when it has stopped to listen.
DEAF = "trap '' TERM; echo deaf; sleep 60"
DISRUPTED = {
    "action": "Ignore",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
}


def container(script: str = "exit 0", **fields: Any) -> Object:
    return {"name": "worker", "image": "hcodec:1", "command": ["/bin/sh", "-c", script], **fields}


def pod_spec(script: str = "exit 0", **fields: Any) -> Object:
    return {"restartPolicy": "Never", "containers": [container(script)], **fields}


def pod(name: str, script: str = "exit 0", **fields: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": pod_spec(script, **fields),
    }


def plain_job(name: str, script: str = "exit 0", **spec: Any) -> Object:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"template": {"spec": pod_spec(script)}, **spec},
    }


def indexed_job(name: str, script: str = "exit 0", completions: int = 2, **spec: Any) -> Object:
    numbers = {"completions": completions, "parallelism": completions}
    return plain_job(name, script, completionMode="Indexed", **{**numbers, **spec})


def exit_rule(action: str, *codes: int, **fields: Any) -> Object:
    return {"action": action, "onExitCodes": {"operator": "In", "values": list(codes), **fields}}


def policy(*rules: Object) -> Object:
    return {"rules": list(rules)}


def conditions(item: Object) -> dict[str, str]:
    """Types that hold, with their reasons."""
    found = (item.get("status") or {}).get("conditions") or []
    return {c["type"]: c.get("reason", "") for c in found if c["status"] == "True"}
