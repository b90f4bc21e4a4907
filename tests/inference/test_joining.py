from __future__ import annotations

import numpy as np
import pytest

from hcodec_core.errors import AudioError, QuarantineReason
from hcodec_core.inference.engine import ClipTokens
from hcodec_core.inference.joining import FileTokens, interior_of, join
from hcodec_core.tokens import CodecManifest, CodecSpec, EncodeSettings, PartDigests, StreamSpec


def spec(**changes) -> CodecSpec:
    values = {
        "name": "toy",
        "family": "toy",
        "sample_rate": 1000,
        "hop_length": 10,
        "streams": (StreamSpec(name="fused", num_codebooks=2, codebook_size=100),),
        "architecture": {},
        "parts": PartDigests(encoder="e", codebooks="c", decoder="d"),
        "weights_sha256": "0" * 64,
        "is_trained": False,
        "num_parameters": 1,
        "weights_licence": "none",
    }
    return CodecSpec(CodecManifest(**(values | changes)), EncodeSettings(compute_class="cpu"))


def clip(num_frames: int, spans: list[int] | None = None) -> ClipTokens:
    codes = np.arange(2 * num_frames, dtype=np.int32).reshape(2, num_frames) % 100
    return ClipTokens(
        {"fused": codes},
        num_frames,
        num_frames * 10,
        None if spans is None else np.array(spans, np.int32),
    )


def test_halos_are_dropped() -> None:
    kept = interior_of(clip(10), 2, 7)
    np.testing.assert_array_equal(kept.codes["fused"], clip(10).codes["fused"][:, 2:7])
    np.testing.assert_array_equal(
        interior_of(clip(10), 2, None).codes["fused"], clip(10).codes["fused"][:, 2:]
    )


@pytest.mark.parametrize(
    ("first", "end", "kept", "spans"),
    [
        (0, None, [0, 1, 2, 3], [3, 2, 4, 1]),
        (3, 9, [1, 2], [2, 4]),
        (2, 8, [0, 1, 2], [1, 2, 3]),
        (6, 8, [2], [2]),
        (4, None, [1, 2, 3], [1, 4, 1]),
    ],
)
def test_no_span_crosses_a_cut(first, end, kept, spans) -> None:
    tokens = clip(4, [3, 2, 4, 1])
    interior = interior_of(tokens, first, end)
    np.testing.assert_array_equal(interior.codes["fused"], tokens.codes["fused"][:, kept])
    assert interior.frame_spans is not None
    assert interior.frame_spans.tolist() == spans
    assert interior.frame_spans.dtype == np.int32


def test_pieces_become_one_stream() -> None:
    pieces = [interior_of(clip(10), 0, 8), interior_of(clip(6), 1, None)]
    joined = join(pieces, num_samples=125, spec=spec())
    assert joined.codes["fused"].shape == (2, 13)
    assert joined.frame_spans is None


def test_the_codec_law_of_lengths_decides_about_the_tail() -> None:
    pieces = [FileTokens(clip(12).codes, None)]
    join(pieces, num_samples=125, spec=spec(min_tail_samples=6))
    with pytest.raises(AudioError, match="expected 2 x 13"):
        join(pieces, num_samples=125, spec=spec())


def test_adaptive_streams_are_counted_in_base_frames() -> None:
    tokens = FileTokens(clip(3).codes, np.array([5, 1, 4], np.int32))
    joined = join([tokens, tokens], num_samples=200, spec=spec(is_variable_rate=True))
    assert joined.frame_spans is not None
    assert joined.frame_spans.tolist() == [5, 1, 4, 5, 1, 4]
    with pytest.raises(AudioError):
        join([tokens], num_samples=110, spec=spec(is_variable_rate=True))


@pytest.mark.parametrize("code", [-1, 100])
def test_codes_out_of_range_are_refused(code: int) -> None:
    tokens = clip(4)
    tokens.codes["fused"][1, 2] = code
    with pytest.raises(AudioError, match=r"outside 0\.\.99") as caught:
        join([FileTokens(tokens.codes, None)], num_samples=40, spec=spec())
    assert caught.value.reason is QuarantineReason.MISMATCH
