"""The backend on the test API server: adopt or create, generations, faults, why pods wait.

Workers are a few lines of Python here; ``test_kube_matrix.py`` has real ones.
"""

from __future__ import annotations

import json
import logging
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hcodec_airflow.backends.base import Phase, Timeouts
from hcodec_airflow.kubernetes.connection import (
    RIGHTS,
    HCodecKubernetesHook,
    missing_rights,
    opener,
)
from hcodec_airflow.kubernetes.manifest import OWNER, job_manifest
from hcodec_airflow.progress import JobSize
from hcodec_airflow.states import JobState
from hcodec_core.dataset.batch_choice import read_batch_choice
from hcodec_core.dataset.leases import EndingKind, read_ending
from hcodec_core.errors import AccessError, ConfigError
from hcodec_core.jobs import WorkerProgress
from tests.cluster.certificates import Authority
from tests.kube import kinds
from tests.kube.server import ALL_GROUPS, KubeServer, NodeSpec
from tests.operators.kube_bed import Bed, Triggerer, wait_until

SIZE = JobSize(num_shards=2, num_files=4)
COMMON = """
import os, pathlib, signal, sys, time
plan = pathlib.Path(sys.argv[2].removeprefix("file://")).parent
index = int(os.environ["JOB_COMPLETION_INDEX"])
def finish(*shards):
    (plan / "results").mkdir(exist_ok=True)
    for shard in shards:
        (plan / "results" / f"s{shard}.json").write_text("{}")
def stop(*_):
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
def wait_for(name):
    while not (plan / name).exists():
        time.sleep(0.05)
"""
FINISH = COMMON + "print('working', flush=True); finish(index)"
HANG = COMMON + "print('waiting', flush=True); wait_for('go'); finish(index)"
REFUSE = COMMON + "print('hcodec: No such device.', flush=True); sys.exit(43)"
FAIL = COMMON + "print('cannot', flush=True); sys.exit(1)"
LEAVE = COMMON + "(None if (plan / 'go').exists() else sys.exit(0)); finish(0, 1)"


@pytest.fixture
def kube():
    with KubeServer(groups=ALL_GROUPS) as server:
        yield server


@pytest.fixture
def make_bed(kube, tmp_path, write_job):
    def make(script, **profile):
        bed = Bed(kube, tmp_path, command=[sys.executable, "-c", script], **profile)
        write_job(bed.storage, f"file://{tmp_path}/plan")
        bed.plan = tmp_path / "plan"
        bed.wanted = bed.request(f"file://{tmp_path}/plan", max_restarts=1)
        return bed

    return make


def _watch(bed, owner="try-1", request=None):
    return Triggerer(bed, request or bed.wanted, owner, SIZE, poll_seconds=0.1)


def _submit(bed, owner="try-1", request=None):
    return bed.backend().submit_or_adopt(request or bed.wanted, owner)


def _go(bed):
    (bed.plan / "go").touch()


def test_done_by_one_job_with_logs_kept(make_bed, kube):
    bed = make_bed(FINISH)
    _submit(bed)
    verdict = _watch(bed).wait()
    assert verdict.state is JobState.DONE
    assert len(bed.jobs(bed.wanted)) == 1
    names = [path.name for path in (bed.plan / "logs").iterdir()]
    assert len([name for name in names if name.endswith(".log")]) == 2
    assert "index.html" in names
    log = next(path for path in (bed.plan / "logs").iterdir() if path.name.endswith(".log"))
    assert "working" in log.read_text()


def test_lists_are_watched_and_not_asked_again_and_again(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    threading.Event().wait(3.0)  # thirty looks
    num_lists = sum(verb == "list" for verb, _ in kube.requests)
    _go(bed)
    watch.wait()
    assert num_lists < 12


def test_the_manifest_is_accepted_by_a_namespace_that_enforces_restricted(make_bed, kube):
    kube.enforce_pod_security()
    bed = make_bed(FINISH, gpus=1, tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}])
    _submit(bed)
    assert _watch(bed).wait().state is JobState.DONE


def test_another_try_adopts_and_the_first_can_no_longer_kill(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed, "try-1")
    _submit(bed, "try-2")
    (job,) = bed.active_jobs(bed.wanted)
    assert job["metadata"]["annotations"][OWNER] == "try-2"
    assert not bed.backend().kill(bed.wanted, "try-1")
    assert len(bed.active_jobs(bed.wanted)) == 1
    assert bed.backend().kill(bed.wanted, "try-2")
    assert bed.active_jobs(bed.wanted) == []
    kube.wait_until(lambda: not kube.pods(), "the pods' end")


def test_four_submitters_at_once_make_one_job(make_bed):
    bed = make_bed(HANG)
    threads = [threading.Thread(target=_submit, args=(bed, f"try-{n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bed.jobs(bed.wanted)) == 1


def test_a_killed_job_is_not_started_again_by_a_watch_that_wakes_up(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    watch.hang()
    assert bed.backend().kill(bed.wanted, "try-1")
    kube.wait_until(lambda: not kube.pods())
    watch.wake()
    assert watch.wait().state is JobState.KILLED
    assert bed.jobs(bed.wanted) == []


def test_after_a_kill_the_next_try_begins_a_new_generation(make_bed):
    bed = make_bed(HANG)
    _submit(bed, "try-1")
    bed.backend().kill(bed.wanted, "try-1")
    _submit(bed, "try-2")
    (job,) = bed.active_jobs(bed.wanted)
    assert job["metadata"]["name"].endswith("-g1")


def test_a_refused_job_fails_at_once_with_the_workers_sentence(make_bed):
    bed = make_bed(REFUSE)
    _submit(bed)
    verdict = _watch(bed).wait()
    assert (verdict.state, verdict.is_retryable) == (JobState.FAILED, False)
    assert "refused the job: No such device." in verdict.message


def test_workers_that_never_succeed_end_after_so_many_generations(make_bed):
    bed = make_bed(FAIL)
    _submit(bed)
    verdict = _watch(bed).wait()
    assert (verdict.state, verdict.is_retryable) == (JobState.FAILED, True)
    assert "2 of 2 shards pending, after 1 restarts each" in verdict.message
    assert {job["metadata"]["name"][-2:] for job in bed.jobs(bed.wanted)} == {"g0", "g1"}


def test_a_complete_job_with_missing_results_is_followed_by_the_next(make_bed):
    bed = make_bed(LEAVE)
    _submit(bed)
    watch = _watch(bed)
    wait_until(lambda: len(bed.jobs(bed.wanted)) == 2)
    _go(bed)
    assert watch.wait().state in {JobState.DONE, JobState.FAILED}  # g1 may have been the last
    _submit(bed, "try-2")
    assert _watch(bed, "try-2").wait().state is JobState.DONE


def test_a_job_deleted_under_us_is_started_again(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    kube.faults.delete_job(bed.jobs(bed.wanted)[0]["metadata"]["name"])
    wait_until(lambda: [j["metadata"]["name"][-2:] for j in bed.active_jobs(bed.wanted)] == ["g1"])
    _go(bed)
    assert watch.wait().state is JobState.DONE


def test_a_job_gone_with_its_results_complete_is_done(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    watch.hang()
    _go(bed)
    name = bed.jobs(bed.wanted)[0]["metadata"]["name"]
    kube.wait_for_job(name)
    kube.faults.delete_job(name)
    kube.wait_until(lambda: not kube.pods())
    watch.wake()
    assert watch.wait().state is JobState.DONE


def test_faults_of_the_server_are_lived_through(make_bed, kube, caplog):
    bed = make_bed(HANG)
    kube.faults.throttle("list", "jobs", retry_after_seconds=1)
    kube.faults.fail(500, "create", "jobs")
    kube.faults.reset_connection("list", "pods")
    kube.faults.watch_expired(2)
    _submit(bed)
    watch = _watch(bed)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    kube.faults.drop_watches()
    kube.faults.compact()
    kube.faults.fail(503, "watch", "pods", times=2)
    kube.faults.go_away(2.0)
    threading.Event().wait(3.0)
    _go(bed)
    assert watch.wait().state is JobState.DONE
    assert len(bed.jobs(bed.wanted)) == 1


def test_a_token_that_expires_is_replaced(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    for number in range(3):
        kube.token = f"token-{number}"
        kube.write_kubeconfig(bed.kubeconfig)
        kube.faults.drop_watches()
        threading.Event().wait(1.0)
    _go(bed)
    assert watch.wait().state is JobState.DONE


def test_a_missing_permission_is_told_with_the_verb(make_bed, kube):
    bed = make_bed(FINISH)
    kube.permissions.deny("create", "jobs")
    with pytest.raises(AccessError, match=r"403 to POST .*/jobs: .*Give the account that verb"):
        _submit(bed)


def test_a_template_that_loosens_security_is_refused_before_anything_is_asked(make_bed, kube):
    bed = make_bed(FINISH)
    template = {"spec": {"hostNetwork": True}}
    wrong = bed.request(bed.wanted.plan_uri, pod_template=template)
    with pytest.raises(ConfigError, match=r"pod_template of the task: spec\.hostNetwork"):
        _submit(bed, request=wrong)
    assert kube.requests == []


def _reason(bed, request=None):
    return bed.backend().observe(request or bed.wanted)


def test_quota_is_queued_with_the_servers_words(make_bed, kube):
    kube.set_quota({"pods": "0"})
    bed = make_bed(FINISH)
    _submit(bed)
    observation = wait_until(lambda: (o := _reason(bed)).phase is Phase.QUEUED and o)
    assert "exceeded quota" in observation.reason
    watch = _watch(bed)
    kube.set_quota({"pods": "10"})
    assert watch.wait().state is JobState.DONE


def test_unschedulable_is_queued_and_its_own_timeout_is_by_the_servers_clock(make_bed, kube):
    bed = make_bed(FINISH, gpus=64)
    request = bed.request(
        bed.wanted.plan_uri, timeouts=Timeouts(queue_seconds=600, startup_seconds=1)
    )
    _submit(bed, request=request)
    observation = wait_until(lambda: (o := _reason(bed, request)).reason and o)
    assert observation.phase is Phase.QUEUED
    assert "Unschedulable" in observation.reason
    assert "nvidia.com/gpu" in observation.reason
    watch = _watch(bed, request=request)
    threading.Event().wait(1.5)
    assert watch.verdict is None  # start-up time does not run while it is queued
    kube.clock.advance(601)
    verdict = watch.wait()
    assert verdict.state is JobState.FAILED
    assert "No worker was given resources within 600 s (Unschedulable" in verdict.message
    assert bed.active_jobs(request) == []


def test_a_broken_image_is_told_and_ends_by_the_start_up_timeout(make_bed, kube, caplog):
    caplog.set_level(logging.INFO)
    kube.faults.break_image("worker:test")
    bed = make_bed(FINISH)
    request = bed.request(bed.wanted.plan_uri, timeouts=Timeouts(startup_seconds=300))
    _submit(bed, request=request)
    wait_until(lambda: "ImagePull" in _reason(bed, request).reason)
    assert _reason(bed, request).phase is Phase.SCHEDULING
    watch = _watch(bed, request=request)
    wait_until(lambda: "ImagePull" in caplog.text, "the reason in the task's log", 40)
    kube.clock.advance(301)
    assert "No worker started within 300 s (" in watch.wait().message


def test_run_timeout_is_by_the_servers_clock(make_bed, kube):
    bed = make_bed(HANG)
    request = bed.request(bed.wanted.plan_uri, timeouts=Timeouts(run_seconds=3600))
    _submit(bed, request=request)
    watch = _watch(bed, request=request)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    kube.clock.advance(3700)
    assert "The workers were not done within 3600 s" in watch.wait().message
    kube.wait_until(lambda: not kube.pods())


def test_kueue_queues_without_timeout_and_preemption_is_no_failure(make_bed, kube, caplog):
    caplog.set_level(logging.INFO)
    bed = make_bed(HANG, kueue_queue="tokens")
    _submit(bed)
    watch = _watch(bed)
    wait_until(lambda: "queued (Kueue" in caplog.text)
    kube.clock.advance(86_400)
    kube.add_queue("tokens", {"pods": 2})
    before = kube.wait_until(lambda: len(p := kube.running_pods()) == 2 and _names(p))
    # Let go of the queue's quota, so that it cannot be admitted again at once.
    kube.store.update(kinds.CLUSTER_QUEUE, "", "tokens", lambda q: _hold(q, True))
    kube.kueue.preempt(bed.jobs(bed.wanted)[0]["metadata"]["name"])
    wait_until(lambda: caplog.text.count("queued (Kueue") >= 2, "queued again", 40)
    kube.store.update(kinds.CLUSTER_QUEUE, "", "tokens", lambda q: _hold(q, False))
    kube.wait_until(lambda: len(p := kube.running_pods()) == 2 and not before & _names(p))
    _go(bed)
    assert watch.wait().state is JobState.DONE
    assert len(bed.jobs(bed.wanted)) == 1


def _names(pods):
    return {pod["metadata"]["name"] for pod in pods}


def _hold(queue, is_held):
    queue["spec"]["stopPolicy"] = "Hold" if is_held else "None"


def _report(bed, pod, shard):
    report = WorkerProgress(
        worker_id=f"{pod['metadata']['uid']}-{'a' * 8}",
        plan_id="p1",
        sequence=1,
        phase="encode",
        held_shards={shard: 1},
    )
    uri = f"{bed.wanted.plan_uri}/workers/{report.worker_id}.json"
    bed.storage.write(uri, report.model_dump_json().encode())


@pytest.mark.parametrize("way", ["evict", "preempt", "kill_pod", "remove_node"])
def test_shards_of_pods_taken_away_are_released_uncounted(make_bed, kube, way):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    first, second = kube.wait_until(lambda: len(p := kube.running_pods()) == 2 and p)
    _report(bed, first, "shard-a")
    _report(bed, second, "shard-b")
    name = first["metadata"]["name"]
    if way == "remove_node":
        kube.nodes.add(NodeSpec("node-3"))
    fault = getattr(kube.faults, way)
    fault(first["spec"]["nodeName"] if way == "remove_node" else name)
    leases = f"{bed.wanted.plan_uri}/leases"
    ending = wait_until(lambda: read_ending(bed.storage, f"{leases}/shard-a", 1), "its release")
    assert ending.kind is EndingKind.RELEASED
    if second["spec"]["nodeName"] != first["spec"]["nodeName"] or way != "remove_node":
        assert read_ending(bed.storage, f"{leases}/shard-b", 1) is None
    _go(bed)
    assert watch.wait().state is JobState.DONE


def test_a_crash_is_not_released_and_counts(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    first, _ = kube.wait_until(lambda: len(p := kube.running_pods()) == 2 and p)
    _report(bed, first, "shard-a")
    kube.faults.kill_process(first["metadata"]["name"])
    kube.wait_until(lambda: len(kube.pods()) == 3)
    threading.Event().wait(1.0)
    assert read_ending(bed.storage, f"{bed.wanted.plan_uri}/leases/shard-a", 1) is None
    _go(bed)
    assert watch.wait().state is JobState.DONE


def test_lack_of_memory_leads_to_the_next_batch_class(make_bed, kube, caplog):
    bed = make_bed(HANG)
    _submit(bed)
    watch = _watch(bed)
    first, _ = kube.wait_until(lambda: len(p := kube.running_pods()) == 2 and p)
    _report(bed, first, "shard-a")
    kube.faults.kill_for_memory(first["metadata"]["name"])
    plan_uri = bed.wanted.plan_uri
    wait_until(lambda: read_batch_choice(bed.storage, plan_uri).index == 1, "the next class")
    wait_until(lambda: read_ending(bed.storage, f"{plan_uri}/leases/shard-a", 1))
    _go(bed)
    assert watch.wait().state is JobState.DONE
    assert "was ended by the system for want of memory (OOMKilled)" in caplog.text
    assert "batch class 1 (held batches 3" in caplog.text
    assert read_batch_choice(bed.storage, plan_uri).index == 1


async def test_access_reviews_name_every_missing_verb(make_bed, kube):
    from hcodec_airflow.kubernetes.client import ClusterApi
    from hcodec_airflow.kubernetes.connection import _review

    bed = make_bed(FINISH)
    open_client = opener({"kube_config_path": str(bed.kubeconfig)})
    rules = [
        {"apiGroups": [r.group], "resources": [r.resource], "verbs": list(r.verbs)} for r in RIGHTS
    ]
    kube.permissions.use_role(rules, "default")
    async with ClusterApi(open_client, "default") as api:
        assert await missing_rights(api, RIGHTS) == []
    kube.permissions.deny("delete", "jobs")
    kube.permissions.deny("get", "pods/log")
    is_good, message = await _review(open_client, "default")
    assert not is_good
    assert "jobs: delete; pods/log: get" in message


class GrantingServer(BaseHTTPRequestHandler):
    """An API server that grants everything and serves nothing else."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer({"groups": []})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"status": {"allowed": True}})

    def _answer(self, body):
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def foreign_certificate(tmp_path):
    """URL of an API server whose certificate is not for its address."""
    pair = Authority(tmp_path).issue("server", addresses=("elsewhere.example",))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.certificate, pair.key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), GrantingServer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("is_unchecked", [False, True, "true"])
def test_connection_may_leave_the_certificate_unchecked(
    foreign_certificate, tmp_path, monkeypatch, is_unchecked
):
    path = tmp_path / "kubeconfig"
    text = Authority(tmp_path).kubeconfig(foreign_certificate, {"token": "t"})
    path.write_text(text)
    extra = {"kube_config_path": str(path), "namespace": "n", "disable_verify_ssl": is_unchecked}
    connection = json.dumps({"conn_type": "hcodec_kubernetes", "extra": extra})
    monkeypatch.setenv("AIRFLOW_CONN_HCODEC_KUBERNETES", connection)
    is_good, message = HCodecKubernetesHook().test_connection()
    assert is_good is bool(is_unchecked), message
    assert is_good or "certificate" in message.lower()


def test_the_button_test_of_the_connection(make_bed, kube, monkeypatch):
    bed = make_bed(FINISH)
    extra = {"kube_config_path": str(bed.kubeconfig), "namespace": "default"}
    connection = json.dumps({"conn_type": "hcodec_kubernetes", "extra": extra})
    monkeypatch.setenv("AIRFLOW_CONN_HCODEC_KUBERNETES", connection)
    hook = HCodecKubernetesHook()
    is_good, message = hook.test_connection()
    assert is_good
    assert message.startswith("All ")
    kube.permissions.deny("watch", "pods")
    assert hook.test_connection() == (
        False,
        "In namespace default the account may not: pods: watch. Bind it to the launcher Role of "
        "the chart, or to one with these verbs.",
    )
    assert "no Airflow connection 'other'" in HCodecKubernetesHook("other").test_connection()[1]


def test_a_killed_jobs_logs_are_kept(make_bed, kube):
    bed = make_bed(HANG)
    _submit(bed)
    kube.wait_until(lambda: len(kube.running_pods()) == 2)
    wait_until(lambda: all("waiting" in kube.log(name) for name in _names(kube.running_pods())))
    bed.backend().kill(bed.wanted, "try-1")
    logs = [path.read_text() for path in (bed.plan / "logs").glob("*.log")]
    assert len(logs) == 2
    assert all("waiting" in log for log in logs)


def test_manifest_needs_no_cluster(make_bed, kube):
    bed = make_bed(FINISH)
    text = bed.backend().manifest(bed.wanted)
    assert text.startswith("apiVersion: batch/v1\nkind: Job\n")
    assert kube.requests == []


def test_names_are_the_same_for_every_try_and_fit(make_bed):
    bed = make_bed(FINISH)
    profile = bed.config.profile("")
    first = job_manifest(bed.wanted, profile, "default", "try-1")
    second = job_manifest(bed.wanted, profile, "default", "try-2")
    assert first["metadata"]["name"] == second["metadata"]["name"]
    assert len(first["metadata"]["name"]) + len("-999") <= 63


async def test_a_view_whose_version_expired_lists_again(make_bed, kube):
    import asyncio

    from hcodec_airflow.kubernetes.client import ClusterApi
    from hcodec_airflow.kubernetes.view import Collection, JobView

    bed = make_bed(HANG)
    paths = ("/apis/batch/v1/namespaces/default/jobs", "/api/v1/namespaces/default/pods")
    open_client = opener({"kube_config_path": str(bed.kubeconfig)})
    async with ClusterApi(open_client, "default") as api:
        view = JobView(api, *(Collection(path, "") for path in paths))
        task = asyncio.create_task(view.follow())
        await view.wait_until_ready(30, task)
        kube.faults.compact()
        kube.faults.drop_watches()
        await asyncio.to_thread(_submit, bed)
        async with asyncio.timeout(60):
            while not (view.workloads.objects and len(view.pods.objects) == 2):
                await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
