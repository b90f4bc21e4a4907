"""The janitor against an API server that runs Jobs, and Airflow's answers about their tasks.

Under its own account on a real cluster: ``make test-cluster``.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from hcodec_airflow.janitor import (
    AirflowSilentError,
    AirflowState,
    JanitorOptions,
    TaskName,
    Verdict,
    main,
    sweep,
)
from hcodec_airflow.kubernetes.client import ClusterApi
from hcodec_airflow.kubernetes.connection import opener
from tests.cluster.airflow_states import TOKEN, AirflowStates
from tests.kube.server import KubeServer

HOUR = 3600.0


@pytest.fixture(scope="module")
def kube():
    with KubeServer() as server:
        yield server


@pytest.fixture
def states():
    with AirflowStates() as answers:
        answers.known_dags.add("dag")
        yield answers


def add_job(kube: KubeServer, name: str, run: str = "run", owner: str = "hcodec") -> None:
    notes = {"dag-id": "dag", "run-id": run, "task-id": "tokenize", "map-index": "-1"}
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    container = {"name": "worker", "image": "hcodec:1", "command": command}
    annotations = {f"hcodec.dev/{key}": value for key, value in notes.items()}
    kube.create(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": name,
                "labels": {"app.kubernetes.io/managed-by": owner},
                "annotations": annotations if run else {},
            },
            "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
        }
    )


def clean(
    kube: KubeServer, states: AirflowStates, min_age_seconds: float = 0.0, **options: Any
) -> dict[str, str]:
    airflow = AirflowState(states.url, TOKEN)

    async def run() -> dict[str, str]:
        extras = {"kube_config": kube.kubeconfig()}
        async with ClusterApi(opener(extras), "default") as api:
            wanted = JanitorOptions("default", min_age_seconds, **options)
            return await sweep(api, airflow, wanted)

    return asyncio.run(run())


@pytest.mark.parametrize("state", ["success", "failed", "skipped", "upstream_failed", "removed"])
def test_job_of_a_finished_task_is_deleted(kube, states, state):
    add_job(kube, f"job-{state.replace('_', '-')}")
    states.states["dag", "run", "tokenize"] = state
    (verdict,) = clean(kube, states).values()
    assert verdict == Verdict.ENDED
    kube.wait_until(lambda: not kube.pods())


@pytest.mark.parametrize(
    "state",
    ["running", "deferred", "queued", "scheduled", "restarting", "up_for_retry", None],
)
def test_job_of_a_task_that_may_go_on_is_left(kube, states, state):
    add_job(kube, "wanted")
    states.states["dag", "run", "tokenize"] = state
    assert clean(kube, states) == {"wanted": Verdict.WANTED}
    assert kube.job("wanted") is not None
    remove(kube, "wanted")


def remove(kube: KubeServer, name: str) -> None:
    kube.faults.delete_job(name)
    kube.wait_until(lambda: kube.job(name) is None and not kube.pods(name))


def test_job_of_a_deleted_run_goes_and_of_an_unknown_dag_stays(kube, states):
    add_job(kube, "gone", run="deleted")
    assert clean(kube, states) == {"gone": Verdict.DELETED_RUN}
    kube.wait_until(lambda: kube.job("gone") is None)
    states.known_dags.clear()
    add_job(kube, "others", run="deleted")
    assert clean(kube, states) == {"others": Verdict.UNKNOWN_DAG}
    assert kube.job("others") is not None
    remove(kube, "others")


def test_what_is_young_foreign_or_unlabelled_is_left(kube, states):
    states.states["dag", "run", "tokenize"] = "failed"
    add_job(kube, "young")
    assert clean(kube, states, HOUR) == {"young": Verdict.YOUNG}
    assert states.asked == []
    remove(kube, "young")
    add_job(kube, "by-hand", run="")
    add_job(kube, "not-ours", owner="someone")
    assert clean(kube, states) == {"by-hand": Verdict.FOREIGN}
    assert kube.job("not-ours") is not None
    remove(kube, "by-hand")
    remove(kube, "not-ours")


def test_age_is_by_the_servers_clock(kube, states):
    states.states["dag", "run", "tokenize"] = "failed"
    add_job(kube, "old")
    kube.clock.advance(2 * HOUR)
    assert clean(kube, states, HOUR, is_dry_run=True) == {"old": Verdict.ENDED}
    assert kube.job("old") is not None
    assert clean(kube, states, HOUR) == {"old": Verdict.ENDED}
    kube.wait_until(lambda: kube.job("old") is None)


def test_job_that_changed_since_it_was_listed_is_spared(kube, states):
    """A retry adopts a Job by stamping it while the janitor still asks about the try before."""
    states.states["dag", "run", "tokenize"] = "failed"
    add_job(kube, "adopted")
    airflow = AirflowState(states.url, TOKEN)
    judge = airflow.judge

    def judge_slowly(task: TaskName) -> Verdict:
        from tests.kube import kinds

        verdict = judge(task)
        kube.store.update(
            kinds.JOB,
            "default",
            "adopted",
            lambda job: job["metadata"]["annotations"].update(x="y"),
        )
        return verdict

    airflow.judge = judge_slowly  # type: ignore[method-assign]

    async def run() -> None:
        async with ClusterApi(opener({"kube_config": kube.kubeconfig()}), "default") as api:
            await sweep(api, airflow, JanitorOptions("default", 0.0))

    asyncio.run(run())
    assert kube.job("adopted") is not None
    remove(kube, "adopted")


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_airflow_that_cannot_tell_stops_the_sweep(kube, states, status):
    add_job(kube, "unsure")
    states.states["dag", "run", "tokenize"] = "failed"
    states.status = status
    if status == 404:
        # A proxy's page, not Airflow's answer.
        states.answer = lambda *_: (404, "no such page")
    with pytest.raises(AirflowSilentError):
        clean(kube, states)
    assert kube.job("unsure") is not None
    remove(kube, "unsure")


def test_airflow_that_is_away_is_said(states):
    silent = AirflowState("http://127.0.0.1:9", TOKEN)
    with pytest.raises(AirflowSilentError, match="no usable answer"):
        silent.judge(TaskName("dag", "run", "tokenize"))


def test_login_is_used_where_no_token_is_given(states):
    states.states["dag", "run", "tokenize"] = "running"
    task = TaskName("dag", "run", "tokenize")
    assert AirflowState(states.url, login=("janitor", "broom")).judge(task) is Verdict.WANTED
    with pytest.raises(AirflowSilentError, match="refused the log-in"):
        AirflowState(states.url, login=("janitor", "mop")).judge(task)


def test_names_are_escaped_and_mapped_tasks_named_by_their_index():
    task = TaskName("dag", "manual__2026-11-20T00:00:00+00:00/x", "group.tokenize", 3)
    assert task.path == (
        "dags/dag/dagRuns/manual__2026-11-20T00%3A00%3A00%2B00%3A00%2Fx"
        "/taskInstances/group.tokenize/3"
    )


def test_command_asks_for_a_login(monkeypatch, caplog):
    for name in ("TOKEN", "USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"HCODEC_AIRFLOW_{name}", raising=False)
    assert main(["--namespace", "hcodec", "--airflow-url", "http://127.0.0.1:9"]) == 43
    assert "set HCODEC_AIRFLOW_TOKEN" in caplog.text
