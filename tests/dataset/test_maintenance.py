from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import datetime, timedelta, tzinfo

import pytest

from hcodec_core.dataset import versions
from hcodec_core.dataset.lock import DatasetLock, LockSeeker, lock_holder, lock_uri
from hcodec_core.dataset.maintenance import (
    SweepReport,
    Upkeep,
    expire_snapshots,
    maintain,
    sweep_orphans,
)
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.table import SnapshotChange, load_table
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.dataset.versions import expire_versions, list_versions, pin, rollback, unpin
from hcodec_core.errors import CommitConflictError, ConfigError
from hcodec_core.storage import join_uri
from tests.dataset.factories import World, by_shard, fail_shard, finish_shard, job_of


def names(count: int) -> list[str]:
    return [f"{index:03d}.wav" for index in range(count)]


def age_everything(world: World, days: float) -> None:
    then = time.time() - days * 86400
    for path in (world.local_path / "root" / "out").rglob("*"):
        os.utime(path, (then, then))


def sweep(world: World, **changes: object) -> SweepReport:
    return sweep_orphans(world.storage, world.layout, **{"dry_run": False, **changes})  # type: ignore[arg-type]


def table_objects(world: World) -> set[str]:
    return {info.uri for info in list_folder(world.storage, world.layout.table_uri)}


def test_orphans_go_and_everything_else_stays(local_world: World) -> None:
    """Guard 5: neither expiry nor anything else of Iceberg removes files."""
    local_world.put(*names(4))
    local_world.version(num_shards=2)
    local_world.put("001.wav", data="new")
    local_world.version()
    before = table_objects(local_world)
    orphan = join_uri(local_world.layout.data_uri, "lost", "x.parquet")
    local_world.storage.write(orphan, b"1234")
    age_everything(local_world, 10)
    report = sweep(local_world, dry_run=True)
    assert (report.uris, report.num_bytes, report.is_dry_run) == ([orphan], 4, True)
    assert orphan in table_objects(local_world)
    assert sweep(local_world).num_orphans == 1
    assert table_objects(local_world) == before
    for version in ("v1", "v2"):
        rows = list(open_dataset(local_world.config, "demo", version))
        assert len(rows) == 4


def test_files_of_expired_snapshots_go(local_world: World) -> None:
    """Guard 5, and the ledger: expiry takes no version away."""
    local_world.put(*names(3))
    local_world.version()
    table = load_table(local_world.layout)
    table.append(table.scan().to_arrow(), branch="scratch")
    table.manage_snapshots().remove_branch("scratch").commit()
    assert expire_snapshots(local_world.layout, datetime.now() + timedelta(days=1)) >= 1
    age_everything(local_world, 10)
    report = sweep(local_world)
    assert any("/data/" in uri and uri.endswith(".parquet") for uri in report.uris)
    assert len(list(open_dataset(local_world.config, "demo", "v1"))) == 3
    assert local_world.plan().is_empty


def test_young_files_and_open_plans_are_spared(local_world: World) -> None:
    local_world.put(*names(4))
    local_world.version()
    local_world.put(*(f"new{name}" for name in names(4)))
    plan = local_world.plan(num_shards=2)
    results = local_world.work(plan)
    assert results[0].data_file is not None
    local_world.storage.write(join_uri(plan.data_uri, "unfinished-1.parquet"), b"1")
    young = join_uri(local_world.layout.data_uri, "lost", "young.parquet")
    age_everything(local_world, 10)
    local_world.storage.write(young, b"1")
    assert sweep(local_world).num_orphans == 0
    age_everything(local_world, 31)
    report = sweep(local_world)
    assert {young, results[0].data_file.uri} <= set(report.uris)


def test_files_taken_over_from_a_failed_generation_are_spared(local_world: World) -> None:
    local_world.put("seed.wav")
    local_world.version()
    local_world.put(*names(4))
    plan = local_world.plan(num_shards=2)
    job = job_of(local_world.storage, plan.plan_uri)
    first, second = by_shard(local_world.files(plan))
    done = finish_shard(local_world.storage, job, first)
    fail_shard(local_world.storage, job, second)
    retry = local_world.plan(num_shards=2)
    assert retry.generation == 1
    assert done.data_file is not None
    age_everything(local_world, 10)
    # The first generation is no open plan any more.
    os.utime(local_world.local_path / plan.plan_uri.removeprefix("file://") / "job.json", (0, 0))
    sweep(local_world)
    assert local_world.storage.head(done.data_file.uri) is not None


def test_the_litter_of_losers_goes(local_world: World) -> None:
    """Guard 12: two writers with one handle each; the loser's files are referred to by nothing."""
    local_world.put("a.wav")
    record = local_world.version()
    handles = [load_table(local_world.layout) for _ in range(2)]
    for table in handles:
        change = SnapshotChange(table, "scratch", record.snapshot_id)
        change.stage([], [], {})
        with suppress(CommitConflictError):
            change.commit({})
    litter = join_uri(local_world.layout.table_uri, "metadata", "00099-loser.metadata.json")
    local_world.storage.write(litter, b"{}")  # what a catalog's lost compare-and-swap leaves
    age_everything(local_world, 10)
    assert litter in sweep(local_world).uris
    assert sweep(local_world).num_orphans == 0
    assert len(open_dataset(local_world.config, "demo", "scratch")) == 1


def test_a_sweep_without_an_age_floor_is_refused(local_world: World) -> None:
    with pytest.raises(ConfigError, match="age floor"):
        sweep(local_world, min_age=timedelta(minutes=59))


def test_a_sweep_of_a_bucket_finds_nothing_young(s3_world: World) -> None:
    s3_world.put("a.wav")
    s3_world.version()
    report = sweep(s3_world, min_age=timedelta(hours=1))
    assert (report.num_orphans, report.num_kept) == (0, len(table_objects(s3_world)))


def test_a_sweep_takes_ages_by_the_storages_clock(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose clock is days ahead must not take a running committer's files for old ones."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=9)

    local_world.put(*names(4))
    local_world.version()
    local_world.storage.write(join_uri(local_world.layout.table_uri, "metadata/new.avro"), b"1")
    monkeypatch.setattr("hcodec_core.dataset.maintenance.datetime", Ahead)
    assert sweep(local_world).num_orphans == 0


def test_upkeep_says_first_what_it_then_does(local_world: World) -> None:
    local_world.put(*names(4))
    local_world.version(num_shards=2)
    local_world.put("new.wav")
    local_world.version()
    orphan = join_uri(local_world.layout.data_uri, "lost", "x.parquet")
    local_world.storage.write(orphan, b"1234")
    age_everything(local_world, 10)
    table = load_table(local_world.layout)
    change = SnapshotChange(table, "side", table.current_snapshot().snapshot_id)
    change.stage([], [], {})
    change.commit({})
    load_table(local_world.layout).manage_snapshots().remove_branch("side").commit()
    before = table_objects(local_world)
    run = (local_world.config, local_world.storage, local_world.layout, "test/1")
    planned = maintain(*run)
    assert table_objects(local_world) == before
    assert planned.compaction.num_files_before == 3
    assert planned.sweep.uris == [orphan]
    done = maintain(*run, dry_run=False)
    assert done.sweep.uris == [orphan]
    assert done.compaction.snapshot_id is not None
    assert len(list(open_dataset(local_world.config, "demo"))) == 5
    uri = lock_uri(local_world.config, "demo")
    assert lock_holder(local_world.storage, uri, "demo") is None


def test_upkeep_waits_for_other_runs(local_world: World) -> None:
    local_world.put(*names(2))
    local_world.version()
    lock = LockSeeker(local_world.config, local_world.storage, "demo", "dag/run 7").acquire()
    assert isinstance(lock, DatasetLock)
    with pytest.raises(CommitConflictError, match="dag/run 7"):
        maintain(
            local_world.config, local_world.storage, local_world.layout, "test/1", dry_run=False
        )


def test_a_dry_expiry_counts_what_would_go(local_world: World) -> None:
    local_world.put(*names(2))
    local_world.version()
    table = load_table(local_world.layout)
    change = SnapshotChange(table, "side", table.current_snapshot().snapshot_id)
    change.stage([], [], {})
    change.commit({})
    load_table(local_world.layout).manage_snapshots().remove_branch("side").commit()
    later = datetime.now().astimezone() + timedelta(days=1)
    num = expire_snapshots(local_world.layout, later, dry_run=True)
    assert num == expire_snapshots(local_world.layout, later) > 0


def four_versions(world: World) -> None:
    for name in names(4):
        world.put(name)
        world.version()


def keep(world: World, number: int, *, dry_run: bool = False) -> list[str]:
    terms = Upkeep(keep_versions=number, expire_after_days=0, small_file_mib=0)
    run = (world.config, world.storage, world.layout, "test/1", terms)
    return maintain(*run, dry_run=dry_run).expired_versions


def test_retention_takes_old_versions_but_no_pinned_one(local_world: World) -> None:
    four_versions(local_world)
    pin(local_world.layout, "v1", "trained on it")
    pin(local_world.layout, "v1", "trained on it twice")
    assert keep(local_world, 1, dry_run=True) == ["v2", "v3"]
    assert keep(local_world, 1) == ["v2", "v3"]
    assert keep(local_world, 1) == []
    listed = {v.version: v for v in list_versions(local_world.layout)}
    assert [v.num_rows for v in listed.values()] == [1, None, None, 4]
    assert (listed["v1"].is_pinned, listed["v1"].pin_reason) == (True, "trained on it twice")
    assert len(open_dataset(local_world.config, "demo", "v1")) == 1
    assert len(open_dataset(local_world.config, "demo")) == 4
    for refused in ("v2", "v9"):
        with pytest.raises(ConfigError, match=r"taken by retention|no version"):
            open_dataset(local_world.config, "demo", refused)
        with pytest.raises(ConfigError):
            pin(local_world.layout, refused)
        with pytest.raises(ConfigError):
            rollback(local_world.layout, refused)
    unpin(local_world.layout, "v1")
    assert keep(local_world, 1) == ["v1"]
    local_world.put("next.wav")
    assert local_world.version().version == "v5"


def test_retention_leaves_what_readers_see(local_world: World) -> None:
    four_versions(local_world)
    rollback(local_world.layout, "v2")
    assert keep(local_world, 1) == ["v1", "v3"]
    assert len(open_dataset(local_world.config, "demo")) == 2


def test_a_pin_wins_over_a_retention_that_did_not_see_it(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_versions(local_world)
    stale = load_table(local_world.layout)
    pin(local_world.layout, "v1")
    monkeypatch.setattr(versions, "load_table", lambda layout: stale)
    with pytest.raises(CommitConflictError):
        expire_versions(local_world.layout, 1)
    monkeypatch.undo()
    assert len(open_dataset(local_world.config, "demo", "v1")) == 1
