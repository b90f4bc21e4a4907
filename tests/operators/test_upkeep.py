"""DAG ``maintain_datasets`` on a real table: a dry run removes nothing, a real one no row."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred

from hcodec_airflow.locking import LockWait, release_lock
from hcodec_airflow.upkeep import describe_upkeep, read_upkeep
from hcodec_airflow.upkeep_operators import ChooseDatasetsOperator, MaintainDatasetOperator
from hcodec_core.dataset.lock import lock_holder, lock_uri
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.table import load_table
from hcodec_core.errors import ConfigError
from hcodec_core.storage import join_uri
from tests.dataset.factories import World

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("run_dag.py")
TEN_DAYS = 10 * 86400


def _rows(world: World, version: str) -> list[tuple]:
    """Every row of a version with all that it holds, in an order of its own."""
    return sorted(
        (
            row.audio_id,
            row.uri,
            row.etag,
            str(row.columns),
            *(c.tobytes() for c in row.codes.values()),
        )
        for row in open_dataset(world.config, "demo", version)
    )


def _objects(world: World) -> set[str]:
    return {info.uri for info in world.storage.list_objects(join_uri(world.root_uri, "out/"))}


def _age(world: World) -> None:
    """Let everything that lies there now be ten days old."""
    old = time.time() - TEN_DAYS
    for path in Path(world.local_path, "root", "out").rglob("*"):
        if path.is_file():
            os.utime(path, (old, old))


@pytest.fixture
def used(world):
    """Three versions in small files, an orphan, and a plan in flight."""
    for number in range(3):
        world.put(f"{number}a.wav", f"{number}b.wav")
        world.version()
    orphan = join_uri(world.layout.data_uri, "left-behind.parquet")
    world.storage.write(orphan, b"nobody refers to this")
    _age(world)
    # Not aged: the etag of a local file is its time, and a commit compares it.
    world.put("later.wav")
    in_flight = world.plan()
    world.work(in_flight)
    return SimpleNamespace(world=world, orphan=orphan, in_flight=in_flight)


def _run_dag(folder: Path, *forms: dict[str, Any]) -> tuple[list[dict], str]:
    dags = folder / "dags"
    dags.mkdir()
    shutil.copy(ROOT / "dags" / "maintain_datasets.py", dags)
    declared = (
        '[datasets.demo]\nsources = ["s3://a/b/"]\n[datasets.unborn]\nsources = ["s3://a/c/"]'
    )
    (dags / "datasets.toml").write_text(declared)
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "OMP_NUM_THREADS": "1",
    }
    texts = []
    for command in (
        ("-m", "airflow", "db", "migrate"),
        (str(RUNNER), str(dags), json.dumps(forms), "maintain_datasets"),
    ):
        done = subprocess.run(
            [sys.executable, *command],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        texts.append(done.stdout)
    log, _, facts = texts[-1].partition("FACTS")
    return json.loads(facts), log


@pytest.mark.airflow
def test_the_dag_in_a_real_airflow(used, tmp_path):
    world = used.world
    versions = ("v1", "v2", "v3")
    rows = {version: _rows(world, version) for version in versions}
    objects = _objects(world)
    real = {"dry_run": "never", "expire_after_days": 0, "orphan_age_days": 1}
    runs, log = _run_dag(tmp_path, {}, real, real)
    dry, first, second = (run["xcoms"] for run in runs)
    assert [run["state"] for run in runs] == ["success"] * 3
    assert dry["choose.return_value"] == ["demo", "unborn"]
    (told,), (did,), (again,) = (
        xcoms["maintain[0].return_value"] for xcoms in (dry, first, second)
    )
    assert told["is_dry_run"]
    assert (told["num_small_files"], told["num_orphans"]) == (did["num_small_files"], 1)
    assert did["num_small_files"] > did["num_files_after"] > 0
    removed = objects - _objects(world)
    # What the expiry set free comes on top of what the dry run could see: lists, but no rows.
    assert did["num_orphans"] == len(removed) == 1 + did["num_expired_snapshots"]
    assert [uri for uri in removed if uri.endswith(".parquet")] == [used.orphan]
    assert (again["num_small_files"], again["num_orphans"]) == (0, 0)
    assert dry["maintain[1].return_value"] == []
    assert "Dry run: nothing was changed." in log
    assert "orphan: " + used.orphan in log
    assert {version: _rows(world, version) for version in versions} == rows
    assert lock_holder(world.storage, lock_uri(world.config, "demo"), "demo") is None
    # The plan that was in flight all the while is published, on top of the compacted files.
    record = world.publish(used.in_flight, world.commit(used.in_flight))
    assert (record.version, len(_rows(world, "v4"))) == ("v4", 7)


def _context(run_type: str = "manual", **params: Any) -> dict[str, Any]:
    task = SimpleNamespace(dag_id="maintain_datasets", run_id="r")
    return {"params": params, "ti": task, "dag_run": SimpleNamespace(run_type=run_type)}


def test_a_dry_run_changes_nothing_and_needs_no_lock(used, caplog):
    caplog.set_level(logging.INFO)
    world = used.world
    held, _ = LockWait("demo", "tokenize/r").ask()
    before = _objects(world), len(load_table(world.layout).snapshots())
    form = {"expire_after_days": 0, "orphan_age_days": 1}
    (row,) = MaintainDatasetOperator(task_id="m", dataset="demo").execute(_context(**form))
    assert row["is_dry_run"]
    assert row["num_orphans"] == 1
    assert (_objects(world), len(load_table(world.layout).snapshots())) == before
    assert "Dry run: nothing was changed." in caplog.text
    release_lock(held)


def test_a_running_tokenise_run_is_waited_for(used):
    """The task waits for its lock, then works on the one that the trigger got."""
    world = used.world
    held, _ = LockWait("demo", "tokenize/r").ask()
    operator = MaintainDatasetOperator(task_id="m", dataset="demo")
    context = _context("scheduled")
    before = _objects(world)
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute(context)
    path, kwargs = deferred.value.trigger.serialize()
    assert path.endswith("DatasetLockTrigger")
    assert _objects(world) == before
    release_lock(held)
    lock, message = LockWait(kwargs["dataset"], kwargs["owner"]).ask()
    (row,) = operator.take_from_trigger(context, {"lock": lock, "message": message})
    assert not row["is_dry_run"]
    assert used.orphan not in _objects(world)
    assert lock_holder(world.storage, lock_uri(world.config, "demo"), "demo") is None
    with pytest.raises(AirflowFailException, match="storage is gone"):
        operator.take_from_trigger(context, {"error": "storage is gone"})


def test_the_lock_is_given_back_when_upkeep_fails(used, monkeypatch):
    from hcodec_airflow import upkeep

    def fails(*arguments, **options):
        raise ConfigError("Something is wrong.")

    monkeypatch.setattr(upkeep, "maintain_dataset", fails)
    with pytest.raises(AirflowFailException, match="Something is wrong"):
        MaintainDatasetOperator(task_id="m", dataset="demo").execute(_context(dry_run="never"))
    world = used.world
    assert lock_holder(world.storage, lock_uri(world.config, "demo"), "demo") is None


@pytest.mark.parametrize(
    ("dry_run", "run_type", "is_dry"),
    [
        ("by hand", "manual", True),
        ("by hand", "scheduled", False),
        ("by hand", "backfill", True),
        ("always", "scheduled", True),
        ("never", "manual", False),
    ],
)
def test_who_starts_a_run_decides_whether_it_is_dry(dry_run, run_type, is_dry):
    assert read_upkeep({"dry_run": dry_run}).is_dry(run_type) is is_dry


def test_compaction_can_be_left_out(used):
    form = {"dry_run": "never", "compact": False}
    (row,) = MaintainDatasetOperator(task_id="m", dataset="demo").execute(_context(**form))
    assert (row["num_small_files"], row["num_orphans"]) == (0, 1)


def test_the_form_chooses_datasets_or_all_declared_ones():
    choose = ChooseDatasetsOperator(task_id="choose", declared=["a", "b"])
    assert choose.execute(_context()) == ["a", "b"]
    assert choose.execute(_context(datasets=None)) == ["a", "b"]
    assert choose.execute(_context(datasets=["c", "a", "c"])) == ["c", "a"]
    for wrong in ({"datasets": ["No Name"]}, {"orphan_age_days": 0}, {"colour": "red"}):
        with pytest.raises(AirflowFailException, match="This run cannot be started"):
            choose.execute(_context(**wrong))


def test_a_table_for_people():
    row = {
        "dataset": "demo",
        "encode_id": "abc",
        "num_small_files": 12,
        "num_files_after": 1,
        "num_expired_snapshots": 3,
        "num_orphans": 4,
        "num_orphan_bytes": 2_500_000,
        "num_kept": 99,
    }
    heads, line, end = describe_upkeep([row], dry_run=True)
    assert (
        heads.split() == "dataset encode id small files become snapshots orphans size kept".split()
    )
    assert line.split() == ["demo", "abc", "12", "1", "3", "4", "2.5", "MB", "99"]
    assert line.index("12") == heads.index("small files")
    assert end == "Dry run: nothing was changed."
    assert describe_upkeep([row], dry_run=False)[-1] == "Done."
    assert describe_upkeep([], dry_run=False) == [
        "No dataset has a table yet: nothing to maintain."
    ]
