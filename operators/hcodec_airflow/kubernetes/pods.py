"""Reading pods: does one live, how did it end, and why does it wait."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hcodec_airflow.kubernetes.manifest import CONTAINER
from hcodec_airflow.kubernetes.profiles import Object

_INDEX = "batch.kubernetes.io/job-completion-index"
_MAX_REASON = 300
# Reasons of a waiting container that are only the ordinary way of starting.
_ORDINARY = frozenset({"ContainerCreating", "PodInitializing"})


@dataclass(frozen=True)
class PodState:
    """One pod, as far as workers are concerned.

    ``is_alive``: its container runs, or the pod is being stopped while it does. ``is_disrupted``:
    evicted, preempted, deleted or on a lost node: not the work's fault. Timestamps are the API
    server's, empty while not reached.
    """

    name: str
    uid: str
    index: int
    generation: int
    created_at: str
    is_alive: bool
    is_ended: bool
    is_disrupted: bool
    exit_code: int | None = None
    is_out_of_memory: bool = False
    scheduled_at: str = ""
    running_at: str = ""
    note: str = ""
    waits_for: str = ""
    container: str = CONTAINER


def pod_state(pod: Object, generation: int = 0) -> PodState:
    """What a pod's document says; ``generation``: of the workload it belongs to."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    phase = status.get("phase", "Pending")
    container = _container_status(status)
    ended = (container.get("state") or {}).get("terminated")
    running = (container.get("state") or {}).get("running")
    disruption = _condition(status, "DisruptionTarget")
    is_ended = phase in {"Succeeded", "Failed"}
    is_disrupted = disruption is not None or bool(metadata.get("deletionTimestamp"))
    return PodState(
        name=metadata["name"],
        uid=metadata["uid"],
        index=_index_of(metadata),
        generation=generation,
        created_at=metadata.get("creationTimestamp", ""),
        is_alive=not is_ended and (phase == "Running" or running is not None),
        is_ended=is_ended,
        is_disrupted=is_disrupted or status.get("reason") in {"Evicted", "NodeLost", "Preempting"},
        exit_code=ended.get("exitCode") if ended else None,
        is_out_of_memory=(ended or {}).get("reason") == "OOMKilled",
        scheduled_at=_scheduled_at(status),
        running_at=_running_at(container),
        note=_note(status, ended, disruption, bool(metadata.get("deletionTimestamp"))),
        waits_for="" if is_ended or running else _waits_for(status, container),
        container=container.get("name", CONTAINER),
    )


def why_waiting(pods: Iterable[PodState]) -> str:
    """Why the first few pods that do not run yet wait, each reason once."""
    reasons: dict[str, int] = {}
    for pod in pods:
        if pod.waits_for:
            reasons[pod.waits_for] = reasons.get(pod.waits_for, 0) + 1
    told = sorted(reasons.items(), key=lambda entry: -entry[1])[:3]
    return "; ".join(f"{what} ({number} pods)" if number > 1 else what for what, number in told)


def _container_status(status: Object) -> Object:
    containers = [dict(container) for container in status.get("containerStatuses") or []]
    named = [container for container in containers if container.get("name") == CONTAINER]
    # Kubeflow's runtimes have another name for it.
    return next(iter([*named, *containers]), {})


def _index_of(metadata: Object) -> int:
    text = (metadata.get("annotations") or {}).get(_INDEX, "")
    return int(text) if text.isdecimal() else 0


def _condition(status: Object, kind: str) -> Object | None:
    for condition in status.get("conditions") or []:
        if condition.get("type") == kind and condition.get("status") == "True":
            return dict(condition)
    return None


def _scheduled_at(status: Object) -> str:
    scheduled = _condition(status, "PodScheduled")
    return str((scheduled or {}).get("lastTransitionTime") or "")


def _running_at(container: Object) -> str:
    state = container.get("state") or {}
    for kind in ("running", "terminated"):
        if state.get(kind):
            return str(state[kind].get("startedAt") or "")
    return ""


def _note(status: Object, ended: Object | None, disruption: Object | None, deleted: bool) -> str:
    """Why a pod ended or is ending, in a few words; empty when its exit code says it all."""
    if ended and ended.get("reason") == "OOMKilled":
        return "was ended by the system for want of memory (OOMKilled)"
    if disruption is not None:
        return f"was disrupted ({disruption.get('reason')}: {disruption.get('message', '')})"
    if status.get("reason"):
        return f"was ended ({status['reason']}: {status.get('message', '')})"[:_MAX_REASON]
    if deleted and not ended:
        return "was deleted"
    return ""


def _waits_for(status: Object, container: Object) -> str:
    waiting = (container.get("state") or {}).get("waiting")
    if waiting and waiting.get("reason") not in _ORDINARY:
        return f"{waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")[:_MAX_REASON]
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            reason = condition.get("reason", "Unschedulable")
            return f"{reason}: {condition.get('message', '')}".rstrip(": ")[:_MAX_REASON]
    if waiting:
        return str(waiting.get("reason"))
    return ""
