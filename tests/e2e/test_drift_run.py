"""Drift through a real Airflow: silent while a corpus stays the same, an alarm when it changes.

Versions are published beside it and announced as the tokenise DAGs do: by an event of the
dataset's asset. A DAG scheduled on the drift asset stands for the one that trains the codec anew.
"""

from __future__ import annotations

import os
import shutil
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from hcodec_airflow.demo.airflow_api import FINISHED, AirflowApi
from hcodec_airflow.demo.services import (
    AIRFLOW,
    DemoError,
    Services,
    airflow_environment,
    free_port,
    start_airflow,
    wait_until_answers,
)
from hcodec_core.dataset.versions import pin
from tests.monitoring.conftest import add, drifting_world

__all__ = ["add", "drifting_world"]
pytestmark = [pytest.mark.airflow, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
MONITOR, CONSUMER = "monitor_tokens", "on_drift"
PATIENCE_SECONDS = 300
CONSUMER_DAG = """
from airflow.sdk import DAG, task
from hcodec_airflow.assets import drift_asset

with DAG("on_drift", schedule=drift_asset("demo")):
    @task
    def see(triggering_asset_events=None):
        # Events that came through an alias stand under its name too.
        return [event.extra for event in triggering_asset_events[drift_asset("demo")]]
    see()
"""


class House:
    """A running Airflow with the shipped DAG and a consumer of its alarms."""

    def __init__(self, folder: Path, config_path: Path) -> None:
        self.services = Services(folder / "services")
        dags = folder / "dags"
        dags.mkdir()
        shutil.copy(ROOT / "dags" / "monitor_tokens.py", dags)
        (dags / "on_drift.py").write_text(CONSUMER_DAG)
        (dags / "datasets.toml").write_text('[datasets.demo]\nsources = ["s3://a/b/"]\n')
        port = free_port(18080)
        environment = {
            **os.environ,
            **airflow_environment(folder / "services", dags, config_path, port),
            "OMP_NUM_THREADS": "1",
        }
        self.api = AirflowApi(f"http://127.0.0.1:{port}")
        self.services.start("airflow-db", [*AIRFLOW, "db", "migrate"], environment)
        self.services.wait_for("airflow-db", PATIENCE_SECONDS)
        start_airflow(self.services, environment)
        wait_until_answers(f"{self.api.base_url}/api/v2/version", self.services, PATIENCE_SECONDS)
        self.api.login()
        for dag_id in (MONITOR, CONSUMER):
            self.api.wait_for_dag(dag_id, self.services, PATIENCE_SECONDS)
            self.api.call("PATCH", f"/api/v2/dags/{dag_id}", {"is_paused": False})

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """Runs that assets started, oldest first."""
        found = self.api.call("GET", f"/api/v2/dags/{dag_id}/dagRuns?limit=100")["dag_runs"]
        return sorted(
            (run for run in found if run["run_type"] == "asset_triggered"),
            key=lambda run: run["run_after"],
        )

    def ended(self, dag_id: str, number: int) -> dict[str, Any]:
        """The ``number``-th run that assets started, once it has ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            self.services.check()
            runs = self.runs(dag_id)
            if len(runs) >= number and runs[number - 1]["state"] in FINISHED:
                return runs[number - 1]
            time.sleep(0.5)
        raise AssertionError(f"{dag_id} had no {number} runs in time: {self.runs(dag_id)}")

    def announce(self, version: str) -> None:
        """An event of the dataset's asset, as ``publish`` makes it."""
        assets = self.api.call("GET", "/api/v2/assets?name_pattern=tokens__demo")["assets"]
        body = {"asset_id": assets[0]["id"], "extra": {"dataset": "demo", "version": version}}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.api.call("POST", "/api/v2/assets/events", body)
            except DemoError as error:
                # sqlite has one writer: on a busy machine it may be waited for too long.
                if "answered 500" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1)
            else:
                return

    def returned(self, run: dict[str, Any], task: str, map_index: int = -1) -> Any:
        path = f"/api/v2/dags/{run['dag_id']}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"
        entry = f"{path}/taskInstances/{task}/xcomEntries/return_value"
        query = f"?deserialize=true&map_index={map_index}"
        return self.api.call("GET", entry + query)["value"]

    def links(self, run: dict[str, Any]) -> dict[str, Any]:
        path = f"/api/v2/dags/{run['dag_id']}/dagRuns/{urllib.parse.quote(run['dag_run_id'])}"
        answer = self.api.call("GET", f"{path}/taskInstances/monitor/links?map_index=0")
        return dict(answer["extra_links"])


@pytest.fixture
def house(drifting_world, tmp_path):
    made = House(tmp_path, drifting_world.write_config())
    yield made
    made.services.stop()


def test_silent_on_the_same_corpus_and_an_alarm_on_a_changed_one(drifting_world, add, house):
    pin(drifting_world.layout, add("speech", 60))
    found = []
    for number, kind in enumerate(["speech", "speech", "music", "music"], start=1):
        house.announce(add(kind, 60))
        run = house.ended(MONITOR, number)
        assert run["state"] == "success"
        assert house.returned(run, "choose") == ["demo"]
        found.append(house.returned(run, "monitor", 0))
        print(found[-1]["text"])
        assert len(house.runs(CONSUMER)) == 0 or number == 4
    assert [facts["state"] for facts in found] == ["same", "same", "drifted", "drifted"]
    assert [facts["is_alarm"] for facts in found] == [False, False, False, True]
    (seen,) = house.returned(house.ended(CONSUMER, 1), "see")
    print("event", seen)
    assert (seen["dataset"], seen["version"], seen["reference"]) == ("demo", "v5", "v1")
    assert drifting_world.storage.read(seen["evidence_uri"]).startswith(b"<!DOCTYPE html>")
    assert house.links(run) == {"Drift evidence": seen["evidence_uri"]}
    # The same window once more, by hand: it is known, and nobody is told twice.
    again = house.api.trigger(MONITOR, {"datasets": ["demo"]})
    deadline = time.monotonic() + PATIENCE_SECONDS
    while house.api.run_state(MONITOR, again) not in FINISHED and time.monotonic() < deadline:
        time.sleep(0.5)
    facts = house.returned({"dag_id": MONITOR, "dag_run_id": again}, "monitor", 0)
    assert "is not counted again" in facts["text"]
    assert len(house.runs(CONSUMER)) == 1
