"""Finds nodes for pods: resources, selectors, required affinity, taints; says why there is none."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING

from tests.kube import kinds, pods, quantities
from tests.kube.errors import Object

if TYPE_CHECKING:
    from tests.kube.server import KubeServer


def requests_of(spec: Object) -> dict[str, Decimal]:
    """What a pod takes from a node: the sum of its containers, or its largest init container."""
    total: dict[str, Decimal] = {"pods": Decimal(1)}
    for container in spec["containers"]:
        for name, amount in _wanted(container).items():
            total[name] = total.get(name, Decimal(0)) + quantities.value(amount)
    for container in spec.get("initContainers") or []:
        for name, amount in _wanted(container).items():
            total[name] = max(total.get(name, Decimal(0)), quantities.value(amount))
    return total


def _wanted(container: Object) -> Object:
    """Requests; a limit stands in for a request that a template does not give."""
    resources = container["resources"]
    return {**(resources.get("limits") or {}), **(resources.get("requests") or {})}


class Scheduler:
    """Binds pending pods to the first node that fits, in the order of their creation."""

    def __init__(self, api: KubeServer) -> None:
        self._api = api
        self._store = api.store

    def sync(self) -> None:
        all_pods = self._store.list(kinds.POD)
        waiting = [
            pod
            for pod in all_pods
            if not pod["spec"].get("nodeName")
            and pods.is_active(pod)
            and not pod["spec"].get("schedulingGates")
        ]
        if not waiting:
            return
        nodes = self._store.list(kinds.NODE)
        free = {node["metadata"]["name"]: _free(node, all_pods) for node in nodes}
        waiting.sort(key=lambda pod: int(pod["metadata"]["resourceVersion"]))
        for pod in waiting:
            self._schedule(pod, nodes, free)

    def _schedule(
        self, pod: Object, nodes: list[Object], free: dict[str, dict[str, Decimal]]
    ) -> None:
        reasons: Counter[str] = Counter()
        for node in nodes:
            name = node["metadata"]["name"]
            obstacles = _obstacles(pod["spec"], node, free[name])
            if not obstacles:
                for resource, amount in requests_of(pod["spec"]).items():
                    free[name][resource] = free[name].get(resource, Decimal(0)) - amount
                self._bind(pod, name)
                return
            reasons.update(obstacles)
        self._refuse(pod, len(nodes), reasons)

    def _bind(self, pod: Object, node: str) -> None:
        metadata = pod["metadata"]
        now = self._store.clock.timestamp()

        def edit(item: Object) -> None:
            item["spec"]["nodeName"] = node
            pods.set_condition(item, now, "PodScheduled", "True")
            for condition in item["status"]["conditions"]:
                if condition["type"] == "PodScheduled":
                    condition.pop("reason", None)
                    condition.pop("message", None)

        self._store.update(kinds.POD, metadata["namespace"], metadata["name"], edit)
        message = f"Successfully assigned {metadata['namespace']}/{metadata['name']} to {node}"
        self._api.recorder.say(pod, "Normal", "Scheduled", message, "default-scheduler")

    def _refuse(self, pod: Object, num_nodes: int, reasons: Counter[str]) -> None:
        if num_nodes == 0:
            message = "no nodes available to schedule pods"
        else:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            message = (
                f"0/{num_nodes} nodes are available: {listed}. preemption: 0/{num_nodes} nodes "
                "are available: No preemption victims found for incoming pod."
            )
        metadata, now = pod["metadata"], self._store.clock.timestamp()
        changed = False

        def edit(item: Object) -> None:
            nonlocal changed
            more = {"reason": "Unschedulable", "message": message}
            changed = pods.set_condition(item, now, "PodScheduled", "False", **more)

        self._store.update(kinds.POD, metadata["namespace"], metadata["name"], edit)
        if changed:
            self._api.recorder.say(pod, "Warning", "FailedScheduling", message, "default-scheduler")


def _free(node: Object, all_pods: list[Object]) -> dict[str, Decimal]:
    free = {name: quantities.value(v) for name, v in node["status"]["allocatable"].items()}
    for pod in all_pods:
        if pod["spec"].get("nodeName") == node["metadata"]["name"] and not pods.is_finished(pod):
            for name, amount in requests_of(pod["spec"]).items():
                free[name] = free.get(name, Decimal(0)) - amount
    return free


def _obstacles(spec: Object, node: Object, free: dict[str, Decimal]) -> list[str]:
    """Why a pod cannot go there, in the scheduler's words; empty when it can."""
    if node["spec"].get("unschedulable"):
        return ["node(s) were unschedulable"]
    for taint in node["spec"].get("taints") or []:
        if taint["effect"] != "PreferNoSchedule" and not _tolerates(spec, taint):
            shown = f"{taint['key']}: {taint.get('value', '')}"
            return [f"node(s) had untolerated taint {{{shown}}}"]
    labels = node["metadata"].get("labels") or {}
    wanted = spec.get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in wanted.items()) or not _likes(spec, labels):
        return ["node(s) didn't match Pod's node affinity/selector"]
    return [
        "Too many pods" if name == "pods" else f"Insufficient {name}"
        for name, amount in requests_of(spec).items()
        if amount > free.get(name, Decimal(0))
    ]


def _tolerates(spec: Object, taint: Object) -> bool:
    for toleration in spec.get("tolerations") or []:
        if toleration.get("effect") not in (None, "", taint["effect"]):
            continue
        if toleration.get("key") not in (None, "", taint["key"]):
            continue
        if toleration.get("operator") == "Exists":
            return True
        if toleration.get("value", "") == taint.get("value", ""):
            return True
    return False


def _likes(spec: Object, labels: Object) -> bool:
    """Required node affinity: one term must hold."""
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if not required:
        return True
    return any(
        all(_holds(e, labels) for e in term.get("matchExpressions") or [])
        for term in required["nodeSelectorTerms"]
    )


def _holds(expression: Object, labels: Object) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    operator = expression["operator"]
    if operator in ("Exists", "DoesNotExist"):
        return (value is not None) == (operator == "Exists")
    if operator in ("In", "NotIn"):
        return (value in values) == (operator == "In")
    if value is None:
        return False
    return int(value) > int(values[0]) if operator == "Gt" else int(value) < int(values[0])
