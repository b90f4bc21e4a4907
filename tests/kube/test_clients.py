"""Both official clients speak to the server: objects, pages, watches, patches, deletions."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import kubernetes
import kubernetes_asyncio
import pytest
import pytest_asyncio

from tests.kube import kinds
from tests.kube.manifests import FOREVER, indexed_job, plain_job, pod
from tests.kube.server import ALL_GROUPS, KubeServer

HELD = {"metadata": {"name": "held", "labels": {"a": "1"}}, "data": {"x": "1"}}


@pytest.fixture
def sync(kube) -> Iterator[SimpleNamespace]:
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config_from_dict(
        kube.kubeconfig(), client_configuration=configuration
    )
    with kubernetes.client.ApiClient(configuration) as api:
        yield SimpleNamespace(
            api=api,
            core=kubernetes.client.CoreV1Api(api),
            batch=kubernetes.client.BatchV1Api(api),
            custom=kubernetes.client.CustomObjectsApi(api),
            authorization=kubernetes.client.AuthorizationV1Api(api),
        )


@pytest_asyncio.fixture
async def aio(kube) -> AsyncIterator[SimpleNamespace]:
    configuration = kubernetes_asyncio.client.Configuration()
    await kubernetes_asyncio.config.load_kube_config_from_dict(
        kube.kubeconfig(), client_configuration=configuration
    )
    async with kubernetes_asyncio.client.ApiClient(configuration) as api:
        yield SimpleNamespace(
            api=api,
            core=kubernetes_asyncio.client.CoreV1Api(api),
            batch=kubernetes_asyncio.client.BatchV1Api(api),
        )


def refused(error: kubernetes.client.ApiException) -> str:
    import json

    return json.loads(error.body)["reason"]


def test_kubeconfig_file_is_one(kube, tmp_path):
    path = kube.write_kubeconfig(tmp_path / "config", namespace="default")
    with kubernetes.config.new_client_from_config(str(path)) as api:
        assert kubernetes.client.VersionApi(api).get_code().git_version == "v1.34.0"


def test_job_runs_and_tells_its_log(kube, sync):
    script = 'echo "index $JOB_COMPLETION_INDEX"; echo two'
    sync.batch.create_namespaced_job("default", indexed_job("work", script))
    kube.wait_for_job("work")
    job = sync.batch.read_namespaced_job_status("work", "default")
    assert job.status.succeeded == 2
    assert job.status.completed_indexes == "0,1"
    listed = sync.core.list_namespaced_pod("default", label_selector="job-name=work")
    texts = []
    for one in listed.items:
        # Client 36 gives "b'...'" for a log unless the raw answer is asked for.
        answer = sync.core.read_namespaced_pod_log(
            one.metadata.name, "default", tail_lines=2, container="worker", _preload_content=False
        )
        texts.append(answer.data.decode())
    assert sorted(texts) == ["index 0\ntwo\n", "index 1\ntwo\n"]


async def test_asynchronous_client_runs_a_job(kube, aio):
    listed = await aio.batch.list_namespaced_job("default")
    await aio.batch.create_namespaced_job("default", plain_job("work", "echo done"))
    watch = kubernetes_asyncio.watch.Watch()
    seen = []
    version = listed.metadata.resource_version
    async with watch.stream(
        aio.batch.list_namespaced_job, "default", resource_version=version, timeout_seconds=30
    ) as stream:
        async for event in stream:
            seen.append(event["type"])
            if any(c.type == "Complete" for c in event["object"].status.conditions or []):
                break
    assert seen[0] == "ADDED"
    assert "MODIFIED" in seen
    (one,) = (await aio.core.list_namespaced_pod("default")).items
    assert await aio.core.read_namespaced_pod_log(one.metadata.name, "default") == "done\n"


def test_synchronous_watch_goes_on_from_a_list(kube, sync):
    listed = sync.core.list_namespaced_config_map("default")
    sync.core.create_namespaced_config_map("default", HELD)
    sync.core.patch_namespaced_config_map("held", "default", {"data": {"x": "2"}})
    sync.core.delete_namespaced_config_map("held", "default")
    watch = kubernetes.watch.Watch()
    events = watch.stream(
        sync.core.list_namespaced_config_map,
        "default",
        resource_version=listed.metadata.resource_version,
        timeout_seconds=1,
    )
    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED"]


def test_selectors_choose_in_lists_and_watches(kube, sync):
    version = sync.core.list_namespaced_config_map("default").metadata.resource_version
    for name, labels in (("a", {"x": "1"}), ("b", {"x": "2"}), ("c", {})):
        body = {"metadata": {"name": name, "labels": labels}}
        sync.core.create_namespaced_config_map("default", body)

    def names(**query) -> list[str]:
        items = sync.core.list_namespaced_config_map("default", **query).items
        return [item.metadata.name for item in items]

    assert names(label_selector="x=1") == ["a"]
    assert names(label_selector="x in (1,2)") == ["a", "b"]
    assert names(label_selector="x notin (1)") == ["b", "c"]
    assert names(label_selector="!x") == ["c"]
    assert names(label_selector="x,x!=1") == ["b"]
    assert names(field_selector="metadata.name=c") == ["c"]
    sync.core.patch_namespaced_config_map("b", "default", {"metadata": {"labels": {"x": "3"}}})
    events = kubernetes.watch.Watch().stream(
        sync.core.list_namespaced_config_map,
        "default",
        label_selector="x=2",
        resource_version=version,
        timeout_seconds=1,
    )
    # An object that leaves the selection is told as deleted.
    assert [event["type"] for event in events] == ["ADDED", "DELETED"]
    with pytest.raises(kubernetes.client.ApiException, match="is not a known field selector"):
        names(field_selector="data.x=1")


def test_lists_come_in_pages_until_they_expire(kube, sync):
    for number in range(5):
        body = {"metadata": {"name": f"c{number}"}}
        sync.core.create_namespaced_config_map("default", body)
    first = sync.core.list_namespaced_config_map("default", limit=2)
    assert first.metadata.remaining_item_count == 3
    # What is made meanwhile is not in a list that has begun.
    sync.core.create_namespaced_config_map("default", {"metadata": {"name": "c9"}})
    following = first.metadata._continue
    second = sync.core.list_namespaced_config_map("default", limit=3, _continue=following)
    assert [item.metadata.name for item in second.items] == ["c2", "c3", "c4"]
    assert second.metadata._continue is None
    assert second.metadata.resource_version == first.metadata.resource_version
    kube.faults.compact()
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.core.list_namespaced_config_map("default", limit=2, _continue=following)
    assert (caught.value.status, refused(caught.value)) == (410, "Expired")


async def test_watch_from_an_old_version_is_told_so(kube, aio):
    listed = await aio.core.list_namespaced_pod("default")
    kube.faults.compact()
    stream = kubernetes_asyncio.watch.Watch().stream(
        aio.core.list_namespaced_pod,
        "default",
        resource_version=listed.metadata.resource_version,
        timeout_seconds=5,
    )
    with pytest.raises(kubernetes_asyncio.client.ApiException) as caught:
        await anext(stream)
    assert caught.value.status == 410


async def test_bookmarks_move_the_version(kube, aio):
    kube.settings.bookmark_seconds = 0.05
    listed = await aio.core.list_namespaced_config_map("default")
    body = {"metadata": {"name": "other"}}
    kube.registry.create(kinds.SECRET, "default", body)
    watch = kubernetes_asyncio.watch.Watch()
    async with watch.stream(
        aio.core.list_namespaced_config_map,
        "default",
        resource_version=listed.metadata.resource_version,
        allow_watch_bookmarks=True,
        timeout_seconds=20,
    ) as stream:
        async for event in stream:
            assert event["type"] == "BOOKMARK"
            if int(watch.resource_version) > int(listed.metadata.resource_version):
                break


def test_name_is_taken_once(kube, sync):
    sync.core.create_namespaced_config_map("default", HELD)
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.core.create_namespaced_config_map("default", HELD)
    assert (caught.value.status, refused(caught.value)) == (409, "AlreadyExists")


def test_copy_of_a_stored_object_is_not_created(kube, sync):
    made = sync.core.create_namespaced_config_map("default", HELD)
    made.metadata.name = "copy"
    with pytest.raises(kubernetes.client.ApiException, match="resourceVersion should not be set"):
        sync.core.create_namespaced_config_map("default", made)


def test_stale_update_is_refused(kube, sync):
    stale = sync.core.create_namespaced_config_map("default", HELD)
    sync.core.patch_namespaced_config_map("held", "default", {"data": {"x": "2"}})
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.core.replace_namespaced_config_map("held", "default", stale)
    assert (caught.value.status, refused(caught.value)) == (409, "Conflict")
    version = {"metadata": {"resourceVersion": stale.metadata.resource_version}}
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.core.patch_namespaced_config_map("held", "default", version)
    assert caught.value.status == 409


def test_three_kinds_of_patch(kube, sync):
    sync.batch.create_namespaced_job("default", plain_job("work", FOREVER, suspend=True))

    def patch(body: object, content_type: str) -> dict:
        return sync.api.call_api(
            "/apis/batch/v1/namespaces/default/jobs/work",
            "PATCH",
            body=body,
            header_params={"Content-Type": content_type},
            auth_settings=["BearerToken"],
            response_types_map={200: "object"},
            _return_http_data_only=True,
        )

    merged = patch({"metadata": {"annotations": {"a": "1"}}}, "application/merge-patch+json")
    assert merged["metadata"]["annotations"] == {"a": "1"}
    removed = patch({"metadata": {"annotations": {"a": None}}}, "application/merge-patch+json")
    assert not removed["metadata"].get("annotations")
    change = {"spec": {"template": {"spec": {"containers": [{"name": "worker", "image": "b"}]}}}}
    with pytest.raises(kubernetes.client.ApiException, match="field is immutable"):
        patch(change, "application/strategic-merge-patch+json")
    operations = [
        {"op": "test", "path": "/spec/suspend", "value": True},
        {"op": "add", "path": "/metadata/labels", "value": {"b": "2"}},
    ]
    assert patch(operations, "application/json-patch+json")["metadata"]["labels"] == {"b": "2"}
    operations[0]["value"] = False
    with pytest.raises(kubernetes.client.ApiException) as caught:
        patch(operations, "application/json-patch+json")
    assert caught.value.status == 422
    with pytest.raises(kubernetes.client.ApiException) as caught:
        patch({}, "application/json")
    assert caught.value.status == 415


def test_deletion_names_what_it_means(kube, sync):
    made = sync.batch.create_namespaced_job("default", plain_job("work", FOREVER))
    other = {"preconditions": {"uid": "other"}, "propagationPolicy": "Background"}
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.batch.delete_namespaced_job("work", "default", body=other)
    assert (caught.value.status, refused(caught.value)) == (409, "Conflict")
    kube.wait_until(lambda: kube.running_pods("work"))
    stale = {"preconditions": {"resourceVersion": made.metadata.resource_version}}
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.batch.delete_namespaced_job("work", "default", body=stale)
    assert caught.value.status == 409
    own = {"preconditions": {"uid": made.metadata.uid}, "propagationPolicy": "Background"}
    assert sync.batch.delete_namespaced_job("work", "default", body=own).status == "Success"
    kube.wait_until(lambda: not kube.pods("work"))
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.batch.read_namespaced_job("work", "default")
    assert (caught.value.status, refused(caught.value)) == (404, "NotFound")


def test_deletion_without_a_policy_orphans_the_pods(kube, sync):
    sync.batch.create_namespaced_job("default", plain_job("work", FOREVER))
    kube.wait_until(lambda: kube.running_pods("work"))
    _, _, headers = sync.batch.delete_namespaced_job_with_http_info("work", "default")
    assert "child pods are preserved by default" in headers["Warning"]
    kube.wait_until(lambda: kube.job("work") is None)
    (orphan,) = kube.running_pods("work")
    kube.wait_until(lambda: "ownerReferences" not in kube.pods("work")[0]["metadata"])
    assert orphan["metadata"]["name"] == kube.pods("work")[0]["metadata"]["name"]


def test_foreground_deletion_waits_for_the_pods(kube, sync):
    script = "trap '' TERM; sleep 60"
    body = plain_job("work", script)
    body["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    sync.batch.create_namespaced_job("default", body)
    kube.wait_until(lambda: kube.running_pods("work"))
    sync.batch.delete_namespaced_job("work", "default", propagation_policy="Foreground")
    job = kube.job("work")
    assert job["metadata"]["deletionTimestamp"]
    assert job["metadata"]["finalizers"] == ["foregroundDeletion"]
    kube.wait_until(lambda: kube.job("work") is None)
    assert kube.pods("work") == []


def test_collection_is_deleted_by_selector(kube, sync):
    for name in ("a", "b"):
        body = {"metadata": {"name": name, "labels": {"name": name}}}
        sync.core.create_namespaced_config_map("default", body)
    sync.core.delete_collection_namespaced_config_map("default", label_selector="name=a")
    left = sync.core.list_namespaced_config_map("default").items
    assert [item.metadata.name for item in left] == ["b"]


def test_dry_run_changes_nothing(kube, sync):
    sync.batch.create_namespaced_job("default", plain_job("work"), dry_run="All")
    assert kube.job("work") is None


def test_name_is_generated(kube, sync):
    body = {"metadata": {"generateName": "run-"}}
    made = sync.core.create_namespaced_config_map("default", body)
    assert made.metadata.name.startswith("run-")
    assert len(made.metadata.name) == len("run-") + 5


def test_namespace_must_exist_and_match(kube, sync):
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.core.create_namespaced_config_map("elsewhere", HELD)
    assert caught.value.status == 404
    body = {**HELD, "metadata": {"name": "x", "namespace": "elsewhere"}}
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.core.create_namespaced_config_map("default", body)
    assert caught.value.status == 400


def test_status_is_changed_through_its_own_path(kube, sync):
    sync.batch.create_namespaced_job("default", plain_job("work", suspend=True))
    change = {"status": {"failed": 3}, "spec": {"parallelism": 7}}
    through_main = sync.batch.patch_namespaced_job("work", "default", change)
    assert through_main.spec.parallelism == 7
    assert not through_main.status.failed
    change["spec"]["parallelism"] = 9
    through_status = sync.batch.patch_namespaced_job_status("work", "default", change)
    assert (through_status.status.failed, through_status.spec.parallelism) == (3, 7)


def test_wrong_token_is_nobody(kube, sync):
    configuration = kubernetes.client.Configuration(host=kube.url)
    with kubernetes.client.ApiClient(configuration) as stranger:
        with pytest.raises(kubernetes.client.ApiException) as caught:
            kubernetes.client.CoreV1Api(stranger).list_namespaced_pod("default")
    assert caught.value.status == 401


def test_discovery_tells_what_is_served(kube, sync):
    groups = kubernetes.client.ApisApi(sync.api).get_api_versions().groups
    assert "batch" in [group.name for group in groups]
    assert "jobset.x-k8s.io" not in [group.name for group in groups]
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.custom.list_namespaced_custom_object(
            "jobset.x-k8s.io", "v1alpha2", "default", "jobsets"
        )
    assert caught.value.status == 404
    names = [resource.name for resource in sync.batch.get_api_resources().resources]
    assert names == ["jobs", "jobs/status"]


def test_groups_can_be_served():
    with KubeServer(groups=ALL_GROUPS) as kube:
        configuration = kubernetes.client.Configuration()
        kubernetes.config.load_kube_config_from_dict(
            kube.kubeconfig(), client_configuration=configuration
        )
        with kubernetes.client.ApiClient(configuration) as api:
            found = kubernetes.client.CustomObjectsApi(api).list_namespaced_custom_object(
                "kueue.x-k8s.io", "v1beta1", "default", "workloads"
            )
    assert found["kind"] == "WorkloadList"


def test_log_is_followed_to_its_end(kube, sync):
    kube.create(pod("talker", "echo one; sleep 0.3; echo two"))
    kube.wait_until(lambda: "containerStatuses" in kube.pods()[0]["status"])
    kube.wait_until(lambda: kube.running_pods())
    answer = sync.core.read_namespaced_pod_log(
        "talker", "default", follow=True, _preload_content=False
    )
    assert b"".join(answer.stream()) == b"one\ntwo\n"


def test_log_of_a_pod_without_a_node_is_empty(kube, sync):
    kube.create(pod("one", nodeSelector={"no": "where"}))
    kube.wait_until(lambda: kube.events("one"))
    answer = sync.core.read_namespaced_pod_log("one", "default", _preload_content=False)
    assert answer.data == b""


def test_log_of_nothing_is_refused(kube, sync):
    kube.settings.start_seconds = 60
    kube.create(pod("late"))
    kube.wait_until(lambda: "nodeName" in kube.pods()[0]["spec"])
    with pytest.raises(kubernetes.client.ApiException, match="waiting to start"):
        sync.core.read_namespaced_pod_log("late", "default")
    with pytest.raises(kubernetes.client.ApiException, match="is not valid for pod"):
        sync.core.read_namespaced_pod_log("late", "default", container="other")
    with pytest.raises(kubernetes.client.ApiException) as caught:
        sync.core.read_namespaced_pod_log("nobody", "default")
    assert caught.value.status == 404


def test_parallel_creators_have_one_winner(kube, sync):
    outcomes = []

    def create() -> None:
        try:
            sync.core.create_namespaced_config_map("default", HELD)
            outcomes.append(201)
        except kubernetes.client.ApiException as error:
            outcomes.append(error.status)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [201] + [409] * 7


def test_leases_are_objects_with_versions(kube, sync):
    leases = kubernetes.client.CoordinationV1Api(sync.api)
    body = {"metadata": {"name": "lock"}, "spec": {"holderIdentity": "a"}}
    made = leases.create_namespaced_lease("default", body)
    made.spec.holder_identity = "b"
    leases.replace_namespaced_lease("lock", "default", made)
    with pytest.raises(kubernetes.client.ApiException) as caught:
        leases.replace_namespaced_lease("lock", "default", made)
    assert caught.value.status == 409
