"""Jobs run, fail, are suspended and end as the Job controller of 1.34 has them."""

from __future__ import annotations

import pytest

from tests.kube import kinds
from tests.kube.failure_policy import judge
from tests.kube.job_controller import FAILURES, IGNORED_FAILURES, INDEX
from tests.kube.manifests import (
    DEAF,
    DISRUPTED,
    FOREVER,
    conditions,
    exit_rule,
    indexed_job,
    plain_job,
    policy,
)
from tests.kube.server import KubeServer


def annotations(pod: dict) -> dict[str, str]:
    return pod["metadata"]["annotations"]


def starts_by_index(kube: KubeServer, job: str) -> dict[str, int]:
    """How many pods were ever made for each index."""
    made = [
        change.object
        for change in kube.store.history
        if change.type == "ADDED" and change.key[0] == "pods"
    ]
    counts: dict[str, int] = {}
    for pod in made:
        if pod["metadata"]["labels"]["job-name"] == job:
            counts[annotations(pod)[INDEX]] = counts.get(annotations(pod)[INDEX], 0) + 1
    return counts


def first_that_wrote(kube: KubeServer) -> dict | None:
    """A running pod with something in its log."""
    found = kube.running_pods()
    return next((pod for pod in found if kube.log(pod["metadata"]["name"])), None)


def most_at_once(kube: KubeServer) -> int:
    """The largest number of pods there ever were that had not ended."""
    alive: set[str] = set()
    most = 0
    for change in kube.store.history:
        if change.key[0] == "pods":
            is_over = change.object["status"]["phase"] in ("Succeeded", "Failed")
            if change.type == "DELETED" or is_over:
                alive.discard(change.key[2])
            else:
                alive.add(change.key[2])
            most = max(most, len(alive))
    return most


def most_active(kube: KubeServer, job: str) -> int:
    """The largest ``active`` that the Job's status ever told."""
    return max(
        change.object.get("status", {}).get("active", 0)
        for change in kube.store.history
        if change.key == ("jobs.batch", "default", job)
    )


def test_indexed_job_completes(kube):
    kube.create(indexed_job("work", 'test "$JOB_COMPLETION_INDEX" -lt 3', completions=3))
    job = kube.wait_for_job("work")
    status = job["status"]
    assert status["completedIndexes"] == "0-2"
    assert (status["succeeded"], status.get("failed"), status["ready"]) == (3, None, 0)
    assert conditions(job) == {
        "SuccessCriteriaMet": "CompletionsReached",
        "Complete": "CompletionsReached",
    }
    assert status["startTime"] <= status["completionTime"]
    for pod in kube.pods("work"):
        index = annotations(pod)[INDEX]
        assert pod["spec"]["hostname"] == f"work-{index}"
        assert pod["metadata"]["labels"][INDEX] == index
        assert pod["metadata"]["name"].startswith(f"work-{index}-")
        # Counted pods are let go.
        assert not pod["metadata"].get("finalizers")
    assert ("Completed", "Job completed") in kube.events("work")


def test_parallelism_limits_active_pods(kube):
    kube.create(indexed_job("work", "sleep 0.1", completions=4, parallelism=2))
    kube.wait_for_job("work")
    assert most_active(kube, "work") == 2


def test_plain_job_without_completions_ends_with_its_first_success(kube):
    kube.create(plain_job("work", "exit 0", parallelism=2))
    job = kube.wait_for_job("work")
    assert "Complete" in conditions(job)


def test_backoff_limit_ends_the_job(kube):
    kube.create(plain_job("work", "exit 7", backoffLimit=1))
    job = kube.wait_for_job("work")
    assert conditions(job) == {
        "FailureTarget": "BackoffLimitExceeded",
        "Failed": "BackoffLimitExceeded",
    }
    assert job["status"]["failed"] == 2
    reasons = [reason for reason, _ in kube.events("work")]
    assert "BackoffLimitExceeded" in reasons


def test_each_index_has_its_own_limit(kube):
    script = 'test "$JOB_COMPLETION_INDEX" != 1'
    kube.create(indexed_job("work", script, completions=3, backoffLimitPerIndex=2))
    job = kube.wait_for_job("work")
    assert conditions(job)["Failed"] == "FailedIndexes"
    assert job["status"]["failedIndexes"] == "1"
    assert job["status"]["completedIndexes"] == "0,2"
    assert starts_by_index(kube, "work") == {"0": 1, "1": 3, "2": 1}
    counts = {annotations(pod)[FAILURES] for pod in kube.pods("work")}
    assert counts == {"0", "1", "2"}


def test_too_many_failed_indexes_end_the_others(kube):
    script = f'test "$JOB_COMPLETION_INDEX" = 2 || exit 1; {FOREVER}'
    body = indexed_job("work", script, 3, backoffLimitPerIndex=0, maxFailedIndexes=1)
    kube.create(body)
    job = kube.wait_for_job("work")
    assert conditions(job)["Failed"] == "MaxFailedIndexesExceeded"
    assert kube.running_pods("work") == []
    assert not job["status"].get("active")


def test_fail_job_ends_everything_at_once(kube):
    script = f'test "$JOB_COMPLETION_INDEX" = 0 && exit 43; {FOREVER}'
    rules = policy(exit_rule("FailJob", 43, containerName="worker"), DISRUPTED)
    kube.create(indexed_job("work", script, backoffLimitPerIndex=5, podFailurePolicy=rules))
    job = kube.wait_for_job("work")
    assert conditions(job)["Failed"] == "PodFailurePolicy"
    message = next(c["message"] for c in job["status"]["conditions"] if c["type"] == "Failed")
    assert "Container worker for pod default/work-0-" in message
    assert "failed with exit code 43 matching FailJob rule at index 0" in message
    assert starts_by_index(kube, "work") == {"0": 1, "1": 1}


def test_failed_is_told_only_when_no_pod_terminates_any_more(kube):
    script = f"test $JOB_COMPLETION_INDEX = 0 && exit 43; {DEAF}"
    body = indexed_job("work", script, podFailurePolicy=policy(exit_rule("FailJob", 43)))
    body["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    kube.create(body)
    kube.wait_until(lambda: "FailureTarget" in conditions(kube.job("work")))
    terminating = [
        change.object["status"]
        for change in kube.store.history
        if change.key[0] == "jobs.batch" and change.object["status"].get("terminating")
    ]
    kube.wait_for_job("work")
    assert all("Failed" not in conditions({"status": status}) for status in terminating)
    assert not kube.job("work")["status"]["terminating"]


def test_fail_index_spares_the_others(kube):
    script = 'test "$JOB_COMPLETION_INDEX" = 1 && exit 9; exit 0'
    rules = policy(exit_rule("FailIndex", 9))
    kube.create(indexed_job("work", script, 3, backoffLimitPerIndex=5, podFailurePolicy=rules))
    job = kube.wait_for_job("work")
    assert (job["status"]["failedIndexes"], job["status"]["completedIndexes"]) == ("1", "0,2")
    assert starts_by_index(kube, "work")["1"] == 1


def test_disruption_is_not_counted(kube, tmp_path):
    marker = tmp_path / "go"
    script = f"test -e {marker} || {{ {FOREVER}; }}"
    body = indexed_job(
        "work", script, 1, backoffLimitPerIndex=0, podFailurePolicy=policy(DISRUPTED)
    )
    kube.create(body)
    for _ in range(3):
        (pod,) = kube.wait_until(lambda: kube.running_pods("work"))
        kube.faults.evict(pod["metadata"]["name"])
        gone = pod["metadata"]["uid"]
        kube.wait_until(
            lambda gone=gone: [p for p in kube.running_pods("work") if p["metadata"]["uid"] != gone]
        )
    (last,) = kube.running_pods("work")
    assert (annotations(last)[FAILURES], annotations(last)[IGNORED_FAILURES]) == ("0", "3")
    marker.touch()
    kube.faults.evict(last["metadata"]["name"])
    job = kube.wait_for_job("work")
    assert "Complete" in conditions(job)
    assert not job["status"].get("failed")


def test_count_counts(kube):
    rules = policy(exit_rule("Count", 3), exit_rule("FailJob", 3))
    kube.create(plain_job("work", "exit 3", backoffLimit=1, podFailurePolicy=rules))
    job = kube.wait_for_job("work")
    # The first rule that matches decides: the second never does.
    assert conditions(job)["Failed"] == "BackoffLimitExceeded"


def test_not_in_takes_all_other_codes():
    rule = {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [3]}}
    job = {"spec": {"podFailurePolicy": {"rules": [rule]}}}

    def pod(code: int) -> dict:
        ended = [{"name": "c", "state": {"terminated": {"exitCode": code}}}]
        return {
            "metadata": {"name": "p", "namespace": "n"},
            "status": {"containerStatuses": ended},
        }

    assert judge(job, pod(4)).action == "FailJob"
    assert judge(job, pod(3)).action is None
    # A container that ended well is never matched.
    assert judge(job, pod(0)).action is None


@pytest.mark.parametrize("make", [plain_job, indexed_job])
def test_failed_pods_only_are_replaced(kube, make):
    """With ``Failed`` no second pod runs, or is counted, while the first still terminates."""
    numbers = {"completions": 1, "parallelism": 1}
    body = make("work", DEAF, **numbers, podReplacementPolicy="Failed", backoffLimit=5)
    body["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    kube.create(body)
    pod = kube.wait_until(lambda: first_that_wrote(kube))
    kube.registry.delete(kinds.POD, "default", pod["metadata"]["name"])
    kube.wait_until(lambda: kube.job("work")["status"].get("terminating") == 1)
    kube.wait_until(lambda: kube.running_pods("work"))
    assert kube.job("work")["status"]["failed"] == 1
    for change in kube.store.history:
        if change.key[0] == "jobs.batch" and change.object["status"].get("terminating"):
            assert not change.object["status"].get("failed")
    assert most_at_once(kube) == 1


def test_terminating_pods_are_replaced_by_default(kube):
    kube.create(indexed_job("work", DEAF, 1))
    pod = kube.wait_until(lambda: first_that_wrote(kube))
    kube.registry.delete(kinds.POD, "default", pod["metadata"]["name"])
    kube.wait_until(lambda: kube.running_pods("work"))
    assert len(kube.kubelet.pids("default", pod["metadata"]["name"])) == 1


def test_suspended_job_has_no_pods_and_counts_no_failures(kube):
    kube.create(indexed_job("work", FOREVER))
    kube.wait_until(lambda: len(kube.running_pods("work")) == 2)

    def set_suspend(wanted: bool) -> None:
        kube.store.update(
            kinds.JOB, "default", "work", lambda job: job["spec"].update(suspend=wanted)
        )

    first_start = kube.job("work")["status"]["startTime"]
    kube.clock.advance(100)
    set_suspend(True)
    kube.wait_until(lambda: not kube.pods("work"))
    kube.wait_until(lambda: conditions(kube.job("work")) == {"Suspended": "JobSuspended"})
    set_suspend(False)
    kube.wait_until(lambda: len(kube.running_pods("work")) == 2)
    status = kube.job("work")["status"]
    assert conditions(kube.job("work")) == {}
    assert not status.get("failed")
    assert status["startTime"] > first_start
    reasons = [reason for reason, _ in kube.events("work")]
    assert {"Suspended", "Resumed"} <= set(reasons)


def test_job_created_suspended_waits(kube):
    kube.create(indexed_job("work", suspend=True))
    kube.wait_until(lambda: "Suspended" in conditions(kube.job("work")))
    assert kube.pods("work") == []
    assert "startTime" not in kube.job("work")["status"]


def test_deadline_counts_by_the_servers_clock(kube):
    kube.create(plain_job("work", FOREVER, activeDeadlineSeconds=3600))
    kube.wait_until(lambda: kube.running_pods("work"))
    kube.clock.advance(3601)
    job = kube.wait_for_job("work")
    assert conditions(job)["Failed"] == "DeadlineExceeded"
    assert kube.running_pods("work") == []


def test_finished_job_goes_after_its_ttl(kube):
    kube.create(plain_job("work", ttlSecondsAfterFinished=600))
    kube.wait_for_job("work")
    kube.clock.advance(500)
    assert kube.job("work") is not None
    kube.clock.advance(200)
    kube.wait_until(lambda: kube.job("work") is None and not kube.pods("work"))


def test_success_policy_ends_the_rest(kube):
    script = f'test "$JOB_COMPLETION_INDEX" = 0 || {{ {FOREVER}; }}'
    rules = {"rules": [{"succeededIndexes": "0"}]}
    kube.create(indexed_job("work", script, 2, successPolicy=rules))
    job = kube.wait_for_job("work")
    assert conditions(job) == {"SuccessCriteriaMet": "SuccessPolicy", "Complete": "SuccessPolicy"}
    assert job["status"]["succeeded"] == 1


def test_restarts_in_place_use_up_the_limit(kube):
    body = plain_job("work", "exit 1", backoffLimit=2)
    body["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"
    kube.create(body)
    job = kube.wait_for_job("work")
    assert conditions(job)["Failed"] == "BackoffLimitExceeded"


def test_parallelism_can_shrink(kube):
    kube.create(indexed_job("work", FOREVER, completions=3))
    kube.wait_until(lambda: len(kube.running_pods("work")) == 3)
    kube.store.update(kinds.JOB, "default", "work", lambda job: job["spec"].update(parallelism=1))
    kube.wait_until(lambda: len(kube.running_pods("work")) == 1)
    kube.wait_until(lambda: kube.job("work")["status"].get("active") == 1)


def test_pod_deleted_by_force_is_counted_and_replaced(kube):
    kube.create(indexed_job("work", FOREVER, 1, backoffLimitPerIndex=3))
    (pod,) = kube.wait_until(lambda: kube.running_pods("work"))
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    kube.faults.kill_pod(name)
    kube.wait_until(lambda: [p for p in kube.running_pods("work") if p["metadata"]["uid"] != uid])
    (after,) = kube.running_pods("work")
    assert annotations(after)[FAILURES] == "1"


def test_status_tells_ready_and_active(kube):
    kube.create(indexed_job("work", FOREVER, 2))
    kube.wait_until(lambda: kube.job("work")["status"].get("ready") == 2)
    assert kube.job("work")["status"]["active"] == 2
