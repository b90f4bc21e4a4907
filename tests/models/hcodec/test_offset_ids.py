import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hcodec_core.errors import ConfigError
from hcodec_core.models.hcodec.offset_ids import join_offset_ids, split_offset_ids

GOLDEN = Path(__file__).parents[2] / "golden" / "hcodec-1.5-tiny"
SPANS = np.array([1, 8, 3], np.int32)


def example():
    rng = np.random.default_rng(0)
    return {s: rng.integers(0, 1024, (4, 3)).astype(np.int32) for s in ("semantic", "acoustic")}


def test_joined_ids_can_be_split_again():
    codes = example()
    ids = join_offset_ids(codes, SPANS)
    assert (ids["acoustic"][2] - codes["acoustic"][2]).tolist() == [0, 7168, 2048]
    assert max(values.max() for values in ids.values()) < 8192
    found, spans = split_offset_ids(ids, num_base_frames=12)
    assert list(found) == ["semantic", "acoustic"]
    assert spans.tolist() == SPANS.tolist()
    assert spans.dtype == found["semantic"].dtype == np.int32
    for stream, values in codes.items():
        np.testing.assert_array_equal(found[stream], values)


@pytest.mark.parametrize("name", ["0", "0_thr900", "1_thr970", "1_thr995"])
def test_published_ids(name):
    with np.load(GOLDEN / "expected.npz") as arrays:
        ids = {stream: arrays[f"{stream}_{name}"] for stream in ("semantic", "acoustic")}
        codes, spans = split_offset_ids(ids, codebook_size=64)
        np.testing.assert_array_equal(spans, arrays[f"lengths_{name}"])
        again = join_offset_ids(codes, spans, codebook_size=64)
        for stream, values in ids.items():
            np.testing.assert_array_equal(again[stream], values)


def test_padding_of_a_published_batch_is_dropped():
    codes = example()
    ids = join_offset_ids(codes, SPANS)
    # The published code gives padding a span of 0.
    padded = {stream: np.pad(v, ((0, 0), (0, 2)), constant_values=-7) for stream, v in ids.items()}
    found, spans = split_offset_ids(padded)
    assert spans.tolist() == SPANS.tolist()
    np.testing.assert_array_equal(found["semantic"], codes["semantic"])


def broken(stream, book, token, value):
    ids = join_offset_ids(example(), SPANS)
    ids[stream][book, token] = value
    return ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            broken("acoustic", 2, 1, 5),
            "'acoustic', codebook 2, token 1 tells a span of 1;",
        ),
        (broken("semantic", 3, 0, 1030), "'semantic', codebook 3, token 0 tells a span of 2"),
        (broken("semantic", 0, 0, 1030), "'semantic', codebook 1, token 0 tells a span of 1"),
        (broken("semantic", 1, 2, 8192), r"8192 of stream 'semantic'.* outside 0\.\.8191"),
        (broken("acoustic", 0, 0, -1), r"-1 of stream 'acoustic'.* outside 0\.\.8191"),
        (
            {"semantic": np.zeros((4, 3), int), "acoustic": np.zeros((4, 2), int)},
            "'acoustic' has 2 tokens, stream 'semantic' 3",
        ),
        ({"semantic": np.zeros(3, int)}, r"shape \(3,\)"),
    ],
)
def test_ids_that_contradict_themselves_are_refused(ids, message):
    with pytest.raises(ConfigError, match=message):
        split_offset_ids(ids)


def test_spans_that_do_not_add_up_are_refused():
    ids = join_offset_ids(example(), SPANS)
    with pytest.raises(ConfigError, match="add up to 12 base frames; the clip has 13"):
        split_offset_ids(ids, num_base_frames=13)


@pytest.mark.parametrize(
    ("codes", "spans", "message"),
    [
        (example(), [1, 9, 3], "Token 1 spans 9"),
        (example(), [0, 1, 3], "Token 0 spans 0"),
        (example(), [1, 1], r"shape \(4, 3\); expected \[Q, 2\]"),
        ({"semantic": np.full((1, 1), 1024, np.int32)}, [1], r"1024 .*outside 0\.\.1023"),
        ({"semantic": np.full((1, 1), -1, np.int32)}, [1], r"-1 .*outside 0\.\.1023"),
    ],
)
def test_codes_that_have_no_ids_are_refused(codes, spans, message):
    with pytest.raises(ConfigError, match=message):
        join_offset_ids(codes, np.array(spans, np.int32))


def test_torch_is_not_needed():
    code = (
        "import sys; import hcodec_core.models.hcodec.offset_ids; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
