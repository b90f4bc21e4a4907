"""Every fault a test can ask for happens, once or as often as asked, and passes."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import kubernetes
import kubernetes_asyncio
import pytest
import urllib3

from tests.kube import kinds
from tests.kube.errors import ApiError
from tests.kube.manifests import (
    DEAF,
    DISRUPTED,
    FOREVER,
    conditions,
    container,
    indexed_job,
    plain_job,
    pod,
    policy,
)
from tests.kube.processes import is_alive
from tests.kube.server import KubeServer


@pytest.fixture
def core(kube) -> Iterator[kubernetes.client.CoreV1Api]:
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config_from_dict(
        kube.kubeconfig(), client_configuration=configuration
    )
    configuration.retries = False
    with kubernetes.client.ApiClient(configuration) as api:
        yield kubernetes.client.CoreV1Api(api)


def status_of(core, **query) -> int:
    try:
        core.list_namespaced_pod("default", **query)
    except kubernetes.client.ApiException as error:
        return error.status
    return 200


def running(kube: KubeServer, job: str = "work") -> dict:
    """The one pod of a Job of one worker, once it runs."""
    (found,) = kube.wait_until(lambda: kube.running_pods(job))
    return found


def other_than(kube: KubeServer, gone: dict) -> dict:
    """The pod that runs in the place of ``gone``."""

    def look() -> dict | None:
        found = kube.running_pods("work")
        return next((p for p in found if p["metadata"]["uid"] != gone["metadata"]["uid"]), None)

    return kube.wait_until(look)


def test_errors_come_as_often_as_asked(kube, core):
    kube.faults.fail(503, verb="list", resource="pods", times=2)
    assert [status_of(core) for _ in range(3)] == [503, 503, 200]
    kube.faults.fail(500)
    kube.faults.list_expired("pods")
    assert [status_of(core) for _ in range(3)] == [500, 410, 200]


def test_faults_meet_what_they_name(kube, core):
    fault = kube.faults.fail(500, verb="create", resource="pods")
    assert status_of(core) == 200
    core.list_namespaced_config_map("default")
    assert fault.num_met == 0
    kube.faults.clear()
    core.create_namespaced_pod("default", pod("one"))


def test_throttling_says_when_to_come_back(kube, core):
    kube.faults.throttle(retry_after_seconds=7)
    with pytest.raises(kubernetes.client.ApiException) as caught:
        core.list_namespaced_pod("default")
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "7")


def test_one_verb_can_be_forbidden_for_a_while(kube, core):
    kube.faults.forbid("list", "pods")
    assert [status_of(core), status_of(core)] == [403, 200]


def test_connection_is_reset(kube, core):
    kube.faults.reset_connection("list", "pods")
    with pytest.raises(urllib3.exceptions.ProtocolError):
        core.list_namespaced_pod("default")
    assert status_of(core) == 200


def test_answer_is_lost_after_its_effect(kube, core):
    kube.faults.lose_answer("create", "configmaps")
    with pytest.raises(urllib3.exceptions.ProtocolError):
        core.create_namespaced_config_map("default", {"metadata": {"name": "a"}})
    assert kube.store.get(kinds.CONFIG_MAP, "default", "a")


def test_frozen_watch_is_told_later(kube, core):
    kube.faults.freeze_watches()
    told = []

    def watch() -> None:
        stream = kubernetes.watch.Watch().stream(
            core.list_namespaced_config_map, "default", resource_version="1", timeout_seconds=60
        )
        told.append(next(stream)["object"].metadata.name)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    kube.wait_until(lambda: any(verb == "watch" for verb, _ in kube.requests))
    kube.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}})
    time.sleep(0.3)
    assert told == []
    kube.faults.clear()
    thread.join(timeout=60)
    assert told == ["a"]


def test_answers_are_slow(kube, core):
    kube.faults.slow_down(0.3, verb="list", times=1)
    begin = time.monotonic()
    core.list_namespaced_pod("default")
    assert time.monotonic() - begin >= 0.3
    kube.faults.slow_down(5, verb="list", times=1)
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        core.list_namespaced_pod("default", _request_timeout=0.2)


def test_server_goes_away_and_comes_back(kube, core):
    assert status_of(core) == 200
    address = kube.url.removeprefix("http://")
    kube.faults.go_away()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(address, timeout=5).request("GET", "/version")
    with pytest.raises(urllib3.exceptions.HTTPError):
        core.list_namespaced_pod("default")
    kube.faults.come_back()
    assert status_of(core) == 200


def test_server_is_away_for_seconds_while_pods_go_on(kube, core):
    kube.create(plain_job("work", "sleep 0.1"))
    kube.faults.go_away(seconds=0.5)
    kube.wait_for_job("work")

    def is_back() -> bool:
        try:
            return status_of(core) == 200
        except urllib3.exceptions.HTTPError:
            return False

    kube.wait_until(is_back)


async def test_watch_is_dropped_in_the_middle(kube):
    configuration = kubernetes_asyncio.client.Configuration()
    await kubernetes_asyncio.config.load_kube_config_from_dict(
        kube.kubeconfig(), client_configuration=configuration
    )
    import aiohttp

    async with kubernetes_asyncio.client.ApiClient(configuration) as api:
        core = kubernetes_asyncio.client.CoreV1Api(api)
        kube.create(pod("one", FOREVER))
        stream = kubernetes_asyncio.watch.Watch().stream(
            core.list_namespaced_pod, "default", timeout_seconds=60
        )
        assert (await anext(stream))["type"] == "ADDED"
        kube.faults.drop_watches()
        with pytest.raises((aiohttp.ClientError, ConnectionResetError)):
            [event async for event in stream]
        # The next one is served.
        stream = kubernetes_asyncio.watch.Watch().stream(
            core.list_namespaced_pod, "default", timeout_seconds=60
        )
        assert (await anext(stream))["type"] == "ADDED"
        await stream.close()


def test_watch_is_told_that_its_version_is_gone(kube, core):
    version = core.list_namespaced_pod("default").metadata.resource_version
    kube.faults.watch_expired()
    stream = kubernetes.watch.Watch().stream(
        core.list_namespaced_pod, "default", resource_version=version, timeout_seconds=5
    )
    with pytest.raises(kubernetes.client.ApiException) as caught:
        next(stream)
    assert caught.value.status == 410


def test_clock_of_the_server_is_its_own(kube, core):
    kube.faults.skew_clock(-7200)
    made = core.create_namespaced_config_map("default", {"metadata": {"name": "a"}})
    behind = time.time() - made.metadata.creation_timestamp.timestamp()
    assert 7190 < behind < 7300
    _, _, headers = core.list_namespaced_pod_with_http_info("default")
    assert 7190 < time.time() - parsedate_to_datetime(headers["Date"]).timestamp() < 7300


def test_evicted_pod_is_a_disruption_target(kube):
    kube.create(indexed_job("work", FOREVER, 1, podFailurePolicy=policy(DISRUPTED)))
    first = running(kube)
    kube.faults.evict(first["metadata"]["name"])
    (marked,) = [p for p in kube.pods() if p["metadata"]["uid"] == first["metadata"]["uid"]]
    assert conditions(marked)["DisruptionTarget"] == "EvictionByEvictionAPI"
    assert marked["metadata"]["deletionTimestamp"]
    other_than(kube, first)
    assert not kube.job("work")["status"].get("failed")


def test_preempted_pod_is_a_disruption_target(kube):
    kube.create(indexed_job("work", FOREVER, 1, podFailurePolicy=policy(DISRUPTED)))
    first = running(kube)
    kube.faults.preempt(first["metadata"]["name"])
    other_than(kube, first)
    assert not kube.job("work")["status"].get("failed")


def test_eviction_can_be_asked_for_over_http(kube, core):
    kube.create(pod("one", FOREVER))
    kube.wait_until(kube.running_pods)
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "one"}}
    core.create_namespaced_pod_eviction("one", "default", body)
    kube.wait_until(lambda: not kube.pods())


def test_killed_process_is_a_counted_failure(kube):
    kube.create(indexed_job("work", FOREVER, 1, podFailurePolicy=policy(DISRUPTED)))
    first = running(kube)
    kube.faults.kill_process(first["metadata"]["name"])
    other_than(kube, first)
    assert kube.wait_until(lambda: kube.job("work")["status"].get("failed")) == 1


def test_job_deleted_under_its_owner_takes_its_pods(kube):
    kube.create(indexed_job("work", FOREVER, 1))
    running(kube)
    kube.faults.delete_job("work")
    assert kube.job("work") is None
    kube.wait_until(lambda: not kube.pods())


def test_pods_of_a_lost_node_stay_until_it_is_removed(kube):
    """Nobody confirms their end, so a Job that replaces failed pods only gets no others."""
    kube.create(indexed_job("work", DEAF, 1, podFailurePolicy=policy(DISRUPTED)))
    first = running(kube)
    node = first["spec"]["nodeName"]
    kube.faults.lose_node(node)
    with pytest.raises(ApiError, match="i/o timeout"):
        kube.log(first["metadata"]["name"])
    kube.wait_until(lambda: "deletionTimestamp" in kube.pods()[0]["metadata"])
    (stuck,) = kube.pods()
    assert conditions(stuck)["DisruptionTarget"] == "DeletionByTaintManager"
    assert stuck["status"]["phase"] == "Running"
    assert kube.job("work")["status"]["terminating"] == 1
    kube.faults.remove_node(node)
    replacement = other_than(kube, first)
    assert replacement["spec"]["nodeName"] != node
    assert not kube.job("work")["status"].get("failed")


def test_lost_node_that_returns_tells_what_became_of_its_pods(kube):
    kube.settings.eviction_seconds = 600
    kube.create(pod("one", FOREVER))
    kube.wait_until(kube.running_pods)
    node = kube.pods()[0]["spec"]["nodeName"]
    kube.faults.lose_node(node)
    (ready,) = [
        c
        for c in kube.store.get(kinds.NODE, "", node)["status"]["conditions"]
        if c["type"] == "Ready"
    ]
    assert ready["status"] == "Unknown"
    assert kube.pods()[0]["status"]["phase"] == "Running"
    kube.faults.return_node(node)
    kube.wait_until(lambda: kube.pods()[0]["status"]["phase"] == "Failed")


def test_pod_of_a_cut_off_node_works_on_unseen(kube, tmp_path):
    marker = tmp_path / "tick"
    script = f"while :; do date +%N > {marker}; sleep 0.02; done"
    kube.create(indexed_job("work", script, 1, podFailurePolicy=policy(DISRUPTED)))
    first = running(kube)
    kube.faults.lose_node(first["spec"]["nodeName"], kills_processes=False)
    kube.wait_until(lambda: "deletionTimestamp" in kube.pods()[0]["metadata"])
    before = marker.read_text()
    kube.wait_until(lambda: marker.read_text() not in ("", before))
    kube.faults.return_node(first["spec"]["nodeName"])
    other_than(kube, first)


def test_pod_deleted_by_force_is_killed_where_it_runs(kube):
    kube.create(pod("one", DEAF))
    kube.wait_until(kube.running_pods)
    (pid,) = kube.kubelet.pids("default", "one")
    kube.faults.kill_pod("one")
    assert kube.pods() == []
    kube.wait_until(lambda: not is_alive(pid))


def test_pod_deleted_by_force_works_on_while_its_node_is_cut_off(kube):
    """Two pods of one index at once: what leases in storage are for."""
    kube.settings.eviction_seconds = 600
    kube.create(indexed_job("work", DEAF, 1))
    first = running(kube)
    name, node = first["metadata"]["name"], first["spec"]["nodeName"]
    (pid,) = kube.kubelet.pids("default", name)
    kube.faults.lose_node(node, kills_processes=False)
    kube.faults.kill_pod(name)
    other_than(kube, first)
    assert is_alive(pid)
    kube.faults.return_node(node)
    kube.wait_until(lambda: not is_alive(pid))


def test_toleration_without_end_stays_on_a_lost_node(kube):
    kube.settings.eviction_seconds = 0.0
    forever = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    kube.create(pod("one", FOREVER, tolerations=[forever]))
    kube.create(pod("two", FOREVER))
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    for node in ("node-1", "node-2"):
        kube.faults.lose_node(node)
    kube.wait_until(lambda: "deletionTimestamp" in kube.pods()[1]["metadata"])
    assert "deletionTimestamp" not in kube.pods()[0]["metadata"]


def test_pod_that_never_got_a_node_goes_at_once(kube):
    gpus = {"limits": {"nvidia.com/gpu": "100"}}
    kube.create(pod("one", containers=[container(resources=gpus)]))
    kube.wait_until(lambda: kube.events("one"))
    kube.registry.delete(kinds.POD, "default", "one")
    assert kube.pods() == []


def test_faults_of_pods_that_do_not_run_are_mistakes_of_the_test(kube):
    kube.settings.start_seconds = 60
    with pytest.raises(ApiError, match="not found"):
        kube.faults.pause("nobody")


def test_bug_of_the_server_fails_the_test():
    kube = KubeServer()

    def break_it() -> None:
        with kube:
            kube.registry.list = None
            kube._controllers.append(None)
            kube.wait_until(lambda: False)

    with pytest.raises(AttributeError):
        break_it()
