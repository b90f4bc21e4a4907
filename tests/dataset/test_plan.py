from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from hcodec_core.config import CostConfig
from hcodec_core.dataset.inventory import InventoryInfo
from hcodec_core.dataset.maintenance import sweep_orphans
from hcodec_core.dataset.plan import Plan, make_plan, read_plan
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.results import read_results, result_uri
from hcodec_core.dataset.sharding import deal_out, estimate_seconds, shard_digest
from hcodec_core.dataset.tabular import read_table, write_table
from hcodec_core.errors import (
    AccessError,
    BudgetExceededError,
    ConfigError,
    PlanIncompleteError,
)
from hcodec_core.jobs import JOB_FILE, ShardResult
from hcodec_core.storage import Storage, join_uri
from tests.dataset.factories import World, by_shard, fail_shard, finish_shard, job_of


def names(count: int) -> list[str]:
    return [f"{index:03d}.wav" for index in range(count)]


def test_a_first_plan_lists_every_file_once(world: World) -> None:
    world.put(*names(9))
    plan = world.plan(num_shards=4)
    files = world.files(plan)
    assert sorted(file["uri"] for file in files) == [world.uri(name) for name in names(9)]
    assert [(f["shard_index"], f["file_index"]) for f in files] == sorted(
        (f["shard_index"], f["file_index"]) for f in files
    )
    assert len(by_shard(files)) == plan.num_shards == 4
    assert {shard[0]["file_index"] for shard in by_shard(files)} == {0}
    assert plan.base_snapshot_id is None
    job = job_of(world.storage, plan.plan_uri)
    assert (job.num_files, job.num_shards, job.encode_id) == (9, 4, world.layout.encode_id)
    assert read_plan(world.storage, plan.plan_uri) == plan


def test_the_same_inputs_give_the_same_plan(local_world: World) -> None:
    local_world.put(*names(5))
    first, second = local_world.plan(), local_world.plan()
    assert first.inventory_uri != second.inventory_uri
    assert first.plan_id == second.plan_id
    local_world.put("more.wav")
    assert local_world.plan().plan_id != first.plan_id
    assert local_world.plan(max_attempts=5).plan_id != first.plan_id


def test_a_dry_run_writes_nothing(local_world: World) -> None:
    local_world.put(*names(3))
    plan = local_world.plan(dry_run=True)
    assert plan.num_files == 3
    assert local_world.storage.head(join_uri(plan.plan_uri, JOB_FILE)) is None
    assert not (local_world.local_path / "root/out/work").exists()


def test_shards_are_named_by_content(local_world: World) -> None:
    local_world.put(*names(6))
    before = {f["shard_id"]: f["uri"] for f in local_world.files(local_world.plan(num_shards=3))}
    local_world.put("000.wav", data="changed")
    after = {f["shard_id"]: f["uri"] for f in local_world.files(local_world.plan(num_shards=3))}
    assert len(before.keys() & after.keys()) == 2
    table = pa.table({"uri": ["a", "b"], "etag": ["1", "2"]})
    assert shard_digest("e", table) == shard_digest("e", table.take([1, 0]))
    assert shard_digest("e", table) != shard_digest("f", table)


def test_shards_are_balanced_and_dealt_the_same_in_any_order() -> None:
    rng = np.random.default_rng(0)
    seconds = rng.exponential(30, 1000)
    keys = pa.array([f"k{index:04d}" for index in range(1000)])
    shard_of = deal_out(keys, seconds, 16)
    loads = np.bincount(shard_of, weights=seconds)
    assert loads.max() - loads.min() < seconds.max()
    order = rng.permutation(1000)
    again = deal_out(keys.take(pa.array(order)), seconds[order], 16)
    assert np.array_equal(again, shard_of[order])
    assert set(deal_out(keys[:5], np.zeros(5), 5)) == set(range(5))


def test_lengths_are_guessed_by_container() -> None:
    table = pa.table({"uri": ["a.WAV", "b.opus", "c"], "size": pa.array([32000, 32000, 32000])})
    assert estimate_seconds(table, {}).tolist() == [1.0, 8.0, 2.0]
    assert estimate_seconds(table, {"opus": 16000.0}).tolist() == [1.0, 2.0, 2.0]


def test_min_shards_and_hours_per_shard(local_world: World) -> None:
    local_world.storage.write(local_world.uri("long.wav"), b"\0" * 320_000)
    local_world.put(*names(20))
    assert local_world.plan(min_shards=1).num_shards == 1
    assert local_world.plan(min_shards=7).num_shards == 7
    assert local_world.plan(min_shards=100).num_shards == 21
    assert local_world.plan(min_shards=1, hours_per_shard=10 / 3600 / 4).num_shards == 5


def test_cost_is_estimated_and_capped(local_world: World) -> None:
    local_world.storage.write(local_world.uri("a.wav"), b"\0" * 32_000 * 3600)
    cost = CostConfig(worker_hour=4.0, realtime_factors={"toy": 0.5})
    config = local_world.config.model_copy(update={"cost": cost})
    request = local_world.request(spend_cap=7.0)
    plan = make_plan(config, local_world.storage, request, dry_run=True)
    assert (plan.audio_hours, plan.worker_hours, plan.cost) == (1.0, 2.0, 8.0)
    assert plan.exceeds_spend_cap
    with pytest.raises(BudgetExceededError, match=r"8\.00 USD"):
        make_plan(config, local_world.storage, request)
    assert local_world.storage.head(join_uri(plan.plan_uri, JOB_FILE)) is None


def test_waves_bound_a_plan_and_say_what_remains(local_world: World) -> None:
    for name in names(5):
        local_world.storage.write(local_world.uri(name), b"\0" * 32_000 * 36)
    plan = local_world.plan(max_hours_per_version=0.025)
    assert (plan.num_files, plan.num_remaining_files) == (3, 2)
    assert plan.remaining_hours == pytest.approx(0.02)
    kept = sorted(file["uri"] for file in local_world.files(plan))
    assert kept == [local_world.uri(n) for n in names(3)]
    assert local_world.plan(max_hours_per_version=1e-9).num_files == 1


def test_an_empty_inventory_is_an_empty_plan(local_world: World) -> None:
    plan = local_world.plan()
    assert plan.is_empty
    assert local_world.storage.head(join_uri(plan.plan_uri, JOB_FILE)) is None


def test_metadata_of_a_manifest_reaches_the_files(local_world: World) -> None:
    local_world.put("in/a.wav")
    text = f"uri,speaker\n{local_world.uri('in/a.wav')},7\n"
    local_world.storage.write(local_world.uri("list.csv"), text.encode())
    info = local_world.inventory(local_world.uri("list.csv"))
    plan = local_world.plan(inventory_uri=info.inventory_uri)
    assert dict(local_world.files(plan)[0]["metadata"]) == {"speaker": "7"}


def test_a_failed_plan_gets_a_new_generation_that_keeps_finished_shards(world: World) -> None:
    world.put(*names(6))
    plan = world.plan(num_shards=3)
    job = job_of(world.storage, plan.plan_uri)
    first, second, third = by_shard(world.files(plan))
    done = finish_shard(world.storage, job, first)
    fail_shard(world.storage, job, second)

    retry = world.plan(num_shards=3)
    assert (plan.generation, retry.generation) == (0, 1)
    assert retry.plan_id != plan.plan_id
    (taken,) = read_results(world.storage, retry.plan_uri, lambda result: result)
    assert taken.data_file == done.data_file
    assert (taken.plan_id, taken.status) == (retry.plan_id, "done")
    shards = by_shard(world.files(retry))
    assert [f["uri"] for f in shards[taken.shard_index]] == [o.uri for o in taken.outcomes]
    assert {s[0]["shard_id"] for s in shards} & {
        first[0]["shard_id"],
        third[0]["shard_id"],
    } == set()
    assert world.plan(num_shards=3).plan_id == retry.plan_id


def test_an_inventory_of_foreign_places_is_refused(local_world: World) -> None:
    local_world.put("a.wav")
    info = local_world.inventory()
    part = info.parts[0]
    table = read_table(local_world.storage, part.uri)
    for uri in ("s3://secret/x.wav", local_world.source_uri + "../out/x.wav"):
        forged = table.set_column(0, table.schema.field(0), [[uri]])
        write_table(local_world.storage, part.uri, forged)
        with pytest.raises(AccessError):
            local_world.plan(inventory_uri=info.inventory_uri)


def test_a_request_names_a_usable_dataset(local_world: World) -> None:
    for name in ("a__b", "Demo", "1x", ""):
        with pytest.raises(ValueError, match="dataset"):
            local_world.request(dataset=name, inventory_uri="s3://x")


def test_an_inventory_document_of_another_kind_is_refused(local_world: World) -> None:
    uri = join_uri(local_world.root_uri, "out", "x")
    local_world.storage.write(uri + "/inventory.json", b'{"a": 1}')
    with pytest.raises(ConfigError, match="not an inventory"):
        local_world.plan(inventory_uri=uri)
    assert isinstance(local_world.inventory(), InventoryInfo)


def test_every_shard_appears_in_the_job(local_world: World) -> None:
    local_world.put(*names(11))
    files = local_world.files(local_world.plan(num_shards=5))
    assert sorted(Counter(f["shard_index"] for f in files)) == list(range(5))
    assert len({(f["shard_index"], f["shard_id"]) for f in files}) == 5
    assert all(f["shard_id"].endswith("-g0") for f in files)


def _cut(storage: Storage, uri: str) -> None:
    storage.write(uri, storage.read(uri)[:200])


def _truncated_result(world: World, result: ShardResult, plan: Plan) -> None:
    _cut(world.storage, result_uri(plan.plan_uri, result.shard_id))


def _missing_file(world: World, result: ShardResult, plan: Plan) -> None:
    assert result.data_file is not None
    world.storage.delete([result.data_file.uri])


def _short_file(world: World, result: ShardResult, plan: Plan) -> None:
    assert result.data_file is not None
    _cut(world.storage, result.data_file.uri)


def _forgotten_file(world: World, result: ShardResult, plan: Plan) -> None:
    outcomes = [result.outcomes[0], *result.outcomes[:-1]]
    text = result.model_copy(update={"outcomes": outcomes}).model_dump_json()
    world.storage.write(result_uri(plan.plan_uri, result.shard_id), text.encode())


@pytest.mark.parametrize("spoil", [_truncated_result, _missing_file, _short_file, _forgotten_file])
def test_a_plan_with_a_bad_result_heals_by_itself(
    world: World, spoil: Callable[[World, ShardResult, Plan], None]
) -> None:
    """The next run does the shard again and nothing else; what was wrong is named, and kept."""
    world.put(*names(8))
    plan = world.plan(num_shards=2)
    good, bad = world.work(plan)
    spoil(world, bad, plan)
    evidence = world.storage.read(result_uri(plan.plan_uri, bad.shard_id))
    with pytest.raises(PlanIncompleteError, match=rf"1 of 2 shards .*{bad.shard_id}: .*plan again"):
        world.commit(plan)
    retry = world.plan(num_shards=2)
    assert retry.generation == 1
    (taken,) = read_results(world.storage, retry.plan_uri, lambda result: result)
    assert taken.data_file == good.data_file
    job = job_of(world.storage, retry.plan_uri)
    for files in by_shard(world.files(retry)):
        if files[0]["shard_id"] != taken.shard_id:
            finish_shard(world.storage, job, files)
    world.publish(retry, world.commit(retry))
    assert len(list(open_dataset(world.config, "demo"))) == 8
    assert world.plan().is_empty
    assert world.storage.read(result_uri(plan.plan_uri, bad.shard_id)) == evidence


def test_a_failed_shard_does_not_hold_up_the_next_run(local_world: World) -> None:
    """All shards are accounted for, the commit names the failure, the next plan goes on."""
    local_world.put(*names(6))
    plan = local_world.plan(num_shards=2)
    job = job_of(local_world.storage, plan.plan_uri)
    first, second = by_shard(local_world.files(plan))
    finish_shard(local_world.storage, job, first)
    fail_shard(local_world.storage, job, second)
    with pytest.raises(PlanIncompleteError, match=r"out of memory.*plan again"):
        local_world.commit(plan)
    retry = local_world.plan(num_shards=2)
    job = job_of(local_world.storage, retry.plan_uri)
    (pending,) = (
        files
        for files in by_shard(local_world.files(retry))
        if local_world.storage.head(result_uri(retry.plan_uri, files[0]["shard_id"])) is None
    )
    finish_shard(local_world.storage, job, pending)
    local_world.publish(retry, local_world.commit(retry))
    assert len(list(open_dataset(local_world.config, "demo"))) == 6


def test_a_sweep_passes_over_results_that_cannot_be_read(local_world: World) -> None:
    local_world.put(*names(4))
    local_world.version()
    local_world.put("new.wav")
    plan = local_world.plan()
    (result,) = local_world.work(plan)
    _truncated_result(local_world, result, plan)
    assert result.data_file is not None
    sweep_orphans(local_world.storage, local_world.layout, dry_run=False)
    assert local_world.storage.head(result.data_file.uri) is not None
