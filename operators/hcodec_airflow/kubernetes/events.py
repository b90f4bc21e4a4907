"""Why pods wait, where their own documents do not say: events, and Kueue's workloads."""

from __future__ import annotations

from hcodec_airflow.kubernetes.client import ClusterApi, NotFoundError
from hcodec_airflow.kubernetes.profiles import Object
from hcodec_core.errors import AccessError, ClusterError

_KUEUE = "/apis/kueue.x-k8s.io/v1beta1/namespaces/{}/workloads"
_KUEUE_JOB_UID = "kueue.x-k8s.io/job-uid"
_MAX_REASON = 300


async def last_warning(api: ClusterApi, name: str) -> str:
    """Reason and message of the newest warning about an object, empty when there is none.

    Events are news, not truth: what cannot be read is left out.
    """
    path = f"/api/v1/namespaces/{api.namespace}/events"
    try:
        listed = await api.list_objects(path, fieldSelector=f"involvedObject.name={name}")
    except (AccessError, ClusterError, NotFoundError):
        return ""
    warnings = [event for event in listed.get("items") or [] if event.get("type") == "Warning"]
    if not warnings:
        return ""
    newest = max(warnings, key=_time_of)
    return f"{newest.get('reason')}: {newest.get('message', '')}".rstrip(": ")[:_MAX_REASON]


async def kueue_reason(api: ClusterApi, job: Object) -> str:
    """Why Kueue has not admitted a suspended Job, as its workload says."""
    query = {"labelSelector": f"{_KUEUE_JOB_UID}={job['metadata']['uid']}"}
    try:
        listed = await api.list_objects(_KUEUE.format(api.namespace), **query)
    except (AccessError, ClusterError, NotFoundError):
        return "Kueue has not admitted it (its workload cannot be read)"
    for workload in listed.get("items") or []:
        return _reason_of(workload)
    return "Kueue has made no workload for it yet"


def _reason_of(workload: Object) -> str:
    conditions = (workload.get("status") or {}).get("conditions") or []
    for kind in ("Evicted", "Preempted"):
        for condition in conditions:
            if condition.get("type") == kind and condition.get("status") == "True":
                return f"Kueue took it back: {condition.get('message', '')}"[:_MAX_REASON]
    for condition in conditions:
        if condition.get("type") in {"QuotaReserved", "Admitted"} and condition["status"] != "True":
            return f"Kueue: {condition.get('message', '')}"[:_MAX_REASON]
    queue = (workload.get("spec") or {}).get("queueName", "")
    return f"Kueue: waiting in queue {queue}"


def _time_of(event: Object) -> str:
    times = (event.get("lastTimestamp"), event.get("eventTime"), event.get("firstTimestamp"))
    return next((str(time) for time in times if time), "")
