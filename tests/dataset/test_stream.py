from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hcodec_core.dataset.ordering import EpochOrder, Shuffle
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.stream import Place, StreamOptions, TokenStream, open_stream
from hcodec_core.errors import ConfigError
from tests.dataset.factories import World

NUM_ROWS = 31


@pytest.fixture
def filled(local_world: World) -> World:
    local_world.put(*(f"{index:03d}.wav" for index in range(NUM_ROWS)))
    local_world.version(num_shards=5)
    return local_world


def options(world: World, **changes: object) -> StreamOptions:
    return dataclasses.replace(
        StreamOptions(cache_path=world.local_path / "cache", shuffle=Shuffle(7, 6, 3)), **changes
    )


def stream(world: World, rank: int = 0, num_ranks: int = 1, **changes: object) -> TokenStream:
    return open_stream(
        world.config, "demo", options=options(world, **changes), place=Place(rank, num_ranks)
    )


def ids(samples: object) -> list[str]:
    return [sample.audio_id for sample in samples]


@pytest.mark.parametrize("lanes", [1, 4, 24, 100])
@pytest.mark.parametrize("sizes", [(5, 0, 9, 1), (40,), (1,) * 13])
def test_an_epoch_visits_every_row_once(lanes: int, sizes: tuple[int, ...]) -> None:
    order = EpochOrder(sizes, 3, Shuffle(1, lanes, 4))
    places = [order.locate(position) for position in range(sum(sizes))]
    assert len(set(places)) == sum(sizes)
    assert all(row < sizes[file] for file, row in places)
    backwards = [order.locate(position) for position in reversed(range(sum(sizes)))]
    assert backwards[::-1] == places


def test_the_order_of_an_epoch_stays_what_it_was() -> None:
    """A change of this list breaks the resumption of every run that is under way."""
    order = EpochOrder((4, 5), 2, Shuffle(9, 2, 3))
    found = [order.locate(position) for position in range(9)]
    assert found == GOLDEN_ORDER
    assert found != [EpochOrder((4, 5), 3, Shuffle(9, 2, 3)).locate(p) for p in range(9)]


GOLDEN_ORDER = [(1, 1), (0, 2), (1, 2), (0, 0), (1, 0), (0, 1), (1, 4), (0, 3), (1, 3)]


def test_samples_are_the_rows(filled: World) -> None:
    truth = {row.audio_id: row for row in open_dataset(filled.config, "demo")}
    seen = 0
    for sample in stream(filled, columns=("uri", "metadata", "duration_seconds")):
        row = truth[sample.audio_id]
        assert sample.columns["uri"] == row.uri
        assert sample.columns["duration_seconds"] == row.duration_seconds
        for name in ("semantic", "acoustic"):
            assert sample.codes[name].dtype == np.int32
            assert np.array_equal(sample.codes[name], row.codes[name])
        seen += 1
    assert seen == NUM_ROWS


def test_without_a_shuffle_rows_come_in_order(filled: World) -> None:
    assert ids(stream(filled, shuffle=None)) == [
        row.audio_id for row in open_dataset(filled.config, "demo")
    ]


def test_epochs_differ_and_repeat_by_seed(filled: World) -> None:
    reader = stream(filled)
    first, second = ids(reader), ids(reader)
    assert first != second
    assert set(first) == set(second)
    again = stream(filled)
    again.set_epoch(1)
    assert ids(again) == second
    assert ids(stream(filled, shuffle=Shuffle(8, 6, 3))) != first


@pytest.mark.parametrize(("remainder", "counts"), [("drop", 7), ("pad", 8), ("keep", None)])
def test_ranks_share_an_epoch(filled: World, remainder: str, counts: int | None) -> None:
    readers = [stream(filled, rank, 4, remainder=remainder) for rank in range(4)]
    parts = [ids(reader) for reader in readers]
    assert [len(part) for part in parts] == [len(reader) for reader in readers]
    times = Counter(audio_id for part in parts for audio_id in part)
    if counts is None:
        assert sorted(len(part) for part in parts) == [7, 8, 8, 8]
    else:
        assert {len(part) for part in parts} == {counts}
    assert sum(times.values()) == {"drop": 28, "pad": 32, "keep": 31}[remainder]
    assert len(times) == {"drop": 28, "pad": 31, "keep": 31}[remainder]


@pytest.mark.parametrize("ranks", [(2, 3), (3, 2), (2, 2), (1, 5)])
def test_a_state_resumes_under_another_number_of_ranks(
    filled: World, ranks: tuple[int, int]
) -> None:
    """Ranks of the first run take 4 rows each; one rank's state resumes all of the second run."""
    before, after = ranks
    seen: list[str] = []
    for rank in range(before):
        reader = stream(filled, rank, before, remainder="keep")
        samples = iter(reader)
        seen += [next(samples).audio_id for _ in range(4)]
        state = json.loads(json.dumps(reader.state_dict()))
    for rank in range(after):
        reader = stream(filled, rank, after, remainder="keep")
        reader.load_state_dict(state)
        rest = ids(reader)
        assert len(rest) == len(reader)
        seen += rest
    assert len(seen) == NUM_ROWS
    assert len(set(seen)) == NUM_ROWS


def test_a_state_resumes_twice_in_the_same_order(filled: World) -> None:
    whole = ids(stream(filled))
    reader = stream(filled)
    samples = iter(reader)
    start = [next(samples).audio_id for _ in range(10)]
    resumed = stream(filled)
    resumed.load_state_dict(reader.state_dict())
    resumed.set_epoch(0)
    assert start + ids(resumed) == whole


def test_a_later_version_changes_nothing_for_a_pinned_reader(filled: World) -> None:
    reader = stream(filled)
    before = ids(reader)
    filled.put("new.wav")
    filled.version()
    reader.set_epoch(0)
    assert ids(reader) == before
    latest = stream(filled)
    assert len(latest) == NUM_ROWS + 1
    with pytest.raises(ConfigError, match="another filter or shuffle"):
        latest.load_state_dict(reader.state_dict())
    old = open_stream(filled.config, "demo", "v1", options=options(filled))
    old.load_state_dict(reader.state_dict())


def test_filters_choose_rows(filled: World) -> None:
    rows = open_dataset(filled.config, "demo").to_arrow(["audio_id", "num_frames"]).to_pylist()
    wanted = {row["audio_id"] for row in rows if row["num_frames"] > 20}
    assert 0 < len(wanted) < NUM_ROWS
    reader = stream(filled, row_filter="num_frames > 20 and container = 'wav'")
    assert set(ids(reader)) == wanted
    assert len(reader) == len(wanted)
    uri = filled.uri("000.wav")
    one = stream(filled, row_filter=f"uri = '{uri}'")
    assert len(one.snapshot.uris) < 5, "files whose statistics rule them out stay closed"
    assert len(ids(one)) == 1
    assert ids(stream(filled, row_filter="num_frames > 9999")) == []


@pytest.mark.parametrize("row_filter", ["no_such = 1", "num_frames >", "num_frames > 'x'"])
def test_a_bad_filter_is_refused(filled: World, row_filter: str) -> None:
    with pytest.raises(ConfigError, match="row filter"):
        stream(filled, row_filter=row_filter)


def test_columns_and_streams_are_projected(filled: World) -> None:
    reader = stream(filled, streams=("semantic",))
    assert list(next(iter(reader)).codes) == ["semantic"]
    for wrong in ({"streams": ("fused",)}, {"columns": ("colour",)}):
        with pytest.raises(ConfigError, match="There is no"):
            stream(filled, **wrong)


def test_the_cache_is_bounded_and_used_again(filled: World) -> None:
    folder = filled.local_path / "cache"
    assert len(ids(stream(filled, cache_bytes=1))) == NUM_ROWS
    assert len(list(folder.glob("*.arrow"))) == 1
    ids(stream(filled))
    kept = {path: path.stat().st_ino for path in folder.glob("*.arrow")}
    assert len(kept) == 5
    ids(stream(filled))
    assert {path: path.stat().st_ino for path in folder.glob("*.arrow")} == kept
    assert not list(folder.glob("*.part"))


def test_a_private_cache_goes_with_the_reader(filled: World) -> None:
    reader = stream(filled, cache_path=None)
    assert len(ids(reader)) == NUM_ROWS
    folder = Path(reader._reader._cache._folder_path)
    assert folder.exists()
    del reader
    assert not folder.exists()


def test_a_bucket_reads_like_a_folder(s3_world: World) -> None:
    s3_world.put("a.wav", "b.wav", "c.wav")
    s3_world.version()
    expected = {row.audio_id for row in open_dataset(s3_world.config, "demo")}
    assert set(ids(stream(s3_world))) == expected


def test_states_of_no_reader_are_refused(filled: World) -> None:
    reader = stream(filled)
    with pytest.raises(ConfigError, match="no state of a reader"):
        reader.load_state_dict({"position": 3})
    one_of_two = reader.state_dict() | {"num_workers": 2, "worker": 1}
    with pytest.raises(ConfigError, match="worker 1 of 2"):
        reader.load_state_dict(one_of_two)
