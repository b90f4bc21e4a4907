"""Kueue holds Jobs back and takes them back; JobSet and TrainJob run their pods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kube import kinds, pods
from tests.kube.errors import ApiError
from tests.kube.job_controller import INDEX
from tests.kube.kueue import JOB_UID, QUEUE
from tests.kube.manifests import (
    FOREVER,
    conditions,
    container,
    exit_rule,
    indexed_job,
    pod_spec,
    policy,
)
from tests.kube.patching import JSON, MERGE, patched
from tests.kube.server import ALL_GROUPS, KubeServer


@pytest.fixture
def full() -> Iterator[KubeServer]:
    """A server with every group."""
    with KubeServer(groups=ALL_GROUPS) as server:
        yield server


def queued(name: str, script: str = FOREVER, completions: int = 2, **spec) -> dict:
    body = indexed_job(name, script, completions, **spec)
    body["metadata"]["labels"] = {QUEUE: "tokens"}
    return body


def workload(kube: KubeServer, job: str) -> dict:
    """The Workload of a Job, once there is one."""
    uid = kube.job(job)["metadata"]["uid"]

    def look() -> dict | None:
        found = kube.store.list(kinds.WORKLOAD)
        return next((w for w in found if w["metadata"]["labels"][JOB_UID] == uid), None)

    return kube.wait_until(look)


def reason(kube: KubeServer, job: str, type_: str = "QuotaReserved") -> str:
    found = workload(kube, job).get("status", {}).get("conditions", [])
    return next((c["message"] for c in found if c["type"] == type_), "")


def test_queued_job_starts_suspended_and_is_admitted(full):
    full.add_queue("tokens", {"pods": 2})
    made = full.create(queued("work", "exit 0"))
    assert made["spec"]["suspend"] is True
    job = full.wait_for_job("work")
    assert job["status"]["succeeded"] == 2
    full.wait_until(lambda: "Finished" in conditions(workload(full, "work")))


def test_job_waits_for_quota_and_says_why(full):
    full.add_queue("tokens", {"pods": 3})
    full.create(queued("first"))
    full.wait_until(lambda: len(full.running_pods("first")) == 2)
    full.create(queued("second"))
    full.wait_until(lambda: "insufficient unused quota for pods" in reason(full, "second"))
    assert full.pods("second") == []
    assert "Suspended" in conditions(full.job("second"))
    full.faults.delete_job("first")
    full.wait_until(lambda: len(full.running_pods("second")) == 2)
    assert "Admitted" in conditions(workload(full, "second"))


def test_quota_counts_gpus(full):
    full.add_queue("tokens", {"nvidia.com/gpu": 1})
    body = queued("work")
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    body["spec"]["template"]["spec"]["containers"][0]["resources"] = gpu
    full.create(body)
    full.wait_until(lambda: "quota for nvidia.com/gpu" in reason(full, "work"))
    assert "1 more needed" in reason(full, "work")


def test_queue_that_is_not_there(full):
    full.create(queued("work"))
    full.wait_until(lambda: reason(full, "work") == "LocalQueue tokens doesn't exist")
    full.add_queue("tokens", {"pods": 2})
    full.wait_until(lambda: len(full.running_pods("work")) == 2)


def test_preempted_job_is_suspended_and_comes_again(full):
    full.add_queue("tokens", {"pods": 2})
    full.create(queued("work"))
    before = full.wait_until(lambda: len(full.running_pods("work")) == 2 and full.pods("work"))
    full.store.update(
        kinds.CLUSTER_QUEUE, "", "tokens", lambda item: item["spec"].update(stopPolicy="Hold")
    )
    full.kueue.preempt("work")
    full.wait_until(lambda: not full.pods("work"))
    full.wait_until(lambda: "Suspended" in conditions(full.job("work")))
    # Kueue takes the start time back, so that the next admission may choose other nodes.
    assert "startTime" not in full.job("work")["status"]
    assert {"Evicted", "Preempted"} <= set(conditions(workload(full, "work")))
    assert not full.job("work")["status"].get("failed")
    full.store.update(
        kinds.CLUSTER_QUEUE, "", "tokens", lambda item: item["spec"].update(stopPolicy="None")
    )
    full.wait_until(lambda: len(full.running_pods("work")) == 2)
    uids = {pod["metadata"]["uid"] for pod in before}
    assert not uids & {pod["metadata"]["uid"] for pod in full.running_pods("work")}
    assert not full.job("work")["status"].get("failed")


def test_job_without_a_queue_is_left_alone(full):
    full.create(indexed_job("work"))
    full.wait_for_job("work")
    assert full.store.list(kinds.WORKLOAD) == []


def job_set(name: str, script: str, replicas: int = 1, **spec) -> dict:
    job = {
        "completionMode": "Indexed",
        "completions": 2,
        "parallelism": 2,
        "backoffLimit": 0,
        "template": {"spec": pod_spec(script)},
    }
    node = {"name": "node", "replicas": replicas, "template": {"spec": job}}
    return {
        "apiVersion": kinds.JOBSET,
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {"replicatedJobs": [node], **spec},
    }


def ended(kube: KubeServer, kind: kinds.Kind, name: str, *types: str) -> dict:
    def look() -> dict | None:
        item = kube.store.get(kind, "default", name)
        return item if set(types) & set(conditions(item)) else None

    return kube.wait_until(look)


def test_job_set_runs_its_jobs(full):
    full.create(job_set("ring", 'echo "$JOB_COMPLETION_INDEX ring-node-0-0.ring"', replicas=2))
    item = ended(full, kinds.JOB_SET, "ring", "Completed", "Failed")
    assert conditions(item)["Completed"] == "AllJobsCompleted"
    assert {job["metadata"]["name"] for job in full.store.list(kinds.JOB)} == {
        "ring-node-0",
        "ring-node-1",
    }
    (first,) = [p for p in full.pods("ring-node-0") if p["metadata"]["labels"][INDEX] == "0"]
    assert first["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] == "ring"
    assert first["spec"]["subdomain"] == "ring"
    # Pods of one headless service are all on this machine.
    assert full.log(first["metadata"]["name"]) == "0 127.0.0.1\n"


def test_job_set_starts_all_again_when_one_fails(full, tmp_path):
    marker = tmp_path / "once"
    fail = f"test -e {marker} || {{ touch {marker}; exit 1; }}"
    script = f'test "$JOB_COMPLETION_INDEX" = 0 || exit 0; {fail}'
    full.create(job_set("ring", script, failurePolicy={"maxRestarts": 1}))
    item = ended(full, kinds.JOB_SET, "ring", "Completed", "Failed")
    assert "Completed" in conditions(item)
    assert item["status"]["restarts"] == 1
    (job,) = full.store.list(kinds.JOB)
    assert job["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] == "1"


def test_job_set_fails_in_the_end(full):
    full.create(job_set("ring", "exit 1", failurePolicy={"maxRestarts": 1}))
    item = ended(full, kinds.JOB_SET, "ring", "Completed", "Failed")
    assert conditions(item)["Failed"] == "ReachedMaxRestarts"


def test_job_set_can_be_suspended(full):
    full.create(job_set("ring", FOREVER, suspend=True))
    full.wait_until(lambda: "Suspended" in conditions(full.store.get(*RING)))
    assert full.pods() == []
    full.store.update(*RING, lambda item: item["spec"].update(suspend=False))
    full.wait_until(lambda: len(full.running_pods()) == 2)
    full.registry.delete(*RING, {"propagationPolicy": "Background"})
    full.wait_until(lambda: not full.pods() and not full.store.list(kinds.JOB))


RING = (kinds.JOB_SET, "default", "ring")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(replicas=2), 'unknown field "spec.replicas"'),
        (lambda spec: spec.update(replicatedJobs=[]), "Required value"),
        (
            lambda spec: spec["replicatedJobs"][0]["template"]["spec"].update(backoff=1),
            'unknown field "spec.backoff"',
        ),
    ],
)
def test_job_set_has_a_schema(full, change, message):
    body = job_set("ring", "exit 0")
    change(body["spec"])
    with pytest.raises(ApiError, match=message):
        full.create(body)


def test_job_set_policy_can_refuse_a_restart(full):
    rule = {
        "name": "refused",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    body = job_set("ring", "exit 43", failurePolicy={"maxRestarts": 5, "rules": [rule]})
    job = body["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["podFailurePolicy"] = policy(exit_rule("FailJob", 43))
    full.create(body)
    item = ended(full, kinds.JOB_SET, "ring", "Completed", "Failed")
    assert conditions(item)["Failed"] == "FailJobSetFailurePolicyAction"
    assert not item["status"].get("restarts")


@pytest.mark.parametrize("kind", [kinds.JOB_SET, kinds.TRAIN_JOB])
def test_running_set_is_fixed(full, kind):
    make = job_set if kind is kinds.JOB_SET else train_job
    full.create(make("ring", FOREVER))

    def change(value: object) -> None:
        full.registry.change(
            kind, "default", "ring", "", lambda item: patched(item, value, MERGE, False)
        )

    field = "network" if kind is kinds.JOB_SET else "labels"
    with pytest.raises(ApiError, match=f"spec.{field}.*field is immutable"):
        change({"spec": {field: {"a": "b"}}})
    change({"spec": {"suspend": True}, "metadata": {"annotations": {"a": "b"}}})


def test_custom_resource_is_not_replaced_blindly(full):
    made = full.create(job_set("ring", FOREVER, suspend=True))
    made["metadata"].pop("resourceVersion")
    with pytest.raises(ApiError, match="must be specified for an update"):
        full.registry.change(*RING, "", lambda _: made, is_replacement=True)


def test_finished_job_set_goes_after_its_ttl(full):
    full.create(job_set("ring", "exit 0", ttlSecondsAfterFinished=600))
    ended(full, kinds.JOB_SET, "ring", "Completed")
    full.clock.advance(601)
    full.wait_until(lambda: not (full.store.get(*RING) or full.store.list(kinds.JOB)))


@pytest.mark.parametrize("kind", [kinds.JOB_SET, kinds.TRAIN_JOB])
def test_queue_holds_other_kinds_too(full, kind):
    make = job_set if kind is kinds.JOB_SET else train_job
    body = make("ring", FOREVER)
    body["metadata"]["labels"] = {QUEUE: "tokens"}
    made = full.create(body)
    assert made["spec"]["suspend"] is True
    full.add_queue("tokens", {"pods": 1})
    full.wait_until(
        lambda: any(
            "insufficient unused quota for pods" in condition["message"]
            for found in full.store.list(kinds.WORKLOAD)
            for condition in found.get("status", {}).get("conditions", [])
        )
    )
    full.registry.change(
        kinds.CLUSTER_QUEUE,
        "",
        "tokens",
        "",
        lambda item: patched(item, [{"op": "replace", "path": QUOTA_PATH, "value": "2"}], JSON, 0),
    )
    full.wait_until(lambda: len(full.running_pods()) == 2)


QUOTA_PATH = "/spec/resourceGroups/0/flavors/0/resources/0/nominalQuota"


def train_job(name: str, script: str, **spec) -> dict:
    box = container(script)
    return {
        "apiVersion": kinds.TRAINER,
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": box["image"],
                "command": box["command"],
                "numNodes": 2,
                "numProcPerNode": 1,
                "env": [{"name": "MINE", "value": "yes"}],
            },
            **spec,
        },
    }


def test_train_job_runs_its_nodes(full):
    script = 'test -d "$0"; echo "$MINE $PET_NNODES $PET_NODE_RANK $PET_MASTER_ADDR"'
    volume = {"name": "scratch", "emptyDir": {}}
    mount = {"name": "scratch", "mountPath": "/scratch"}
    override = {
        "targetJobs": [{"name": "node"}],
        "spec": {
            "volumes": [volume],
            "serviceAccountName": "worker",
            "containers": [{"name": "node", "volumeMounts": [mount]}],
        },
    }
    full.create(train_job("tune", script, podTemplateOverrides=[override], labels={"a": "b"}))
    item = ended(full, kinds.TRAIN_JOB, "tune", "Complete", "Failed")
    assert conditions(item)["Complete"] == "AllJobsCompleted"
    assert item["status"]["jobsStatus"][0]["name"] == "node"
    found = full.pods("tune-node-0")
    assert {p["spec"]["serviceAccountName"] for p in found} == {"worker"}
    assert {p["spec"]["containers"][0]["volumeMounts"][0]["mountPath"] for p in found} == {
        "/scratch"
    }
    logs = sorted(full.log(p["metadata"]["name"]) for p in found)
    assert logs == [f"yes 2 {rank} 127.0.0.1\n" for rank in (0, 1)]
    owner = pods.controller_of(full.job("tune-node-0"))
    assert (owner["kind"], owner["name"]) == ("JobSet", "tune")


def test_train_job_tells_its_failure(full):
    full.create(train_job("tune", "exit 1"))
    # Pods of the runtime restart in place, up to the limit of the Job.
    item = ended(full, kinds.TRAIN_JOB, "tune", "Complete", "Failed")
    assert "Failed" in conditions(item)


def test_train_job_goes_with_all_it_made(full):
    full.create(train_job("tune", FOREVER))
    full.wait_until(lambda: len(full.running_pods()) == 2)
    full.registry.delete(kinds.TRAIN_JOB, "default", "tune", {"propagationPolicy": "Background"})
    full.wait_until(
        lambda: not (full.pods() or full.store.list(kinds.JOB) or full.store.list(kinds.JOB_SET))
    )


def test_train_job_waits_while_it_is_suspended(full):
    full.create(train_job("tune", FOREVER, suspend=True))
    full.wait_until(
        lambda: "Suspended" in conditions(full.store.get(kinds.TRAIN_JOB, "default", "tune"))
    )
    assert full.pods() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(runtimeRef={"name": "nothing"}), "must be created before"),
        (lambda spec: spec.update(runtimeRef={}), "Required value"),
        (lambda spec: spec["trainer"]["env"].append({"name": "PET_NNODES", "value": "1"}), "PET_"),
        (lambda spec: spec.update(nodes=1), 'unknown field "spec.nodes"'),
    ],
)
def test_train_job_is_checked(full, change, message):
    body = train_job("tune", "exit 0")
    change(body["spec"])
    with pytest.raises(ApiError, match=message):
        full.create(body)
