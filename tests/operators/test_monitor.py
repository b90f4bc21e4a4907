"""The operators of ``monitor_tokens`` without Airflow's database; all of it: ``tests/e2e``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import AssetAlias
from airflow.sdk.exceptions import AirflowFailException

from hcodec_airflow.assets import drift_asset
from hcodec_airflow.monitor_operators import ChooseWatchedOperator, MonitorDatasetOperator
from hcodec_core.dataset.versions import pin
from tests.monitoring.conftest import add, drifting_world

__all__ = ["add", "drifting_world"]


class Events(dict):
    """Airflow's accessor of outlet events, as far as an alias needs it."""

    def __missing__(self, alias: AssetAlias) -> SimpleNamespace:
        self[alias] = SimpleNamespace(found=[])
        self[alias].add = lambda asset, extra: self[alias].found.append((asset, extra))
        return self[alias]

    def __hash__(self) -> int:
        return id(self)


ALIAS = AssetAlias("monitor_tokens")


@pytest.fixture
def world(drifting_world, monkeypatch):
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", str(drifting_world.write_config()))
    return drifting_world


def _context(run_id: str = "r", events: Any = None, **params: Any) -> dict[str, Any]:
    pushed: dict[str, Any] = {}
    task = SimpleNamespace(
        dag_id="monitor_tokens",
        run_id=run_id,
        pushed=pushed,
        xcom_push=lambda key, value: pushed.update({key: value}),
    )
    return {
        "params": {"min_files": 20, **params},
        "ti": task,
        "outlet_events": Events(),
        "triggering_asset_events": events,
    }


def _monitor(context: dict[str, Any]) -> tuple[dict[str, Any], list]:
    operator = MonitorDatasetOperator(task_id="m", dataset="demo", outlets=[ALIAS])
    facts = operator.execute(context)
    return facts, context["outlet_events"][ALIAS].found


def test_an_alarm_is_an_event_of_the_drift_asset_also_when_its_task_is_tried_again(world, add):
    pin(world.layout, add("speech", 60))
    add("music", 25)
    first = _context("r", windows_in_a_row=1)
    for context in (first, _context("r", windows_in_a_row=1)):
        facts, events = _monitor(context)
        assert facts["is_alarm"]
        ((asset, extra),) = events
        assert asset == drift_asset("demo")
        assert extra["evidence_uri"].endswith("/index.html")
        assert "semantic 0" in extra["moved"]
        assert context["ti"].pushed["evidence_url"] == extra["evidence_uri"]
    assert _monitor(_context("another", windows_in_a_row=1))[1] == []


def test_what_is_no_alarm_is_no_event(world, add):
    pin(world.layout, add("speech", 60))
    add("music", 25)
    facts, events = _monitor(_context())
    assert (facts["state"], facts["num_in_a_row"], events) == ("drifted", 1, [])


def test_datasets_of_a_run(world, add):
    choose = ChooseWatchedOperator(task_id="c", declared=["demo", "unborn"])
    event = SimpleNamespace(extra={"dataset": "demo", "version": "v1"})
    assert choose.execute(_context()) == []
    add("speech", 20)
    assert choose.execute(_context()) == []
    pin(world.layout, "v1")
    assert choose.execute(_context()) == ["demo"]
    assert choose.execute(_context(events={"asset": [event, event]})) == ["demo"]
    # What a person names is not left out in silence.
    assert choose.execute(_context(datasets=["unborn"])) == ["unborn"]
    with pytest.raises(AirflowFailException, match="no dataset 'unborn'"):
        MonitorDatasetOperator(task_id="m", dataset="unborn").execute(_context())


def test_a_wrong_form_fails_at_once(world):
    choose = ChooseWatchedOperator(task_id="c", declared=[])
    with pytest.raises(AirflowFailException, match="false_alarm_rate"):
        choose.execute(_context(false_alarm_rate=2))
