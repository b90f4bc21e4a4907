"""The main job, end to end: a real Airflow, a real S3 endpoint, real workers, the REST API."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from hcodec_airflow.demo.corpus import sync_folder
from hcodec_airflow.demo.follow import follow_run
from hcodec_airflow.demo.services import DemoError, Services
from hcodec_airflow.demo.stage import prepare
from hcodec_airflow.demo.summary import report_run
from hcodec_core.dataset.audit import read_audit
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.table import find_layout
from hcodec_core.dataset.versions import diff_versions, list_versions

pytestmark = pytest.mark.airflow

ROOT = Path(__file__).parent.parent.parent
CLIPS = ROOT / "tests" / "corpus" / "clips"
MANIFEST = json.loads((ROOT / "tests" / "corpus" / "manifest.json").read_text())
DAG = "tokenize_corpus"
MAX_SECONDS = 12.0
NUM_GOOD, NUM_BROKEN = 12, 5


def entries(is_good: bool, count: int) -> list[str]:
    chosen = [
        entry["file"]
        for entry in MANIFEST
        if (entry["expected"] == "decoded") is is_good and entry.get("seconds", 0) < MAX_SECONDS
    ]
    return chosen[:count]


class World:
    """A running demo and the folder that its bucket mirrors."""

    def __init__(self, state_path: Path) -> None:
        self.corpus = state_path / "corpus" / "clips"
        self.good = entries(True, NUM_GOOD)
        self.broken = entries(False, NUM_BROKEN)
        for name in [*self.good, *self.broken]:
            target = self.corpus / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CLIPS / name, target)
        self.services = Services(state_path)
        self.stage = prepare(self.corpus, ROOT / "dags", self.services)

    def run(self, **conf: object) -> tuple[str, str]:
        """Sync, trigger, follow; the run's id and final state."""
        stage = self.stage
        sync_folder(self.corpus, stage.source_uri, stage.storage)
        form = {
            "source": stage.source_uri + "/",
            "dataset": stage.dataset,
            "hours_per_shard": 0.005,
            "max_bad_share": 0.5,
            **conf,
        }
        run_id = stage.api.trigger(DAG, form)
        return run_id, follow_run(stage, self.services, DAG, run_id)

    def uri(self, name: str) -> str:
        return f"{self.stage.source_uri}/{name}"

    def uris(self, version: str) -> set[str]:
        view = open_dataset(self.stage.config_path, self.stage.dataset, version)
        return {row.uri for row in view}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    before = dict(os.environ)
    made = World(tmp_path_factory.mktemp("demo"))
    yield made
    made.services.stop()
    os.environ.clear()
    os.environ.update(before)


def test_first_run_publishes_every_readable_file(world, capsys):
    run_id, state = world.run()
    report_run(world.stage, DAG, run_id, state)
    shown = capsys.readouterr().out
    assert state == "success", shown
    assert world.uris("v1") == {world.uri(name) for name in world.good}
    assert f"without tokens: {NUM_BROKEN}" in shown
    for name in world.broken:
        assert world.uri(name) in shown
    pages = list((world.services.state_path / "reports").rglob("index.html"))
    assert len(pages) == 1
    assert "random weights" in shown
    assert "/cards/v1/index.html (while the storage runs)" in shown
    assert world.stage.api.task_states(DAG, run_id)["audit"] == "success"
    plan_uri = world.stage.api.xcom(DAG, run_id, "plan")["plan_uri"]
    audit = read_audit(world.stage.storage, plan_uri)
    assert len(audit.compared) == 8
    assert audit.with_other_codes == []
    assert "which printed: 12 " in shown


def test_second_run_finds_nothing_new(world, capsys):
    run_id, state = world.run()
    report_run(world.stage, DAG, run_id, state)
    assert state == "success"
    assert "Nothing new" in capsys.readouterr().out
    layout = find_layout(world.stage.config, world.stage.dataset)
    assert [version.version for version in list_versions(layout)] == ["v1"]
    tasks = world.stage.api.task_states(DAG, run_id)
    assert tasks["publish"] == "skipped"
    assert tasks["release"] == "success"


def test_one_added_one_changed_one_deleted(world):
    deleted, changed = world.good[0], world.good[1]
    added = f"new/{Path(world.good[2]).name}"
    (world.corpus / "new").mkdir()
    shutil.copy(world.corpus / world.good[2], world.corpus / added)
    (world.corpus / deleted).unlink()
    other = next(name for name in world.good[3:] if Path(name).suffix == Path(changed).suffix)
    shutil.copy(world.corpus / other, world.corpus / changed)
    _, state = world.run()
    assert state == "success"
    layout = find_layout(world.stage.config, world.stage.dataset)
    diff = diff_versions(layout, "v1", "v2")
    assert diff.added == [world.uri(added)]
    assert diff.changed == [world.uri(changed)]
    assert diff.removed == [world.uri(deleted)]
    assert diff.num_kept == NUM_GOOD - 2


def test_wrong_parameter_types_are_refused_by_the_api(world):
    with pytest.raises(DemoError, match="400"):
        world.run(workers="many")


def test_a_source_outside_the_allowed_prefixes_fails_before_any_work(world, capsys):
    run_id, state = world.run(source="s3://somewhere-else/audio/")
    report_run(world.stage, DAG, run_id, state)
    assert state == "failed"
    tasks = world.stage.api.task_states(DAG, run_id)
    assert tasks["inventory"] == "failed"
    assert tasks["tokenize"] == "upstream_failed"
    assert "source_prefixes" in capsys.readouterr().out


@pytest.mark.slow
def test_over_the_budget_nothing_is_published_and_files_are_named(world, capsys):
    run_id, state = world.run(dataset="strict", max_bad_share=0.1)
    report_run(world.stage, DAG, run_id, state)
    assert state == "failed"
    tasks = world.stage.api.task_states(DAG, run_id)
    assert tasks["validate"] == "failed"
    assert tasks["publish"] == "upstream_failed"
    shown = capsys.readouterr().out
    assert any(world.uri(name) in shown for name in world.broken)
    assert list_versions(find_layout(world.stage.config, "strict")) == []
