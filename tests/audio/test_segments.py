"""The segment rule: contiguous interiors, exact frame counts, independence of block sizes."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcodec_core.audio.native import Samples
from hcodec_core.audio.segments import Segment, segments
from hcodec_core.errors import ConfigError

RATE = 100  # samples per second, so that one second is a small number


def cut(audio: Samples, sizes: list[int], hop: int, length: float, halo: float) -> list[Segment]:
    return list(
        segments(
            blocks_of(audio, sizes),
            sample_rate=RATE,
            hop_length=hop,
            segment_seconds=length,
            halo_seconds=halo,
        )
    )


def blocks_of(audio: Samples, sizes: list[int]) -> Iterator[Samples]:
    """``audio`` in blocks of ``sizes``, over and over."""
    offset = index = 0
    while offset < len(audio):
        size = sizes[index % len(sizes)]
        yield audio[offset : offset + size]
        offset, index = offset + size, index + 1


def ramp(num_samples: int) -> Samples:
    return np.arange(num_samples, dtype=np.float32)


@settings(max_examples=400, deadline=None)
@given(
    num_samples=st.integers(1, 3000),
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=5),
    hop=st.sampled_from([1, 7, 10, 32]),
    length=st.sampled_from([1.5, 2, 3.3, 5]),
    halo=st.sampled_from([0, 0.25, 1, 2.5, 7]),
)
def test_interiors_are_the_file(
    num_samples: int, sizes: list[int], hop: int, length: float, halo: float
) -> None:
    audio = ramp(num_samples)
    parts = cut(audio, sizes, hop, length, halo)
    halo_samples = -(-round(halo * RATE) // hop) * hop
    position = 0
    for part in parts:
        left = part.halo_left_frames * hop
        interior = part.samples[left : left + part.num_interior_samples]
        assert part.start_sample == position
        assert part.start_sample % hop == 0
        np.testing.assert_array_equal(interior, audio[position : position + len(interior)])
        position += part.num_interior_samples
        # Both halos are as long as the file allows, and are the file's own samples.
        start = part.start_sample - left
        assert left == min(halo_samples, part.start_sample)
        end = min(position + halo_samples, num_samples)
        np.testing.assert_array_equal(part.samples, audio[start:end])
        assert part.halo_right_frames == -(-(end - position) // hop)
        assert part.num_interior_frames == -(-part.num_interior_samples // hop)
        total = part.halo_left_frames + part.num_interior_frames + part.halo_right_frames
        assert total == -(-len(part.samples) // hop)
    assert position == num_samples
    assert sum(part.num_interior_frames for part in parts) == -(-num_samples // hop)
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [part.index for part in parts] == list(range(len(parts)))


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(1, 2000),
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4),
)
def test_cuts_do_not_depend_on_blocks(num_samples: int, sizes: list[int]) -> None:
    audio = ramp(num_samples)
    ours = cut(audio, sizes, 10, 3, 1)
    whole = cut(audio, [num_samples], 10, 3, 1)
    assert ours == whole
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)


@pytest.mark.parametrize(
    ("num_samples", "lengths"),
    [
        (1, [1]),
        (300, [300]),
        (399, [399]),  # a tail of 0.99 s joins
        (400, [300, 100]),
        (699, [300, 399]),
        (700, [300, 300, 100]),
    ],
)
def test_a_tail_under_one_second_joins(num_samples: int, lengths: list[int]) -> None:
    parts = cut(ramp(num_samples), [64], 10, 3, 1)
    assert [part.num_interior_samples for part in parts] == lengths


def test_no_samples_no_segments() -> None:
    assert cut(ramp(0), [1], 10, 3, 1) == []


def test_kept_frames_are_the_interior() -> None:
    part = cut(ramp(900), [900], 10, 3, 1)[1]
    assert part.interior == slice(10, 40)


def test_segment_length_is_whole_hops_as_written() -> None:
    # 0.29 * 100 is 28.999... in binary; 1.29 s must still be 129 samples.
    parts = cut(ramp(500), [500], 1, 1.29, 0.29)
    assert parts[0].num_interior_samples == 129
    assert parts[1].halo_left_frames == 29


@pytest.mark.parametrize(("hop", "length", "halo"), [(10, 0.5, 0), (300, 2, 0), (10, 3, -0.001)])
def test_impossible_rules_are_refused(hop: int, length: float, halo: float) -> None:
    with pytest.raises(ConfigError, match="cannot be cut"):
        cut(ramp(10), [10], hop, length, halo)


def test_memory_is_bounded_for_long_files() -> None:
    """Two hours at 16 kHz are 460 MB of samples; about two segments of 60 s may be held."""

    def long_file() -> Iterator[Samples]:
        for _ in range(7200):
            yield np.zeros(16_000, np.float32)

    tracemalloc.start()
    num_frames = 0
    for part in segments(
        long_file(), sample_rate=16_000, hop_length=320, segment_seconds=60, halo_seconds=2
    ):
        num_frames += part.num_interior_frames
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_frames == 7200 * 50
    assert peak_bytes < 4 * 64 * 16_000 * 4
