from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcodec_core.dataset.lm_layouts import (
    Vocabulary,
    add_spans,
    deinterleave,
    delay,
    flatten,
    interleave,
    split_spans,
    undelay,
    unflatten,
)
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import Codes, StreamSpec

SEMANTIC = StreamSpec(name="semantic", num_codebooks=1, codebook_size=16)
ACOUSTIC = StreamSpec(name="acoustic", num_codebooks=4, codebook_size=8)
VOCABULARY = Vocabulary((SEMANTIC, ACOUSTIC))


def codes_of(books: int, frames: int, size: int, seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    return rng.integers(0, size, (books, frames)).astype(np.int32)


shapes = st.tuples(st.integers(1, 33), st.integers(0, 40), st.integers(2, 2000), st.integers(0, 99))


@given(shapes, st.integers(0, 5000))
def test_flat_ids_come_back(shape: tuple[int, int, int, int], first_id: int) -> None:
    codes = codes_of(*shape)
    ids = flatten(codes, shape[2], first_id)
    assert ids.shape == (codes.size,)
    assert np.array_equal(unflatten(ids, shape[0], shape[2], first_id), codes)


def test_flat_is_the_form_of_ucodec() -> None:
    codes = codes_of(32, 3, 256, 0)
    ids = flatten(codes, 256)
    assert [int(i) for i in ids[:2]] == [codes[0, 0], codes[1, 0] + 256]
    assert ids[32 + 5] == codes[5, 1] + 256 * 5


@given(st.integers(0, 30), st.integers(0, 99), st.booleans())
def test_interleaved_ids_come_back(frames: int, seed: int, acoustic_first: bool) -> None:
    codes = {"semantic": codes_of(1, frames, 16, seed), "acoustic": codes_of(4, frames, 8, seed)}
    order = ("acoustic", "semantic") if acoustic_first else ("semantic", "acoustic")
    ids = interleave(codes, order, VOCABULARY)
    back = deinterleave(ids, order, VOCABULARY)
    assert all(np.array_equal(back[name], codes[name]) for name in codes)
    width = 4 if acoustic_first else 1
    steps = ids.reshape(-1, 5)
    first = VOCABULARY.first_id(order[0])
    assert np.array_equal(steps[:, 0], codes[order[0]][0] + first)
    assert np.array_equal(steps[:, width], codes[order[1]][0] + VOCABULARY.first_id(order[1]))


@given(shapes)
def test_delayed_steps_come_back(shape: tuple[int, int, int, int]) -> None:
    codes = codes_of(*shape)
    steps = delay(codes, pad_id=shape[2])
    assert steps.shape == (shape[0], shape[1] + shape[0] - 1)
    assert np.array_equal(undelay(steps, shape[2]), codes)


def test_a_delay_pattern_shifts_each_codebook() -> None:
    steps = delay(np.array([[1, 2], [3, 4], [5, 6]]), pad_id=9)
    assert steps.tolist() == [[1, 2, 9, 9], [9, 3, 4, 9], [9, 9, 5, 6]]


@given(shapes.filter(lambda shape: shape[1] > 0))
def test_spans_come_back(shape: tuple[int, int, int, int]) -> None:
    codes = codes_of(*shape)
    spans = np.random.default_rng(shape[3]).integers(1, 9, shape[1]).astype(np.int32)
    back, found = split_spans(add_spans(codes, spans, shape[2]), shape[2])
    assert np.array_equal(back, codes)
    assert np.array_equal(found, spans)


def test_a_vocabulary_has_each_id_once() -> None:
    assert VOCABULARY.first_id("acoustic") == 16
    assert VOCABULARY.num_codes == 48
    specials = VOCABULARY.special_ids
    assert sorted(specials.values()) == list(range(48, 53))
    assert len(VOCABULARY) == 53
    assert VOCABULARY.describe()["streams"][1]["first_id"] == 16
    with pytest.raises(ConfigError, match="fused"):
        VOCABULARY.first_id("fused")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: flatten(np.array([[8]], np.int32), 8),
        lambda: unflatten(np.arange(3), 2, 8),
        lambda: unflatten(np.array([0, 0]), 2, 8),
        lambda: deinterleave(np.arange(6), ("semantic", "acoustic"), VOCABULARY),
        lambda: undelay(np.array([[1, 2, 3], [9, 3, 4]]), 9),
        lambda: undelay(np.zeros((4, 2), np.int64), 9),
        lambda: add_spans(np.zeros((1, 2), np.int32), np.array([1, 0], np.int32), 8),
        lambda: split_spans(np.array([[8], [0]]), 8),
        lambda: split_spans(np.array([[-8]]), 8),
        lambda: interleave(
            {"semantic": np.zeros((1, 2), np.int32), "acoustic": np.zeros((4, 3), np.int32)},
            ("semantic", "acoustic"),
            VOCABULARY,
        ),
    ],
)
def test_wrong_sequences_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError):
        wrong()
