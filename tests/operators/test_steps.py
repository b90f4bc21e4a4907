"""The tasks' steps on a real table, with toy tokens in place of a codec's."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowFailException

from hcodec_airflow import steps
from hcodec_airflow.dataset_operators import InventoryOperator
from hcodec_airflow.requests import read_request
from hcodec_core.dataset.table import load_table
from hcodec_core.dataset.versions import list_versions
from hcodec_core.errors import BudgetExceededError, ConfigError
from hcodec_core.jobs import Outcome


def test_inventory_of_a_run_is_taken_anew_when_asked_again(world):
    world.put("a.wav")
    request = read_request({"source": world.source_uri, "dataset": "demo"})
    first = steps.inventory(request, "d/a")
    world.put("b.wav")
    again = steps.inventory(request, "d/a")
    assert again["inventory_uri"] == first["inventory_uri"]
    assert (first["num_files"], again["num_files"]) == (1, 2)
    assert steps.inventory(request, "d/b")["inventory_uri"] != first["inventory_uri"]


def test_source_outside_the_allowed_prefixes_is_not_retried(world):
    operator = InventoryOperator(task_id="inventory")
    task = SimpleNamespace(dag_id="d", run_id="a")
    form = {"source": "s3://elsewhere/audio/", "dataset": "demo"}
    with pytest.raises(AirflowFailException, match="lies outside the allowed prefixes"):
        operator.execute({"ti": task, "params": form})


def test_plan_for_people(world):
    world.put("a.wav", "b.wav", "c.wav")
    made = world.plan(max_hours_per_version=1e-9, spend_cap=0.0, dry_run=True)
    text = "\n".join(steps.describe_plan(made))
    assert "Dataset demo, now at no version yet; codec toy (random weights, for tests only)" in text
    assert "Listed 3 files: 1 new, 0 changed, 0 unchanged, 0 in quarantine; 0 deleted" in text
    assert "To encode: 1 files" in text
    assert "Left for later runs: 2 files" in text
    assert "Erased" not in text
    erased = made.model_copy(update={"num_excluded_files": 4})
    lines = steps.describe_plan(erased)
    assert "Erased from the dataset, so left out: 4 files" in lines


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.0 MB"), (1_500_000, "1.5 MB"), (2_340_000_000, "2.34 GB")]
)
def test_sizes(num_bytes, text):
    assert steps.size_text(num_bytes) == text


def test_compute_class_is_asked_of_a_process_of_its_own(world, monkeypatch):
    monkeypatch.setenv("AIRFLOW__HCODEC__LOCAL_DEVICE", "no-such-device")
    with pytest.raises(ConfigError, match="Local workers cannot run here"):
        steps.compute_class(steps.read_settings())


def test_version_that_came_first_is_built_upon(world, caplog):
    """Another run published between our validation and our publish."""
    world.put("a.wav", "b.wav")
    plan = world.plan()
    world.work(plan)
    committed = steps.commit(plan.plan_uri)
    report = steps.validate(committed)
    assert report.failure is None
    world.put("c.wav")
    assert world.version().version == "v1"
    version = steps.publish(committed, report.uri)
    assert version["version"] == "v2"
    assert version["num_rows"] == 3
    assert "commit it again" in caplog.text
    assert [v.version for v in list_versions(world.layout)] == ["v1", "v2"]
    assert steps.publish(committed, report.uri)["version"] == "v2"


def test_failed_validation_drops_the_branch_and_names_the_files(world, caplog):
    caplog.set_level(logging.INFO)
    world.put(*(f"{number}.wav" for number in range(4)))
    plan = world.plan(bad_files={"max_share": 0.1})
    bad = world.uri("2.wav")
    world.work(plan, lambda uri: Outcome.QUARANTINED if uri == bad else Outcome.TOKENS)
    committed = steps.commit(plan.plan_uri)
    report = steps.validate(committed)
    assert isinstance(report.failure, BudgetExceededError)
    assert "2.wav" in str(report.failure)
    table = load_table(world.layout)
    assert committed["branch"] not in table.refs()
    assert "tag rejected_" in caplog.text
    assert list_versions(world.layout) == []
    assert world.storage.head(report.uri) is not None
    # Validating once more, as a retry does, changes nothing.
    assert steps.validate(committed).failure is not None


def test_threads_of_local_workers_are_in_their_compute_class(world, monkeypatch):
    monkeypatch.setenv("AIRFLOW__HCODEC__LOCAL_THREADS", "2")
    assert steps.compute_class(steps.read_settings()).endswith("-threads2")


def test_what_the_form_says_about_encoding_reaches_the_plan(world, monkeypatch):
    monkeypatch.setattr(steps, "compute_class", lambda settings: "cpu-test")
    world.put("a.wav")
    inventory_uri = world.inventory().inventory_uri
    form = {"source": world.source_uri, "dataset": "demo", "channel": "first", "gain": 0.5}

    def planned(**changes):
        return steps.plan(read_request({**form, "dry_run": True, **changes}), inventory_uri)

    wanted = steps._plan_request(
        read_request(form), inventory_uri, steps.read_settings(), world.storage
    ).settings
    assert (wanted.channel, wanted.gain, wanted.threshold) == ("first", 0.5, None)
    plans = [planned(), planned(gain=1.0), planned(channel="mean")]
    assert len({plan["plan_id"] for plan in plans}) == 3
    with pytest.raises(ConfigError, match="has a fixed frame rate: leave the threshold"):
        planned(threshold=0.7)
