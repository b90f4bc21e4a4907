from __future__ import annotations

import pytest

from hcodec_core.dataset import compaction
from hcodec_core.dataset.compaction import CompactionReport, compact
from hcodec_core.dataset.ledger import PlanState, plan_entry
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.table import data_files, load_table, main_snapshot_id, refs_of
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.dataset.versions import diff_versions, list_versions, rollback
from hcodec_core.errors import CommitConflictError, StorageError
from tests.dataset.factories import World


def names(start: int, end: int) -> list[str]:
    return [f"{index:03d}.wav" for index in range(start, end)]


def run(world: World) -> CompactionReport:
    return compact(world.storage, world.layout, dry_run=False)


def num_files(world: World) -> int:
    table = load_table(world.layout)
    return len(data_files(table, main_snapshot_id(table)))


def rows(world: World, version: str = "latest") -> list[dict]:
    table = open_dataset(world.config, "demo", version).to_arrow()
    return sorted(table.to_pylist(), key=lambda row: row["uri"])


def test_files_become_few_and_rows_stay(world: World) -> None:
    world.put(*names(0, 6))
    world.version(num_shards=3)
    world.put(*names(6, 8))
    world.version(num_shards=2)
    before = rows(world)
    planned = compact(world.storage, world.layout)
    assert (planned.num_files_before, planned.num_files_after, planned.num_rows) == (5, 1, 8)
    assert num_files(world) == 5
    assert run(world).snapshot_id == main_snapshot_id(load_table(world.layout))
    assert num_files(world) == 1
    assert rows(world) == before == rows(world, "v2")
    assert not [name for name in refs_of(load_table(world.layout)) if "compact" in name]
    assert run(world).snapshot_id is None


def test_versions_know_where_they_are(local_world: World) -> None:
    local_world.put(*names(0, 4))
    local_world.version(num_shards=2)
    local_world.put(*names(4, 6))
    local_world.version(num_shards=2)
    run(local_world)
    assert [v.is_current for v in list_versions(local_world.layout)] == [False, True]
    assert rollback(local_world.layout, "v2") is None
    assert local_world.plan().is_empty
    local_world.put("new.wav")
    record = local_world.version()
    assert (record.version, record.previous_version) == ("v3", "v2")
    assert record.counts.num_total_rows == 7
    assert diff_versions(local_world.layout, "v2", "v3").num_added == 1
    entry = rollback(local_world.layout, "v1")
    assert entry is not None
    assert len(rows(local_world)) == 4


def test_a_plan_committed_before_is_known_after(local_world: World) -> None:
    local_world.put(*names(0, 4))
    plan = local_world.plan(num_shards=2)
    local_world.work(plan)
    info = local_world.commit(plan)
    local_world.publish(plan, info)
    run(local_world)
    again = local_world.commit(plan)
    assert (again.version, again.snapshot_id) == ("v1", info.snapshot_id)
    entry = plan_entry(load_table(local_world.layout), plan.plan_id)
    assert entry is not None
    assert entry.state is PlanState.PUBLISHED
    assert len(rows(local_world)) == 4


def test_a_plan_in_flight_is_committed_on_top(local_world: World) -> None:
    local_world.put(*names(0, 4))
    local_world.version(num_shards=2)
    local_world.put(*names(4, 6))
    plan = local_world.plan(num_shards=2)
    local_world.work(plan)
    early = local_world.commit(plan)
    run(local_world)
    with pytest.raises(CommitConflictError, match="commit it again"):
        local_world.publish(plan, early)
    local_world.publish(plan, local_world.commit(plan))
    assert [row["uri"] for row in rows(local_world)] == [local_world.uri(n) for n in names(0, 6)]
    assert num_files(local_world) == 3


def test_a_compaction_that_is_late_changes_nothing(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_world.put(*names(0, 4))
    local_world.version(num_shards=2)
    local_world.put(*names(4, 5))
    real = compaction._without_leftovers

    def publish_meanwhile(table, layout):
        local_world.version()
        return real(load_table(layout), layout)

    monkeypatch.setattr(compaction, "_without_leftovers", publish_meanwhile)
    with pytest.raises(CommitConflictError, match="compact again"):
        run(local_world)
    listed = [info.uri for info in list_folder(local_world.storage, local_world.layout.data_uri)]
    assert not [uri for uri in listed if "compacted" in uri]
    assert len(rows(local_world)) == 5


def test_wrong_bytes_are_seen(local_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    local_world.put(*names(0, 4))
    local_world.version(num_shards=2)
    before = main_snapshot_id(load_table(local_world.layout))
    real = compaction._Writer._write

    def drop_a_file(self, paths, merged_path):
        real(self, paths[:-1], merged_path)

    monkeypatch.setattr(compaction._Writer, "_write", drop_a_file)
    with pytest.raises(StorageError, match="does not hold the rows"):
        run(local_world)
    assert main_snapshot_id(load_table(local_world.layout)) == before


def test_a_compaction_that_died_leaves_a_branch_for_the_next(local_world: World) -> None:
    local_world.put(*names(0, 4))
    local_world.version(num_shards=2)
    table = load_table(local_world.layout)
    table.manage_snapshots().create_branch(main_snapshot_id(table), "compact_dead").commit()
    assert run(local_world).snapshot_id is not None
    assert "compact_dead" not in refs_of(load_table(local_world.layout))
