"""Nodes: what they offer, which are lost, and the clean-up of pods that they leave behind."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.kube import kinds, pods
from tests.kube.errors import Object

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

UNREACHABLE = "node.kubernetes.io/unreachable"


@dataclass(frozen=True)
class NodeSpec:
    """A node as a test wants it: ``resources`` are allocatable amounts by name."""

    name: str
    resources: Mapping[str, str] = field(
        default_factory=lambda: {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8"}
    )
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Object, ...] = ()


class Nodes:
    """The node objects, the node lifecycle controller and pod garbage collection."""

    def __init__(self, api: KubeServer) -> None:
        self._api = api
        self._store = api.store
        self._lost: dict[str, float] = {}  # name -> when
        self._disconnected: set[str] = set()

    def add(self, spec: NodeSpec) -> None:
        """Let a node join the cluster."""
        amounts = {"pods": "110", "ephemeral-storage": "500Gi", **spec.resources}
        labels = {"kubernetes.io/hostname": spec.name, "kubernetes.io/os": "linux", **spec.labels}
        body = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": spec.name, "labels": labels},
            "spec": {"taints": [dict(taint) for taint in spec.taints]},
            "status": {"capacity": amounts, "allocatable": amounts, "conditions": []},
        }
        now = self._store.clock.timestamp()
        more = {"reason": "KubeletReady", "message": "kubelet is posting ready status"}
        pods.set_condition(body, now, "Ready", "True", **more)
        self._store.create(kinds.NODE, "", body)

    def is_heard(self, name: str) -> bool:
        """Whether its kubelet still talks to the server."""
        return name not in self._lost and self._store.get(kinds.NODE, "", name) is not None

    def lose(self, name: str, kills_processes: bool) -> None:
        with self._store.lock:
            self._lost[name] = time.monotonic()
            if kills_processes:
                self._api.kubelet.kill_all_on(name)
            self._store.update(kinds.NODE, "", name, self._mark_lost)
            for pod in self._pods_on(name):
                self._edit_status(pod, self._mark_unready)

    def give_back(self, name: str) -> None:
        with self._store.lock:
            self._lost.pop(name, None)
            self._store.update(kinds.NODE, "", name, self._mark_found)

    def remove(self, name: str) -> None:
        with self._store.lock:
            self._lost.pop(name, None)
            self._api.kubelet.kill_all_on(name)
            self._store.remove(kinds.NODE, "", name)

    def sync(self) -> None:
        """Evict pods of lost nodes and fail those that no kubelet will ever report on."""
        known = {node["metadata"]["name"] for node in self._store.list(kinds.NODE)}
        for pod in self._store.list(kinds.POD):
            node = pod["spec"].get("nodeName")
            if node and node not in known:
                self._collect(pod, "DeletionByPodGC", "PodGC: node no longer exists")
            elif not node and pods.is_terminating(pod):
                self._collect(pod, "", "")
            elif node in self._lost and pods.is_active(pod):
                self._evict_when_due(pod, self._lost[node])

    def _evict_when_due(self, pod: Object, lost_at: float) -> None:
        """The taint manager: deletion after the pod's own toleration, or the short setting."""
        limit = self._api.settings.eviction_seconds
        for toleration in pod["spec"].get("tolerations") or []:
            fits = toleration.get("key") in (UNREACHABLE, None)
            if fits and toleration.get("effect") in ("NoExecute", None):
                seconds = toleration.get("tolerationSeconds")
                if seconds is None:
                    return
                limit = min(limit, seconds)
        if time.monotonic() >= lost_at + limit:
            metadata = pod["metadata"]
            message = "Taint manager: deleting due to NoExecute taint"
            self._api.disrupt(
                metadata["namespace"], metadata["name"], "DeletionByTaintManager", message
            )

    def _collect(self, pod: Object, reason: str, message: str) -> None:
        metadata = pod["metadata"]

        def fail(item: Object) -> None:
            item["status"]["phase"] = "Failed"
            if reason:
                now = self._store.clock.timestamp()
                more = {"reason": reason, "message": message}
                pods.set_condition(item, now, "DisruptionTarget", "True", **more)

        if not pods.is_finished(pod):
            self._edit_status(pod, fail)
        self._api.registry.delete(
            kinds.POD, metadata["namespace"], metadata["name"], {"gracePeriodSeconds": 0}
        )

    def _pods_on(self, name: str) -> list[Object]:
        return [p for p in self._store.list(kinds.POD) if p["spec"].get("nodeName") == name]

    def _edit_status(self, pod: Object, edit: object) -> None:
        metadata = pod["metadata"]
        self._store.update(kinds.POD, metadata["namespace"], metadata["name"], edit)  # type: ignore[arg-type]

    def _mark_unready(self, pod: Object) -> None:
        now = self._store.clock.timestamp()
        if pods.phase(pod) == "Running":
            pods.set_condition(pod, now, "Ready", "False")

    def _mark_lost(self, node: Object) -> None:
        now = self._store.clock.timestamp()
        more = {
            "reason": "NodeStatusUnknown",
            "message": "Kubelet stopped posting node status.",
        }
        pods.set_condition(node, now, "Ready", "Unknown", **more)
        taints = node["spec"].setdefault("taints", [])
        taints += [{"key": UNREACHABLE, "effect": e} for e in ("NoSchedule", "NoExecute")]

    def _mark_found(self, node: Object) -> None:
        now = self._store.clock.timestamp()
        more = {"reason": "KubeletReady", "message": "kubelet is posting ready status"}
        pods.set_condition(node, now, "Ready", "True", **more)
        kept = [taint for taint in node["spec"]["taints"] if taint["key"] != UNREACHABLE]
        node["spec"]["taints"] = kept
