"""A Kubernetes API server for tests, with controllers and a kubelet that runs real processes.

    with KubeServer() as kube:
        kube.write_kubeconfig(tmp_path / "config")  # token, no TLS, namespace "default"
        ...                                         # any client: kubernetes, kubernetes_asyncio
        kube.wait_for_job("name")                     # until Complete or Failed

What it takes is checked as strictly as a 1.34 server does with ``fieldValidation=Strict``; each
container's ``command`` and ``args`` then run as a process of this machine in a session of its own,
with the pod's variables and ``Settings.base_environment`` only. Leaving the ``with`` block kills
them all, whatever a test did. Paths below a volume's ``mountPath`` are replaced by a folder.

Parts a test talks to:

- ``kube.url``, ``kube.token``, ``kube.write_kubeconfig(path, namespace)``, ``kube.requests``
- ``kube.settings`` (delays, environment of the pods, what a missing ``command`` means)
- ``kube.faults``: 410, 429, 5xx, resets, slow answers, dropped watches, server away, eviction,
  lost nodes, kills, out of memory, paused pods, image pulls, deleted Jobs, clock skew
- ``kube.permissions``: ``use_role(rules)`` of a manifest, ``deny(verb, resource)``
- ``kube.clock.advance(seconds)``: the server's time, in every timestamp and in ``Date``
- ``kube.nodes.add(NodeSpec(...))`` beyond those given to the constructor; ``groups`` served
  (``ALL_GROUPS``: with Kueue, JobSet and Trainer), ``kube.add_queue``, ``kube.kueue.preempt(job)``
- ``kube.enforce_pod_security()``, ``kube.set_quota({"pods": "2"})``
- ``kube.pods(job=...)``, ``kube.job(name)``, ``kube.create(body)``, ``kube.wait_until(...)``
"""

from __future__ import annotations

import copy
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.kube import kinds, pods
from tests.kube.access import Permissions
from tests.kube.admission import ENFORCE, PodSecurity, Quota
from tests.kube.clock import Clock
from tests.kube.collector import Collector
from tests.kube.errors import ApiError, Object
from tests.kube.events import Recorder
from tests.kube.faults import Faults
from tests.kube.job_controller import JobController, is_finished
from tests.kube.kubelet import Kubelet
from tests.kube.kueue import Kueue
from tests.kube.listing import Lists
from tests.kube.nodes import Nodes, NodeSpec
from tests.kube.processes import kill_marked
from tests.kube.registry import Registry
from tests.kube.rest import Listener
from tests.kube.scheduler import Scheduler
from tests.kube.store import Store
from tests.kube.training import TORCH_RUNTIME, JobSets, TrainJobs


def _default_environment() -> dict[str, str]:
    """Enough to find this interpreter and what is installed beside it."""
    folder = str(Path(sys.executable).parent)
    return {"PATH": f"{folder}:{os.environ.get('PATH', os.defpath)}", "LANG": "C.UTF-8"}


@dataclass
class Settings:
    """How fast the cluster is, and what pods find. Times in seconds."""

    base_environment: dict[str, str] = field(default_factory=_default_environment)
    entrypoints: dict[str, list[str]] = field(default_factory=dict)  # part of an image name -> argv
    tick_seconds: float = 0.05
    backoff_seconds: float = 0.1  # 10 s on a real cluster, doubled per failure
    max_backoff_seconds: float = 2.0
    restart_seconds: float = 0.2  # in place, with restartPolicy OnFailure
    start_seconds: float = 0.0  # from scheduled to started: image pull
    eviction_seconds: float = 0.5  # stands in for longer tolerations of a lost node
    bookmark_seconds: float = 1.0

    def backoff(self, num_failures: int) -> float:
        """Delay before a pod is made again after its n-th failure."""
        return min(self.max_backoff_seconds, self.backoff_seconds * 2 ** max(0, num_failures - 1))

    def entrypoint_of(self, image: str) -> list[str]:
        """What an image runs without a ``command``."""
        return next((argv for part, argv in self.entrypoints.items() if part in image), [])


class KubeServer:
    """See the module's docstring. Use as a context manager."""

    def __init__(
        self,
        settings: Settings | None = None,
        nodes: Sequence[NodeSpec] = (NodeSpec("node-1"), NodeSpec("node-2")),
        groups: Collection[str] = kinds.BUILT_IN_GROUPS,
        namespaces: Sequence[str] = ("default",),
    ) -> None:
        self.settings = settings or Settings()
        self.groups = frozenset(groups) | {"v1"}
        self.clock = Clock()
        self.store = Store(self.clock)
        self.token = secrets.token_urlsafe(16)
        self.mark = f"kube-{os.getpid()}-{secrets.token_hex(4)}"
        self.requests: list[tuple[str, str]] = []
        self.errors: list[BaseException] = []
        self.is_stopped = False
        self.permissions = Permissions()
        self.registry = Registry(self.store)
        self.lists = Lists(self.store)
        self.recorder = Recorder(self.store)
        self.faults = Faults(self)
        self.nodes = Nodes(self)
        self._folder = tempfile.TemporaryDirectory(prefix="kube-")
        self.kubelet = Kubelet(self, Path(self._folder.name))
        self.kueue = Kueue(self)
        self._controllers: list[Any] = [
            JobController(self),
            Scheduler(self),
            self.kubelet,
            self.nodes,
            Collector(self),
            *self._add_admission(),
        ]
        self._listener: Listener | None = None
        self._port = 0
        self._listening = threading.Lock()
        for name in namespaces:
            self.registry.create(kinds.NAMESPACE, "", {"metadata": {"name": name}})
        for spec in nodes:
            self.nodes.add(spec)

    def _add_admission(self) -> list[Any]:
        """Hook admission in, and return the controllers that go with it and what is served."""
        quota = Quota(self.store)
        self.registry.validating += [PodSecurity(self.store), quota]
        found: list[Any] = [quota]
        if kinds.KUEUE in self.groups:
            self.registry.mutating.append(self.kueue.suspend_new)
            found.append(self.kueue)
        if kinds.TRAINER in self.groups:
            train_jobs = TrainJobs(self)
            self.registry.validating.append(train_jobs.check_new)
            self.registry.create(kinds.CLUSTER_TRAINING_RUNTIME, "", TORCH_RUNTIME)
            found.append(train_jobs)
        if {kinds.JOBSET, kinds.TRAINER} & self.groups:
            found.append(JobSets(self))
        return found

    def __enter__(self) -> Self:
        self.start_listening()
        self._loop = threading.Thread(target=self._run_controllers, daemon=True)
        self._loop.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is None and self.errors:
            raise self.errors[0]

    def close(self) -> None:
        """End everything; no process of a pod is left."""
        with self.store.lock:
            self.is_stopped = True
            self.store.lock.notify_all()
        try:
            self.stop_listening()
            self._loop.join(timeout=30)
        finally:
            self.kubelet.close()
            kill_marked(self.mark + "/")
            self._folder.cleanup()

    def start_listening(self) -> None:
        """Accept connections, on the same port as before."""
        with self._listening:
            if self._listener is not None or self.is_stopped:
                return
            self._listener = Listener(self, self._port)
            self._port = self._listener.server_port
            threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop_listening(self) -> None:
        """Refuse connections and break those that are open."""
        with self._listening:
            listener, self._listener = self._listener, None
            if listener is not None:
                listener.shutdown()
                listener.server_close()
                listener.break_connections()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def write_kubeconfig(self, path: Path, namespace: str = "default") -> Path:
        """Write a kubeconfig for this server and return its path."""
        # At once: a client may be reading it.
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(yaml.safe_dump(self.kubeconfig(namespace)))
        return fresh.replace(path)

    def kubeconfig(self, namespace: str = "default") -> Object:
        context = {"cluster": "test", "user": "test", "namespace": namespace}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [{"name": "test", "context": context}],
        }

    def is_token(self, header: str | None) -> bool:
        return header == f"Bearer {self.token}"

    def record(self, method: str, path: str, verb: str | None) -> None:
        """Remember a request as (verb or method, path)."""
        self.requests.append((verb or method.lower(), path))

    def _run_controllers(self) -> None:
        while not self.is_stopped:
            with self.store.lock:
                before = self.store.version
                for controller in self._controllers:
                    if self.is_stopped:
                        return
                    try:
                        controller.sync()
                    except Exception as error:  # noqa: BLE001  A controller's bug fails the test at its end.
                        self.errors.append(error)
                        self.is_stopped = True
                        return
                if self.store.version == before:
                    self.store.lock.wait(self.settings.tick_seconds)

    def evict(self, namespace: str, name: str) -> None:
        """``pods/eviction``: what a drain calls."""
        message = "Eviction API: evicting"
        self.disrupt(namespace, name, "EvictionByEvictionAPI", message)

    def disrupt(self, namespace: str, name: str, reason: str, message: str) -> None:
        """Mark a pod as a DisruptionTarget and delete it gracefully."""

        def mark(pod: Object) -> None:
            now = self.clock.timestamp()
            more = {"reason": reason, "message": message}
            pods.set_condition(pod, now, "DisruptionTarget", "True", **more)

        with self.store.lock:
            self.store.update(kinds.POD, namespace, name, mark)
            self.registry.delete(kinds.POD, namespace, name)

    def enforce_pod_security(self, namespace: str = "default") -> None:
        """Label the namespace so that only ``restricted`` pods are let in."""

        def label(item: Object) -> None:
            item["metadata"].setdefault("labels", {})[ENFORCE] = "restricted"

        self.store.update(kinds.NAMESPACE, "", namespace, label)

    def set_quota(self, hard: Object, namespace: str = "default", name: str = "quota") -> None:
        """A ResourceQuota, made or changed: ``{"pods": "2", "requests.nvidia.com/gpu": "1"}``."""
        if self.store.get(kinds.QUOTA, namespace, name):
            self.store.update(
                kinds.QUOTA, namespace, name, lambda item: item["spec"].update(hard=hard)
            )
            return
        body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name}}
        self.create({**body, "spec": {"hard": hard}}, namespace)

    def add_queue(self, queue: str, quota: Object, namespace: str = "default") -> None:
        """A Kueue LocalQueue with a ClusterQueue of its name: ``{"pods": 2}`` as its quota."""
        resources = [{"name": k, "nominalQuota": str(v)} for k, v in quota.items()]
        flavors = [{"name": "default", "resources": resources}]
        group = {"coveredResources": list(quota), "flavors": flavors}
        for kind, spec in (
            ("ClusterQueue", {"namespaceSelector": {}, "resourceGroups": [group]}),
            ("LocalQueue", {"clusterQueue": queue}),
        ):
            body = {"apiVersion": kinds.KUEUE, "kind": kind, "metadata": {"name": queue}}
            self.create({**body, "spec": spec}, namespace)

    def create(self, body: Object, namespace: str = "default") -> Object:
        """Create an object as an administrator, with all checks."""
        kind = kinds.by_owner(body["apiVersion"], body["kind"])
        if kind is None:
            raise LookupError(f"unknown kind {body['kind']}")
        return self.registry.create(kind, namespace if kind.is_namespaced else "", body)

    def job(self, name: str, namespace: str = "default") -> Object | None:
        """A Job as stored; None when it is gone."""
        return self.store.get(kinds.JOB, namespace, name)

    def pods(self, job: str | None = None, namespace: str = "default") -> list[Object]:
        """Copies of the pods, those of one Job by its label."""
        found = copy.deepcopy(self.store.list(kinds.POD, namespace))
        if job is None:
            return found
        return [p for p in found if (p["metadata"].get("labels") or {}).get("job-name") == job]

    def running_pods(self, job: str | None = None, namespace: str = "default") -> list[Object]:
        """Pods that run and are not on their way out."""
        found = self.pods(job, namespace)
        return [p for p in found if pods.phase(p) == "Running" and pods.is_active(p)]

    def events(self, name: str, namespace: str = "default") -> list[tuple[str, str]]:
        """(reason, message) of what was said about an object."""
        return [
            (event["reason"], event["message"])
            for event in self.store.list(kinds.EVENT, namespace)
            if event["involvedObject"]["name"] == name
        ]

    def log(self, pod: str, namespace: str = "default") -> str:
        """All a pod has written so far."""
        return b"".join(self.kubelet.read_log(namespace, pod, {}) or ()).decode(errors="replace")

    def wait_until(
        self, condition: Callable[[], Any], what: str = "", timeout_seconds: float = 60.0
    ) -> Any:
        """Look again after each change until ``condition`` gives something true, and return it."""
        deadline = time.monotonic() + timeout_seconds
        # Without the lock: a condition may ask over HTTP.
        while not (found := condition()):
            if self.errors:
                raise self.errors[0]
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what or condition} did not come true: {self._situation()}")
            with self.store.lock:
                self.store.lock.wait(0.05)
        return found

    def wait_for_job(
        self, name: str, namespace: str = "default", timeout_seconds: float = 60.0
    ) -> Object:
        """The Job once it is Complete or Failed."""

        def ended() -> Object | None:
            job = self.job(name, namespace)
            return job if job and is_finished(job) else None

        found: Object = self.wait_until(ended, f"the end of Job {name}", timeout_seconds)
        return found

    def _situation(self) -> str:
        jobs = [(j["metadata"]["name"], j.get("status")) for j in self.store.list(kinds.JOB)]
        found = [
            (p["metadata"]["name"], p["status"].get("phase")) for p in self.store.list(kinds.POD)
        ]
        return f"Jobs {jobs}, pods {found}"


ALL_GROUPS = kinds.BUILT_IN_GROUPS | {kinds.JOBSET, kinds.TRAINER, kinds.KUEUE}

__all__ = ["ALL_GROUPS", "ApiError", "KubeServer", "NodeSpec", "Settings"]
