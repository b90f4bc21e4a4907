"""The dataset's lock between DAG runs: waiting visibly, keeping it, giving it back."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred

from hcodec_airflow import locking
from hcodec_airflow.dataset_operators import (
    DatasetOperator,
    LockDatasetOperator,
    ReleaseLockOperator,
)
from hcodec_airflow.locking import LockWait, kept_alive, release_lock
from hcodec_airflow.triggers import DatasetLockTrigger
from hcodec_core.errors import LeaseLostError


@pytest.fixture(autouse=True)
def configured(tmp_path, monkeypatch):
    config = tmp_path / "hcodec.toml"
    config.write_text(
        f'[access]\nsource_prefixes = ["file://{tmp_path}"]\n'
        f'destination_prefixes = ["file://{tmp_path}"]\n'
        f'[catalog]\nuri = "sqlite:///{tmp_path}/c.db"\nwarehouse_uri = "file://{tmp_path}/wh"\n'
        f'[work]\nwork_uri = "file://{tmp_path}/work"\n'
    )
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", str(config))


def _take(run):
    lock, _ = LockWait("demo", run).ask()
    return lock


def _context(run_id, **params):
    form = {"source": "s3://audio/x/", "dataset": "demo", **params}
    return {"ti": SimpleNamespace(dag_id="d", run_id=run_id), "params": form}


def test_one_run_at_a_time_and_its_own_retry():
    first = _take("d/a")
    lock, message = LockWait("demo", "d/b").ask()
    assert lock is None
    assert message.startswith("Dataset demo is locked by run d/a since 20")
    assert _take("d/a") == first
    release_lock(first)
    release_lock(first)
    assert _take("d/b")["epoch"] > first["epoch"]


def test_free_lock_is_taken_without_waiting(caplog):
    caplog.set_level(logging.INFO)
    lock = LockDatasetOperator(task_id="lock").execute(_context("a"))
    assert lock["owner"] == "d/a"
    assert json.loads(json.dumps(lock)) == lock
    assert "Dataset demo: lock taken." in caplog.text
    ReleaseLockOperator(task_id="release", lock=lock).execute({})
    assert _take("d/b") is not None


def test_dry_run_takes_none():
    assert LockDatasetOperator(task_id="lock").execute(_context("a", dry_run=True)) == {}
    assert _take("d/b") is not None
    ReleaseLockOperator(task_id="release", lock={}).execute({})


async def test_waiting_is_deferred_and_says_for_whom(caplog):
    caplog.set_level(logging.INFO)
    held = _take("d/a")
    operator = LockDatasetOperator(task_id="lock")
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(_context("b"))
    path, kwargs = caught.value.trigger.serialize()
    assert path == "hcodec_airflow.triggers.DatasetLockTrigger"
    trigger = DatasetLockTrigger(**{**kwargs, "poll_seconds": 0.05})
    waiting = asyncio.ensure_future(anext(trigger.run()))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    # Said by the task, then by the trigger, and not again at every look.
    assert caplog.text.count("Dataset demo is locked by run d/a since") == 2
    release_lock(held)
    event = (await asyncio.wait_for(waiting, 10)).payload
    lock = getattr(operator, caught.value.method_name)(_context("b"), event=event)
    assert lock["owner"] == "d/b"


async def test_trigger_that_cannot_ask_fails_the_task(monkeypatch):
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", "")
    event = (await anext(DatasetLockTrigger("demo", "d/a").run())).payload
    with pytest.raises(AirflowFailException, match="No hcodec configuration is named"):
        LockDatasetOperator(task_id="lock").take_from_trigger({}, event)


def test_steps_keep_the_lock_alive(monkeypatch, wait_until):
    monkeypatch.setattr(locking, "RENEW_SECONDS", 0.05)
    beats = []
    lock = _take("d/a")
    monkeypatch.setattr(locking, "renewer", lambda lock: lambda: beats.append(lock))
    with kept_alive(lock):
        wait_until(lambda: len(beats) > 3)


def test_lost_lock_stops_the_next_step():
    lock = _take("d/a")
    release_lock(lock)
    _take("d/b")
    with pytest.raises(LeaseLostError, match="not held by d/a any more"), kept_alive(lock):
        pytest.fail("the step must not run")


def test_step_fails_when_its_lock_was_taken_over_meanwhile():
    lock = _take("d/a")

    class Step(DatasetOperator):
        def step(self, context):
            release_lock(lock)

    with pytest.raises(AirflowFailException, match="not held by d/a any more"):
        Step(task_id="step", lock=lock).execute({})


def test_no_lock_is_kept_by_a_step_without_one():
    with kept_alive(None), kept_alive({}):
        pass
