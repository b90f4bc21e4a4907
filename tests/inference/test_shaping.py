from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from hcodec_core.inference.engine import Engine, compute_class
from hcodec_core.inference.shaping import (
    BatchBudget,
    in_equal_lengths,
    in_fixed_shapes,
    in_free_shapes,
)
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings, ShapeRule

RATE = Fraction(25)
ROWS = ShapeRule(growth=1.25, batch_seconds=8.0, max_rows=4)


def lengths(num: int = 40) -> list[int]:
    return np.random.default_rng(0).integers(1, 300, num).tolist()


def indices(batches) -> list[int]:
    return sorted(index for batch in batches for index in batch.indices)


def test_fixed_shapes_follow_from_each_length_alone():
    sizes = lengths()
    batches = list(in_fixed_shapes(sizes, ROWS, RATE))
    assert indices(batches) == list(range(len(sizes)))
    for batch in batches:
        for index in batch.indices:
            bound = ROWS.bucket_frames(sizes[index])
            assert (batch.size, batch.num_rows) == (bound, ROWS.bucket_rows(bound, RATE))
        assert len(batch.indices) <= batch.num_rows


def test_free_shapes_hold_neighbours_in_length():
    sizes = lengths()
    batches = list(in_free_shapes(sizes, ROWS, RATE, BatchBudget(8.0)))
    assert indices(batches) == list(range(len(sizes)))
    for batch, later in itertools.pairwise(batches):
        assert batch.size == max(sizes[i] for i in batch.indices)
        assert min(sizes[i] for i in batch.indices) >= later.size
    for batch in batches:
        assert batch.num_rows == len(batch.indices) <= ROWS.max_rows
        assert batch.num_rows == 1 or batch.num_rows * batch.size <= 8 * RATE


def test_free_shapes_follow_what_is_learned_on_the_way():
    budget = BatchBudget(100.0, 4.0)
    batches = in_free_shapes([25] * 60, ShapeRule(max_rows=64), RATE, budget)
    assert next(batches).num_rows == 4
    budget.learn(4.0, used_bytes=10, free_bytes=1000)
    assert next(batches).num_rows == 16
    budget.shrink(16.0)
    assert next(batches).num_rows == 8


def test_equal_lengths_never_mix():
    sizes = [5, 7, 5, 5, 7, 5, 5]
    batches = list(in_equal_lengths(sizes, lambda _: 2))
    assert indices(batches) == list(range(7))
    assert all({sizes[i] for i in batch.indices} == {batch.size} for batch in batches)
    assert max(len(batch.indices) for batch in batches) == 2


def test_budget_grows_to_what_memory_holds_and_no_further():
    budget = BatchBudget(1000.0, 100.0)
    budget.learn(100.0, used_bytes=10 << 30, free_bytes=100 << 30)
    assert budget.seconds == 400.0  # four times what ran, though 800 s should fit
    budget.learn(400.0, used_bytes=40 << 30, free_bytes=100 << 30)
    assert budget.seconds == pytest.approx(800.0)
    budget.learn(10.0, used_bytes=1, free_bytes=1 << 40)
    assert budget.seconds == pytest.approx(800.0)  # a small batch tells nothing
    budget.shrink(800.0)
    assert budget.seconds == 400.0
    budget.learn(400.0, used_bytes=1, free_bytes=1 << 40)
    assert budget.seconds == 400.0  # what did not fit once is not tried again
    assert BatchBudget(1.0).rows(60.0) == 1


@pytest.fixture
def engines():
    cpu = compute_class("cpu")
    shapes = ShapeRule(growth=1.25, batch_seconds=60.0, max_rows=8)
    settings = EncodeSettings(mode="fast", compute_class=cpu, shapes=shapes)
    return [Engine(load_codec("hcodec-nano", settings)) for _ in range(2)]


def test_out_of_memory_halves_the_batch_and_loses_nothing(engines, monkeypatch):
    plain, small = engines
    rng = np.random.default_rng(0)
    clips = [rng.standard_normal(640 * n).astype(np.float32) / 9 for n in (9, 20, 3, 15, 14, 7, 8)]
    rows: list[int] = []
    encode = small.codec.encode

    def fail_above_two_rows(audio, num_samples, starts=None):
        rows.append(len(audio))
        if len(audio) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(audio, num_samples, starts)

    monkeypatch.setattr(small.codec, "encode", fail_above_two_rows)
    found = small.encode_clips(clips)
    assert rows[0] == 7
    assert rows == [7, 3, 1, 2, 4, 2, 2]
    for tokens, clip in zip(found, clips, strict=True):
        assert tokens.num_frames == len(clip) // 640
    first = rows.copy()
    small.encode_clips(clips)
    assert max(rows[len(first) :]) < 7, "what did not fit was tried again"
    for tokens, expected in zip(found, plain.encode_clips(clips), strict=True):
        assert (tokens.codes["semantic"][0] == expected.codes["semantic"][0]).mean() > 0.9


def test_a_row_that_does_not_fit_and_mode_exact_are_not_halved(engines, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    clips = [np.ones(6400, np.float32)] * 4
    for engine in (engines[0], engines[1].in_mode("exact")):
        monkeypatch.setattr(engine, "_encode_batch", fail)
        with pytest.raises(torch.OutOfMemoryError):
            engine.encode_clips(clips)
