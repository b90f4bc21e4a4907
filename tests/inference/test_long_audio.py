"""Token rows of any length decode in bounded pieces that join to the right length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hcodec_core.audio.segments import SegmentRule, segments
from hcodec_core.errors import ConfigError, ForeignTokensError
from hcodec_core.inference.engine import ClipTokens, Engine, compute_class
from hcodec_core.inference.invariance import synthetic_clips
from hcodec_core.inference.long_audio import faded, is_long, token_pieces
from hcodec_core.inference.segmented import encode_in_segments
from hcodec_core.models.loading import load_codec
from hcodec_core.models.random_weights import write_random_codec
from hcodec_core.models.registry import build_codec, presets
from hcodec_core.tokens import EncodeSettings

HOP = 640
RATE = 16000
RULE = SegmentRule.of(sample_rate=RATE, hop_length=HOP, segment_seconds=4.0, halo_seconds=0.5)
SECONDS = [4.0, 4.9, 5.0, 5.2, 7.99, 8.0, 9.0, 12.31]


def row(num_samples: int, spans: list[int] | None = None) -> ClipTokens:
    """Tokens whose codes are their place in the row."""
    num_frames = -(-num_samples // HOP) if spans is None else len(spans)
    codes = np.arange(num_frames, dtype=np.int32)[None]
    return ClipTokens(
        {"acoustic": codes}, num_frames, num_samples, None if spans is None else np.array(spans)
    )


@pytest.mark.parametrize("seconds", SECONDS)
def test_rows_are_cut_where_files_are(seconds):
    num_samples = int(seconds * RATE)
    cut = segments(
        [np.zeros(num_samples, np.float32)],
        sample_rate=RATE,
        hop_length=HOP,
        segment_seconds=4.0,
        halo_seconds=0.5,
    )
    expected = [(s.start_sample, s.num_interior_samples, s.is_last) for s in cut]
    pieces = list(token_pieces(row(num_samples), RULE))
    found = [(p.first_sample, p.end_sample - p.first_sample, p.is_last) for p in pieces]
    assert found == expected
    assert is_long(num_samples, RULE) == (len(expected) > 1)


def test_pieces_carry_their_halos_and_know_where_they_lie():
    pieces = list(token_pieces(row(12 * RATE), RULE))
    assert len(pieces) == 3
    for piece in pieces:
        first_token = piece.tokens.codes["acoustic"][0, 0]
        assert piece.start_sample == first_token * HOP
        assert piece.tokens.num_samples == min(piece.end_sample + 8320, 12 * RATE) - max(
            0, piece.first_sample - 8320
        )


def test_tokens_that_lie_across_a_cut_are_not_torn():
    rng = np.random.default_rng(0)
    spans: list[int] = []
    while sum(spans) < 310:
        spans.append(int(rng.integers(1, 9)))
    spans[-1] -= sum(spans) - 310
    pieces = list(token_pieces(row(310 * HOP - 5, spans), RULE))
    assert pieces[0].first_sample == 0
    assert pieces[-1].end_sample == 310 * HOP - 5
    starts = set(np.cumsum([0, *spans]) * HOP)
    for piece, later in zip(pieces, [*pieces[1:], None], strict=True):
        assert {piece.start_sample, piece.first_sample} <= starts
        held = int(piece.tokens.frame_spans.sum()) * HOP
        assert piece.start_sample + held >= min(piece.end_sample + RULE.halo_samples, 310 * HOP - 5)
        if later is not None:
            assert later.first_sample == piece.end_sample
            assert not piece.is_last


@pytest.mark.parametrize("fade", [0, 2, 800])
def test_fading_pieces_of_one_signal_gives_the_signal(fade):
    signal = np.random.default_rng(0).standard_normal(int(12.3 * RATE)).astype(np.float32)
    decoded = (
        (piece, signal[piece.start_sample : piece.start_sample + piece.tokens.num_samples])
        for piece in token_pieces(row(len(signal)), RULE)
    )
    np.testing.assert_allclose(np.concatenate(list(faded(decoded, fade))), signal, atol=1e-6)


def test_a_difference_in_level_fades_over():
    pieces = list(token_pieces(row(8 * RATE), RULE))
    levels = [np.full(p.tokens.num_samples, i, np.float32) for i, p in enumerate(pieces)]
    joined = np.concatenate(list(faded(zip(pieces, levels, strict=True), 800)))
    assert len(joined) == 8 * RATE
    assert np.abs(np.diff(joined)).max() < 1.3 / 800
    assert (joined[: 4 * RATE - 400] == 0).all()
    assert (joined[4 * RATE + 400 :] == 1).all()


def settings(**changes) -> EncodeSettings:
    values = {"segment_seconds": 4.0, "halo_seconds": 0.5} | changes
    return EncodeSettings(compute_class=compute_class("cpu"), **values)


@pytest.fixture(scope="module")
def engine():
    return Engine(load_codec("hcodec-nano", settings()))


@pytest.fixture(scope="module")
def tokens(engine):
    sound = np.concatenate(synthetic_clips(RATE, 4, 0))[: int(14.3 * RATE)]
    whole = Engine(load_codec("hcodec-nano", settings(segment_seconds=60.0)))
    return whole.encode_clips([sound])[0], whole


def test_long_rows_decode_in_pieces_of_the_rule(engine, tokens, monkeypatch):
    sizes = []
    decode = engine.codec._decode

    def record(frames):
        sizes.append(next(iter(frames.codes.values())).shape[2])
        return decode(frames)

    monkeypatch.setattr(engine.codec, "_decode", record)
    pieces = list(engine.decode_stream(tokens[0]))
    assert sum(map(len, pieces)) == tokens[0].num_samples
    assert len(sizes) == 4
    assert max(sizes) * HOP <= RULE.segment_samples + 2 * RULE.halo_samples + RATE
    assert all(piece.dtype == np.float32 for piece in pieces)
    np.testing.assert_array_equal(
        engine.decode_clips([tokens[0]])[0], np.concatenate(list(engine.decode_stream(tokens[0])))
    )


def test_decoding_in_pieces_stays_near_decoding_at_once(engine, tokens):
    clip, whole = tokens
    at_once, in_pieces = whole.decode_clips([clip])[0], engine.decode_clips([clip])[0]
    assert len(at_once) == len(in_pieces) == clip.num_samples
    difference = np.sqrt(np.mean((at_once - in_pieces) ** 2)) / at_once.std()
    assert difference < 0.3


def test_long_and_short_rows_together_keep_their_order(engine, tokens):
    long, _ = tokens
    short = long.part(0, 40, 40 * HOP)
    together = engine.decode_clips([short, long, short])
    np.testing.assert_array_equal(together[0], together[2])
    np.testing.assert_array_equal(together[0], engine.decode_clips([short])[0])
    np.testing.assert_array_equal(together[1], engine.decode_clips([long])[0])


def test_faults_of_long_rows_are_named_by_their_place_in_the_row(engine, tokens):
    long, _ = tokens
    codes = {name: values.copy() for name, values in long.codes.items()}
    codes["acoustic"][2, 333] = 1024
    with pytest.raises(ConfigError, match="codebook 2, frame 333"):
        engine.decode_clips([ClipTokens(codes, long.num_frames, long.num_samples)])
    with pytest.raises(ConfigError, match="claims"):
        engine.decode_clips([ClipTokens(long.codes, long.num_frames, long.num_samples + 1000)])
    with pytest.raises(ForeignTokensError):
        engine.decode_clips([long], codebook_id="0" * 32)


def test_adaptive_rows_decode_in_pieces(tmp_path):
    from hcodec_core.models.loading import CodecCard, save_codec

    torch.manual_seed(0)
    codec = build_codec("hcodec", presets("hcodec")["hcodec-1.5-tiny"]().architecture())
    save_codec(codec, CodecCard("tiny", False, "none"), tmp_path / "codec")
    adaptive = Engine(load_codec(str(tmp_path / "codec"), settings(threshold=0.9)))
    sound = np.concatenate(synthetic_clips(RATE, 4, 0))[: int(9.7 * RATE)]
    cuts = [[100, 200]]
    clip = adaptive.encode_clips([sound], cuts)[0]
    assert clip.frame_spans is not None
    assert len(set(clip.frame_spans.tolist())) > 1
    audio = adaptive.decode_clips([clip])[0]
    assert len(audio) == len(sound)
    assert np.isfinite(audio).all()


def test_a_decoder_that_sees_less_than_the_halo_has_no_seams(tmp_path):
    write_random_codec("dac-tiny", tmp_path)
    pieces = Engine(load_codec(str(tmp_path), settings(segment_seconds=1.5)))
    whole = Engine(load_codec(str(tmp_path), settings(segment_seconds=60.0)))
    sound = np.concatenate(synthetic_clips(RATE, 4, 0))[: int(7.77 * RATE)]
    clip = encode_in_segments(pieces, sound)
    at_once, in_pieces = (engine.decode_clips([clip])[0] for engine in (whole, pieces))
    np.testing.assert_allclose(in_pieces, at_once, atol=1e-4 * at_once.std())
