"""The Job controller, after pkg/controller/job/job_controller.go of Kubernetes 1.34.

Simplified: finalizers go and counters change in one step, so ``uncountedTerminatedPods`` stays
empty; delays before a pod is made again are ``Settings.backoff_seconds``, doubled per failure.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.kube import kinds, pods
from tests.kube.errors import ApiError, Object
from tests.kube.failure_policy import is_failed, judge, only_replaces_failed
from tests.kube.job_rules import format_indexes, is_indexed, parse_indexes

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

INDEX = "batch.kubernetes.io/job-completion-index"
FAILURES = "batch.kubernetes.io/job-index-failure-count"
IGNORED_FAILURES = "batch.kubernetes.io/job-index-ignored-failure-count"
_SOURCE = "job-controller"


@dataclass
class Sync:
    """One look at a Job: what there is and what is to become of it."""

    job: Object
    pods: list[Object]
    status: Object
    active: list[Object]
    num_terminating: int
    num_failed: int = 0
    num_succeeded: int = 0
    succeeded: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    delayed: dict[int, Object] = field(default_factory=dict)
    verdict: tuple[str, str, str] | None = None  # condition type, reason, message

    @property
    def spec(self) -> Object:
        return dict(self.job["spec"])

    @property
    def has_index_limit(self) -> bool:
        return self.spec.get("backoffLimitPerIndex") is not None

    @property
    def is_suspended(self) -> bool:
        return bool(self.spec.get("suspend"))


def index_of(pod: Object) -> int:
    """The completion index; -1 without."""
    text = (pod["metadata"].get("annotations") or {}).get(INDEX, "")
    return int(text) if text.isdigit() else -1


def failures_of(pod: Object, name: str = FAILURES) -> int:
    return int((pod["metadata"].get("annotations") or {}).get(name, 0))


def is_finished(job: Object) -> bool:
    return "True" in (
        pods.condition_status(job, "Complete"),
        pods.condition_status(job, "Failed"),
    )


class JobController:
    """Makes, counts and removes the pods of Jobs; ends Jobs."""

    def __init__(self, api: KubeServer) -> None:
        self._api = api
        self._store = api.store
        self._failed_at: dict[str, float] = {}  # pod uid -> when it was first seen failed
        self._next_try: dict[str, float] = {}  # job uid -> when to try a refused pod again

    def sync(self) -> None:
        """Bring every Job one step on."""
        jobs = self._store.list(kinds.JOB)
        all_pods = self._store.list(kinds.POD)
        for job in jobs:
            if is_finished(job) or job["spec"].get("managedBy") not in (
                None,
                "kubernetes.io/job-controller",
            ):
                continue
            uid = job["metadata"]["uid"]
            mine = [p for p in all_pods if (pods.controller_of(p) or {}).get("uid") == uid]
            self._sync_job(job, mine)
        self._release_orphans(all_pods, {job["metadata"]["uid"] for job in jobs})

    def _release_orphans(self, all_pods: list[Object], known: set[str]) -> None:
        """Pods whose Job is gone are counted by nobody."""
        for pod in all_pods:
            owner = pods.controller_of(pod)
            if pods.is_tracked(pod) and (owner is None or owner["uid"] not in known):
                self._drop_finalizer(pod)

    def _sync_job(self, job: Object, mine: list[Object]) -> None:
        status = copy.deepcopy(job.get("status") or {})
        active = [pod for pod in mine if pods.is_active(pod)]
        terminating = [p for p in mine if pods.is_terminating(p) and not pods.is_finished(p)]
        sync = Sync(job, mine, status, active, len(terminating))
        self._count(sync)
        if "startTime" not in status and not sync.is_suspended:
            status["startTime"] = self._store.clock.timestamp()
        self._judge(sync)
        if sync.verdict is not None:
            self._delete_pods(sync, sync.active, keeps_finalizer=True)
        else:
            if not pods.is_terminating(job):
                self._manage(sync)
            self._conclude(sync)
        self._settle(sync)

    def _count(self, sync: Sync) -> None:
        """Count what ended since the last look, in numbers and indexes."""
        job, status = sync.job, sync.status
        fresh = [p for p in sync.pods if pods.is_tracked(p) and self._is_valid(sync, p)]
        for pod in fresh:
            if is_failed(job, pod):
                self._failed_at.setdefault(pod["metadata"]["uid"], time.monotonic())
        failures = [p for p in fresh if is_failed(job, p) and judge(job, p).is_counted]
        successes = [p for p in fresh if pods.phase(p) == "Succeeded"]
        sync.num_failed = status.get("failed", 0) + len(failures)
        sync.num_succeeded = status.get("succeeded", 0) + len(successes)
        if not is_indexed(sync.spec):
            return
        sync.succeeded = set(parse_indexes(status.get("completedIndexes", "")))
        sync.succeeded |= {index_of(pod) for pod in successes}
        sync.num_succeeded = len(sync.succeeded)
        if sync.has_index_limit:
            sync.failed = set(parse_indexes(status.get("failedIndexes") or ""))
            sync.failed |= {index_of(pod) for pod in fresh if self._fails_index(sync, pod)}
            sync.delayed = self._delayed(sync, fresh)

    @staticmethod
    def _is_valid(sync: Sync, pod: Object) -> bool:
        return not is_indexed(sync.spec) or 0 <= index_of(pod) < sync.spec["completions"]

    @staticmethod
    def _fails_index(sync: Sync, pod: Object) -> bool:
        if not is_failed(sync.job, pod):
            return False
        verdict = judge(sync.job, pod)
        if verdict.action == "FailIndex":
            return True
        return verdict.is_counted and failures_of(pod) >= sync.spec["backoffLimitPerIndex"]

    @staticmethod
    def _delayed(sync: Sync, fresh: list[Object]) -> dict[int, Object]:
        """Failed pods that stay until their replacement has taken over the failure count."""
        busy = {index_of(pod) for pod in sync.active} | sync.succeeded | sync.failed
        latest: dict[int, Object] = {}
        for pod in fresh:
            if is_failed(sync.job, pod) and index_of(pod) not in busy:
                known = latest.get(index_of(pod))
                if known is None or _absolute_failures(known) <= _absolute_failures(pod):
                    latest[index_of(pod)] = pod
        return latest

    def _judge(self, sync: Sync) -> None:
        """Whether the Job is decided, in the controller's order of precedence."""
        for condition in sync.status.get("conditions") or []:
            decided = condition["type"] in ("SuccessCriteriaMet", "FailureTarget")
            if decided and condition["status"] == "True":
                sync.verdict = condition["type"], condition["reason"], condition["message"]
                return
        failure = self._failure(sync) or self._index_failure(sync)
        if failure:
            sync.verdict = ("FailureTarget", *failure)
        elif is_indexed(sync.spec) and (message := _success_message(sync)):
            sync.verdict = "SuccessCriteriaMet", "SuccessPolicy", message

    def _failure(self, sync: Sync) -> tuple[str, str] | None:
        spec = sync.spec
        for pod in sync.pods:
            if is_failed(sync.job, pod) and (message := judge(sync.job, pod).message):
                return "PodFailurePolicy", message
        if sync.num_failed > spec["backoffLimit"] or self._is_past_restarts(sync):
            return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        deadline, start = spec.get("activeDeadlineSeconds"), sync.status.get("startTime")
        if deadline is not None and start and not sync.is_suspended:
            if self._store.clock.seconds_since(start) >= deadline:
                return "DeadlineExceeded", "Job was active longer than specified deadline"
        return None

    @staticmethod
    def _is_past_restarts(sync: Sync) -> bool:
        """With OnFailure the kubelet restarts in place; those restarts use up the limit."""
        if sync.spec["template"]["spec"]["restartPolicy"] != "OnFailure":
            return False
        num_restarts = sum(
            container["restartCount"]
            for pod in sync.pods
            if pods.phase(pod) in ("Running", "Pending")
            for container in pod["status"].get("containerStatuses") or []
        )
        return num_restarts > 0 and num_restarts >= sync.spec["backoffLimit"]

    @staticmethod
    def _index_failure(sync: Sync) -> tuple[str, str] | None:
        if not sync.has_index_limit:
            return None
        most = sync.spec.get("maxFailedIndexes")
        if most is not None and len(sync.failed) > most:
            message = "Job has exceeded the specified maximal number of failed indexes"
            return "MaxFailedIndexesExceeded", message
        if sync.failed and len(sync.failed | sync.succeeded) >= sync.spec["completions"]:
            return "FailedIndexes", "Job has failed indexes"
        return None

    def _manage(self, sync: Sync) -> None:
        """Make or remove pods until as many run as should."""
        spec, active = sync.spec, sync.active
        if sync.is_suspended:
            self._delete_pods(sync, active, keeps_finalizer=False)
            return
        wanted = spec["parallelism"]
        if spec.get("completions") is not None:
            wanted = max(0, min(wanted, spec["completions"] - sync.num_succeeded))
        elif sync.num_succeeded:
            wanted = len(active)
        surplus = _surplus(sync, len(active) - wanted)
        if surplus:
            self._delete_pods(sync, surplus, keeps_finalizer=False)
            return
        held_up = sync.num_terminating if only_replaces_failed(sync.job) else 0
        num_missing = wanted - held_up - len(active)
        if num_missing > 0 and self._may_create(sync):
            self._create_pods(sync, num_missing)

    def _may_create(self, sync: Sync) -> bool:
        uid = sync.job["metadata"]["uid"]
        if time.monotonic() < self._next_try.get(uid, 0):
            return False
        if sync.has_index_limit:
            return True
        times = [
            self._failed_at[pod["metadata"]["uid"]]
            for pod in sync.pods
            if pod["metadata"]["uid"] in self._failed_at
        ]
        if not times:
            return True
        return time.monotonic() >= max(times) + self._api.settings.backoff(len(times))

    def _create_pods(self, sync: Sync, number: int) -> None:
        if not is_indexed(sync.spec):
            for _ in range(number):
                self._create_pod(sync, None)
            return
        busy = {index_of(pod) for pod in sync.active} | sync.succeeded | sync.failed
        if only_replaces_failed(sync.job):
            busy |= {index_of(p) for p in sync.pods if _is_leaving(p)}
        pending = [index for index in range(sync.spec["completions"]) if index not in busy]
        for index in pending[:number]:
            replaced = sync.delayed.get(index)
            if replaced is None or self._is_rested(replaced):
                self._create_pod(sync, index)

    def _is_rested(self, pod: Object) -> bool:
        failed_at = self._failed_at.get(pod["metadata"]["uid"], 0.0)
        delay = self._api.settings.backoff(_absolute_failures(pod) + 1)
        return time.monotonic() >= failed_at + delay

    def _create_pod(self, sync: Sync, index: int | None) -> None:
        job = sync.job
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        template = copy.deepcopy(sync.spec["template"])
        metadata = {
            "generateName": f"{name}-",
            "labels": template["metadata"].get("labels") or {},
            "annotations": template["metadata"].get("annotations") or {},
            "finalizers": [*(template["metadata"].get("finalizers") or []), pods.TRACKING],
            "ownerReferences": [pods.owner_reference(job)],
        }
        if index is not None:
            metadata["generateName"] = f"{name}-{index}-"
            metadata["labels"][INDEX] = metadata["annotations"][INDEX] = str(index)
            template["spec"]["hostname"] = f"{name}-{index}"
            _add_index_variable(template["spec"])
            if sync.has_index_limit:
                metadata["annotations"].update(_failure_counts(job, sync.delayed.get(index)))
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        try:
            pod = self._api.registry.create(kinds.POD, namespace, body)
        except ApiError as error:
            self._next_try[job["metadata"]["uid"]] = time.monotonic() + 0.5
            self._say(job, "Warning", "FailedCreate", f"Error creating: {error.message}")
            return
        sync.active.append(pod)
        sync.pods.append(pod)
        self._say(job, "Normal", "SuccessfulCreate", f"Created pod: {pod['metadata']['name']}")

    def _delete_pods(self, sync: Sync, doomed: list[Object], keeps_finalizer: bool) -> None:
        """Pods of an ended Job are still counted; those of a suspended one are not."""
        for pod in list(doomed):
            metadata = pod["metadata"]
            if not keeps_finalizer:
                self._drop_finalizer(pod)
                sync.pods.remove(pod)
            try:
                self._api.registry.delete(kinds.POD, metadata["namespace"], metadata["name"])
            except ApiError:
                continue
            self._say(sync.job, "Normal", "SuccessfulDelete", f"Deleted pod: {metadata['name']}")
            sync.num_terminating += 1
        sync.active = [pod for pod in sync.active if pod not in doomed]

    def _conclude(self, sync: Sync) -> None:
        """Complete, suspended or resumed, when nothing else was decided."""
        spec = sync.spec
        if spec.get("completions") is None:
            is_complete = sync.num_succeeded > 0 and not sync.active
        else:
            is_complete = sync.num_succeeded >= spec["completions"] and not sync.active
        now = self._store.clock.timestamp()
        if is_complete:
            message = "Reached expected number of succeeded pods"
            sync.verdict = "SuccessCriteriaMet", "CompletionsReached", message
        elif sync.is_suspended:
            more = {"reason": "JobSuspended", "message": "Job suspended"}
            if pods.set_condition({"status": sync.status}, now, "Suspended", "True", **more):
                self._say(sync.job, "Normal", "Suspended", "Job suspended")
        elif pods.condition_status({"status": sync.status}, "Suspended") == "True":
            more = {"reason": "JobResumed", "message": "Job resumed"}
            pods.set_condition({"status": sync.status}, now, "Suspended", "False", **more)
            # The deadline counts from the last start.
            sync.status["startTime"] = now
            self._say(sync.job, "Normal", "Resumed", "Job resumed")

    def _settle(self, sync: Sync) -> None:
        """Write counters and conditions, let go of counted pods, end the Job when all are gone."""
        status, job = sync.status, sync.job
        self._release(sync)
        status["active"] = len(sync.active)
        status["ready"] = sum(pods.is_ready(pod) for pod in sync.active)
        status["terminating"] = sync.num_terminating
        status["uncountedTerminatedPods"] = {}
        if is_indexed(sync.spec):
            status["completedIndexes"] = format_indexes(sync.succeeded)
            if sync.has_index_limit:
                status["failedIndexes"] = format_indexes(sync.failed)
        self._write_verdict(sync)
        for name in ("active", "succeeded", "failed", "completedIndexes"):
            if not status.get(name):  # omitempty
                status.pop(name, None)
        metadata = job["metadata"]
        try:
            self._store.update(
                kinds.JOB,
                metadata["namespace"],
                metadata["name"],
                lambda item: item.update(status=status),
            )
        except ApiError:
            pass  # its last pod went, and with it the Job

    def _release(self, sync: Sync) -> None:
        """canRemoveFinalizer and the counting that goes with it."""
        job, status, verdict = sync.job, sync.status, sync.verdict
        num_failed = 0
        for pod in sync.pods:
            if not pods.is_tracked(pod):
                continue
            failed, done = is_failed(job, pod), pods.phase(pod) == "Succeeded"
            is_over = verdict is not None or pods.is_terminating(job) or done
            waits = sync.delayed.get(index_of(pod), {}).get("metadata") == pod["metadata"]
            if not is_over and (not failed or waits):
                continue
            is_lost = verdict is not None and verdict[0] == "FailureTarget"
            if not done and (failed or is_lost) and self._is_valid(sync, pod):
                num_failed += judge(job, pod).is_counted
            self._drop_finalizer(pod)
        status["failed"] = status.get("failed", 0) + num_failed
        status["succeeded"] = sync.num_succeeded

    def _write_verdict(self, sync: Sync) -> None:
        if sync.verdict is None:
            return
        now = self._store.clock.timestamp()
        type_, reason, message = sync.verdict
        more = {"reason": reason, "message": message}
        item = {"status": sync.status}
        pods.set_condition(item, now, type_, "True", **more)
        if sync.num_terminating:
            return  # an ended Job has no pods that still terminate
        if type_ == "SuccessCriteriaMet":
            pods.set_condition(item, now, "Complete", "True", **more)
            sync.status["completionTime"] = now
            self._say(sync.job, "Normal", "Completed", "Job completed")
        else:
            pods.set_condition(item, now, "Failed", "True", **more)
            self._say(sync.job, "Warning", reason, message)

    def _drop_finalizer(self, pod: Object) -> None:
        def edit(item: Object) -> None:
            kept = [f for f in item["metadata"].get("finalizers") or [] if f != pods.TRACKING]
            item["metadata"]["finalizers"] = kept
            if not kept:
                item["metadata"].pop("finalizers")

        metadata = pod["metadata"]
        if self._store.get(kinds.POD, metadata["namespace"], metadata["name"]):
            self._store.update(kinds.POD, metadata["namespace"], metadata["name"], edit)

    def _say(self, job: Object, type_: str, reason: str, message: str) -> None:
        self._api.recorder.say(job, type_, reason, message, _SOURCE)


def _absolute_failures(pod: Object) -> int:
    return failures_of(pod) + failures_of(pod, IGNORED_FAILURES)


def _is_leaving(pod: Object) -> bool:
    return pods.is_terminating(pod) and not pods.is_finished(pod)


def _failure_counts(job: Object, replaced: Object | None) -> dict[str, str]:
    """Annotations of a pod: how often its index failed, counted and not."""
    if replaced is None:
        return {FAILURES: "0"}
    is_counted = judge(job, replaced).is_counted
    ignored = failures_of(replaced, IGNORED_FAILURES) + (not is_counted)
    counts = {FAILURES: str(failures_of(replaced) + is_counted)}
    return {**counts, IGNORED_FAILURES: str(ignored)} if ignored else counts


def _add_index_variable(spec: Object) -> None:
    source = {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        variables = container.setdefault("env", [])
        if not any(variable["name"] == "JOB_COMPLETION_INDEX" for variable in variables):
            variables.append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})


def _surplus(sync: Sync, number: int) -> list[Object]:
    """Pods too many: repeated or impossible indexes first, then those least far on."""
    doomed: list[Object] = []
    if is_indexed(sync.spec):
        seen: set[int] = set()
        for pod in sync.active:
            index = index_of(pod)
            if index in seen or not 0 <= index < sync.spec["completions"]:
                doomed.append(pod)
            seen.add(index)
    rest = [pod for pod in sync.active if pod not in doomed]
    rest.sort(key=lambda pod: (bool(pod["spec"].get("nodeName")), pods.is_ready(pod)))
    return doomed + rest[: max(0, number - len(doomed))]


def _success_message(sync: Sync) -> str:
    for index, rule in enumerate((sync.spec.get("successPolicy") or {}).get("rules") or []):
        text, count = rule.get("succeededIndexes"), rule.get("succeededCount")
        meant = set(parse_indexes(text)) if text else set(range(sync.spec["completions"]))
        if len(meant & sync.succeeded) >= (len(meant) if count is None else count):
            return f"Matched rules at index {index}"
    return ""
