"""On a real Kubernetes: the chart, its Roles, and the tokenise DAG with workers that are killed.

Its API is that of 1.20: it proves images, chart, rights, pods and leases, not Indexed Jobs or
failure policies. The tests are one story and run in this order.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from hcodec_airflow.pipelines import MANUAL_DAG_ID
from hcodec_core.dataset.reader import TokenDatasetView, open_dataset
from tests.cluster.cluster import wait_for
from tests.cluster.conftest import COPIES
from tests.cluster.house import AIRFLOW_NAMESPACE, BUCKET, CLIPS, RELEASE, WORKERS

pytestmark = pytest.mark.cluster

NUM_WORKERS = 3
FORM = {"source": f"s3://{BUCKET}/audio/", "hours_per_shard": 0.03, "workers": NUM_WORKERS}


@pytest.fixture
def launcher(house) -> Any:
    """kubectl under the launcher's account."""
    kubeconfig = house.cluster.token_kubeconfig(
        "hcodec-launcher", AIRFLOW_NAMESPACE, house.folder / "launcher.kubeconfig"
    )

    def may(*arguments: str) -> bool:
        options = ["--kubeconfig", str(kubeconfig), "auth", "can-i", *arguments]
        return house.cluster.kubectl(*options, check=False).strip().startswith("yes")

    return may


def test_chart_is_installed_and_its_own_test_passes(house, capsys):
    listed = json.loads(house.helm("list", "--namespace", AIRFLOW_NAMESPACE, "--output", "json"))
    assert [(r["name"], r["status"]) for r in listed] == [(RELEASE, "deployed")]
    said = house.helm("test", RELEASE, "--namespace", AIRFLOW_NAMESPACE, "--logs")
    with capsys.disabled():
        print(f"\n{said}")
    assert "All verbs that are needed in namespace hcodec-test are granted." in said
    assert "Phase:          Succeeded" in said


def test_launcher_may_start_jobs_and_nothing_more(launcher):
    there = ["--namespace", WORKERS]
    assert launcher("create", "jobs.batch", *there)
    assert launcher("get", "pods", "--subresource=log", *there)
    assert not launcher("get", "secrets", *there)
    assert not launcher("create", "pods", *there)
    assert not launcher("create", "pods", "--subresource=exec", *there)
    assert not launcher("create", "jobs.batch", "--namespace", "default")
    assert not launcher("get", "nodes")


def test_connection_says_what_is_granted_and_what_is_missing(house, capsys):
    whole = house.test_connection()
    path = "/rules/0/verbs"
    verbs = ["get", "list", "watch", "create", "patch"]
    role = ["-n", WORKERS, "patch", "role", f"{RELEASE}-launcher", "--type=json", "-p"]
    house.cluster.kubectl(*role, json.dumps([{"op": "replace", "path": path, "value": verbs}]))
    try:
        without_delete = house.test_connection()
    finally:
        all_verbs = [*verbs, "delete"]
        house.cluster.kubectl(
            *role, json.dumps([{"op": "replace", "path": path, "value": all_verbs}])
        )
    with capsys.disabled():
        print(f"\nwith the Role:  {whole}\nwithout delete: {without_delete}")
    assert whole[0], whole[1]
    assert not without_delete[0]
    assert "jobs: delete." in without_delete[1]


def test_dag_with_a_killed_and_a_stopped_worker_makes_the_same_dataset_as_a_local_run(
    house, airflow, capsys
):
    run_id = airflow.start({**FORM, "dataset": "cluster"})
    killed, stopped = _disturb(house, airflow, run_id)
    assert airflow.wait(run_id) == "success", _end_of_log(airflow, run_id)
    here = airflow.start({**FORM, "dataset": "local", "backend": "local", "workers": 2})
    assert airflow.wait(here) == "success", _end_of_log(airflow, here)
    config = house.folder / "hcodec.toml"
    ours, theirs = (open_dataset(config, name) for name in ("cluster", "local"))
    num_codes = _compare(ours, theirs)
    released = _released(house)
    with capsys.disabled():
        print(
            f"\n{len(ours)} objects, {num_codes} codes: equal to the local run. Killed outright: "
            f"{killed}, and a triggerer; stopped politely: {stopped}. Leases given back: {released}"
        )
        for line in airflow.log(run_id):
            print("  " + line.strip()[:150])
    assert len(ours) == COPIES * len(list(CLIPS.iterdir()))
    assert released


def _end_of_log(airflow, run_id: str) -> str:
    return "\n".join(airflow.log(run_id)[-60:])


def _disturb(house, airflow, run_id: str) -> tuple[str, str]:
    """Kill one worker and the triggerer outright, stop another worker, in the middle of it all."""

    def running() -> list[str]:
        assert airflow.state(run_id) in {"queued", "running"}, _end_of_log(airflow, run_id)
        return _running_pods(house)

    def working() -> list[str]:
        names = running()
        num_held, num_done = len(_work(house, "/leases/")), len(_work(house, "/results/"))
        return names if len(names) == NUM_WORKERS and num_held > num_done >= 1 else []

    names = wait_for(working, "three workers in the middle of their work", 900)
    _delete(house, names[0], "--force", "--grace-period=0")
    _delete(house, names[1])
    airflow.kill_triggerer()
    wait_for(lambda: set(_running_pods(house)) - set(names), "pods in their place", 300)
    airflow.start_triggerer()
    return names[0], names[1]


def _running_pods(house) -> list[str]:
    pods = house.cluster.objects("pods", "-n", WORKERS)
    return [p["metadata"]["name"] for p in pods if p["status"].get("phase") == "Running"]


def _delete(house, pod: str, *options: str) -> None:
    house.cluster.kubectl("-n", WORKERS, "delete", "pod", pod, "--wait=false", *options)


def _work(house, part: str) -> list[str]:
    objects = house.storage.list_objects(f"s3://{BUCKET}/tokens/work/")
    return [info.uri for info in objects if part in info.uri]


def _released(house) -> list[str]:
    """Why leases were given back: by a worker that was stopped, or for one that is gone."""
    uris = [uri for uri in _work(house, "/leases/") if uri.endswith(".released.json")]
    return [json.loads(house.storage.read(uri))["detail"] for uri in uris]


def _compare(ours: TokenDatasetView, theirs: TokenDatasetView) -> int:
    """Every object once, with the same codes; returns how many codes were compared."""
    expected = {row.uri: row for row in theirs}
    found = [row.uri for row in ours]
    assert len(found) == len(set(found)) == len(expected)
    assert set(found) == set(expected)
    num_codes = 0
    for row in ours:
        other = expected[row.uri]
        assert (row.etag, row.num_samples, row.num_frames) == (
            other.etag,
            other.num_samples,
            other.num_frames,
        )
        for name, codes in row.codes.items():
            np.testing.assert_array_equal(codes, other.codes[name], err_msg=row.uri)
            num_codes += codes.size
    return num_codes


def test_workers_had_no_token_and_a_fake_gpu(house):
    """Pods are gone by now, so the Job's template is asked; 1.20 dropped what it did not know."""
    jobs = house.cluster.objects("jobs", "-n", WORKERS)
    # The audit of the same plan is a Job of its own.
    (job,) = (j for j in jobs if j["metadata"]["name"].startswith("hcodec-tokenize-"))
    spec = job["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert job["spec"]["parallelism"] == NUM_WORKERS
    if house.has_gpus:
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_task_marked_failed_while_no_triggerer_is_up_leaves_no_pod(house, airflow, capsys):
    run_id = airflow.start({**FORM, "dataset": "stopped"})

    def is_working() -> bool:
        return airflow.task_state(run_id) == "deferred" and bool(_running_pods(house))

    wait_for(is_working, "workers of a deferred task", 900)
    airflow.kill_triggerer()
    marked_at = time.monotonic()
    airflow.api.mark_failed(MANUAL_DAG_ID, run_id, "tokenize")
    wait_for(lambda: not _pods_left(house), "an end of all pods", 120)
    seconds = time.monotonic() - marked_at
    airflow.start_triggerer()
    with capsys.disabled():
        print(f"\nno worker left {seconds:.0f} s after the mark")
    assert airflow.wait(run_id) == "failed"


def _pods_left(house) -> list[str]:
    pods = house.cluster.objects("pods", "-n", WORKERS)
    ended = ("Succeeded", "Failed")
    return [p["metadata"]["name"] for p in pods if p["status"].get("phase") not in ended]


def test_janitor_deletes_the_orphan_and_nothing_else(house, airflow_states, capsys):
    airflow_states.known_dags.add("tokenize_corpus")
    tasks = {
        "orphan": ("failed", True),
        "wanted": ("deferred", False),
        "run-is-gone": ("absent", True),
        "waits-for-retry": ("up_for_retry", False),
    }
    for name, (state, _) in tasks.items():
        if state != "absent":
            airflow_states.states["tokenize_corpus", name, "tokenize"] = state
        house.cluster.kubectl("apply", "-f", "-", text=json.dumps(_sleeping_job(house, name)))
    house.cluster.kubectl("apply", "-f", "-", text=json.dumps(_janitor_job(house)))

    def ended() -> str:
        (job,) = house.cluster.objects(
            "jobs", "-n", AIRFLOW_NAMESPACE, "--field-selector", "metadata.name=janitor-by-hand"
        )
        return "".join(c["type"] for c in job["status"].get("conditions", []))

    verdict = wait_for(ended, "the janitor", 300)
    said = house.cluster.kubectl("-n", AIRFLOW_NAMESPACE, "logs", "job/janitor-by-hand")
    with capsys.disabled():
        print(f"\n{said}")
    assert verdict == "Complete", said

    def left() -> set[str]:
        jobs = house.cluster.objects("jobs", "-n", WORKERS, "-l", "test=janitor")
        return {job["metadata"]["name"] for job in jobs}

    kept = {name for name, (_, is_orphan) in tasks.items() if not is_orphan}
    wait_for(lambda: left() == kept, f"{kept} alone to be left", 60)


def _sleeping_job(house, name: str) -> dict[str, Any]:
    notes = {"dag-id": "tokenize_corpus", "run-id": name, "task-id": "tokenize", "map-index": "-1"}
    container = {
        "name": "worker",
        "image": house.worker_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "600"],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": WORKERS,
            "labels": {"app.kubernetes.io/managed-by": "hcodec", "test": "janitor"},
            "annotations": {f"hcodec.dev/{key}": value for key, value in notes.items()},
        },
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }


def _janitor_job(house) -> dict[str, Any]:
    """What the CronJob would start, without its age floor: nothing here is an hour old."""
    (cron,) = house.cluster.objects("cronjobs", "-n", AIRFLOW_NAMESPACE)
    spec = cron["spec"]["jobTemplate"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    container["args"] = [
        "--min-age-seconds=0" if word.startswith("--min-age") else word
        for word in container["args"]
    ]
    metadata = {"name": "janitor-by-hand", "namespace": AIRFLOW_NAMESPACE}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
