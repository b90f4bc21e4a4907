"""Retraining, end to end: a real Airflow, a real S3 endpoint, a real MLflow registry, the REST API.

One codec is turned down by a person, one is promoted, its dataset is tokenised anew, and the
promotion is rolled back. The trainings are of three steps: what they give is not looked at.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hcodec_airflow.demo.services import DemoError, Services
from hcodec_airflow.demo.stage import prepare
from hcodec_core.dataset.table import find_layouts
from hcodec_core.dataset.versions import list_versions
from hcodec_core.promotion.codec_versions import CodecVersions
from hcodec_core.promotion.deciding import find_rejection
from hcodec_core.promotion.history import History
from hcodec_core.training.synthetic import synthesise

pytestmark = [pytest.mark.airflow, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
DAG = "retrain_codec"
NAME = "hcodec-nano"
RATE = 16_000
NUM_TRAINING, NUM_HELD_OUT = 10, 4
PATIENCE = 1200
SMALL = {
    "batch_size": 2,
    "crop_seconds": 0.4,
    "quantizer.start_batches": 1,
    "quantizer.kmeans_steps": 2,
    "data.held_out_share": 0.3,
    "data.max_held_out_files": 2,
    "cadence.num_samples": 0,
}


def write_corpus(folder: Path) -> None:
    for number in range(NUM_TRAINING + NUM_HELD_OUT):
        kind = "speech" if number < NUM_TRAINING else "held-out"
        path = folder / kind / f"{number:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        audio = synthesise(RATE, RATE, np.random.default_rng(number))
        soundfile.write(path, audio, RATE, subtype="PCM_16")


class World:
    """A running Airflow with its storage."""

    def __init__(self, services: Services) -> None:
        self.services = services
        corpus = services.state_path / "corpus" / "voices"
        write_corpus(corpus)
        # Any free ports: other tests on this machine take the usual ones.
        (services.state_path / "ports.json").write_text('{"storage": 0, "airflow": 0}')
        self.stage = prepare(corpus, ROOT / "dags", services)
        self.api, self.config, self.storage = (
            self.stage.api,
            self.stage.config,
            self.stage.storage,
        )
        for dag in (DAG, "rollback_codec", "tokenize_corpus"):
            self.api.wait_for_dag(dag, self.services, 180)
        self.versions = CodecVersions(self.config)

    def form(self, **changes: object) -> dict[str, object]:
        return {
            "codec": NAME,
            "base": "hcodec-nano",
            "data": ["dataset:voices"],
            "held_out": f"{self.stage.source_uri}/held-out/",
            "recipe": "nano",
            "steps": 3,
            "changes": SMALL,
            "margins": {"mel_distance_db": 100, "stoi": 1, "pesq_wb": 5, "dnsmos_ovrl": 5},
            "min_files": 2,
            **changes,
        }

    def follow(self, dag: str, run_id: str, until: str = "") -> str:
        """State of a run when it is over, or of it while a task is in state ``until``."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.services.check()
            state = self.api.run_state(dag, run_id)
            if state in {"success", "failed"}:
                return state
            if until and until in self.api.task_states(dag, run_id).values():
                return until
            time.sleep(0.5)
        raise AssertionError(f"{dag} {run_id}: {self.api.task_states(dag, run_id)}")

    def question(self, run_id: str) -> dict:
        path = f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances/approve/-1/hitlDetails"
        return self.api.call("GET", path)

    def answer(self, run_id: str, option: str, reason: str) -> dict:
        """As the page Required actions does."""
        path = f"/api/v2/dags/{DAG}/dagRuns/{run_id}/taskInstances/approve/-1/hitlDetails"
        body = {"chosen_options": [option], "params_input": {"reason": reason}}
        return self.api.call("PATCH", path, body)

    def decide(self, run_id: str, option: str, reason: str) -> str:
        """Answer and follow the run to its end; its state.

        An answer that comes before the scheduler has heard that the task waits is taken for a task
        that was killed: Airflow then asks anew, and so a person would answer again.
        """
        state = "awaiting_input"
        while state == "awaiting_input":
            tell("PATCH hitlDetails ->", json.dumps(self.answer(run_id, option, reason)))
            state = self.follow(DAG, run_id, until="awaiting_input")
        return state

    def log(self, dag: str, run_id: str, task: str) -> str:
        return "\n".join(self.api.log_tail(dag, run_id, task, 60))

    def events(self) -> list[dict]:
        found = self.api.call("GET", "/api/v2/assets/events?limit=100")["asset_events"]
        return [event["extra"] for event in found if event["uri"].startswith("x-hcodec://champion")]

    @property
    def champion(self) -> int | None:
        return self.versions.aliases(NAME).get("champion")


def tell(*things: object) -> None:
    """Shown with ``pytest -s``: the run as a person sees it."""
    print(*things, flush=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    before = dict(os.environ)
    services = Services(tmp_path_factory.mktemp("retrain"))
    try:
        yield World(services)
    finally:
        services.stop()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def first(world):
    """A dataset with tokens, and the first champion, promoted by the gate alone."""
    form = {"source": f"{world.stage.source_uri}/speech/", "dataset": "voices"}
    tokens = world.api.trigger("tokenize_corpus", form)
    assert world.follow("tokenize_corpus", tokens) == "success"
    form = world.form(approval="automatic")
    run = world.api.trigger(DAG, form)
    assert world.follow(DAG, run) == "success", world.api.task_states(DAG, run)
    tell(f"POST /api/v2/dags/{DAG}/dagRuns", json.dumps(form), "->", run)
    tell(world.api.task_states(DAG, run))
    assert world.champion == 1
    return run


@pytest.fixture(scope="module")
def asked(world, first):
    """Two runs against the first champion that wait for a person, and what they ask."""
    runs = {
        "no": world.api.trigger(DAG, world.form(base="champion", steps=4)),
        "yes": world.api.trigger(DAG, world.form(base="champion", steps=5, tokenise=True)),
    }
    for run in runs.values():
        assert world.follow(DAG, run, until="awaiting_input") == "awaiting_input"
    tell({name: world.api.task_states(DAG, run) for name, run in runs.items()})
    return runs


def test_wrong_forms_are_refused_by_the_api(world):
    for wrong in ({"data": "dataset:voices"}, {"steps": 0}, {"approval": False}, {"codec": "a b"}):
        with pytest.raises(DemoError, match="400"):
            world.api.trigger(DAG, world.form(**wrong))


def test_a_person_is_told_all_that_the_answer_rests_on(world, asked):
    question = world.question(asked["yes"])
    tell(json.dumps({name: question[name] for name in ("subject", "body", "options")}, indent=1))
    assert question["subject"].startswith(f"Promote {NAME} version ")
    assert question["options"] == ["Approve", "Reject"]
    assert question["body"].startswith("**Pass: no worse than the champion")
    assert f"[Evaluation report]({world.stage.storage_url}/demo-tokens/work/" in question["body"]
    assert "Champion now: version 1. Trained on: dataset:voices@v1#" in question["body"]
    assert "All tokens of voices change: 10 files" in question["body"]
    assert world.champion == 1


def test_a_no_is_kept_and_promotes_nothing(world, asked):
    assert world.decide(asked["no"], "Reject", "dull voices") == "failed"
    states = world.api.task_states(DAG, asked["no"])
    tell(states)
    assert states["approve"] == "failed"
    assert {states[task] for task in ("promote", "tokens", "tokenise")} == {"upstream_failed"}
    assert "dull voices" in world.log(DAG, asked["no"], "approve")
    decision = world.api.xcom(DAG, asked["no"], "gate")
    kept = find_rejection(world.config, world.storage, NAME, decision["decision_id"])
    assert kept is not None
    assert kept.reason == "dull voices"
    assert world.champion == 1


def test_a_yes_promotes_and_the_dataset_is_tokenised_anew(world, asked):
    assert world.decide(asked["yes"], "Approve", "") == "success"
    tell(world.api.task_states(DAG, asked["yes"]))
    exported = world.api.xcom(DAG, asked["yes"], "export")
    assert world.champion == exported["version"]
    (event,) = [extra for extra in world.events() if extra["version"] == exported["version"]]
    tell("asset event:", json.dumps(event))
    assert (event["kind"], event["from_version"]) == ("promotion", 1)
    tell(world.log(DAG, asked["yes"], "tokens"))
    assert "All tokens of voices change: 10 files" in world.log(DAG, asked["yes"], "tokens")
    (run,) = world.api.xcom(DAG, asked["yes"], "tokens")
    assert world.follow("tokenize_corpus", run["run_id"]) == "success"
    layouts = {layout.encode_id: layout for layout in find_layouts(world.config, "voices")}
    versions = {i[:12]: [v.version for v in list_versions(x)] for i, x in layouts.items()}
    tell("versions of voices by encode id:", versions)
    assert list(versions.values()) == [["v1"], ["v1"]]


def test_clearing_the_end_of_a_run_changes_nothing(world, asked):
    """A person clears promote and what follows: no second step, no second run of tokens."""
    before = len(History(world.config, world.storage, NAME).steps())
    body = {
        "dry_run": False,
        "dag_run_id": asked["yes"],
        "task_ids": ["promote"],
        "include_downstream": True,
        "only_failed": False,
        "reset_dag_runs": True,
    }
    world.api.call("POST", f"/api/v2/dags/{DAG}/clearTaskInstances", body)
    assert world.follow(DAG, asked["yes"]) == "success"
    assert len(History(world.config, world.storage, NAME).steps()) == before
    runs = world.api.call("GET", "/api/v2/dags/tokenize_corpus/dagRuns")["dag_runs"]
    assert len(runs) == 2


def test_rollback_from_the_form_happens_once(world, asked):
    leaving = world.api.xcom(DAG, asked["yes"], "export")["version"]
    form = {"codec": NAME, "champion": leaving, "reason": "hiss in quiet rooms"}
    for _ in range(2):
        run = world.api.trigger("rollback_codec", form)
        assert world.follow("rollback_codec", run) == "success"
        tell("rollback_codec:", json.dumps(world.api.xcom("rollback_codec", run, "roll_back")))
    assert world.champion == 1
    steps = History(world.config, world.storage, NAME).steps()
    kinds = [(step.kind, step.from_version, step.to.version) for step in steps]
    tell("history:", kinds)
    assert kinds == [("promotion", None, 1), ("promotion", 1, leaving), ("rollback", leaving, 1)]
    wrong = world.api.trigger("rollback_codec", {**form, "champion": 99})
    assert world.follow("rollback_codec", wrong) == "failed"
    assert "not version 99" in world.log("rollback_codec", wrong, "roll_back")


def test_a_dry_run_trains_nothing(world, first):
    run = world.api.trigger(DAG, world.form(base="champion", steps=33_000, dry_run=True))
    assert world.follow(DAG, run) == "success"
    states = world.api.task_states(DAG, run)
    assert states.pop("pin") == "success"
    assert set(states.values()) == {"skipped"}
    assert "Dry run: nothing is trained." in world.log(DAG, run, "pin")
