"""JobSet and Kubeflow Trainer, just enough to run the pods: TrainJob -> JobSet -> Indexed Jobs.

Not simulated: start-up order, coordinator, exclusive placement, initializers, MPI. Host names below
a JobSet's subdomain mean 127.0.0.1 in commands and variables of its pods.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tests.kube import kinds, patching, pods
from tests.kube.errors import ApiError, Object, invalid, invalid_object, required
from tests.kube.job_controller import is_finished
from tests.kube.kinds import Kind

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

NAME = "jobset.sigs.k8s.io/jobset-name"
REPLICATED_JOB = "jobset.sigs.k8s.io/replicatedjob-name"
JOB_INDEX = "jobset.sigs.k8s.io/job-index"
ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"
INDEX_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_MASTER_PORT = "29500"

TORCH_RUNTIME = {
    "apiVersion": kinds.TRAINER,
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed"},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": "auto"}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "spec": {
                                "template": {
                                    "spec": {"containers": [{"name": "node", "image": "pytorch:2"}]}
                                }
                            }
                        },
                    }
                ]
            }
        },
    },
}


class JobSets:
    """The JobSet controller: child Jobs, restarts of all together, completion."""

    def __init__(self, api: KubeServer) -> None:
        self._api = api
        self._store = api.store

    def sync(self) -> None:
        for job_set in self._store.list(kinds.JOB_SET):
            if pods.is_terminating(job_set):
                continue
            if job_set.get("status", {}).get("terminalState"):
                self._expire(job_set)
            else:
                self._sync(job_set)

    def _expire(self, job_set: Object) -> None:
        ttl = job_set["spec"].get("ttlSecondsAfterFinished")
        ended = max(c["lastTransitionTime"] for c in job_set["status"]["conditions"])
        if ttl is not None and self._store.clock.seconds_since(ended) >= ttl:
            metadata = job_set["metadata"]
            options = {"propagationPolicy": "Foreground"}
            self._api.registry.delete(
                kinds.JOB_SET, metadata["namespace"], metadata["name"], options
            )

    def _sync(self, job_set: Object) -> None:
        attempt = str(job_set.get("status", {}).get("restarts", 0))
        mine = [job for job in self._children(job_set) if not pods.is_terminating(job)]
        for job in mine:
            if job["metadata"]["labels"][ATTEMPT] != attempt:
                self._delete(job)
        if len(mine) < len(self._children(job_set)):
            return  # Jobs of the attempt before still go away
        current = {j["metadata"]["name"]: j for j in mine if _attempt(j) == attempt}
        is_suspended = bool(job_set["spec"].get("suspend"))
        self._note_suspension(job_set, is_suspended)
        for body in _wanted_jobs(job_set, attempt):
            name = body["metadata"]["name"]
            if name not in current:
                self._create(job_set, body)
            elif bool(current[name]["spec"].get("suspend")) != is_suspended:
                self._suspend(current[name], is_suspended)
        self._judge(job_set, list(current.values()))

    def _children(self, job_set: Object) -> list[Object]:
        uid = job_set["metadata"]["uid"]
        jobs = self._store.list(kinds.JOB, job_set["metadata"]["namespace"])
        return [job for job in jobs if (pods.controller_of(job) or {}).get("uid") == uid]

    def _create(self, job_set: Object, body: Object) -> None:
        body["metadata"]["ownerReferences"] = [pods.owner_reference(job_set)]
        try:
            self._api.registry.create(kinds.JOB, job_set["metadata"]["namespace"], body)
        except ApiError as error:
            message = f"Failed creating job: {error.message}"
            self._api.recorder.say(job_set, "Warning", "JobCreationFailed", message, "jobset")

    def _suspend(self, job: Object, is_suspended: bool) -> None:
        metadata = job["metadata"]
        self._store.update(
            kinds.JOB,
            metadata["namespace"],
            metadata["name"],
            lambda item: item["spec"].update(suspend=is_suspended),
        )

    def _delete(self, job: Object) -> None:
        metadata = job["metadata"]
        options = {"propagationPolicy": "Foreground"}
        self._api.registry.delete(kinds.JOB, metadata["namespace"], metadata["name"], options)

    def _judge(self, job_set: Object, jobs: list[Object]) -> None:
        policy = job_set["spec"].get("failurePolicy") or {}
        restarts = job_set.get("status", {}).get("restarts", 0)
        failed = [job for job in jobs if pods.condition_status(job, "Failed") == "True"]
        if failed:
            name = failed[0]["metadata"]["name"]
            action = _failure_action(policy, failed[0])
            if action == "FailJobSet":
                message = f"jobset failed due to a failure policy rule (failed job: {name})"
                self._end(job_set, "Failed", "FailJobSetFailurePolicyAction", message)
            elif restarts < policy.get("maxRestarts", 0):
                self._write(job_set, lambda item: item["status"].update(restarts=restarts + 1))
            elif policy.get("maxRestarts"):
                message = (
                    f"jobset failed due to reaching max number of restarts (failed job: {name})"
                )
                self._end(job_set, "Failed", "ReachedMaxRestarts", message)
            else:
                message = f"jobset failed due to one or more job failures (failed job: {name})"
                self._end(job_set, "Failed", "FailedJobs", message)
        elif jobs and all(is_finished(job) for job in jobs):
            message = "jobset completed successfully"
            self._end(job_set, "Completed", "AllJobsCompleted", message)
        else:
            statuses = [_replicated_status(rj, jobs) for rj in job_set["spec"]["replicatedJobs"]]
            self._write(job_set, lambda i: i["status"].update(replicatedJobsStatus=statuses))

    def _end(self, job_set: Object, type_: str, reason: str, message: str) -> None:
        now = self._store.clock.timestamp()

        def edit(item: Object) -> None:
            item["status"]["terminalState"] = type_
            pods.set_condition(item, now, type_, "True", reason=reason, message=message)

        self._write(job_set, edit)

    def _note_suspension(self, job_set: Object, is_suspended: bool) -> None:
        now = self._store.clock.timestamp()
        reason, message = (
            ("SuspendedJobs", "jobset is suspended")
            if is_suspended
            else ("ResumeJobs", "jobset is resumed")
        )
        if is_suspended or pods.condition_status(job_set, "Suspended"):
            self._write(
                job_set,
                lambda item: pods.set_condition(
                    item, now, "Suspended", str(is_suspended), reason=reason, message=message
                ),
            )

    def _write(self, job_set: Object, edit: object) -> None:
        _write_status(self._api, kinds.JOB_SET, job_set, edit)


def _failure_action(policy: Object, job: Object) -> str:
    """Of the first failure policy rule that fits; restarting all is the default."""
    reason = next(c["reason"] for c in job["status"]["conditions"] if c["type"] == "Failed")
    replicated = job["metadata"]["labels"][REPLICATED_JOB]
    for rule in policy.get("rules") or []:
        reasons = rule.get("onJobFailureReasons") or [reason]
        targets = rule.get("targetReplicatedJobs") or [replicated]
        if reason in reasons and replicated in targets:
            return str(rule["action"])
    return "RestartJobSet"


def _attempt(job: Object) -> str:
    return str(job["metadata"]["labels"][ATTEMPT])


def _replicated_status(replicated: Object, jobs: list[Object]) -> Object:
    mine = [j for j in jobs if j["metadata"]["labels"][REPLICATED_JOB] == replicated["name"]]
    return {
        "name": replicated["name"],
        "active": sum(bool((job.get("status") or {}).get("active")) for job in mine),
        "ready": sum(
            (j.get("status") or {}).get("ready", 0) >= j["spec"]["parallelism"] for j in mine
        ),
        "succeeded": sum(pods.condition_status(job, "Complete") == "True" for job in mine),
        "failed": sum(pods.condition_status(job, "Failed") == "True" for job in mine),
        "suspended": sum(bool(job["spec"].get("suspend")) for job in mine),
    }


def _wanted_jobs(job_set: Object, attempt: str) -> list[Object]:
    """The child Jobs of one attempt, with the labels by which pods find each other."""
    metadata, spec = job_set["metadata"], job_set["spec"]
    network = spec.get("network") or {}
    found = []
    for replicated in spec["replicatedJobs"]:
        for index in range(replicated.get("replicas", 1)):
            template = copy.deepcopy(replicated["template"])
            labels = {
                NAME: metadata["name"],
                REPLICATED_JOB: replicated["name"],
                JOB_INDEX: str(index),
                ATTEMPT: attempt,
            }
            job_spec = template["spec"]
            job_spec["suspend"] = bool(spec.get("suspend"))
            pod = job_spec["template"]
            pod_metadata = pod.setdefault("metadata", {})
            pod_metadata.setdefault("labels", {}).update(labels)
            pod_metadata.setdefault("annotations", {}).update(labels)
            # A pod template without one restarts on failure (the JobSet webhook's default).
            pod["spec"].setdefault("restartPolicy", "OnFailure")
            job_spec.setdefault("completionMode", "Indexed")
            if network.get("enableDNSHostnames", True):
                pod["spec"]["subdomain"] = network.get("subdomain") or metadata["name"]
            own = template.get("metadata") or {}
            name = f"{metadata['name']}-{replicated['name']}-{index}"
            found.append(
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "metadata": {
                        "name": name,
                        "labels": {**(own.get("labels") or {}), **labels},
                        "annotations": {**(own.get("annotations") or {}), **labels},
                    },
                    "spec": job_spec,
                }
            )
    return found


class TrainJobs:
    """Kubeflow Trainer: the runtime's JobSet with what the TrainJob says, and its end told back."""

    def __init__(self, api: KubeServer) -> None:
        self._api = api
        self._store = api.store

    def check_new(self, kind: Kind, item: Object) -> None:
        """The validating webhook: the runtime must be there, reserved variables must not."""
        if kind is not kinds.TRAIN_JOB:
            return
        name = item["metadata"]["name"]
        reference = item["spec"].get("runtimeRef") or {}
        if not reference.get("name"):
            raise invalid_object(kind, name, [required("spec.runtimeRef.name")])
        if self._runtime(item) is None:
            cause = invalid("spec.runtimeRef", reference, "runtime must be created before TrainJob")
            raise invalid_object(kind, name, [cause])
        for variable in (item["spec"].get("trainer") or {}).get("env") or []:
            if variable["name"].startswith("PET_"):
                cause = invalid("spec.trainer.env", variable["name"], "must not have reserved envs")
                raise invalid_object(kind, name, [cause])

    def sync(self) -> None:
        for train_job in self._store.list(kinds.TRAIN_JOB):
            if not is_finished(train_job) and not pods.is_terminating(train_job):
                self._sync(train_job)

    def _runtime(self, train_job: Object) -> Object | None:
        reference = train_job["spec"]["runtimeRef"]
        if reference.get("kind", "ClusterTrainingRuntime") == "TrainingRuntime":
            namespace = train_job["metadata"]["namespace"]
            return self._store.get(kinds.TRAINING_RUNTIME, namespace, reference["name"])
        return self._store.get(kinds.CLUSTER_TRAINING_RUNTIME, "", reference["name"])

    def _sync(self, train_job: Object) -> None:
        metadata = train_job["metadata"]
        is_suspended = bool(train_job["spec"].get("suspend"))
        job_set = self._store.get(kinds.JOB_SET, metadata["namespace"], metadata["name"])
        if job_set is None:
            body = self.job_set(train_job)
            self._api.registry.create(kinds.JOB_SET, metadata["namespace"], body)
            return
        if bool(job_set["spec"].get("suspend")) != is_suspended:
            self._store.update(
                kinds.JOB_SET,
                metadata["namespace"],
                metadata["name"],
                lambda item: item["spec"].update(suspend=is_suspended),
            )
        self._tell(train_job, job_set, is_suspended)

    def _tell(self, train_job: Object, job_set: Object, is_suspended: bool) -> None:
        now = self._store.clock.timestamp()

        def edit(item: Object) -> None:
            status = job_set.get("status") or {}
            item["status"]["jobsStatus"] = status.get("replicatedJobsStatus") or []
            if is_suspended or pods.condition_status(item, "Suspended"):
                reason = "Suspended" if is_suspended else "Resumed"
                message = f"TrainJob is {reason.lower()}"
                pods.set_condition(
                    item, now, "Suspended", str(is_suspended), reason=reason, message=message
                )
            for theirs, ours in (("Completed", "Complete"), ("Failed", "Failed")):
                for condition in status.get("conditions") or []:
                    if condition["type"] == theirs and condition["status"] == "True":
                        more = {"reason": condition["reason"], "message": condition["message"]}
                        pods.set_condition(item, now, ours, "True", **more)

        _write_status(self._api, kinds.TRAIN_JOB, train_job, edit)

    def job_set(self, train_job: Object) -> Object:
        """The JobSet that a TrainJob becomes."""
        runtime = self._runtime(train_job) or TORCH_RUNTIME
        metadata, spec = train_job["metadata"], train_job["spec"]
        job_set_spec = copy.deepcopy(runtime["spec"]["template"]["spec"])  # type: ignore[index]
        trainer = spec.get("trainer") or {}
        policy = runtime["spec"].get("mlPolicy") or {}  # type: ignore[index, attr-defined]
        num_nodes = trainer.get("numNodes") or policy.get("numNodes") or 1
        for replicated in job_set_spec["replicatedJobs"]:
            job = replicated["template"]["spec"]
            self._override(job["template"], spec, replicated["name"])
            if replicated["name"] == "node":
                job.update(completions=num_nodes, parallelism=num_nodes, completionMode="Indexed")
                _fill_trainer(job["template"], trainer, metadata["name"], num_nodes)
        job_set_spec["suspend"] = bool(spec.get("suspend"))
        return {
            "apiVersion": kinds.JOBSET,
            "kind": "JobSet",
            "metadata": {
                "name": metadata["name"],
                "labels": dict(spec.get("labels") or {}),
                "annotations": dict(spec.get("annotations") or {}),
                "ownerReferences": [pods.owner_reference(train_job)],
            },
            "spec": job_set_spec,
        }

    @staticmethod
    def _override(template: Object, spec: Object, job: str) -> None:
        overrides = spec.get("podTemplateOverrides") or spec.get("podSpecOverrides") or []
        for override in overrides:
            if any(target["name"] == job for target in override["targetJobs"]):
                body = {"spec": override["spec"], "metadata": override.get("metadata") or {}}
                template.update(patching.patched(template, body, patching.STRATEGIC, True))


def _fill_trainer(template: Object, trainer: Object, name: str, num_nodes: int) -> None:
    """The torch plug-in: image, command and the ``PET_*`` variables that torchrun reads."""
    container = next(c for c in template["spec"]["containers"] if c["name"] == "node")
    for field in ("image", "command", "args"):
        if field in trainer:
            container[field] = trainer[field]
    if "resourcesPerNode" in trainer:
        container["resources"] = trainer["resourcesPerNode"]
    rank = {"fieldRef": {"fieldPath": INDEX_FIELD}}
    container["env"] = [
        *(container.get("env") or []),
        *(trainer.get("env") or []),
        {"name": "PET_NNODES", "value": str(num_nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer.get("numProcPerNode", "auto"))},
        {"name": "PET_NODE_RANK", "valueFrom": rank},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": _MASTER_PORT},
    ]


def _write_status(api: KubeServer, kind: Kind, item: Object, edit: object) -> None:
    def apply(one: Object) -> None:
        one.setdefault("status", {})
        edit(one)  # type: ignore[operator]
        for condition in one["status"].get("conditions") or []:
            condition.pop("lastProbeTime", None)

    metadata = item["metadata"]
    try:
        api.store.update(kind, metadata["namespace"], metadata["name"], apply)
    except ApiError:
        pass  # gone meanwhile
