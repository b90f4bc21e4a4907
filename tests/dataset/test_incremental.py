"""Runs that follow what objects there are now, whatever happened between two listings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from hcodec_core.config import CostConfig
from hcodec_core.dataset.plan import make_plan
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.table import open_catalog
from hcodec_core.dataset.versions import diff_versions, list_versions
from hcodec_core.errors import BudgetExceededError
from hcodec_core.jobs import Outcome
from tests.dataset.factories import World

QUARTER_HOUR = 32_000 * 900  # bytes of 16 kHz wav


def held(world: World) -> dict[str, str]:
    """Etag by URI of what readers see; every object once."""
    rows = [(row.uri, row.etag) for row in open_dataset(world.config, "demo")]
    assert len({uri for uri, _ in rows}) == len(rows)
    return dict(rows)


def there(world: World) -> dict[str, str]:
    return {info.uri: info.etag for info in world.storage.list_objects(world.source_uri)}


def test_a_renamed_object_is_one_gone_and_one_new(world: World) -> None:
    world.put("a.wav", "b.wav")
    world.version()
    data = world.storage.read(world.uri("a.wav"))
    world.storage.write(world.uri("renamed.wav"), data)
    world.delete("a.wav")
    world.version(max_delete_share=1.0)
    assert held(world) == there(world)
    diff = diff_versions(world.layout, "v1", "v2")
    assert (diff.added, diff.removed) == ([world.uri("renamed.wav")], [world.uri("a.wav")])
    assert (diff.num_changed, diff.num_kept) == (0, 1)


def test_a_run_that_missed_events_finds_all_of_their_sum(local_world: World) -> None:
    """Added and removed again, changed twice, removed and put back: only what is there counts."""
    world = local_world
    world.put("kept.wav", "changed.wav", "back.wav", "gone.wav", "bad.wav")
    bad = world.uri("bad.wav")
    world.version(lambda uri: Outcome.QUARANTINED if uri == bad else Outcome.TOKENS)
    world.put("passing.wav", "new.wav")
    world.delete("passing.wav", "gone.wav", "back.wav")
    world.put("changed.wav", data="second")
    world.put("changed.wav", data="third")
    world.put("bad.wav", data="mended")
    world.put("back.wav")
    world.version(max_delete_share=1.0)
    assert held(world) == there(world)
    assert world.plan().is_empty


def test_a_plan_computed_by_two_planners_at_once_is_one_plan(world: World) -> None:
    world.put(*(f"{number}.wav" for number in range(6)))
    request = world.request()
    open_catalog(world.config)  # its database is made once; two at that very moment must retry
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(make_plan, world.config, world.storage, request) for _ in range(2)]
        first, second = (call.result() for call in calls)
    assert first == second
    world.work(first)
    records = [world.publish(plan, world.commit(plan)) for plan in (first, second)]
    assert records[0] == records[1]
    assert held(world) == there(world)
    # A planner that comes late with the old listing finds nothing to do on what was published.
    assert make_plan(world.config, world.storage, request).is_empty
    assert [version.version for version in list_versions(world.layout)] == ["v1"]


def test_a_spend_cap_stops_between_waves_and_keeps_what_was_published(local_world: World) -> None:
    """Three waves of a quarter hour; the third would be of an hour, above the cap."""
    world = local_world
    for name, quarters in (("a.wav", 1), ("b.wav", 1), ("c.wav", 4)):
        world.storage.write(world.uri(name), b"\0" * QUARTER_HOUR * quarters)
    cost = CostConfig(worker_hour=1.0, realtime_factors={"toy": 1.0})
    config = world.config.model_copy(update={"cost": cost})
    published = []

    def one_wave_after_the_other() -> None:
        while True:
            request = world.request(spend_cap=0.5, max_hours_per_version=0.25)
            plan = make_plan(config, world.storage, request)
            world.work(plan)
            record = world.publish(plan, world.commit(plan))
            published.append((record.version, record.num_remaining_files))

    with pytest.raises(BudgetExceededError, match=r"1\.00 USD, more than the cap of 0\.5"):
        one_wave_after_the_other()
    assert published == [("v1", 2), ("v2", 1)]
    assert set(held(world)) == {world.uri("a.wav"), world.uri("b.wav")}
    # With a higher cap the next run takes up what is left, and nothing else.
    plan = make_plan(config, world.storage, world.request(spend_cap=2.0))
    assert [file["uri"] for file in world.files(plan)] == [world.uri("c.wav")]


def test_waves_go_on_past_files_that_cannot_be_used(local_world: World) -> None:
    world = local_world
    for name in ("a.wav", "b.wav", "c.wav"):
        world.storage.write(world.uri(name), b"\0" * QUARTER_HOUR)
    bad = world.uri("b.wav")
    seen = []
    while not (plan := world.plan(max_hours_per_version=0.25)).is_empty:
        world.work(plan, lambda uri: Outcome.QUARANTINED if uri == bad else Outcome.TOKENS)
        seen.append(world.publish(plan, world.commit(plan)).counts.num_total_rows)
    assert seen == [1, 1, 2]
