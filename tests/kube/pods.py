"""Small questions that several controllers ask of a pod, and small edits they make to one."""

from __future__ import annotations

from typing import Any

from tests.kube.errors import Object

TRACKING = "batch.kubernetes.io/job-tracking"


def phase(pod: Object) -> str:
    return str(pod["status"].get("phase", "Pending"))


def is_terminating(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def is_finished(pod: Object) -> bool:
    return phase(pod) in ("Succeeded", "Failed")


def is_active(pod: Object) -> bool:
    return not is_finished(pod) and not is_terminating(pod)


def is_ready(pod: Object) -> bool:
    return condition_status(pod, "Ready") == "True"


def is_tracked(pod: Object) -> bool:
    return TRACKING in (pod["metadata"].get("finalizers") or [])


def condition_status(item: Object, type_: str) -> str | None:
    for condition in (item.get("status") or {}).get("conditions") or []:
        if condition["type"] == type_:
            return str(condition["status"])
    return None


def set_condition(item: Object, now: str, type_: str, status: str, **more: Any) -> bool:
    """Add or change one condition of a status; true when that changed anything."""
    conditions = item["status"].setdefault("conditions", [])
    wanted = {"type": type_, "status": status, **more}
    for condition in conditions:
        if condition["type"] == type_:
            if all(condition.get(name) == value for name, value in wanted.items()):
                return False
            if condition["status"] != status:
                condition["lastTransitionTime"] = now
            condition.update(wanted)
            return True
    conditions.append({**wanted, "lastProbeTime": now, "lastTransitionTime": now})
    return True


def terminated_states(pod: Object) -> list[tuple[str, Object]]:
    """(container, its ``state.terminated``) of those that ended."""
    status = pod["status"]
    statuses = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    return [
        (one["name"], one["state"]["terminated"])
        for one in statuses
        if "terminated" in (one.get("state") or {})
    ]


def controller_of(item: Object) -> Object | None:
    for owner in item["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            return dict(owner)
    return None


def owner_reference(owner: Object) -> Object:
    """The reference of a controller to what it makes."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
