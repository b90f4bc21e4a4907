from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from hcodec_core.dataset.ordering import Shuffle
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.stream import StreamOptions
from hcodec_core.dataset.torch_reader import (
    TokenDataset,
    collate_tokens,
    combined_state,
    open_token_dataset,
)
from hcodec_core.errors import ConfigError
from tests.dataset.factories import World

NUM_ROWS = 36
BATCH = 2


@pytest.fixture
def filled(local_world: World) -> World:
    local_world.put(*(f"{index:03d}.wav" for index in range(NUM_ROWS)))
    local_world.version(num_shards=4)
    return local_world


def dataset(world: World, rank: int = 0, num_ranks: int = 1) -> TokenDataset:
    options = StreamOptions(
        shuffle=Shuffle(3, 6, 4), chunk_rows=BATCH, cache_path=world.local_path / "cache"
    )
    return open_token_dataset(world.config, "demo", options=options, ranks=(rank, num_ranks))


def loader(data: TokenDataset, num_workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(
        data, batch_size=BATCH, num_workers=num_workers, collate_fn=collate_tokens
    )


def ids(batches: object) -> list[str]:
    return [audio_id for batch in batches for audio_id in batch["audio_id"]]


def test_batches_hold_the_rows(filled: World) -> None:
    truth = {row.audio_id: row for row in open_dataset(filled.config, "demo")}
    for batch in DataLoader(dataset(filled), batch_size=5, collate_fn=collate_tokens):
        assert batch["acoustic"].dtype == torch.int64
        for index, audio_id in enumerate(batch["audio_id"]):
            codes, frames = truth[audio_id].codes["acoustic"], int(batch["num_frames"][index])
            assert torch.equal(batch["acoustic"][index, :, :frames], torch.from_numpy(codes).long())
            assert not batch["acoustic"][index, :, frames:].any()


def test_the_number_of_workers_changes_nothing(filled: World) -> None:
    alone = ids(loader(dataset(filled), 0))
    assert len(set(alone)) == NUM_ROWS
    assert ids(loader(dataset(filled), 2)) == alone


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_from_its_own_state(filled: World, num_workers: int) -> None:
    whole = ids(loader(dataset(filled), num_workers))
    first = loader(dataset(filled), num_workers)
    batches = iter(first)
    start = ids(next(batches) for _ in range(5))
    state = first.state_dict()
    del batches
    second = loader(dataset(filled), num_workers)
    second.load_state_dict(state)
    assert start + ids(second) == whole


def test_two_ranks_resume_as_three(filled: World) -> None:
    """From the state of one rank, with other numbers of ranks and workers: every row once."""
    seen: list[str] = []
    for rank in range(2):
        first = loader(dataset(filled, rank, 2), 2)
        batches = iter(first)
        seen += ids(next(batches) for _ in range(3))
        state = combined_state(first.state_dict())
        del batches
    assert len(seen) == 12
    for rank in range(3):
        data = dataset(filled, rank, 3)
        data.load_state_dict(state)
        assert len(data) == 8
        seen += ids(loader(data, rank))
    assert len(seen) == NUM_ROWS
    assert len(set(seen)) == NUM_ROWS


def test_a_state_without_a_reader_is_refused() -> None:
    with pytest.raises(ConfigError, match="no state of a TokenDataset"):
        combined_state({"_snapshot": {"step": 1}})


def test_workers_that_left_gaps_are_refused(filled: World) -> None:
    """Batches of three rows from workers that take two at a time: no beginning of the epoch."""
    data = dataset(filled)
    uneven = StatefulDataLoader(data, batch_size=3, num_workers=2, collate_fn=collate_tokens)
    batches = iter(uneven)
    next(batches)
    state = uneven.state_dict()
    del batches
    with pytest.raises(ConfigError, match="chunk_rows"):
        combined_state(state)
