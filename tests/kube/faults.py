"""Faults on demand: what a server, its network and its users do to a client."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.kube.errors import ApiError, expired, too_many_requests
from tests.kube.kinds import Kind

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

ALWAYS = 1_000_000_000


@dataclass
class Fault:
    """What happens to the next ``times`` requests of ``verb`` on ``resource`` ("" is any)."""

    verb: str = ""
    resource: str = ""
    times: int = 1
    error: ApiError | None = None
    is_reset: bool = False
    is_answer_lost: bool = False
    delay_seconds: float = 0.0
    num_met: int = 0

    def fits(self, verb: str, resource: str) -> bool:
        return (
            self.times > self.num_met
            and self.verb in ("", verb)
            and self.resource in ("", resource)
        )


class RequestFaults:
    """Faults of single requests. A test that uses one twice adds it twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._watches_dropped = 0.0
        self.are_watches_frozen = False
        self._num_gone = 0

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Serve everything again."""
        with self._lock:
            self._faults.clear()
            self._num_gone = 0
            self.are_watches_frozen = False

    def throttle(
        self, verb: str = "", resource: str = "", times: int = 1, retry_after_seconds: int = 1
    ) -> Fault:
        """429 with ``Retry-After``, as API priority and fairness answers."""
        error = too_many_requests("Too many requests, please try again later.", retry_after_seconds)
        return self.add(Fault(verb, resource, times, error))

    def fail(self, code: int = 500, verb: str = "", resource: str = "", times: int = 1) -> Fault:
        """500, 503, 504 or another status with a ``Status`` body."""
        reason, message = _ERRORS.get(code, ("InternalError", "injected fault"))
        return self.add(Fault(verb, resource, times, ApiError(code, reason, message)))

    def forbid(self, verb: str, resource: str = "", times: int = 1) -> Fault:
        """403 for a while; for good, use ``KubeServer.permissions.deny``."""
        message = f'{resource or "resource"} is forbidden: User cannot {verb} resource "{resource}"'
        return self.add(Fault(verb, resource, times, ApiError(403, "Forbidden", message)))

    def list_expired(self, resource: str = "", times: int = 1) -> Fault:
        """410 for the next lists."""
        return self.add(Fault("list", resource, times, expired()))

    def watch_expired(self, times: int = 1) -> None:
        """The next watches from a version are told 410 in their first event."""
        with self._lock:
            self._num_gone += times

    def reset_connection(self, verb: str = "", resource: str = "", times: int = 1) -> Fault:
        """RST instead of an answer, before the request had any effect."""
        return self.add(Fault(verb, resource, times, is_reset=True))

    def lose_answer(self, verb: str, resource: str = "", times: int = 1) -> Fault:
        """RST instead of an answer, after the request had its effect: created, and not told."""
        return self.add(Fault(verb, resource, times, is_answer_lost=True))

    def slow_down(
        self, seconds: float, verb: str = "", resource: str = "", times: int = ALWAYS
    ) -> Fault:
        """Answer only after ``seconds``."""
        return self.add(Fault(verb, resource, times, delay_seconds=seconds))

    def drop_watches(self) -> None:
        """Cut every open watch in the middle, without a last chunk."""
        with self._lock:
            self._watches_dropped = time.monotonic()

    def freeze_watches(self) -> None:
        """Leave watches open and tell them nothing, as a dead connection does, until ``clear``."""
        self.are_watches_frozen = True

    def meet(self, verb: str, resource: str) -> Fault | None:
        """The fault of this request, counted; None when it is served."""
        with self._lock:
            for fault in self._faults:
                if fault.fits(verb, resource):
                    fault.num_met += 1
                    return fault
        return None

    def is_watch_dropped(self, opened: float) -> bool:
        return opened <= self._watches_dropped

    def takes_gone(self, kind: Kind) -> bool:
        with self._lock:
            if self._num_gone == 0:
                return False
            self._num_gone -= 1
            return True


_ERRORS = {
    500: ("InternalError", "Internal error occurred: etcdserver: request timed out"),
    503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
    504: ("Timeout", "Timeout: request did not complete within the allotted timeout"),
}


class Faults(RequestFaults):
    """Every fault a test can ask for: of requests, of pods, of nodes, of the server as a whole."""

    def __init__(self, api: KubeServer) -> None:
        super().__init__()
        self._api = api

    def compact(self) -> None:
        """Make every version known so far too old for new watches and continued lists."""
        self._api.store.compact()

    def go_away(self, seconds: float | None = None) -> None:
        """Refuse connections and break the open ones, for good or for ``seconds``.

        Pods and controllers go on meanwhile, as they would not notice.
        """
        self._api.stop_listening()
        if seconds is not None:
            timer = threading.Timer(seconds, self._api.start_listening)
            timer.daemon = True
            timer.start()

    def come_back(self) -> None:
        self._api.start_listening()

    def skew_clock(self, seconds: float) -> None:
        """Put the server's time ahead of the client's (behind it when negative)."""
        self._api.clock.advance(seconds)

    def evict(self, pod: str, namespace: str = "default") -> None:
        """The eviction API, as a drain does: DisruptionTarget, then a graceful deletion."""
        self._api.evict(namespace, pod)

    def preempt(self, pod: str, namespace: str = "default") -> None:
        """The scheduler makes room for a pod of higher priority."""
        message = "default-scheduler: preempting to accommodate a higher priority pod"
        self._api.disrupt(namespace, pod, "PreemptionByScheduler", message)

    def kill_pod(self, pod: str, namespace: str = "default") -> None:
        """``kubectl delete pod --force``: gone from the API at once, SIGKILL on its node."""
        from tests.kube import kinds

        self._api.registry.delete(kinds.POD, namespace, pod, {"gracePeriodSeconds": 0})

    def kill_process(self, pod: str, namespace: str = "default", signal_number: int = 9) -> None:
        """A signal to the container's first process, from nobody in particular."""
        self._api.kubelet.signal(namespace, pod, signal_number)

    def kill_for_memory(self, pod: str, namespace: str = "default") -> None:
        """SIGKILL with reason ``OOMKilled`` and exit code 137."""
        self._api.kubelet.kill_for_memory(namespace, pod)

    def pause(self, pod: str, namespace: str = "default") -> None:
        """SIGSTOP to all processes of the pod: it hangs, and its node sees it run."""
        self._api.kubelet.pause(namespace, pod)

    def wake(self, pod: str, namespace: str = "default") -> None:
        self._api.kubelet.wake(namespace, pod)

    def delete_job(self, job: str, namespace: str = "default", policy: str = "Background") -> None:
        """The Job goes away under its owner, with its pods unless ``policy`` is Orphan."""
        from tests.kube import kinds

        self._api.registry.delete(kinds.JOB, namespace, job, {"propagationPolicy": policy})

    def lose_node(self, node: str, kills_processes: bool = True) -> None:
        """The node stops answering; its pods are evicted after their toleration.

        ``kills_processes`` false: only the network is gone, the pods work on unseen.
        """
        self._api.nodes.lose(node, kills_processes)

    def return_node(self, node: str) -> None:
        """The kubelet is heard of again and tells what became of its pods."""
        self._api.nodes.give_back(node)

    def remove_node(self, node: str) -> None:
        """The node object is deleted: its pods are failed by pod garbage collection."""
        self._api.nodes.remove(node)

    def break_image(self, image_part: str) -> None:
        """Pulls of images whose name holds ``image_part`` fail until ``mend_image``."""
        self._api.kubelet.broken_images.add(image_part)

    def mend_image(self, image_part: str) -> None:
        self._api.kubelet.broken_images.discard(image_part)
