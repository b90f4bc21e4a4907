"""Permissions, Pod Security and quotas are enforced, in the words of the real thing."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import kubernetes
import pytest

from tests.kube import kinds
from tests.kube.errors import ApiError
from tests.kube.manifests import (
    FOREVER,
    RESTRICTED_CONTAINER,
    RESTRICTED_POD,
    conditions,
    container,
    indexed_job,
    plain_job,
    pod,
)

ROLE = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["*"], "resourceNames": ["mine"]},
]


@pytest.fixture
def sync(kube) -> Iterator[SimpleNamespace]:
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config_from_dict(
        kube.kubeconfig(), client_configuration=configuration
    )
    with kubernetes.client.ApiClient(configuration) as api:
        yield SimpleNamespace(
            core=kubernetes.client.CoreV1Api(api),
            batch=kubernetes.client.BatchV1Api(api),
            authorization=kubernetes.client.AuthorizationV1Api(api),
        )


def may(sync, verb: str, resource: str, group: str = "", **more) -> bool:
    attributes = {"verb": verb, "resource": resource, "group": group, "namespace": "default"}
    review = {"spec": {"resourceAttributes": {**attributes, **more}}}
    return sync.authorization.create_self_subject_access_review(review).status.allowed


def test_role_is_enforced_and_told(kube, sync):
    kube.permissions.use_role(ROLE, "default")
    sync.batch.create_namespaced_job("default", plain_job("work"))
    sync.batch.list_namespaced_job("default")
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.batch.delete_namespaced_job("work", "default")
    assert caught.value.status == 403
    assert (
        'jobs.batch \\"work\\" is forbidden: User \\"system:serviceaccount:airflow:hcodec-launcher'
        '\\" cannot delete resource \\"jobs\\" in API group \\"batch\\" in the namespace '
        '\\"default\\"'
    ) in caught.value.body
    assert may(sync, "create", "jobs", "batch")
    assert not may(sync, "delete", "jobs", "batch")
    assert not may(sync, "create", "jobs")
    assert not may(sync, "get", "pods", subresource="log")


def test_verbs_are_told_apart(kube, sync):
    kube.permissions.use_role(ROLE, "default")
    with pytest.raises(kubernetes.client.ApiException) as caught:
        next(kubernetes.watch.Watch().stream(sync.core.list_namespaced_pod, "default"))
    assert caught.value.status == 403
    kube.create(pod("one"))
    with pytest.raises(kubernetes.client.ApiException, match="pods/log"):
        sync.core.read_namespaced_pod_log("one", "default")
    with pytest.raises(kubernetes.client.ApiException, match="deletecollection"):
        sync.core.delete_collection_namespaced_pod("default")


def test_role_is_for_its_namespace_and_names(kube, sync):
    kube.permissions.use_role(ROLE, "default")
    with pytest.raises(kubernetes.client.ApiException, match="at the cluster scope"):
        sync.core.list_pod_for_all_namespaces()
    assert may(sync, "get", "configmaps", name="mine")
    assert not may(sync, "get", "configmaps", name="yours")


def test_one_verb_can_be_taken_away(kube, sync):
    kube.permissions.deny("get", "pods/log")
    assert may(sync, "get", "pods")
    assert not may(sync, "get", "pods", subresource="log")
    kube.permissions.allow("get", "pods/log")
    assert may(sync, "get", "pods", subresource="log")


def test_rules_review_lists_the_role(kube, sync):
    kube.permissions.use_role(ROLE, "default")
    review = sync.authorization.create_self_subject_rules_review({"spec": {"namespace": "default"}})
    assert review.status.resource_rules[0].resources == ["jobs"]
    elsewhere = {"spec": {"namespace": "other"}}
    review = sync.authorization.create_self_subject_rules_review(elsewhere)
    assert review.status.resource_rules == []


def test_restricted_namespace_lets_only_restricted_pods_in(kube):
    kube.enforce_pod_security()
    with pytest.raises(ApiError, match='violates PodSecurity "restricted:latest"') as caught:
        kube.create(pod("one"))
    assert caught.value.code == 403
    for part in (
        "allowPrivilegeEscalation != false",
        "unrestricted capabilities",
        "runAsNonRoot != true",
        "seccompProfile",
    ):
        assert part in caught.value.message
    box = container(securityContext=RESTRICTED_CONTAINER)
    kube.create(pod("one", containers=[box], securityContext=RESTRICTED_POD))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hostNetwork": True}, "host namespaces"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "restricted volume types"),
        ({"securityContext": {**RESTRICTED_POD, "runAsUser": 0}}, "runAsUser=0"),
    ],
)
def test_restricted_namespace_refuses(kube, change, message):
    kube.enforce_pod_security()
    good = {
        "containers": [container(securityContext=RESTRICTED_CONTAINER)],
        "securityContext": RESTRICTED_POD,
    }
    with pytest.raises(ApiError, match=message):
        kube.create(pod("one", **{**good, **change}))


def test_job_with_refused_pods_says_so_and_has_none(kube):
    """A Job itself is not refused: only its events tell why nothing runs."""
    kube.enforce_pod_security()
    kube.create(indexed_job("work"))
    kube.wait_until(lambda: kube.events("work"))
    reason, message = kube.events("work")[0]
    assert reason == "FailedCreate"
    assert "violates PodSecurity" in message
    assert kube.pods() == []


def test_quota_holds_pods_back_until_there_is_room(kube):
    kube.set_quota({"pods": "1"})
    kube.create(indexed_job("work", FOREVER))
    kube.wait_until(
        lambda: [m for r, m in kube.events("work") if r == "FailedCreate" and "exceeded quota" in m]
    )
    (message,) = {m for r, m in kube.events("work") if r == "FailedCreate"} - {""} or {""}
    assert "exceeded quota: quota, requested: pods=1, used: pods=1, limited: pods=1" in message
    assert len(kube.pods("work")) == 1
    kube.wait_until(lambda: kube.store.get(kinds.QUOTA, "default", "quota")["status"])
    kube.set_quota({"pods": "2"})
    kube.wait_until(lambda: len(kube.running_pods("work")) == 2)


def test_quota_counts_gpus(kube):
    kube.set_quota({"requests.nvidia.com/gpu": "2"})
    gpus = {"limits": {"nvidia.com/gpu": "2"}}
    kube.create(pod("one", containers=[container(FOREVER, resources=gpus)]))
    with pytest.raises(ApiError, match=r"requests\.nvidia\.com/gpu=2, used: .*gpu=2"):
        kube.create(pod("two", containers=[container(resources=gpus)]))
    kube.create(pod("three"))
    kube.wait_until(lambda: kube.running_pods())
    kube.faults.kill_process("one")
    kube.wait_until(
        lambda: kube.store.get(kinds.POD, "default", "one")["status"]["phase"] == "Failed"
    )
    kube.create(pod("two", containers=[container(resources=gpus)]))


def test_quota_counts_jobs(kube):
    kube.set_quota({"count/jobs.batch": "1"})
    kube.create(plain_job("one", FOREVER))
    with pytest.raises(ApiError, match="exceeded quota") as caught:
        kube.create(plain_job("two"))
    assert caught.value.code == 403
    assert "Complete" not in conditions(kube.job("one"))
