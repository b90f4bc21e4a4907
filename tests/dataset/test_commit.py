from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Table

from hcodec_core.config import Config
from hcodec_core.dataset import commit as commit_module
from hcodec_core.dataset.commit import CommitInfo, commit_plan
from hcodec_core.dataset.ledger import PlanState, plan_entry
from hcodec_core.dataset.plan import Plan
from hcodec_core.dataset.results import result_uri
from hcodec_core.dataset.table import (
    ensure_table,
    find_table,
    load_table,
    main_snapshot_id,
    root_snapshot_id,
)
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.errors import ConfigError, PlanIncompleteError
from hcodec_core.jobs import Outcome
from hcodec_core.storage import open_storage
from tests.dataset.factories import World, by_shard, fail_shard, finish_shard, job_of, toy_row


def names(count: int) -> list[str]:
    return [f"{index:03d}.wav" for index in range(count)]


def commit(world: World, plan: Plan) -> CommitInfo:
    return commit_plan(world.config, world.storage, plan.plan_uri)


def table_of(world: World) -> Table:
    return load_table(world.layout)


def uris(world: World, snapshot_id: int) -> list[str]:
    scan = table_of(world).scan(snapshot_id=snapshot_id, selected_fields=("uri",))
    found: list[str] = sorted(scan.to_arrow()["uri"].to_pylist())
    return found


def publish_raw(world: World, info: CommitInfo) -> None:
    """Move main without the ledger: what publishing does is tested elsewhere."""
    table = table_of(world)
    table.manage_snapshots().set_current_snapshot(snapshot_id=info.snapshot_id).commit()


def test_a_first_commit_holds_every_row_on_its_own_branch(world: World) -> None:
    world.put(*names(7))
    plan = world.plan(num_shards=3)
    world.work(plan)
    info = commit(world, plan)
    assert uris(world, info.snapshot_id) == sorted(world.uri(name) for name in names(7))
    table = table_of(world)
    assert table.refs()[info.branch].snapshot_id == info.snapshot_id
    assert info.branch == f"audit_{plan.plan_id}"
    # Guard 4: the branch starts at a snapshot of main, and main still shows nothing.
    assert main_snapshot_id(table) == root_snapshot_id(table) == info.base_snapshot_id
    snapshot = table.snapshot_by_id(info.snapshot_id)
    assert snapshot is not None
    assert snapshot.parent_snapshot_id == info.base_snapshot_id
    assert table.scan().to_arrow().num_rows == 0
    assert info.counts.num_rows == info.counts.num_total_rows == 7
    assert info.counts.outcomes == {"tokens": 7, "quarantined": 0, "changed": 0, "deleted": 0}


def test_the_table_says_which_codec_made_it(local_world: World) -> None:
    local_world.put("a.wav")
    plan = local_world.plan()
    local_world.work(plan)
    commit(local_world, plan)
    properties = table_of(local_world).properties
    assert properties["hcodec.encode-id"] == local_world.layout.encode_id
    assert properties["hcodec.codebook-id"] == "c" * 32
    assert properties["hcodec.codec-digest"] == local_world.manifest.digest
    assert properties["commit.retry.num-retries"] == "0"
    assert local_world.layout.table_name == f"demo__{local_world.layout.encode_id[:12]}"


def test_codes_come_back_as_written(world: World) -> None:
    world.put("a.wav")
    plan = world.plan()
    world.work(plan)
    info = commit(world, plan)
    row = table_of(world).scan(snapshot_id=info.snapshot_id).to_arrow().to_pylist()[0]
    (file,) = world.files(plan)
    expected = toy_row(job_of(world.storage, plan.plan_uri), file["shard_id"], file)
    assert {name: value for name, value in row.items() if name in expected} == expected


def test_the_workers_stats_prune_files(local_world: World) -> None:
    local_world.put(*names(6))
    plan = local_world.plan(num_shards=6)
    local_world.work(plan)
    info = commit(local_world, plan)
    table = table_of(local_world)
    wanted = f"uri == '{local_world.uri('003.wav')}'"
    everything = list(table.scan(snapshot_id=info.snapshot_id).plan_files())
    found = list(table.scan(snapshot_id=info.snapshot_id, row_filter=wanted).plan_files())
    assert (len(everything), len(found)) == (6, 1)
    assert table.scan(snapshot_id=info.snapshot_id, row_filter=wanted).to_arrow().num_rows == 1


def test_committing_again_changes_nothing(world: World) -> None:
    """Guard 1: a committer that runs again must not double the rows of its branch."""
    world.put(*names(4))
    plan = world.plan()
    world.work(plan)
    first = commit(world, plan)
    before = table_of(world).metadata_location
    assert commit(world, plan) == first
    assert table_of(world).metadata_location == before
    assert len(uris(world, first.snapshot_id)) == 4


def test_a_stale_committer_loses_and_finds_the_others_commit(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard 2: with pyiceberg's own retry the second commit would append all rows again."""
    local_world.put(*names(4))
    plan = local_world.plan()
    local_world.work(plan)
    stale = ensure_table(local_world.layout, job_of(local_world.storage, plan.plan_uri))
    first = commit(local_world, plan)

    handles = [stale]
    loads: list[str] = []

    def load_stale_then_fresh(layout: Any) -> Table:
        loads.append("stale" if handles else "fresh")
        return handles.pop() if handles else load_table(layout)

    monkeypatch.setattr(commit_module, "ensure_table", lambda *_: stale)
    monkeypatch.setattr(commit_module, "load_table", load_stale_then_fresh)
    assert commit(local_world, plan) == first
    assert loads == ["stale", "fresh"]
    monkeypatch.undo()
    assert Counter(uris(local_world, first.snapshot_id)).most_common(1)[0][1] == 1
    table = table_of(local_world)
    assert table.refs()[first.branch].snapshot_id == first.snapshot_id
    assert [ref for ref in table.refs() if ref.startswith("audit")] == [first.branch]


def _commit_in_process(config: Config, plan_uri: str) -> int:
    return commit_plan(config, open_storage(config.storage), plan_uri).snapshot_id


def test_committers_that_race_commit_once(world: World) -> None:
    world.put(*names(6))
    plan = world.plan()
    world.work(plan)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        futures = [pool.submit(_commit_in_process, world.config, plan.plan_uri) for _ in range(3)]
        snapshots = {future.result(timeout=120) for future in futures}
    assert len(snapshots) == 1
    assert uris(world, snapshots.pop()) == sorted(world.uri(name) for name in names(6))


def test_a_namespace_that_another_process_makes_meanwhile_is_taken(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_world.put(*names(2))
    plan = local_world.plan()
    local_world.work(plan)
    exists = SqlCatalog.namespace_exists

    def exists_only_afterwards(self: SqlCatalog, namespace: str) -> bool:
        if exists(self, namespace):
            return True
        monkeypatch.setattr(SqlCatalog, "namespace_exists", exists)
        self.create_namespace(namespace)
        return False

    monkeypatch.setattr(SqlCatalog, "namespace_exists", exists_only_afterwards)
    assert len(uris(local_world, commit(local_world, plan).snapshot_id)) == 2


def test_two_plans_have_branches_of_their_own(local_world: World) -> None:
    """Guard 8: rows of a rejected plan must not be published with the next one."""
    local_world.put(*names(3))
    first = local_world.plan()
    local_world.work(first)
    rejected = commit(local_world, first)
    local_world.put(*names(5))
    second = local_world.plan()
    local_world.work(second)
    accepted = commit(local_world, second)
    assert accepted.branch != rejected.branch
    assert Counter(uris(local_world, accepted.snapshot_id)).most_common(1)[0][1] == 1
    assert len(uris(local_world, accepted.snapshot_id)) == 5


def test_a_missing_data_file_is_found_before_the_commit(world: World) -> None:
    """Guard 9: Iceberg would take the commit and fail its readers."""
    world.put(*names(4))
    plan = world.plan(num_shards=2)
    results = world.work(plan)
    file = results[1].data_file
    assert file is not None
    world.storage.delete([file.uri])
    with pytest.raises(PlanIncompleteError, match="is gone"):
        commit(world, plan)
    table = find_table(world.layout)
    assert table is not None
    assert plan_entry(table, plan.plan_id) is None


def test_a_data_file_that_was_overwritten_is_found(world: World) -> None:
    world.put(*names(4))
    plan = world.plan(num_shards=2)
    results = world.work(plan)
    file = results[0].data_file
    assert file is not None
    world.storage.write(file.uri, b"x" * file.size)
    with pytest.raises(PlanIncompleteError, match="not what its worker wrote"):
        commit(world, plan)


def test_unfinished_and_failed_shards_are_named(local_world: World) -> None:
    local_world.put(*names(6))
    plan = local_world.plan(num_shards=3)
    job = job_of(local_world.storage, plan.plan_uri)
    first, second, third = by_shard(local_world.files(plan))
    finish_shard(local_world.storage, job, first)
    with pytest.raises(PlanIncompleteError, match=f"2 of 3 shards.*{second[0]['shard_id']}"):
        commit(local_world, plan)
    finish_shard(local_world.storage, job, second)
    fail_shard(local_world.storage, job, third)
    with pytest.raises(PlanIncompleteError, match=f"{third[0]['shard_id']}: out of memory"):
        commit(local_world, plan)


def test_results_that_do_not_add_up_are_refused(local_world: World) -> None:
    local_world.put(*names(4))
    plan = local_world.plan(num_shards=2)
    results = local_world.work(plan)
    good = results[0]
    uri = result_uri(plan.plan_uri, good.shard_id)
    twice = good.outcomes + results[1].outcomes[:1]
    for outcomes, words in [
        (good.outcomes[:-1], "2 files with|1 files with"),
        (twice, "files with tokens, but"),
        ([good.outcomes[0], good.outcomes[0]], "too much in|missing from"),
    ]:
        forged = good.model_copy(update={"outcomes": outcomes})
        local_world.storage.write(uri, forged.model_dump_json().encode())
        with pytest.raises(PlanIncompleteError, match=words):
            commit(local_world, plan)


def test_a_plan_of_bad_files_only_commits_an_empty_snapshot(world: World) -> None:
    world.put(*names(3))
    plan = world.plan()
    world.work(plan, lambda uri: Outcome.QUARANTINED)
    info = commit(world, plan)
    assert uris(world, info.snapshot_id) == []
    assert info.counts.num_files == 0
    assert info.counts.outcomes["quarantined"] == 3
    assert commit(world, plan) == info


def version(world: World, *, verdict: Any = lambda uri: Outcome.TOKENS, **changes: Any) -> Plan:
    """Plan, work, commit and move main."""
    plan = world.plan(**changes)
    world.work(plan, verdict)
    publish_raw(world, commit(world, plan))
    return plan


def rows(world: World) -> dict[str, str]:
    """Etag by URI of what main shows; fails on a URI that is there twice."""
    found = table_of(world).scan(selected_fields=("uri", "etag")).to_arrow().to_pylist()
    assert len({row["uri"] for row in found}) == len(found)
    return {row["uri"]: row["etag"] for row in found}


def etags(world: World, files: list[str]) -> dict[str, str]:
    found = {}
    for name in files:
        info = world.storage.head(world.uri(name))
        assert info is not None
        found[world.uri(name)] = info.etag
    return found


def test_changed_and_deleted_objects_are_swapped_by_whole_files(world: World) -> None:
    """Guard 6: only the files that hold such rows are written again."""
    world.put(*names(12))
    version(world, num_shards=6)
    before = {task.file.file_path for task in table_of(world).scan().plan_files()}
    world.put("003.wav", data="new content")
    world.put("new.wav")
    world.delete("007.wav")
    plan = world.plan()
    assert (plan.num_new_files, plan.num_changed_files, plan.num_tombstones) == (1, 1, 1)
    assert plan.num_unchanged_files == 10
    world.work(plan)
    info = commit(world, plan)
    assert info.counts.num_rows_removed == 2
    assert 1 <= info.counts.num_rewritten_files <= 2
    publish_raw(world, info)
    remaining = [name for name in names(12) if name != "007.wav"]
    assert rows(world) == etags(world, [*remaining, "new.wav"])
    after = {task.file.file_path for task in table_of(world).scan().plan_files()}
    assert len(before - after) == info.counts.num_rewritten_files
    assert info.counts.num_total_rows == len(rows(world))
    assert world.plan().is_empty


def test_a_file_without_rows_left_is_only_dropped(local_world: World) -> None:
    local_world.put(*names(4))
    version(local_world, num_shards=4)
    local_world.delete("001.wav")
    plan = local_world.plan(max_delete_share=0.5)
    assert plan.num_files == 0
    assert not plan.is_empty
    local_world.work(plan)
    info = commit(local_world, plan)
    assert info.counts.num_rewritten_files == 1
    data = list_folder(local_world.storage, plan.data_uri)
    assert data == []
    publish_raw(local_world, info)
    assert len(rows(local_world)) == 3


def test_a_changed_object_that_turned_bad_loses_its_old_row(local_world: World) -> None:
    local_world.put(*names(4))
    version(local_world)
    local_world.put("002.wav", data="noise")
    bad = local_world.uri("002.wav")
    version(
        local_world,
        verdict=lambda uri: Outcome.QUARANTINED if uri == bad else Outcome.TOKENS,
    )
    assert rows(local_world) == etags(local_world, ["000.wav", "001.wav", "003.wav"])


def test_an_object_that_changed_while_it_was_read_keeps_its_old_row(local_world: World) -> None:
    local_world.put(*names(4))
    version(local_world)
    old = rows(local_world)
    local_world.put("002.wav", data="new")
    version(local_world, verdict=lambda uri: Outcome.CHANGED)
    assert rows(local_world) == old


def test_tombstones_need_a_complete_listing_of_the_same_folder(local_world: World) -> None:
    local_world.put("a/1.wav", "a/2.wav", "b/1.wav")
    version(local_world)
    local_world.delete("a/1.wav", "b/1.wav")
    a_only = local_world.inventory(local_world.source_uri + "a/")
    plan = local_world.plan(inventory_uri=a_only.inventory_uri, max_delete_share=1.0)
    assert plan.num_tombstones == 1

    uri = a_only.inventory_uri + "/inventory.json"
    partial = a_only.model_copy(update={"is_complete": False})
    local_world.storage.write(uri, partial.model_dump_json().encode())
    plan = local_world.plan(inventory_uri=a_only.inventory_uri, max_delete_share=1.0)
    assert (plan.num_tombstones, plan.withheld_tombstones) == (0, 1)
    assert "not complete" in plan.withheld_reason

    text = f"uri\n{local_world.uri('a/2.wav')}\n".encode()
    local_world.storage.write(local_world.uri("list.csv"), text)
    manifest = local_world.inventory(local_world.uri("list.csv"))
    plan = local_world.plan(inventory_uri=manifest.inventory_uri, max_delete_share=1.0)
    assert (plan.num_tombstones, plan.withheld_tombstones) == (0, 0)


def test_many_deletes_need_permission(local_world: World) -> None:
    local_world.put(*names(10))
    version(local_world)
    local_world.delete(*names(5))
    local_world.put("new.wav")
    plan = local_world.plan()
    assert (plan.num_tombstones, plan.withheld_tombstones, plan.num_files) == (0, 5, 1)
    assert "50%" in plan.withheld_reason
    assert local_world.plan(allow_many_deletes=True).num_tombstones == 5


def test_a_plan_whose_base_moved_is_committed_again_without_doubles(world: World) -> None:
    world.put(*names(4))
    slow = world.plan()
    world.work(slow)
    first = commit(world, slow)
    world.put("new.wav")
    version(world)  # another plan, with the same files and one more, was published meanwhile
    again = commit(world, slow)
    assert again.attempt == 2
    assert again.branch == f"{first.branch}_2"
    assert first.branch not in table_of(world).refs()
    assert again.base_snapshot_id == main_snapshot_id(table_of(world))
    publish_raw(world, again)
    assert rows(world) == etags(world, [*names(4), "new.wav"])


def test_a_lost_ledger_entry_does_not_double_rows(local_world: World) -> None:
    """Guard 11: the ledger is what remembers; without it files and rows still count once."""
    local_world.put(*names(4))
    plan = version(local_world)
    table = table_of(local_world)
    entry = plan_entry(table, plan.plan_id)
    assert entry is not None
    assert entry.state is PlanState.COMMITTED
    with table.transaction() as transaction:
        transaction.remove_properties(f"hcodec.plan.{plan.plan_id}")
    publish_raw(local_world, commit(local_world, plan))
    assert rows(local_world) == etags(local_world, names(4))

    # The same after a compaction gave the rows other files.
    table = table_of(local_world)
    table.overwrite(table.scan().to_arrow())
    with table.transaction() as transaction:
        transaction.remove_properties(f"hcodec.plan.{plan.plan_id}")
    publish_raw(local_world, commit(local_world, plan))
    assert rows(local_world) == etags(local_world, names(4))


def test_a_branch_that_was_removed_is_made_again(local_world: World) -> None:
    local_world.put(*names(3))
    plan = local_world.plan()
    local_world.work(plan)
    first = commit(local_world, plan)
    table_of(local_world).manage_snapshots().remove_branch(first.branch).commit()
    again = commit(local_world, plan)
    assert (again.attempt, len(uris(local_world, again.snapshot_id))) == (2, 3)


def test_another_table_under_this_name_is_refused(local_world: World) -> None:
    local_world.put("a.wav")
    version(local_world)
    with table_of(local_world).transaction() as transaction:
        transaction.set_properties({"hcodec.encode-id": "f" * 32})
    with pytest.raises(ConfigError, match="not this dataset's table"):
        find_table(local_world.layout)


def test_a_loser_deletes_its_own_rewritten_files(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_world.put(*names(6))
    version(local_world, num_shards=2)
    local_world.put("001.wav", data="new")
    plan = local_world.plan()
    local_world.work(plan)
    handles = [table_of(local_world), table_of(local_world)]
    first = commit(local_world, plan)
    assert first.counts.num_rewritten_files == 1
    kept = list_folder(local_world.storage, plan.data_uri)

    monkeypatch.setattr(commit_module, "ensure_table", lambda *_: handles.pop())
    monkeypatch.setattr(
        commit_module, "load_table", lambda layout: handles.pop() if handles else load_table(layout)
    )
    assert commit(local_world, plan) == first
    assert handles == []
    assert list_folder(local_world.storage, plan.data_uri) == kept
