from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from pyiceberg.table import Table

from hcodec_core.config import Config
from hcodec_core.dataset import versions as versions_module
from hcodec_core.dataset.ledger import PlanState, plan_entry, rollback_entries
from hcodec_core.dataset.quarantine import read_quarantine
from hcodec_core.dataset.table import RefChange, load_table, main_snapshot_id
from hcodec_core.dataset.versions import (
    diff_versions,
    drop_branch,
    list_versions,
    publish,
    resolve_version,
    rollback,
    version_record,
)
from hcodec_core.errors import (
    CommitConflictError,
    ConfigError,
    HCodecError,
    ObjectMissingError,
    PlanIncompleteError,
    ValidationFailedError,
)
from hcodec_core.jobs import Outcome
from hcodec_core.storage import open_storage
from tests.dataset.factories import World


def names(count: int) -> list[str]:
    return [f"{index:03d}.wav" for index in range(count)]


def table_of(world: World) -> Table:
    return load_table(world.layout)


def uris(table: Table, snapshot_id: int | None = None) -> list[str]:
    scan = table.scan(snapshot_id=snapshot_id, selected_fields=("uri",))
    found: list[str] = sorted(scan.to_arrow()["uri"].to_pylist())
    return found


def test_publishing_moves_main_and_makes_tag_record_and_quarantine(world: World) -> None:
    world.put(*names(5))
    bad = world.uri("002.wav")
    plan = world.plan()
    world.work(plan, lambda uri: Outcome.QUARANTINED if uri == bad else Outcome.TOKENS)
    info = world.commit(plan)
    record = publish(world.config, world.storage, plan.plan_uri, info.snapshot_id, "s3://r/i.html")
    table = table_of(world)
    assert main_snapshot_id(table) == info.snapshot_id
    assert table.refs()["v1"].snapshot_id == info.snapshot_id
    assert info.branch not in table.refs()
    assert len(uris(table)) == 4
    assert record == version_record(world.storage, world.layout, "v1")
    assert (record.version, record.previous_version) == ("v1", None)
    assert record.report_uri == "s3://r/i.html"
    assert record.counts.outcomes["quarantined"] == 1
    (row,) = read_quarantine(world.storage, world.layout).to_pylist()
    assert (row["uri"], row["reason"]) == (bad, "undecodable")
    assert (row["plan_id"], row["version"]) == (plan.plan_id, "v1")


def test_the_next_plan_starts_from_the_version(world: World) -> None:
    world.put(*names(4))
    bad = world.uri("002.wav")
    first = world.version(lambda uri: Outcome.QUARANTINED if uri == bad else Outcome.TOKENS)
    assert world.plan().is_empty
    assert world.plan().num_quarantined_files == 1
    retry = world.plan(retry_quarantined=True)
    assert [file["uri"] for file in world.files(retry)] == [bad]
    assert (retry.base_version, retry.base_snapshot_id) == ("v1", first.snapshot_id)
    world.put("002.wav", data="mended")
    second = world.version()
    assert (second.version, second.previous_version) == ("v2", "v1")
    assert uris(table_of(world)) == sorted(world.uri(name) for name in names(4))
    assert [v.version for v in list_versions(world.layout)] == ["v1", "v2"]
    assert [v.is_current for v in list_versions(world.layout)] == [False, True]
    assert [v.num_rows for v in list_versions(world.layout)] == [3, 4]


def test_bounded_waves_are_published_one_by_one(local_world: World) -> None:
    for name in names(4):
        local_world.storage.write(local_world.uri(name), b"\0" * 32_000 * 36)
    seen = []
    while not (plan := local_world.plan(max_hours_per_version=0.02)).is_empty:
        local_world.work(plan)
        record = local_world.publish(plan, local_world.commit(plan))
        seen.append((record.version, record.counts.num_total_rows, record.num_remaining_files))
    assert seen == [("v1", 2, 2), ("v2", 4, 0)]


def test_only_the_validated_snapshot_is_published(world: World) -> None:
    """Guard 3: what came to the branch after validation does not get to main."""
    world.put(*names(3))
    plan = world.plan()
    world.work(plan)
    info = world.commit(plan)
    table = table_of(world)
    rows = table.scan(snapshot_id=info.snapshot_id).to_arrow()
    table.append(rows, branch=info.branch)
    assert len(uris(table_of(world), table.refs()[info.branch].snapshot_id)) == 6
    world.publish(plan, info)
    assert len(uris(table_of(world))) == 3


def test_main_must_be_at_the_base_of_the_commit(world: World) -> None:
    """Guard 3: neither ancestry nor a fresh look at main, but the recorded base."""
    world.put(*names(3))
    slow = world.plan()
    world.work(slow)
    info = world.commit(slow)
    world.put("more.wav")
    world.version()
    with pytest.raises(CommitConflictError, match="commit it again"):
        world.publish(slow, info)
    again = world.commit(slow)
    with pytest.raises(CommitConflictError, match=f"{again.snapshot_id}: validate"):
        world.publish(slow, info)
    record = world.publish(slow, again)
    assert record.version == "v2"
    assert uris(table_of(world)) == sorted(world.uri(n) for n in [*names(3), "more.wav"])


@pytest.mark.parametrize("mover", ["publish", "rollback"])
def test_main_that_moves_during_the_publish_stops_it(
    local_world: World, monkeypatch: pytest.MonkeyPatch, mover: str
) -> None:
    """Guard 3: the requirement holds in the commit itself (pyiceberg keeps the first of several).

    A rollback makes no tag, so that the requirement on ``main`` is the only one that can stop it.
    """
    local_world.put("a.wav")
    local_world.version()
    local_world.put("b.wav")
    local_world.version()
    local_world.put("c.wav")
    slow = local_world.plan()
    local_world.work(slow)
    info = local_world.commit(slow)
    stale = [table_of(local_world)]
    if mover == "publish":
        local_world.put("more.wav")
        local_world.version()
    else:
        rollback(local_world.layout, "v1")
    moved_to = main_snapshot_id(table_of(local_world))
    monkeypatch.setattr(
        versions_module, "load_table", lambda layout: stale.pop() if stale else load_table(layout)
    )
    with pytest.raises(CommitConflictError, match="commit it again"):
        local_world.publish(slow, info)
    assert stale == []
    assert main_snapshot_id(table_of(local_world)) == moved_to


def test_publishing_again_gives_the_same_version(world: World) -> None:
    """Guard 10: a tag is looked up by plan id first and never moved."""
    world.put(*names(3))
    plan = world.plan()
    world.work(plan)
    info = world.commit(plan)
    first = world.publish(plan, info)
    world.put("more.wav")
    world.version()
    before = table_of(world).metadata_location
    assert world.publish(plan, info) == first
    assert world.commit(plan).version == "v1"
    assert table_of(world).metadata_location == before
    assert table_of(world).refs()["v1"].snapshot_id == info.snapshot_id


def test_a_tag_is_never_moved(local_world: World) -> None:
    """Guard 10: with pyiceberg's own create_tag this would move v1."""
    local_world.put(*names(2))
    local_world.version()
    table = table_of(local_world)
    parent = table.snapshots()[0].snapshot_id
    with pytest.raises(CommitConflictError):
        RefChange(table).create_tag("v1", parent).commit()
    table.manage_snapshots().create_tag(parent, "v2").commit()  # by hand
    local_world.put("more.wav")
    assert local_world.version().version == "v3"
    assert table_of(local_world).refs()["v2"].snapshot_id == parent


def test_a_publisher_that_died_after_the_tag_is_finished_by_the_next(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_world.put(*names(3))
    plan = local_world.plan()
    local_world.work(plan, lambda uri: Outcome.QUARANTINED)
    info = local_world.commit(plan)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(versions_module, "write_quarantine", die)
    with pytest.raises(KeyboardInterrupt):
        local_world.publish(plan, info)
    monkeypatch.undo()
    with pytest.raises(ObjectMissingError):
        version_record(local_world.storage, local_world.layout, "v1")
    record = local_world.publish(plan, info)
    assert record.version == "v1"
    assert len(read_quarantine(local_world.storage, local_world.layout)) == 3
    assert record == version_record(local_world.storage, local_world.layout, "v1")


def _publish_in_process(config: Config, plan_uri: str, snapshot_id: int) -> str:
    try:
        return publish(config, open_storage(config.storage), plan_uri, snapshot_id).version
    except HCodecError as error:
        return type(error).__name__


def test_of_two_plans_that_race_one_is_published(local_world: World) -> None:
    local_world.put(*names(3))
    first = local_world.plan()
    local_world.put("more.wav")
    second = local_world.plan()
    plans = []
    for plan in (first, second):
        local_world.work(plan)
        plans.append((plan.plan_uri, local_world.commit(plan).snapshot_id))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(_publish_in_process, local_world.config, *plan) for plan in plans]
        answers = [future.result(timeout=120) for future in futures]
    assert sorted(answers) == ["CommitConflictError", "v1"]


def test_the_ledger_outlives_compaction_and_expiry(local_world: World) -> None:
    """Guard 11: neither files nor snapshot properties tell what was committed any more."""
    local_world.put(*names(4))
    plan = local_world.plan()
    local_world.work(plan)
    info = local_world.commit(plan)
    first = local_world.publish(plan, info)
    table = table_of(local_world)
    table.overwrite(table.scan().to_arrow())
    table.manage_snapshots().remove_tag("v1").commit()
    table.maintenance.expire_snapshots().older_than(datetime.now() + timedelta(days=1)).commit()
    assert table_of(local_world).snapshot_by_id(info.snapshot_id) is None
    known = local_world.commit(plan)
    assert (known.version, known.snapshot_id) == ("v1", info.snapshot_id)
    assert local_world.publish(plan, info) == first
    assert len(uris(table_of(local_world))) == 4
    assert local_world.plan().is_empty


def test_publishing_does_not_walk_ancestry(local_world: World) -> None:
    """Guard 3: expiry of the snapshots in between must not stop a publish."""
    local_world.put("a.wav")
    local_world.version()
    local_world.put("b.wav")
    plan = local_world.plan()
    local_world.work(plan)
    info = local_world.commit(plan)
    table = table_of(local_world)
    table.maintenance.expire_snapshots().older_than(datetime.now() + timedelta(days=1)).commit()
    assert len(table_of(local_world).snapshots()) == 2
    assert local_world.publish(plan, info).version == "v2"


def test_a_rejected_plan_leaves_readers_alone_and_keeps_the_evidence(world: World) -> None:
    """Guard 8: the rejected rows are not in the next version."""
    world.put(*names(3))
    plan = world.plan()
    world.work(plan)
    info = world.commit(plan)
    rejection = drop_branch(world.config, world.storage, plan.plan_uri, "too loud")
    assert drop_branch(world.config, world.storage, plan.plan_uri, "too loud") == rejection
    table = table_of(world)
    assert info.branch not in table.refs()
    assert len(uris(table, table.refs()[rejection.tag].snapshot_id)) == 3
    assert uris(table) == []
    with pytest.raises(ValidationFailedError, match="rejected"):
        world.publish(plan, info)
    again = world.commit(plan)
    assert (again.attempt, again.branch) == (2, f"audit_{plan.plan_id}_2")
    assert world.publish(plan, again).counts.num_total_rows == 3
    with pytest.raises(ConfigError, match="roll back instead"):
        drop_branch(world.config, world.storage, plan.plan_uri)


def test_an_uncommitted_plan_cannot_be_published_or_rejected(local_world: World) -> None:
    local_world.put("a.wav")
    local_world.version()
    local_world.put("b.wav")
    plan = local_world.plan()
    with pytest.raises(PlanIncompleteError, match="not committed"):
        publish(local_world.config, local_world.storage, plan.plan_uri, 1)
    with pytest.raises(PlanIncompleteError, match="not committed"):
        drop_branch(local_world.config, local_world.storage, plan.plan_uri)


def test_rollback_shows_the_older_version_and_new_work_starts_there(world: World) -> None:
    world.put("a.wav")
    world.version()
    world.put("b.wav")
    second = world.version()
    entry = rollback(world.layout, "v1", "b is noise")
    assert entry is not None
    assert (entry.from_version, entry.to_version) == ("v2", "v1")
    assert rollback(world.layout, "v1") is None
    table = table_of(world)
    assert uris(table) == [world.uri("a.wav")]
    assert resolve_version(table, "latest")[0] == "v1"
    assert resolve_version(table, "v2")[1] == second.snapshot_id
    assert [e.reason for e in rollback_entries(table)] == ["b is noise"]
    plan = world.plan()
    assert plan.plan_id != second.plan_id
    assert plan.base_version == "v1"
    world.work(plan)
    third = world.publish(plan, world.commit(plan))
    assert (third.version, third.previous_version) == ("v3", "v1")
    assert uris(table_of(world)) == [world.uri("a.wav"), world.uri("b.wav")]
    with pytest.raises(ConfigError, match="no version 'v9'"):
        rollback(world.layout, "v9")


def test_diff_tells_added_changed_and_removed_objects(local_world: World) -> None:
    local_world.put(*names(6))
    local_world.version()
    local_world.put("001.wav", data="new")
    local_world.put("x.wav", "y.wav")
    local_world.delete("004.wav")
    local_world.version()
    diff = diff_versions(local_world.layout, "v1", "v2", max_examples=1)
    assert (diff.num_added, diff.num_changed, diff.num_removed, diff.num_kept) == (2, 1, 1, 4)
    assert diff.added == [local_world.uri("x.wav")]
    assert diff.changed == [local_world.uri("001.wav")]
    assert diff.removed == [local_world.uri("004.wav")]
    with pytest.raises(ConfigError, match="versions: v1, v2"):
        diff_versions(local_world.layout, "v1", "v7")


def test_readers_see_only_versions_when_another_tool_moved_main(local_world: World) -> None:
    local_world.put(*names(3))
    record = local_world.version()
    table = table_of(local_world)
    table.append(table.scan().to_arrow())
    assert resolve_version(table_of(local_world), "latest") == ("v1", record.snapshot_id)


def test_old_ledger_entries_lose_their_counts(
    local_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hcodec_core.dataset import ledger

    monkeypatch.setattr(ledger, "_NUM_DETAILED", 0)
    local_world.put("a.wav")
    first = local_world.version()
    local_world.put("b.wav")
    local_world.version()
    entry = plan_entry(table_of(local_world), first.plan_id)
    assert entry is not None
    assert (entry.state, entry.version, entry.counts.num_rows) == (PlanState.PUBLISHED, "v1", 0)
    record = version_record(local_world.storage, local_world.layout, "v1")
    assert record.counts.num_rows == 1
    assert record.published_at < datetime.now(UTC)
