"""The steps of ``retrain_codec`` on a real registry; the training itself is a result by hand.

The whole DAG with real trainings is in ``tests/e2e/test_retrain_run.py``.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException, DagRunTriggerException

os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="hcodec-airflow-"))

from hcodec_airflow import retrain_due, retrain_steps
from hcodec_airflow.links import REPORT_URL_KEY
from hcodec_airflow.retrain_form import ANSWER_FIELDS, FIELDS, ROLLBACK_FIELDS
from hcodec_airflow.retrain_form import form as form_of
from hcodec_airflow.retrain_operators import (
    ApprovePromotionOperator,
    DueOperator,
    GateOperator,
    PinOperator,
    StartTokenisingOperator,
)
from hcodec_airflow.retrain_requests import (
    RetrainRequest,
    RollbackRequest,
    check_codec,
    read_retraining,
)
from hcodec_core.codecs import load_manifest
from hcodec_core.config import GateConfig, MetricMargin
from hcodec_core.dataset.table import find_layout
from hcodec_core.errors import ConfigError, PromotionRefusedError
from hcodec_core.jobs import read_any_job
from hcodec_core.promotion.deciding import decide, find_rejection
from hcodec_core.promotion.history import History
from hcodec_core.promotion.promoting import promote
from hcodec_core.training.job import RESULT_FILE, TrainingResult
from hcodec_core.training.sources import read_sources
from tests.promotion.conftest import NAME, Bench, make_result


@pytest.fixture
def installed(bench: Bench, tmp_path, monkeypatch) -> Bench:
    """The bench as the installation that the steps see, with audio and a held-out set."""
    settings = SimpleNamespace(
        backend="local",
        load_config=lambda: bench.config,
        open_storage=lambda: bench.storage,
        browser_url=lambda uri: uri,
    )
    for module in (retrain_steps, retrain_due):
        monkeypatch.setattr(module, "read_settings", lambda: settings)
    for folder, count in (("clips", 6), ("held-out", 4)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for index in range(count):
            (tmp_path / folder / f"{folder}-{index}.wav").write_bytes(bytes(1000 + index))
    return bench


@pytest.fixture
def form(tmp_path) -> dict[str, Any]:
    return {
        "codec": NAME,
        "data": [f"file://{tmp_path}/clips"],
        "held_out": f"file://{tmp_path}/held-out",
        "recipe": "tiny",
        "base": "champion",
        "changes": {"data.held_out_share": 0.5},
        "max_files": 4,
    }


def crown(bench: Bench, codec: str = "one", **facts: str) -> None:
    """Make a codec the first champion."""
    registered = bench.register(codec, **facts)
    uri = bench.evaluation(codec, None)
    decision = decide(bench.config, bench.storage, registered, uri)
    promote(bench.config, bench.storage, NAME, decision.decision_id)


def trained(bench: Bench, pinned: dict[str, Any], codec: str = "two") -> None:
    """What a training that is over leaves behind."""
    uri = f"file://{bench.codecs[codec]}"
    digest = load_manifest(uri).digest
    result = TrainingResult(uri, digest, "r", "d", 20, 3, 3, {})
    text = json.dumps(asdict(result)).encode()
    bench.storage.write(f"{pinned['run_uri']}/{RESULT_FILE}", text)


def evaluated(bench: Bench, exported: dict[str, Any], gain: float = 0.05) -> None:
    result = make_result(bench.codecs, "two", "one", gain, 8)
    bench.storage.write(exported["evaluation_uri"], result.model_dump_json().encode())


def as_far_as_the_gate(bench: Bench, form: dict[str, Any]) -> tuple[RetrainRequest, dict, dict]:
    crown(bench)
    request = read_retraining(form)
    pinned = retrain_steps.pin(request)
    trained(bench, pinned)
    exported = retrain_steps.export(request, pinned)
    evaluated(bench, exported)
    return request, pinned, exported


def test_pinning_names_all_that_decides_the_training(installed, form, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    crown(installed)
    form["data"] = [f"file://{tmp_path}/clips", f"file://{tmp_path}/held-out"]
    pinned = retrain_steps.pin(read_retraining(form))
    assert retrain_steps.pin(read_retraining(form)) == pinned
    job = read_any_job(installed.storage.read(pinned["job_uri"]))
    assert job.base.version == f"models:/{NAME}/1"
    assert job.base.digest == load_manifest(str(installed.codecs["one"])).digest
    assert (job.sample_rate, job.recipe["steps"]) == (16_000, 20)
    # The held-out set lies among the data, and is not trained on.
    files = read_sources(installed.storage, f"{pinned['run_uri']}/files.parquet")
    assert len(files) == 6
    assert all("/clips/" in file.uri for file in files)
    assert "4 left out for the evaluation" in caplog.text
    assert pinned["data_version"].startswith(f"file://{tmp_path}/clips; ")
    other = retrain_steps.pin(read_retraining({**form, "learning_rate": 0.5}))
    assert other["run_uri"] != pinned["run_uri"]


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    installed, form, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    crown(installed)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    skipped: list[Any] = []
    with DAG("retrain"):
        operator = PinOperator(task_id="pin")
    monkeypatch.setattr(operator, "skip", lambda ti, tasks: skipped.append(tasks))
    pinned = operator.execute(_context({**form, "dry_run": True, "steps": 45_000}))
    assert len(skipped) == 1
    assert pinned["ends_run"]
    # 45 000 steps of 4 clips of 0.4 s are 20 h of crops: one GPU hour at 20 times real time.
    assert (pinned["crop_hours"], pinned["gpu_hours"], pinned["cost"]) == (20.0, 1.0, 3.0)
    assert "20.00 h of crops, 1.00 GPU hours, 1.00 h, 3.00 USD" in caplog.text
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "There is no champion of hcodec-tiny yet"),
        ({"base": "scratch", "train": "decoder"}, "keeps the encoder of a codec"),
        ({"base": "scratch", "gpus": 3}, "3 processes cannot share a batch of 4 clips"),
        ({"base": "scratch", "nodes": 2}, "backend local has one node"),
        ({"base": "scratch", "margins": {"beauty": 1}}, "no metric 'beauty'"),
        ({"base": "scratch", "datasets": ["music"]}, "no dataset 'music'"),
        ({"base": "scratch", "recipe": "huge"}, "no recipe 'huge'"),
        ({"base": "scratch", "changes": {"losses.beauty": 1}}, "losses.beauty"),
        ({"base": "scratch", "data": ["dataset:music"]}, "no dataset 'music'"),
        ({"base": "scratch", "data": ["HELD_OUT"]}, "kept back for the evaluation"),
        ({"base": "scratch", "held_out": "EMPTY"}, "held-out set .* is empty"),
        ({"base": "models:/other/1"}, "not in the registry"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(installed, form, tmp_path, changes, said):
    (tmp_path / "empty").mkdir()
    wrong = {**form, **changes}
    if wrong["held_out"] == "EMPTY":
        wrong["held_out"] = f"file://{tmp_path}/empty"
    if wrong["data"] == ["HELD_OUT"]:
        wrong["data"] = [form["held_out"]]
    with pytest.raises(ConfigError, match=said):
        retrain_steps.pin(read_retraining(wrong))
    assert not (tmp_path / "work" / "trainings").exists()


def test_from_training_to_champion_and_back_each_step_twice(installed, form):
    request, pinned, exported = as_far_as_the_gate(installed, form)
    assert retrain_steps.export(request, pinned) == exported
    assert (exported["codec"], exported["champion"]) == (f"models:/{NAME}/2", 1)
    job = read_any_job(installed.storage.read(exported["job_uri"]))
    assert (job.codec.version, job.against.version) == (f"models:/{NAME}/2", f"models:/{NAME}/1")
    decision = retrain_steps.judge(request, exported)
    assert retrain_steps.judge(request, exported) == decision
    assert decision["subject"] == f"Promote {NAME} version 2 to champion?"
    assert decision["body"].startswith("**Pass: no worse than the champion")
    assert "Champion now: version 1." in decision["body"]
    champion = retrain_steps.promote(NAME, decision["decision_id"], "ann")
    assert retrain_steps.promote(NAME, decision["decision_id"], "bob") == champion
    assert (champion["version"], champion["from_version"], champion["by"]) == (2, 1, "ann")
    assert installed.champion == 2
    # The same weights again: there is nothing to compare.
    again = retrain_steps.export(request, pinned)
    assert again["ends_run"]
    wanted = RollbackRequest(codec=NAME, champion=2, reason="hiss")
    back = retrain_steps.roll_back(wanted, "ann")
    assert retrain_steps.roll_back(wanted, "ann") == back
    assert (back["kind"], back["version"], installed.champion) == ("rollback", 1, 1)
    assert len(History(installed.config, installed.storage, NAME).steps()) == 3


def test_a_challenger_that_is_worse_ends_at_the_gate(installed, form):
    _, _, exported = as_far_as_the_gate(installed, form)
    evaluated(installed, exported, gain=-0.2)
    pushed: dict[str, Any] = {}
    with pytest.raises(AirflowFailException, match=r"Nothing is promoted\. Fail: STOI"):
        GateOperator(task_id="gate", exported=exported).execute(_context(form, pushed))
    assert REPORT_URL_KEY in pushed
    assert installed.champion == 1


def test_margins_of_the_form_are_those_of_the_decision(installed, form):
    """A loss of 0.05 fails the configured margin of 0.01 and passes one of 0.1."""
    _, _, exported = as_far_as_the_gate(installed, form)
    evaluated(installed, exported, gain=-0.05)
    assert not retrain_steps.judge(read_retraining(form), exported)["passed"]
    wide = read_retraining({**form, "margins": {"stoi": 0.1}})
    assert retrain_steps.judge(wide, exported)["passed"]


def test_a_codec_promoted_meanwhile_means_another_evaluation(installed, form):
    request, _, exported = as_far_as_the_gate(installed, form)
    other = installed.register("three")
    uri = installed.evaluation("three", "one")
    decision = decide(installed.config, installed.storage, other, uri)
    promote(installed.config, installed.storage, NAME, decision.decision_id)
    with pytest.raises(PromotionRefusedError, match="evaluate again"):
        retrain_steps.judge(request, exported)


def _approval(decision: dict[str, Any]) -> ApprovePromotionOperator:
    return ApprovePromotionOperator(
        task_id="approve", subject="s", body="b", decision=decision, params=form_of(ANSWER_FIELDS)
    )


def _answer(option: str) -> dict[str, Any]:
    return {
        "chosen_options": [option],
        "params_input": {},
        "responded_by_user": {"id": "1", "name": "ann"},
        "responded_at": SimpleNamespace(isoformat=lambda: "2026-01-01T00:00:00"),
    }


def test_a_no_is_kept_and_nobody_is_asked_again(installed, form):
    request, _, exported = as_far_as_the_gate(installed, form)
    decision = retrain_steps.judge(request, exported)
    answer = {**_answer("Reject"), "params_input": {"reason": "sounds dull"}}
    operator = _approval(decision)
    with pytest.raises(AirflowFailException, match="Turned down by ann: sounds dull"):
        operator.execute_complete(_context(form), answer)
    kept = find_rejection(installed.config, installed.storage, NAME, decision["decision_id"])
    assert (kept.by, kept.reason) == ("ann", "sounds dull")
    with pytest.raises(AirflowFailException, match="Turned down by ann"):
        _approval(decision).execute(_context(form))
    with pytest.raises(PromotionRefusedError, match="turned down"):
        retrain_steps.promote(NAME, decision["decision_id"], "bob")
    assert installed.champion == 1


def test_a_yes_names_who_said_it_and_automatic_asks_nobody(installed, form):
    request, _, exported = as_far_as_the_gate(installed, form)
    decision = retrain_steps.judge(request, exported)
    said = _approval(decision).execute_complete(_context(form), _answer("Approve"))
    assert said == {"by": "ann", "reason": ""}
    automatic = _approval(decision).execute(_context({**form, "approval": "automatic"}))
    assert automatic["by"] == "the gate (automatic)"


def test_tokens_of_the_codecs_datasets_are_planned_and_runs_only_when_asked_for(
    installed, form, dataset, caplog
):
    caplog.set_level(logging.INFO)
    request, _, exported = as_far_as_the_gate(installed, form)
    (plan,), runs = retrain_steps.plan_tokens(request, exported, "d" * 24)
    assert (plan["dataset"], plan["num_files"], plan["changes_tokens"]) == ("speech", 5, True)
    assert plan["cost"] > 0
    assert runs == []
    assert "All tokens of speech change: 5 files" in caplog.text
    assert "Only planned" in caplog.text
    asking = read_retraining({**form, "tokenise": True, "tokenise_workers": 3})
    _, (run,) = retrain_steps.plan_tokens(asking, exported, "d" * 24)
    assert run["conf"]["codec"] == f"file://{installed.codecs['two']}"
    assert (run["conf"]["dataset"], run["conf"]["workers"]) == ("speech", 3)
    with pytest.raises(DagRunTriggerException) as asked:
        StartTokenisingOperator(task_id="t", run=run, dag_id_to_start="x").execute({})
    assert asked.value.dag_run_id == f"retokenise__speech__{plan['new_encode_id'][:12]}__{'d' * 12}"
    assert asked.value.skip_when_already_exists


def test_scheduled_runs_wait_for_new_hours(installed, form, dataset, monkeypatch, caplog):
    """The dataset has 15 seconds; nothing was trained on it, then its first version was."""
    caplog.set_level(logging.INFO)
    installed.register("one")
    hours = retrain_due._hours(installed.config, installed.storage, "speech", None, None)
    assert hours > 0
    data = ["dataset:speech"]
    assert retrain_due.is_due(NAME, data, hours)[0]
    assert not retrain_due.is_due(NAME, data, hours * 1.01)[0]
    made_by = find_layout(installed.config, "speech").encode_id
    installed.register("two", data_version=f"dataset:speech@v1#{made_by[:12]}; list 0")
    verdict, sentence = retrain_due.is_due(NAME, data, hours / 100)
    assert not verdict
    assert "0.00 new hours" in sentence
    with pytest.raises(ConfigError, match="counts datasets"):
        retrain_due.is_due(NAME, form["data"], 1.0)
    declared = {**form, "data": data}
    skipped: list[Any] = []
    with DAG("retrain"):
        due = DueOperator(task_id="due", min_new_hours=hours / 100)
    monkeypatch.setattr(due, "skip", lambda ti, tasks: skipped.append(tasks))
    assert not due.execute(_context(declared, run_type="scheduled"))
    assert len(skipped) == 1
    for run_type in ("manual", "asset_triggered"):
        assert due.execute(_context(declared, run_type=run_type))
    assert len(skipped) == 1


def test_form_and_request_have_the_same_entries_and_defaults():
    assert set(FIELDS) == set(RetrainRequest.model_fields)
    assert set(ROLLBACK_FIELDS) == set(RollbackRequest.model_fields)
    for name, entry in FIELDS.items():
        if "default" in entry:
            assert RetrainRequest.model_fields[name].default == entry["default"], name
        else:
            assert RetrainRequest.model_fields[name].is_required(), name


def test_what_the_form_says_replaces_entries_of_recipe_and_gate(form):
    request = read_retraining(
        {**form, "steps": 7, "learning_rate": 0.1, "train": "all", "margins": {"stoi": 0.2}}
    )
    assert request.recipe_changes() == {
        "data.held_out_share": 0.5,
        "steps": 7,
        "optimizer.learning_rate": 0.1,
        "train": "all",
    }
    gate = request.gate(GateConfig(metrics={"stoi": MetricMargin(margin=0.01, worst=0.8)}))
    assert gate.metrics["stoi"] == MetricMargin(margin=0.2, worst=0.8, is_required=True)
    assert gate.min_files == 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"worker": 1}, "worker: Extra inputs"),
        ({"data": ["/etc"]}, r"data\.0"),
        ({"min_new_hours": 5}, "needs a schedule"),
        ({"approval": "never"}, "approval"),
    ],
)
def test_wrong_declarations_are_named(tmp_path, change, said):
    good = {"data": ["dataset:speech"], "held_out": "s3://a/held-out/"}
    path = tmp_path / "codecs.toml"
    assert check_codec(path, "nano", good).request_values()["data"] == ["dataset:speech"]
    with pytest.raises(ConfigError, match=said) as found:
        check_codec(path, "nano", {**good, **change})
    assert str(found.value).startswith("codecs.toml, [codecs.nano]: ")


def _context(
    params: dict[str, Any], pushed: dict[str, Any] | None = None, run_type: str = "manual"
) -> dict[str, Any]:
    kept = {} if pushed is None else pushed
    task = SimpleNamespace(xcom_push=lambda key, value: kept.update({key: value}))
    return {"params": params, "ti": task, "dag_run": SimpleNamespace(run_type=run_type)}
