"""H-Codec 1.5: where tokens begin, and that they depend on their clip alone."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from hcodec_core.errors import ConfigError
from hcodec_core.inference.engine import ClipTokens, Engine, compute_class
from hcodec_core.models.base import FrameCodes, TokenStarts
from hcodec_core.models.hcodec.convert import golden_cases
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import CodecSpec, EncodeSettings, ShapeRule

FOLDER = Path(__file__).parents[2] / "golden" / "hcodec-1.5-tiny"
HOP = 640


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """The golden codec: tokens of it have every span from 1 to 8."""
    return str(golden_cases(FOLDER, tmp_path_factory.mktemp("golden"))[0].codec_path)


@pytest.fixture(scope="module")
def sound():
    with np.load(FOLDER / "expected.npz") as arrays:
        return np.concatenate([arrays["wav_0"], arrays["wav_1"]])


def load(uri, threshold=0.9, **changes):
    settings = EncodeSettings(compute_class=compute_class("cpu"), threshold=threshold, **changes)
    return load_codec(uri, settings)


@pytest.fixture(scope="module")
def codec(uri):
    return load(uri)


def encode(codec, clip, starts=None):
    return codec.encode(torch.from_numpy(clip)[None, None], torch.tensor([len(clip)]), starts)


def test_spans_follow_from_the_semantic_stream_alone(codec, sound):
    tokens = encode(codec, sound)
    audio = torch.from_numpy(sound[: len(sound) // HOP * HOP + HOP])
    padded = torch.nn.functional.pad(audio, (0, -len(audio) % HOP))[None, None]
    with torch.no_grad():
        latents, _ = codec.embed(padded, torch.tensor([len(sound)]))
    semantic = latents["semantic"][0]
    spans = [1]
    for frame in range(1, semantic.shape[1]):
        similarity = torch.cosine_similarity(semantic[:, frame], semantic[:, frame - 1], dim=0)
        if similarity <= 0.9 or spans[-1] == 8:
            spans.append(0)
        spans[-1] += 1
    assert tokens.frame_spans[0].tolist() == spans
    assert len(set(spans)) > 3, "the example is too plain"


def test_a_higher_threshold_gives_more_tokens(uri, sound):
    counts = [int(encode(load(uri, t), sound).num_frames[0]) for t in (0.5, 0.7, 0.9, 0.97, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[2] < counts[-1]
    assert counts[-1] == -(-len(sound) // HOP), "a threshold of 1 joins nothing"


def test_tokens_end_after_eight_frames(uri):
    tokens = encode(load(uri, 0.01), np.zeros(20 * HOP, np.float32))
    assert tokens.frame_spans[0].max() == 8


def test_the_released_threshold_is_taken_and_warned_of(uri, sound, caplog):
    with caplog.at_level(logging.WARNING):
        codec = load(uri, None)
    (record,) = caplog.records
    assert "0.6 as its published tokeniser does" in record.getMessage()
    assert "0.7..1" in record.getMessage()
    wanted = encode(load(uri, 0.6), sound)
    found = encode(codec, sound)
    np.testing.assert_array_equal(found.frame_spans, wanted.frame_spans)
    np.testing.assert_array_equal(found.codes["acoustic"], wanted.codes["acoustic"])
    assert found.encode_id != encode(load(uri, 0.9), sound).encode_id


@pytest.mark.parametrize(("threshold", "is_warned"), [(0.69, True), (0.7, False), (1.0, False)])
def test_only_thresholds_outside_the_trained_range_are_warned_of(uri, caplog, threshold, is_warned):
    with caplog.at_level(logging.WARNING):
        load(uri, threshold)
    assert bool(caplog.records) == is_warned


def test_tokens_begin_where_they_have_to(codec, sound):
    own = encode(codec, sound)
    ends = np.cumsum(own.frame_spans[0])
    inside = next(
        int(end - 1)
        for end, span in zip(ends, own.frame_spans[0], strict=True)
        if 2 < span < 8  # no token that another one goes on with
    )
    frames = torch.zeros(1, int(ends[-1]), dtype=torch.bool)
    frames[0, inside] = True
    cut = encode(codec, sound, TokenStarts(frames))
    starts = set((np.cumsum(cut.frame_spans[0]) - cut.frame_spans[0]).tolist())
    assert starts == set((ends - own.frame_spans[0]).tolist()) | {inside}
    only = encode(codec, sound, TokenStarts(frames, is_complete=True))
    spans = only.frame_spans[0]
    # Nothing but the one wanted, and the bound of eight frames on both sides of it.
    wanted = [8] * (inside // 8) + [inside % 8] * bool(inside % 8)
    assert spans[: len(wanted)].tolist() == wanted
    assert (spans[len(wanted) : -1] == 8).all()


def test_recorded_beginnings_give_the_recorded_tokens(codec, sound):
    own = encode(codec, sound)
    starts = torch.zeros(1, int(own.frame_spans.sum()), dtype=torch.bool)
    starts[0, np.cumsum(own.frame_spans[0]) - own.frame_spans[0]] = True
    again = encode(load_other(codec, 0.7), sound, TokenStarts(starts, is_complete=True))
    np.testing.assert_array_equal(again.frame_spans, own.frame_spans)
    for name, codes in own.codes.items():
        np.testing.assert_array_equal(again.codes[name], codes)


def load_other(codec, threshold):
    """The same weights under another threshold."""
    settings = codec.spec.settings.model_copy(update={"threshold": threshold})
    other = type(codec)(codec.config)
    other.load_state_dict(codec.state_dict())
    return other.eval().bind(CodecSpec(codec.spec.manifest, settings))


def test_rows_of_a_batch_are_single_files(codec, sound):
    """In float64: bits of float32 depend on the shape, results may not."""
    exact = load_other(codec, 0.9).double()
    ends = [len(sound), 1, 9 * HOP + 5, 30 * HOP]
    audio = torch.zeros(4, 1, len(sound))
    for row, end in enumerate(ends):
        audio[row, 0, :end] = torch.from_numpy(sound[:end])
    together = exact.encode_frames(audio, torch.tensor(ends), with_margins=True)
    assert together.start_margins.shape == (4, -(-len(sound) // HOP))
    for row, end in enumerate(ends):
        alone = exact.encode_frames(
            audio[row : row + 1, :, :end], torch.tensor([end]), with_margins=True
        )
        count, base = int(alone.num_frames[0]), -(-end // HOP)
        assert int(together.num_frames[row]) == count
        assert torch.equal(together.frame_spans[row, :count], alone.frame_spans[0, :count])
        assert not together.frame_spans[row, count:].any()
        torch.testing.assert_close(
            together.start_margins[row, :base], alone.start_margins[0], rtol=0, atol=1e-9
        )
        for name, codes in alone.codes.items():
            assert torch.equal(together.codes[name][row, :, :count], codes[0, :, :count])


def test_decoded_rows_are_single_files(codec):
    exact = load_other(codec, 0.9).double()
    generator = torch.Generator().manual_seed(0)
    codes = {s.name: torch.randint(0, 64, (3, 4, 6), generator=generator) for s in exact.streams}
    spans = torch.tensor([[1, 8, 2, 3, 1, 5], [2, 2, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    counts = torch.tensor([6, 2, 1])
    with torch.no_grad():
        together = exact._decode(FrameCodes(codes, counts, spans))
        for row, count in enumerate(counts.tolist()):
            own = {name: value[row : row + 1, :, :count] for name, value in codes.items()}
            alone = exact._decode(
                FrameCodes(own, counts[row : row + 1], spans[row : row + 1, :count])
            )
            size = int(spans[row].sum()) * HOP
            assert alone.shape[2] == size
            torch.testing.assert_close(together[row, 0, :size], alone[0, 0], rtol=1e-8, atol=1e-10)
            assert not together[row, 0, size:].any()


@pytest.mark.parametrize("company", [1, 2, 3])
def test_bits_do_not_depend_on_company(uri, sound, company):
    """Several rows to a batch; the number of groups of the neighbours must not show."""
    rows = ShapeRule(growth=1.25, batch_seconds=4.0, max_rows=4)
    engine = Engine(load(uri, shapes=rows))
    clip = np.ascontiguousarray(sound[3000:23000])
    alone = engine.encode_clips([clip])[0]
    generator = np.random.default_rng(company)
    others = [
        (generator.standard_normal(19_500) * scale).astype(np.float32)
        for scale in (0.0, 30.0, 0.1)[:company]
    ]
    found = engine.encode_clips([*others, clip])[-1]
    assert len(set(found.frame_spans.tolist())) > 2
    np.testing.assert_array_equal(found.frame_spans, alone.frame_spans)
    for name, codes in alone.codes.items():
        np.testing.assert_array_equal(found.codes[name], codes)
    audio = engine.decode_clips([*engine.encode_clips(others), found])[-1]
    np.testing.assert_array_equal(audio, engine.decode_clips([alone])[0])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (None, "frame_spans must be given"),
        ([1, 2, 0, 1], "Token 2 of clip 0 spans 0"),
        ([1, 2, 9, 1], r"Token 2 of clip 0 spans 9 .*1\.\.8"),
        ([1, -2, 1, 1], "Token 1 of clip 0 spans -2"),
        ([1, 2, 1], r"4 tokens, but frame_spans of shape \(3,\)"),
        ([1, 2**31 - 1, 1, 1], "Token 1 of clip 0 spans 2147483647"),
        ([1, 2, 1, 1], r"frame_spans of clip 0 add up to 5 base frames; its \d+ samples make [12]"),
    ],
)
def test_spans_that_cannot_be_are_refused(codec, spans, message):
    codes = {s.name: np.zeros((4, 4), np.int32) for s in codec.streams}
    spans = None if spans is None else np.array(spans, np.int32)
    clip = ClipTokens(codes, 4, 2 * HOP, spans)
    with pytest.raises(ConfigError, match=message):
        Engine(codec).decode_clips([clip])
    if spans is not None:
        tokens = encode(codec, np.zeros(8 * HOP, np.float32) + 0.1)
        tokens = dataclasses.replace(
            tokens,
            codes={name: values[None] for name, values in codes.items()},
            num_frames=np.array([4]),
            num_samples=np.array([HOP]),
            frame_spans=spans[None],
        )
        with pytest.raises(ConfigError, match=message):
            codec.decode(tokens)


def test_a_fixed_rate_takes_no_threshold():
    with pytest.raises(ConfigError, match=r"fixed frame rate.*\(0\.8\)"):
        load_codec("hcodec-nano", EncodeSettings(compute_class="cpu-test", threshold=0.8))


def test_each_part_has_its_own_digest(codec):
    parts = {key.partition(".")[0]: codec.part_of(key).value for key in codec.state_dict()}
    assert parts["aggregators"] == "encoder"
    assert parts["bottleneck"] == "decoder"


def test_what_decides_codes_is_in_the_identities(codec):
    from hcodec_core.models.hcodec.model import codec_of
    from hcodec_core.models.loading import part_digests

    before = part_digests(codec)
    for change, part in (
        ({"released_threshold": 0.65}, "encoder"),
        ({"max_frame_span": 7}, "encoder"),
        ({"aggregator": codec.config.aggregator.model_copy(update={"num_heads": 2})}, "encoder"),
        ({"bottleneck": codec.config.bottleneck.model_copy(update={"num_heads": 2})}, "decoder"),
        ({"ssl_layers": (10, 14, 16)}, "ssl"),
    ):
        other = codec_of(codec.config.model_copy(update=change))
        other.load_state_dict(codec.state_dict())
        after = part_digests(other)
        changed = {name for name, value in before if value != getattr(after, name)}
        assert changed == {part}, change
