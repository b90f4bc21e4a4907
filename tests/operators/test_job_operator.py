"""The job operator and its trigger, from ``execute`` through the deferral to the result."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred

from hcodec_airflow.backends import processes
from hcodec_airflow.backends.base import Phase
from hcodec_airflow.backends.local import LocalBackend, open_backend
from hcodec_airflow.dataset_operators import ReleaseLockOperator
from hcodec_airflow.job_operator import CodecJobOperator
from hcodec_airflow.settings import read_settings
from hcodec_airflow.triggers import CodecJobTrigger, request_from

FINISH = """
import pathlib, sys
plan = pathlib.Path(sys.argv[2])
for folder, name, text in (
    ("results", f"s{sys.argv[1]}.json", "{}"),
    ("workers", f"w{sys.argv[1]}.json", sys.argv[3]),
):
    (plan / folder).mkdir(exist_ok=True)
    (plan / folder / name).write_text(text)
"""
HEARTBEAT = (
    '{"worker_id": "w", "plan_id": "p1", "sequence": 1, "phase": "encode", "num_files": 2,'
    ' "audio_seconds": 1.5, "num_tokens": 75}'
)
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def job(tmp_path, monkeypatch, storage, write_job):
    """A job document on local files, with Airflow configured to find them."""
    folder = tmp_path / "plan"
    config = tmp_path / "hcodec.toml"
    config.write_text(
        f'[access]\nsource_prefixes = ["file://{tmp_path}"]\n'
        f'destination_prefixes = ["file://{tmp_path}"]\n'
        f'[catalog]\nuri = "sqlite:///{tmp_path}/c.db"\nwarehouse_uri = "file://{tmp_path}/wh"\n'
        f'[work]\nwork_uri = "file://{tmp_path}/work"\n'
    )
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", str(config))
    monkeypatch.setenv("AIRFLOW__HCODEC__LOCAL_STATE_DIR", str(tmp_path / "state"))
    return write_job(storage, f"file://{folder}")


@pytest.fixture
def run_script(monkeypatch, job):
    """Let workers run a script; ends those that are left."""

    def set_script(script):
        import sys

        def command(self, request, folder, index):
            plan_path = request.plan_uri.removeprefix("file://")
            return [sys.executable, "-c", script, str(index), plan_path, HEARTBEAT]

        monkeypatch.setattr(LocalBackend, "_command", command)

    yield set_script
    for path in (processes.Path(job.plan_uri.removeprefix("file://")) / "backend").glob("*.json"):
        workers = json.loads(path.read_text())["workers"]
        groups = [processes.ProcessGroup(w["pid"], w["started_at"]) for w in workers]
        processes.stop(groups, grace_seconds=0)


def _context(try_id="try-1"):
    pushed = {}
    task = SimpleNamespace(id=try_id, dag_id="d", run_id="r", task_id="tokenize", map_index=-1)
    task.xcom_push = lambda key, value: pushed.update({key: value})
    return {"ti": task, "pushed": pushed}


def _operator(job, **options):
    return CodecJobOperator(task_id="tokenize", job=f"{job.plan_uri}/job.json", **options)


def _defer(operator, context) -> TaskDeferred:
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(context)
    return caught.value


def _rebuilt(trigger) -> CodecJobTrigger:
    """The trigger as another process makes it from what Airflow stored."""
    path, kwargs = trigger.serialize()
    assert path == "hcodec_airflow.triggers.CodecJobTrigger"
    return CodecJobTrigger(**json.loads(json.dumps(kwargs)))


async def _event(trigger):
    return (await anext(trigger.run())).payload


def _observe(trigger):
    return open_backend(read_settings()).observe(request_from(trigger.request))


async def test_done(job, run_script):
    run_script(FINISH)
    operator = _operator(job, workers="2", poll_seconds=0.1)
    deferred = _defer(operator, _context())
    assert deferred.timeout is None
    event = await _event(_rebuilt(deferred.trigger))
    assert event["state"] == "done"
    result = getattr(operator, deferred.method_name)(_context(), event=event)
    assert result["job_uri"] == f"{job.plan_uri}/job.json"
    assert (result["num_shards_done"], result["num_files"]) == (2, 4)
    assert (result["audio_seconds"], result["num_tokens"]) == (3.0, 150)
    assert len(json.dumps(result)) < 500


async def test_refused_job_is_not_retried(job, run_script):
    run_script("import sys; print('hcodec: No such device.'); sys.exit(43)")
    operator = _operator(job, poll_seconds=0.1)
    deferred = _defer(operator, _context())
    event = await _event(_rebuilt(deferred.trigger))
    with pytest.raises(AirflowFailException, match=r"Worker \d refused the job: No such device\."):
        operator.execute_complete(_context(), event=event)


async def test_workers_that_fail_are_retried(job, run_script):
    run_script("raise SystemExit(1)")
    operator = _operator(job, max_restarts=0, poll_seconds=0.1)
    deferred = _defer(operator, _context())
    event = await _event(_rebuilt(deferred.trigger))
    with pytest.raises(AirflowException, match="2 of 2 shards pending") as caught:
        operator.execute_complete(_context(), event=event)
    assert not isinstance(caught.value, AirflowFailException)


async def test_a_finished_job_starts_no_workers(job, run_script, storage):
    run_script(SLEEP)
    for shard in range(2):
        storage.write(f"{job.plan_uri}/results/s{shard}.json", b"{}")
    result = _operator(job).execute(_context())
    assert (result["num_shards_done"], result["num_files"]) == (2, 4)
    assert storage.head(f"{job.plan_uri}/backend/tokenize-p1.json") is None


def test_never_more_workers_than_shards(job, run_script):
    run_script(SLEEP)
    deferred = _defer(_operator(job, workers=5), _context())
    assert len(_observe(deferred.trigger).workers) == 2


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"workers": "many"}, "workers is 'many'"),
        ({"workers": 0}, "workers is 0"),
        ({"backend": "slurm"}, "There is no backend 'slurm'"),
        ({"backend": "kubernetes"}, "set kubernetes_file in section"),
        ({"executor": "CeleryExecutor"}, "cannot run under CeleryExecutor"),
    ],
)
def test_wrong_use_is_refused_with_a_sentence(job, run_script, options, fault):
    run_script(SLEEP)
    with pytest.raises(AirflowFailException, match=fault):
        _operator(job, **options).execute(_context())


def test_missing_configuration_names_the_option(job, monkeypatch):
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", "")
    with pytest.raises(AirflowFailException, match="AIRFLOW__HCODEC__CONFIG_FILE"):
        _operator(job).execute(_context())


def test_operator_on_kill_stops_what_it_started(job, run_script):
    run_script(SLEEP)
    operator = _operator(job)
    deferred = _defer(operator, _context())
    assert _observe(deferred.trigger).phase is Phase.RUNNING
    operator.on_kill()
    assert _observe(deferred.trigger).phase is Phase.KILLED


@pytest.fixture
def on_kill(monkeypatch, job, run_script):
    """Runs a trigger's ``on_kill`` while Airflow says that the task is in ``state``."""
    run_script(SLEEP)
    deferred = _defer(_operator(job), _context())

    async def run(state, key="tokenize", map_index=-1):
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        def states(**asked):
            assert asked == {
                "dag_id": "d", "task_ids": ["tokenize"], "run_ids": ["r"], "map_index": map_index,
            }  # fmt: skip
            if isinstance(state, Exception):
                raise state
            return {"r": {key: state}}

        monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", staticmethod(states))
        trigger = _rebuilt(deferred.trigger)
        trigger.task_instance = SimpleNamespace(
            **{**vars(_context()["ti"]), "map_index": map_index}
        )
        await trigger.on_kill()
        return _observe(trigger).phase

    run.deferred = deferred
    return run


async def test_trigger_taken_by_another_triggerer_kills_nothing(on_kill):
    assert await on_kill("deferred") is Phase.RUNNING
    assert await on_kill("deferred", key="tokenize_3", map_index=3) is Phase.RUNNING


async def test_marked_or_cleared_task_stops_its_workers(on_kill):
    assert await on_kill("failed") is Phase.KILLED


async def test_cleared_task_has_no_state(on_kill):
    assert await on_kill(None) is Phase.KILLED


async def test_unknown_state_kills_nothing(on_kill):
    with pytest.raises(RuntimeError):
        await on_kill(RuntimeError("API server is gone"))
    assert await on_kill("deferred") is Phase.RUNNING


async def test_on_kill_goes_on_when_airflow_cancels_it_again(on_kill, monkeypatch, wait_until):
    """Airflow 3.3 cancels a trigger every second until it has ended."""
    phases = []
    ask = CodecJobTrigger._task_state

    async def slow(self):
        await asyncio.sleep(0.3)
        return await ask(self)

    monkeypatch.setattr(CodecJobTrigger, "_task_state", slow)
    killing = asyncio.ensure_future(on_kill("failed"))
    for _ in range(3):
        await asyncio.sleep(0.05)
        killing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await killing
    deferred = on_kill.deferred
    for _ in range(100):
        phases.append(_observe(deferred.trigger).phase)
        if phases[-1] is Phase.KILLED:
            break
        await asyncio.sleep(0.05)
    assert phases[0] is Phase.RUNNING
    assert phases[-1] is Phase.KILLED


async def test_late_on_kill_spares_the_workers_of_a_newer_try(on_kill, job):
    _defer(_operator(job), _context("try-2"))
    assert await on_kill("running") is Phase.RUNNING


@pytest.fixture
def end_run(monkeypatch, job, run_script):
    """Runs a run's last task: a try of the job is deferred, Airflow says the task is ``state``."""
    run_script(SLEEP)
    context = _context()
    deferred = _defer(_operator(job), context)

    def run(state, returned=None):
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        states = staticmethod(lambda **_: {"r": {"tokenize": state} if state else {}})
        monkeypatch.setattr(RuntimeTaskInstance, "get_task_states", states)
        stored = json.loads(json.dumps({**context["pushed"], "return_value": returned}))

        def pull(task_ids, key="return_value"):
            assert task_ids == "tokenize"
            return stored.get(key)

        teardown = SimpleNamespace(dag_id="d", run_id="r", xcom_pull=pull)
        release = ReleaseLockOperator(task_id="release", lock={}, job_tasks=["tokenize"])
        release.execute({"ti": teardown})
        return _observe(deferred.trigger).phase

    return run


@pytest.mark.parametrize("state", ["failed", "skipped", "success", "removed"])
def test_end_of_a_run_stops_what_an_ended_task_left(end_run, state):
    assert end_run(state) is Phase.KILLED


@pytest.mark.parametrize("state", ["deferred", "running", "up_for_retry", "scheduled", None])
def test_end_of_a_run_spares_the_workers_of_a_task_that_goes_on(end_run, state):
    assert end_run(state) is Phase.RUNNING


def test_end_of_a_run_spares_the_workers_that_another_adopted(end_run, job):
    _defer(_operator(job), _context("try-2"))
    assert end_run("failed") is Phase.RUNNING


def test_end_of_a_run_asks_nobody_about_a_job_that_concluded(end_run):
    assert end_run("success", returned={"num_shards_done": 2}) is Phase.RUNNING


def test_lock_is_given_back_though_the_workers_cannot_be_stopped(end_run, monkeypatch):
    given_back = []
    monkeypatch.setattr("hcodec_airflow.locking.release_lock", given_back.append)
    monkeypatch.setattr(LocalBackend, "kill", lambda *_: (_ for _ in ()).throw(OSError("away")))
    with pytest.raises(OSError, match="away"):
        end_run("failed")
    assert given_back == [{}]


async def test_cancelled_trigger_leaves_the_workers(job, run_script):
    """A triggerer that shuts down cancels its triggers; the next one finds the workers."""
    run_script(SLEEP)
    deferred = _defer(_operator(job, poll_seconds=0.05), _context())
    waiting = asyncio.ensure_future(_event(_rebuilt(deferred.trigger)))
    await asyncio.sleep(0.5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    observation = _observe(deferred.trigger)
    assert observation.num_alive == 2
    assert [worker.num_starts for worker in observation.workers] == [1, 1]


async def test_trigger_does_not_block_the_event_loop(job, run_script, monkeypatch):
    run_script(SLEEP)
    deferred = _defer(_operator(job, poll_seconds=0.05), _context())
    waiting = asyncio.ensure_future(_event(_rebuilt(deferred.trigger)))
    longest = 0.0
    loop = asyncio.get_running_loop()
    for _ in range(40):
        before = loop.time()
        await asyncio.sleep(0.02)
        longest = max(longest, loop.time() - before - 0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert longest < 0.5


async def test_progress_is_in_the_log(job, run_script, caplog):
    caplog.set_level(logging.INFO)
    run_script("import time; time.sleep(2.0)\n" + FINISH)
    deferred = _defer(_operator(job, poll_seconds=0.1), _context())
    await _event(_rebuilt(deferred.trigger))
    text = caplog.text
    assert "Job tokenize-p1: submitted to backend local" in text
    assert "Job tokenize-p1: running (2/2)" in text
    assert "running 2/2 workers, shards 0/2, files 0/4" in text
    assert "Job tokenize-p1: done" in text


def test_dry_run_prints_the_manifest_without_connection_or_cluster(
    job, tmp_path, monkeypatch, capsys
):
    import yaml

    path = tmp_path / "kubernetes.toml"
    path.write_text('[profiles.a]\nimage = "worker"\n[profiles.b]\nimage = "w"\ngpus = 4\n')
    monkeypatch.setenv("AIRFLOW__HCODEC__KUBERNETES_FILE", str(path))
    _operator(job, backend="kubernetes", profile="b").dry_run()
    made = yaml.safe_load(capsys.readouterr().out)
    assert made["spec"]["completions"] == 2
    container = made["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert container["command"][container["command"].index("--device") + 1] == "cuda"
    _operator(job, backend="local").dry_run()
    assert "hcodec_core.cli run" in capsys.readouterr().out


def test_the_example_is_a_dag_and_its_pod_fields_are_templated():
    import runpy

    from hcodec_airflow import example_dags

    folder = processes.Path(example_dags.__path__[0])
    (path,) = folder.glob("workers_*.py")
    dag = runpy.run_path(str(path))["dag"]
    (task,) = dag.tasks
    assert {"job", "workers", "profile", "pod_template"} <= set(task.template_fields)


def test_few_parameters():
    import inspect

    assert len(inspect.signature(CodecJobOperator.__init__).parameters) < 20
