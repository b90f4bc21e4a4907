"""The kubelet of every node: runs containers as local processes and reports on them."""

from __future__ import annotations

import copy
import itertools
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kube import kinds, logs, pods
from tests.kube.containers import Container
from tests.kube.environment import ConfigurationError, Surroundings
from tests.kube.errors import ApiError, Object
from tests.kube.processes import MARK, Guard, StartError, kill_marked

if TYPE_CHECKING:
    from tests.kube.server import KubeServer


class PodRun:
    """One pod on its node: its folder and containers."""

    def __init__(self, pod: Object, folder: Path, address: str) -> None:
        metadata, spec = pod["metadata"], pod["spec"]
        self.uid = metadata["uid"]
        self.key = metadata["namespace"], metadata["name"]
        self.node = spec["nodeName"]
        self.folder = folder
        self.address = address
        self.policy = spec["restartPolicy"]
        self.created = time.monotonic()
        self.stop_deadline: float | None = None
        self.reported: list[Object] = []
        init = spec.get("initContainers") or []
        self.init = [Container(c, folder) for c in init]
        self.main = [Container(c, folder) for c in spec["containers"]]
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def containers(self) -> list[Container]:
        return [*self.init, *self.main]

    @property
    def is_running(self) -> bool:
        return any(container.is_running for container in self.containers)

    def stop(self, grace_seconds: float) -> None:
        """SIGTERM once, SIGKILL when the (maybe shortened) grace period is over."""
        deadline = time.monotonic() + grace_seconds
        if self.stop_deadline is None:
            for container in self.containers:
                container.signal(signal.SIGTERM)
            self.stop_deadline = deadline
        self.stop_deadline = min(self.stop_deadline, deadline)
        if time.monotonic() >= self.stop_deadline:
            self.kill()

    def kill(self) -> None:
        for container in self.containers:
            container.kill()


class Kubelet:
    """All nodes' kubelets in one; what it may see of a pod, its node must be heard for."""

    def __init__(self, api: KubeServer, folder: Path) -> None:
        self._api = api
        self._store = api.store
        self._folder = folder
        self._runs: dict[str, PodRun] = {}
        self._addresses = itertools.count(2)
        self._guard: Guard | None = None
        self.broken_images: set[str] = set()

    def sync(self) -> None:
        all_pods = self._store.list(kinds.POD)
        for pod in all_pods:
            node = pod["spec"].get("nodeName")
            if node and self._api.nodes.is_heard(node):
                self._sync_pod(pod)
        known = {pod["metadata"]["uid"] for pod in all_pods}
        for run in list(self._runs.values()):
            if run.uid not in known and self._api.nodes.is_heard(run.node):
                self._discard(run)

    def _discard(self, run: PodRun) -> None:
        """Deleted by force, or while its node was away."""
        run.kill()
        kill_marked(self._mark(run.uid))
        for container in run.containers:
            container.poll(self._store.clock)
        del self._runs[run.uid]
        shutil.rmtree(run.folder, ignore_errors=True)

    def _mark(self, uid: str) -> str:
        return f"{self._api.mark}/{uid}"

    def _sync_pod(self, pod: Object) -> None:
        run = self._runs.get(pod["metadata"]["uid"])
        if pods.is_finished(pod):
            if pods.is_terminating(pod):
                self._confirm_deletion(pod)
            return
        if run is None:
            run = self._admit(pod)
        for container in run.containers:
            container.poll(self._store.clock)
        if pods.is_terminating(pod):
            run.stop(pod["metadata"].get("deletionGracePeriodSeconds", 0))
            if not run.is_running:
                self._finish(pod, run)
                return
        else:
            self._advance(pod, run)
        self._report(pod, run)

    def _admit(self, pod: Object) -> PodRun:
        uid = pod["metadata"]["uid"]
        if self._guard is None:
            self._guard = Guard(self._api.mark + "/")
        number = next(self._addresses)
        address = f"10.244.{number // 250}.{number % 250 + 1}"
        run = self._runs[uid] = PodRun(pod, self._folder / uid, address)
        return run

    def _advance(self, pod: Object, run: PodRun) -> None:
        """Start what may start now."""
        if time.monotonic() < run.created + self._api.settings.start_seconds:
            return
        for container in run.init:
            if not container.is_done_well:
                self._try_start(pod, run, container)
                return
        for container in run.main:
            self._try_start(pod, run, container)

    def _try_start(self, pod: Object, run: PodRun, container: Container) -> None:
        if not container.may_start(run.policy, self._api.settings.restart_seconds):
            return
        image = container.spec["image"]
        if any(part in image for part in self.broken_images):
            self._refuse_image(pod, container, image)
            return
        surroundings = Surroundings(self._store, pod, run.folder, self._base(pod, container))
        entrypoint = self._api.settings.entrypoint_of(image)
        try:
            variables = surroundings.variables(container.spec)
            command = surroundings.command(container.spec, entrypoint)
            folder = surroundings.working_folder(container.spec)
            container.start(command, variables, folder, self._store.clock)
        except ConfigurationError as error:
            container.wait_for("CreateContainerConfigError", str(error))
            self._say(pod, "Warning", "Failed", f"Error: {error}")
            return
        except (StartError, OSError) as error:
            container.fail_to_start(str(error), self._store.clock)
            self._say(pod, "Warning", "Failed", f"Error: failed to start container: {error}")
            return
        name = container.name
        message = f'Container image "{image}" already present on machine'
        self._say(pod, "Normal", "Pulled", message)
        self._say(pod, "Normal", "Created", f"Created container: {name}")
        self._say(pod, "Normal", "Started", f"Started container {name}")

    def _base(self, pod: Object, container: Container) -> dict[str, str]:
        metadata = pod["metadata"]
        return {
            **self._api.settings.base_environment,
            "HOSTNAME": pod["spec"].get("hostname") or metadata["name"],
            MARK: f"{self._mark(metadata['uid'])}/{container.name}/",
        }

    def _refuse_image(self, pod: Object, container: Container, image: str) -> None:
        why = f'failed to pull and unpack image "{image}": not found'
        if container.waiting_for not in ("ErrImagePull", "ImagePullBackOff"):
            self._say(pod, "Normal", "Pulling", f'Pulling image "{image}"')
            self._say(pod, "Warning", "Failed", f'Failed to pull image "{image}": {why}')
            container.wait_for("ErrImagePull", why)
        elif container.waiting_for == "ErrImagePull":
            message = f'Back-off pulling image "{image}"'
            self._say(pod, "Normal", "BackOff", message)
            container.wait_for("ImagePullBackOff", message)

    def _report(self, pod: Object, run: PodRun) -> None:
        """Write the status, when it changed."""
        states = [copy.deepcopy(container.status()) for container in run.containers]
        if states == run.reported:
            return
        run.reported = states
        namespace, name = run.key
        self._store.update(kinds.POD, namespace, name, lambda item: self._fill(item, run))

    def _fill(self, pod: Object, run: PodRun) -> None:
        status, now = pod["status"], self._store.clock.timestamp()
        status["phase"] = _phase(run)
        status.setdefault("startTime", now)
        status.update(hostIP="10.0.0.1", podIP=run.address, podIPs=[{"ip": run.address}])
        if run.init:
            status["initContainerStatuses"] = [c.status() for c in run.init]
        status["containerStatuses"] = [c.status() for c in run.main]
        is_over = status["phase"] in ("Succeeded", "Failed")
        is_initialized = all(c.is_done_well for c in run.init)
        is_ready = not is_over and all(c.is_running for c in run.main)
        reason = {"reason": "PodCompleted"} if status["phase"] == "Succeeded" else {}
        pods.set_condition(pod, now, "PodReadyToStartContainers", str(not is_over))
        pods.set_condition(pod, now, "Initialized", str(is_initialized))
        pods.set_condition(pod, now, "Ready", str(is_ready), **reason)
        pods.set_condition(pod, now, "ContainersReady", str(is_ready), **reason)

    def _finish(self, pod: Object, run: PodRun) -> None:
        """The last status of a pod that was asked to go, then its going."""

        def edit(item: Object) -> None:
            self._fill(item, run)
            if item["status"]["phase"] not in ("Succeeded", "Failed"):
                item["status"]["phase"] = "Failed"

        namespace, name = run.key
        updated = self._store.update(kinds.POD, namespace, name, edit)
        self._say(pod, "Normal", "Killing", f"Stopping container {run.main[0].name}")
        self._confirm_deletion(updated)

    def _confirm_deletion(self, pod: Object) -> None:
        metadata = pod["metadata"]
        if not metadata.get("deletionGracePeriodSeconds") and metadata.get("finalizers"):
            return
        try:
            self._api.registry.delete(
                kinds.POD, metadata["namespace"], metadata["name"], {"gracePeriodSeconds": 0}
            )
        except ApiError:
            pass  # gone with its status update

    def _say(self, pod: Object, type_: str, reason: str, message: str) -> None:
        self._api.recorder.say(pod, type_, reason, message, "kubelet")

    def _run_of(self, namespace: str, name: str) -> PodRun:
        pod = self._api.registry.get(kinds.POD, namespace, name)
        run = self._runs.get(pod["metadata"]["uid"])
        if run is None:
            raise LookupError(f"pod {namespace}/{name} has not begun to run")
        return run

    def signal(self, namespace: str, name: str, number: int) -> None:
        with self._store.lock:
            for container in self._run_of(namespace, name).containers:
                container.signal(number)

    def kill_for_memory(self, namespace: str, name: str) -> None:
        with self._store.lock:
            for container in self._run_of(namespace, name).containers:
                container.kill_for_memory()

    def pause(self, namespace: str, name: str) -> None:
        with self._store.lock:
            for container in self._run_of(namespace, name).containers:
                container.pause()

    def wake(self, namespace: str, name: str) -> None:
        with self._store.lock:
            for container in self._run_of(namespace, name).containers:
                container.wake()

    def pids(self, namespace: str, name: str) -> list[int]:
        """First processes of the pod's running containers."""
        with self._store.lock:
            run = self._run_of(namespace, name)
            return [c.process.pid for c in run.containers if c.process and c.is_running]

    def kill_all_on(self, node: str) -> None:
        """The machine is off."""
        for run in self._runs.values():
            if run.node == node:
                run.kill()
                kill_marked(self._mark(run.uid))

    def read_log(self, namespace: str, name: str, query: dict[str, str]) -> Iterator[bytes] | None:
        """The log of one container in pieces; empty pieces while a follower waits.

        None for a pod without a node. Raises 400, 404, 500.
        """
        with self._store.lock:
            pod = self._api.registry.get(kinds.POD, namespace, name)
            run = self._runs.get(pod["metadata"]["uid"])
            node = pod["spec"].get("nodeName", "")
            wanted = logs.chosen_name(pod, query)
            if not node:
                return None  # nowhere to ask: no content, and no error
            container = logs.started_container(pod, wanted, run.containers if run else [], query)
            if not self._api.nodes.is_heard(node):
                message = f'Get "https://{node}:10250/containerLogs": dial tcp: i/o timeout'
                raise ApiError(500, "InternalError", message)
        return logs.read(container, query, self._store.clock)

    def close(self) -> None:
        """Kill every process of every pod, and see them gone."""
        with self._store.lock:
            runs = list(self._runs.values())
            for run in runs:
                run.kill()
        kill_marked(self._api.mark + "/")
        for run in runs:
            for container in run.containers:
                if container.process is not None:
                    container.process.wait(5.0)
        if self._guard is not None:
            self._guard.close()
            self._guard = None


def _phase(run: PodRun) -> str:
    if any(container.has_failed_for_good(run.policy) for container in run.init):
        return "Failed"
    states = [container.outcome(run.policy) for container in run.main]
    if all(state in ("succeeded", "failed") for state in states):
        return "Failed" if "failed" in states else "Succeeded"
    return "Running" if any(state != "waiting" for state in states) else "Pending"
