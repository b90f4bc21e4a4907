"""The shipped DAG files in a real Airflow: they parse, are light, and read nothing they should not.

Airflow runs in processes of its own, with a home of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

DAGS = Path(__file__).parents[2] / "dags"
TASKS = [
    "lock",
    "inventory",
    "plan",
    "tokenize",
    "commit",
    "audit",
    "validate",
    "publish",
    "release",
]
HEAVY = {
    "torch", "torchaudio", "transformers", "boto3", "botocore", "pyiceberg", "duckdb", "obstore",
    "great_expectations", "kubernetes", "kubernetes_asyncio", "pandas", "pyarrow", "scipy",
}  # fmt: skip
DECLARED = """
[datasets.speech]
description = "All of it"
sources = ["s3://audio/speech/"]
schedule = "@daily"
workers = 3
max_bad_share = 0.01

[datasets.by_hand]
sources = ["s3://audio/other/"]
"""
WRONG = """
[datasets.typo]
sources = ["s3://audio/other/"]
worker = 3
"""

CODECS = """
[codecs.hcodec-nano]
data = ["dataset:speech"]
held_out = "s3://audio/held-out/"
schedule = "@weekly"
min_new_hours = 50.0
on_drift_of = ["speech", "by_hand"]
approval = "automatic"

[codecs.drifting]
data = ["dataset:speech"]
held_out = "s3://audio/held-out/"
on_drift_of = ["speech"]

[codecs.quiet]
data = ["s3://audio/speech/"]
held_out = "s3://audio/held-out/"
"""
WRONG_CODEC = """
[codecs.typo]
data = ["/etc"]
held_out = "s3://audio/held-out/"
"""

BUDGET = """
import json, sys, time
import airflow.sdk
known = set(sys.modules)
seen = []
WATCHED = {"open", "socket.connect", "subprocess.Popen", "os.system"}

def watch(event, args):
    if event in WATCHED:
        seen.append((event, str(args[0] if event == "open" else args)))

if sys.argv[1]:
    # What Airflow itself loads for the first DAG (croniter runs a command) is not ours.
    with airflow.sdk.DAG("first", schedule="@daily"):
        airflow.sdk.BaseOperator(task_id="task")
    sys.addaudithook(watch)
start = time.process_time()
import runpy
for path in sys.argv[2:]:
    runpy.run_path(path)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - known), "seen": seen}))
"""

BAG = """
import copy, json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import ParamValidationError
from airflow.serialization.serialized_objects import DagSerialization

def refusal(dag, conf):
    params = copy.deepcopy(dag.params)
    try:
        params.update(conf)
        params.validate()
    except (ParamValidationError, ValueError) as error:
        return str(error).splitlines()[0]

def watched(dag):
    return getattr(getattr(dag.timetable, "asset_condition", None), "objects", ())

bag = DagBag(sys.argv[1])
confs = json.loads(sys.argv[2])
facts = {"errors": bag.import_errors, "dags": {}, "modules": sorted(sys.modules)}
for dag_id, dag in bag.dags.items():
    stored = DagSerialization.deserialize_dag(
        json.loads(json.dumps(DagSerialization.serialize_dag(dag)))
    )
    facts["dags"][dag_id] = {
        "tasks": [task.task_id for task in dag.topological_sort()],
        "operators": {task.task_id: task.task_type for task in stored.tasks},
        "downstream": {task.task_id: sorted(task.downstream_task_ids) for task in stored.tasks},
        "setups": [task.task_id for task in stored.tasks if task.is_setup],
        "teardowns": [task.task_id for task in stored.tasks if task.is_teardown],
        "links": {t.task_id: list(t.extra_links) for t in stored.tasks if t.extra_links},
        "timeouts": [t.task_id for t in stored.tasks if t.execution_timeout],
        "params": {name: dag.params.get_param(name).serialize() for name in dag.params},
        "schedule": str(dag.schedule),
        "watched": sorted(part.name for part in watched(dag)),
        "max_active_runs": dag.max_active_runs,
        "outlets": [type(o).__name__ + " " + o.name for t in dag.tasks for o in t.outlets],
        "refusals": [refusal(dag, conf) for conf in confs.get(dag_id, [])],
        "source": dag.get_task("plan").request if dag.has_task("plan") else None,
        "mapped": [task.task_id for task in stored.tasks if task.is_mapped],
    }
print("FACTS" + json.dumps(facts, default=lambda value: "unset"))
"""

GOOD = {"source": "s3://audio/demo/", "dataset": "demo"}
CONFS: list[dict[str, object]] = [
    GOOD,
    {"dataset": "demo"},
    {**GOOD, "workers": "two"},
    {**GOOD, "workers": 0},
    {**GOOD, "mode": "quick"},
    {**GOOD, "source": "/etc"},
    {**GOOD, "dataset": "De mo"},
    {**GOOD, "dataset": "a__b"},
    {**GOOD, "max_bad_share": 2},
    {**GOOD, "dry_run": "yes"},
    {**GOOD, "shards": 0},
    {**GOOD, "channel": "left"},
    {**GOOD, "gain": 0},
    {**GOOD, "threshold": 1.5},
    {
        **GOOD,
        "shards": 5,
        "spend_cap": None,
        "max_hours_per_version": 0.5,
        "channel": "first",
        "threshold": 0.8,
    },
]

GOOD_CODEC = {
    "codec": "hcodec-nano",
    "data": ["dataset:speech@v3", "s3://audio/more/"],
    "held_out": "s3://audio/held-out/",
}
RETRAIN_CONFS: list[dict[str, object]] = [
    GOOD_CODEC,
    {"codec": "hcodec-nano"},
    {**GOOD_CODEC, "codec": "a b"},
    {**GOOD_CODEC, "data": "dataset:speech"},
    {**GOOD_CODEC, "data": []},
    {**GOOD_CODEC, "data": ["/etc"]},
    {**GOOD_CODEC, "held_out": "/etc"},
    {**GOOD_CODEC, "steps": 0},
    {**GOOD_CODEC, "learning_rate": 0},
    {**GOOD_CODEC, "train": "encoder"},
    {**GOOD_CODEC, "changes": "steps=1"},
    {**GOOD_CODEC, "nodes": 0},
    {**GOOD_CODEC, "gpus": 17},
    {**GOOD_CODEC, "margins": {"stoi": -1}},
    {**GOOD_CODEC, "min_files": 1},
    {**GOOD_CODEC, "approval": True},
    {**GOOD_CODEC, "datasets": ["De mo"]},
    {**GOOD_CODEC, "margins": {"stoi": 0.02}, "changes": {"losses.mel": 45}, "gpus": 8},
]
ROLLBACK_CONFS: list[dict[str, object]] = [
    {"codec": "hcodec-nano", "champion": 3, "reason": "hiss"},
    {"codec": "hcodec-nano", "reason": "hiss"},
    {"codec": "hcodec-nano", "champion": 0, "reason": "hiss"},
    {"codec": "hcodec-nano", "champion": 3, "reason": ""},
    {"codec": "hcodec-nano", "champion": 2, "reason": "noise"},
]

UPKEEP_CONFS: list[dict[str, object]] = [
    {"datasets": ["speech"], "dry_run": "never", "compact": False},
    {"datasets": "speech"},
    {"datasets": ["De mo"]},
    {"dry_run": False},
    {"orphan_age_days": 0},
    {"expire_after_days": -1},
    {"small_file_mib": 0},
    {"datasets": None, "dry_run": "always", "expire_after_days": 0},
]

MONITOR_CONFS: list[dict[str, object]] = [
    {"datasets": ["speech"], "reference": "v3", "window": "version"},
    {"datasets": "speech"},
    {"datasets": ["De mo"]},
    {"reference": ""},
    {"window": "all"},
    {"windows_in_a_row": 0},
    {"cool_down_days": -1},
    {"false_alarm_rate": 0.5},
    {"least_psi": -1},
    {"min_files": 19},
    {"datasets": None, "reference": "pinned", "false_alarm_rate": 0.001, "cool_down_days": 0},
]


def _python(home: Path, *arguments: str) -> str:
    environment = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PATH": os.environ["PATH"],
        "HOME": str(home),
    }
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _heavy(modules: list[str]) -> list[str]:
    return sorted(HEAVY & {name.split(".")[0] for name in modules})


def _facts(home: Path, folder: Path) -> dict:
    confs = {
        "tokenize_corpus": CONFS,
        "maintain_datasets": UPKEEP_CONFS,
        "monitor_tokens": MONITOR_CONFS,
        "retrain_codec": RETRAIN_CONFS,
        "rollback_codec": ROLLBACK_CONFS,
    }
    text = _python(home, BAG, str(folder), json.dumps(confs))
    return json.loads(text.partition("FACTS")[2])


def tokenising(facts: dict) -> dict:
    """The DAGs that turn audio into tokens."""
    return {dag_id: dag for dag_id, dag in facts["dags"].items() if dag_id.startswith("tokenize")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped files with two declared datasets and three declared codecs."""
    path = tmp_path_factory.mktemp("dags")
    for file in DAGS.glob("*.py"):
        shutil.copy(file, path)
    (path / "datasets.toml").write_text(DECLARED)
    (path / "codecs.toml").write_text(CODECS)
    return path


@pytest.fixture(scope="module")
def facts(tmp_path_factory, folder):
    return _facts(tmp_path_factory.mktemp("home"), folder)


def test_shipped_files_parse(tmp_path):
    facts = _facts(tmp_path, DAGS)
    assert facts["errors"] == {}
    assert "tokenize_corpus" in facts["dags"]


def test_dags_of_the_form_and_of_the_declarations(facts):
    assert facts["errors"] == {}
    assert set(tokenising(facts)) == {"tokenize_corpus", "tokenize__speech", "tokenize__by_hand"}
    assert facts["dags"]["tokenize__speech"]["schedule"] == "@daily"
    assert facts["dags"]["tokenize__by_hand"]["schedule"] == "None"
    assert facts["dags"]["tokenize_corpus"]["schedule"] == "None"
    assert facts["dags"]["tokenize__speech"]["max_active_runs"] == 1


def test_tasks_in_order_with_the_lock_around_them(facts):
    for dag in tokenising(facts).values():
        assert sorted(dag["tasks"]) == sorted(TASKS)
        assert dag["tasks"][0] == "lock"
        for task, after in pairwise(TASKS):
            assert after in dag["downstream"][task]
        assert dag["setups"] == ["lock"]
        # A teardown is not what the run's state is taken from: publish is.
        assert dag["teardowns"] == ["release"]
        assert dag["downstream"]["publish"] == ["release"]
        assert dag["links"]["validate"] == ["Validation report"]
        assert dag["links"]["publish"] == ["Dataset card"]
        assert dag["timeouts"] == []
        assert dag["operators"]["tokenize"] == "CodecJobOperator"
        assert dag["operators"]["audit"] == "AuditOperator"


def test_outlets(facts):
    outlets = {dag_id: dag["outlets"] for dag_id, dag in tokenising(facts).items()}
    assert outlets == {
        "tokenize_corpus": ["AssetAlias tokenize_corpus"],
        "tokenize__speech": ["Asset tokens__speech"],
        "tokenize__by_hand": ["Asset tokens__by_hand"],
    }


def test_every_field_of_the_forms_explains_itself(facts):
    for dag in facts["dags"].values():
        for name, param in dag["params"].items():
            assert param["schema"]["title"], name
            assert param["schema"]["section"], name
            assert len(param["description"]) > 20, name
    params = facts["dags"]["tokenize_corpus"]["params"]
    assert list(params)[:3] == ["source", "dataset", "codec"]
    assert {name for name, param in params.items() if param["value"] == "unset"} == {
        "source",
        "dataset",
    }


def test_wrong_values_are_refused_by_the_schema(facts):
    refusals = facts["dags"]["tokenize_corpus"]["refusals"]
    assert refusals[0] is None
    assert refusals[-1] is None
    assert all(refusals[1:-1]), refusals
    assert "workers" in refusals[2]


def test_upkeep_is_weekly_and_one_task_per_declared_dataset(facts):
    dag = facts["dags"]["maintain_datasets"]
    assert (dag["schedule"], dag["max_active_runs"]) == ("@weekly", 1)
    assert dag["tasks"] == ["choose", "maintain", "table"]
    assert dag["mapped"] == ["maintain"]
    assert dag["outlets"] == []
    assert dag["timeouts"] == []
    assert dag["params"]["dry_run"]["value"] == "by hand"
    refusals = dag["refusals"]
    assert refusals[0] is None
    assert refusals[-1] is None
    assert all(refusals[1:-1]), refusals


def test_monitoring_follows_every_declared_dataset_and_the_manual_dag(facts):
    dag = facts["dags"]["monitor_tokens"]
    assert dag["watched"] == ["tokenize_corpus", "tokens__by_hand", "tokens__speech"]
    assert dag["max_active_runs"] == 1
    assert dag["tasks"] == ["choose", "monitor"]
    assert dag["mapped"] == ["monitor"]
    assert dag["outlets"] == ["AssetAlias monitor_tokens"]
    assert dag["links"]["monitor"] == ["Drift evidence"]
    assert dag["timeouts"] == []
    refusals = dag["refusals"]
    assert refusals[0] is None
    assert refusals[-1] is None
    assert all(refusals[1:-1]), refusals


RETRAIN_TASKS = [
    *("pin", "train", "export", "evaluate", "gate", "approve", "promote", "tokens", "tokenise"),
]


def test_retraining_by_form_and_by_declaration(facts):
    dags = {dag_id: dag for dag_id, dag in facts["dags"].items() if "retrain" in dag_id}
    assert set(dags) == {
        *("retrain_codec", "retrain__hcodec-nano", "retrain__drifting", "retrain__quiet"),
    }
    for dag_id, dag in dags.items():
        due = ["due"] if dag_id == "retrain__hcodec-nano" else []
        assert dag["tasks"] == [*due, *RETRAIN_TASKS]
        for task, after in pairwise(dag["tasks"]):
            assert dag["downstream"][task] == [after]
        assert dag["mapped"] == ["tokenise"]
        assert dag["timeouts"] == []
        assert dag["links"]["gate"] == dag["links"]["approve"] == ["Evaluation report"]
        assert dag["operators"]["train"] == dag["operators"]["evaluate"] == "CodecJobOperator"
    assert dags["retrain_codec"]["schedule"] == dags["retrain__quiet"]["schedule"] == "None"
    assert dags["retrain_codec"]["outlets"] == ["AssetAlias retrain_codec"]
    nano = dags["retrain__hcodec-nano"]
    assert nano["outlets"] == ["Asset hcodec-champion-hcodec-nano"]
    assert nano["max_active_runs"] == 1
    assert "codec" not in nano["params"]
    assert nano["params"]["approval"]["value"] == "automatic"
    assert nano["params"]["data"]["value"] == ["dataset:speech"]


def test_drift_and_time_start_a_declared_retraining(facts):
    both = facts["dags"]["retrain__hcodec-nano"]["schedule"]
    assert "AssetOrTimeSchedule" in both
    assert "hcodec-drift-speech" in facts["dags"]["retrain__drifting"]["schedule"]


@pytest.mark.parametrize("dag_id", ["retrain_codec", "rollback_codec"])
def test_wrong_values_of_retraining_are_refused_by_the_schema(facts, dag_id):
    refusals = facts["dags"][dag_id]["refusals"]
    assert refusals[0] is None
    assert refusals[-1] is None
    assert all(refusals[1:-1]), refusals


def test_declared_values_are_fixed_or_defaults(facts):
    speech = facts["dags"]["tokenize__speech"]
    assert speech["source"]["sources"] == ["s3://audio/speech/"]
    assert speech["params"]["workers"]["value"] == 3
    assert speech["params"]["max_bad_share"]["value"] == 0.01
    assert not {"source", "dataset", "codec", "mode"} & set(speech["params"])


def test_no_heavy_library_is_loaded_by_the_dag_bag(facts):
    assert _heavy(facts["modules"]) == []


def test_parsing_is_quick_and_reads_only_the_declarations(tmp_path, folder):
    files = sorted(map(str, folder.glob("*.py")))
    assert len(files) == len(list(DAGS.glob("*.py")))
    found = json.loads(_python(tmp_path, BUDGET, "watch", *files))
    assert _heavy(found["modules"]) == []
    code = (".py", ".pyc", ".so")
    seen = {text for event, text in found["seen"] if event != "open" or not text.endswith(code)}
    assert seen == {str(folder / "datasets.toml"), str(folder / "codecs.toml")}
    # Processor time, since other processes share the machine. Of all files in one process, while
    # Airflow parses each in a process of its own: more than any of them takes.
    runs = [json.loads(_python(tmp_path, BUDGET, "", *files)) for _ in range(3)]
    assert min(run["seconds"] for run in runs) < 0.25


def test_a_wrong_declaration_stops_no_other_dataset(tmp_path, folder):
    copy = tmp_path / "dags"
    shutil.copytree(folder, copy)
    (copy / "datasets.toml").write_text(DECLARED + WRONG)
    (tmp_path / "home").mkdir()
    facts = _facts(tmp_path / "home", copy)
    assert set(tokenising(facts)) == {"tokenize_corpus", "tokenize__speech", "tokenize__by_hand"}
    ((file, error),) = facts["errors"].items()
    assert file.endswith("declared_datasets_errors.py")
    assert "datasets.toml, [datasets.typo]: worker: Extra inputs are not permitted" in error


def test_a_wrong_declaration_stops_no_other_codec(tmp_path, folder):
    copy = tmp_path / "dags"
    shutil.copytree(folder, copy)
    (copy / "codecs.toml").write_text(CODECS + WRONG_CODEC)
    (tmp_path / "home").mkdir()
    facts = _facts(tmp_path / "home", copy)
    assert {"retrain__hcodec-nano", "retrain__quiet"} <= set(facts["dags"])
    ((file, error),) = facts["errors"].items()
    assert file.endswith("declared_codecs_errors.py")
    assert "codecs.toml, [codecs.typo]: data.0: String should match pattern" in error
