"""A small Kueue: Workloads for Jobs, JobSets and TrainJobs with a queue, admission, preemption.

Served when ``kueue.x-k8s.io/v1beta1`` is among the groups. A LocalQueue names its ClusterQueue, and
that one's first flavor holds ``nominalQuota`` per resource (``pods`` counts pods); a queue nobody
made holds its Jobs back, with Kueue's words. Borrowing, cohorts and fair sharing are not simulated.
"""

from __future__ import annotations

import copy
from decimal import Decimal
from typing import TYPE_CHECKING

from tests.kube import defaults, kinds, pods, quantities
from tests.kube.errors import ApiError, Object
from tests.kube.job_controller import is_finished
from tests.kube.kinds import Kind
from tests.kube.scheduler import requests_of
from tests.kube.training import TrainJobs

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
JOB_UID = "kueue.x-k8s.io/job-uid"
_QUEUED = (kinds.JOB, kinds.JOB_SET, kinds.TRAIN_JOB)


def _queue_of(job: Object) -> str:
    return str((job["metadata"].get("labels") or {}).get(QUEUE, ""))


def _is_over(job: Object) -> bool:
    return is_finished(job) or bool((job.get("status") or {}).get("terminalState"))


class Kueue:
    """Webhook and controllers."""

    def __init__(self, api: KubeServer) -> None:
        self._api = api
        self._store = api.store

    def suspend_new(self, kind: Kind, item: Object) -> None:
        """The mutating webhook: a queued Job starts suspended, whatever its author wrote."""
        if kind in _QUEUED and _queue_of(item):
            if pods.controller_of(item) is None:
                item["spec"]["suspend"] = True

    def sync(self) -> None:
        """Make, admit, finish and drop Workloads."""
        for kind in _QUEUED:
            for job in self._store.list(kind):
                if _queue_of(job) and pods.controller_of(job) is None:
                    self._sync_job(job)

    def _sync_job(self, job: Object) -> None:
        workload = self._workload_of(job)
        if workload is None:
            if not _is_over(job) and not pods.is_terminating(job):
                self._make_workload(job)
            return
        if _is_over(job):
            self._condition(workload, "Finished", "True", "JobFinished", "Job finished")
        elif pods.condition_status(workload, "Admitted") == "True":
            self._set_suspend(job, False)
        elif job["spec"].get("suspend"):
            self._try_admit(job, workload)
        else:
            self._set_suspend(job, True)

    def _workload_of(self, job: Object) -> Object | None:
        uid = job["metadata"]["uid"]
        for workload in self._store.list(kinds.WORKLOAD, job["metadata"]["namespace"]):
            if (workload["metadata"].get("labels") or {}).get(JOB_UID) == uid:
                return workload
        return None

    def _make_workload(self, job: Object) -> None:
        metadata = job["metadata"]
        body = {
            "apiVersion": kinds.KUEUE,
            "kind": "Workload",
            "metadata": {
                "name": f"{job['kind'].lower()}-{metadata['name'][:40]}-{metadata['uid'][:5]}",
                "labels": {JOB_UID: metadata["uid"]},
                "ownerReferences": [pods.owner_reference(job)],
            },
            "spec": {
                "active": True,
                "queueName": _queue_of(job),
                "priorityClassName": (metadata.get("labels") or {}).get(PRIORITY, ""),
                "podSets": self._pod_sets(job),
            },
            "status": {},
        }
        self._api.registry.create(kinds.WORKLOAD, metadata["namespace"], body)
        message = f"Created Workload: {metadata['namespace']}/{body['metadata']['name']}"  # type: ignore[index]
        self._say(job, "Normal", "CreatedWorkload", message)

    def _pod_sets(self, job: Object) -> list[Object]:
        """Names, counts and templates of the pods that run together."""
        spec = job["spec"]
        if job["kind"] == "Job":
            return [{"name": "main", "count": spec["parallelism"], "template": spec["template"]}]
        if job["kind"] == "TrainJob":
            spec = TrainJobs(self._api).job_set(job)["spec"]
        found = []
        for replicated in spec["replicatedJobs"]:
            inner = copy.deepcopy(replicated["template"]["spec"])
            defaults.default_pod_spec(inner["template"]["spec"])
            count = replicated.get("replicas", 1) * inner.get("parallelism", 1)
            one = {"name": replicated["name"], "count": count, "template": inner["template"]}
            found.append(one)
        return found

    def _try_admit(self, job: Object, workload: Object) -> None:
        cluster_queue, obstacle = self._find_queue(workload)
        if cluster_queue is not None:
            obstacle = self._shortage(cluster_queue, workload)
        if obstacle:
            reason = "Pending" if cluster_queue is not None else "Inadmissible"
            self._condition(workload, "QuotaReserved", "False", reason, obstacle)
            return
        assert cluster_queue is not None
        name = cluster_queue["metadata"]["name"]
        message = f"Quota reserved in ClusterQueue {name}"
        self._condition(workload, "QuotaReserved", "True", "QuotaReserved", message)
        for type_ in ("Evicted", "Preempted"):
            if pods.condition_status(workload, type_) == "True":
                self._condition(workload, type_, "False", "QuotaReserved", "Previously: evicted")
        message = "The workload is admitted"
        self._condition(workload, "Admitted", "True", "Admitted", message, cluster_queue=name)
        self._say(job, "Normal", "Started", f"Admitted by clusterQueue {name}")
        self._set_suspend(job, False)

    def _find_queue(self, workload: Object) -> tuple[Object | None, str]:
        namespace, name = workload["metadata"]["namespace"], workload["spec"]["queueName"]
        local = self._store.get(kinds.LOCAL_QUEUE, namespace, name)
        if local is None:
            return None, f"LocalQueue {name} doesn't exist"
        wanted = local["spec"]["clusterQueue"]
        cluster_queue = self._store.get(kinds.CLUSTER_QUEUE, "", wanted)
        if cluster_queue is None:
            return None, f"ClusterQueue {wanted} doesn't exist"
        if cluster_queue["spec"].get("stopPolicy", "None") != "None":
            return None, f"ClusterQueue {wanted} is stopped"
        return cluster_queue, ""

    def _shortage(self, cluster_queue: Object, workload: Object) -> str:
        """Which resource is missing, in Kueue's words; empty when all fit."""
        name = cluster_queue["metadata"]["name"]
        wanted, pod_set = _needs(workload), workload["spec"]["podSets"][0]["name"]
        used: dict[str, Decimal] = {}
        for other in self._store.list(kinds.WORKLOAD):
            is_admitted = (other["status"].get("admission") or {}).get("clusterQueue") == name
            if is_admitted and pods.condition_status(other, "Finished") != "True":
                for resource, amount in _needs(other).items():
                    used[resource] = used.get(resource, Decimal(0)) + amount
        for group in cluster_queue["spec"].get("resourceGroups") or []:
            flavor = group["flavors"][0]
            for resource in flavor["resources"]:
                quota = quantities.value(resource["nominalQuota"])
                kind, free = resource["name"], quota - used.get(resource["name"], Decimal(0))
                missing = wanted.get(kind, Decimal(0)) - free
                if missing > 0:
                    return (
                        f"couldn't assign flavors to pod set {pod_set}: insufficient unused quota "
                        f"for {kind} in flavor {flavor['name']}, {missing} more needed"
                    )
        return ""

    def preempt(self, job: str, namespace: str = "default", kind: Kind = kinds.JOB) -> None:
        """A workload of higher priority takes the place: the Job is suspended again."""
        with self._store.lock:
            found = self._api.registry.get(kind, namespace, job)
            workload = self._workload_of(found)
            if workload is None:
                raise LookupError(f"Kueue has no workload for Job {namespace}/{job}")
            message = "Preempted to accommodate a workload (UID: other) due to prioritization"
            for type_, reason in (("Evicted", "Preempted"), ("Preempted", "InClusterQueue")):
                self._condition(workload, type_, "True", reason, message)
            self._condition(workload, "QuotaReserved", "False", "Pending", message)
            self._condition(workload, "Admitted", "False", "NoReservation", message)
            self._set_suspend(found, True)
            self._say(found, "Normal", "Stopped", message)

    def _set_suspend(self, job: Object, wanted: bool) -> None:
        metadata = job["metadata"]
        if bool(job["spec"].get("suspend")) == wanted:
            return

        def edit(item: Object) -> None:
            item["spec"]["suspend"] = wanted
            if wanted:
                # Without a start time, a queue may change where the Job's pods go next.
                (item.get("status") or {}).pop("startTime", None)

        kind = kinds.by_owner(job["apiVersion"], job["kind"])
        assert kind is not None
        self._store.update(kind, metadata["namespace"], metadata["name"], edit)

    def _condition(
        self,
        workload: Object,
        type_: str,
        status: str,
        reason: str,
        message: str,
        cluster_queue: str = "",
    ) -> None:
        metadata, now = workload["metadata"], self._store.clock.timestamp()

        def edit(item: Object) -> None:
            item.setdefault("status", {})
            pods.set_condition(item, now, type_, status, reason=reason, message=message)
            for condition in item["status"]["conditions"]:
                condition.pop("lastProbeTime", None)
            if cluster_queue:
                item["status"]["admission"] = {"clusterQueue": cluster_queue}
            elif type_ == "QuotaReserved" and status == "False":
                item["status"].pop("admission", None)

        try:
            self._store.update(kinds.WORKLOAD, metadata["namespace"], metadata["name"], edit)
        except ApiError:
            pass  # its Job went, and it with it

    def _say(self, job: Object, type_: str, reason: str, message: str) -> None:
        self._api.recorder.say(job, type_, reason, message, "batch/job-kueue-controller")


def _needs(workload: Object) -> dict[str, Decimal]:
    total: dict[str, Decimal] = {}
    for pod_set in workload["spec"]["podSets"]:
        for name, amount in requests_of(pod_set["template"]["spec"]).items():
            total[name] = total.get(name, Decimal(0)) + amount * pod_set["count"]
    return total
