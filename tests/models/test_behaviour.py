"""What every codec promises, checked on the tiny presets of every registered family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hcodec_core.errors import AudioError, ConfigError, ForeignTokensError, QuarantineReason
from hcodec_core.inference.engine import Clip, ClipTokens, Engine, compute_class
from hcodec_core.models.base import Codec, FrameCodes, Part
from hcodec_core.models.loading import CodecCard, load_codec, part_digests, save_codec
from hcodec_core.models.random_weights import is_lively, random_codec
from hcodec_core.models.registry import FAMILIES, presets
from hcodec_core.tokens import CodecManifest, EncodeSettings, TokenBatch

TINY = [(family, name) for family in FAMILIES for name in presets(family) if "tiny" in name]
CARD = CodecCard("behaviour", is_trained=False, weights_licence="none")


@dataclass(frozen=True)
class Subject:
    """One codec under test, loaded from the folder it was saved in."""

    codec: Codec
    engine: Engine
    manifest: CodecManifest
    folder_path: Path

    def clip(self, num_samples: int, seed: int = 0) -> Clip:
        return signal(num_samples, self.codec.sample_rate, seed)


def signal(num_samples: int, sample_rate: int, seed: int) -> Clip:
    """A gliding tone in noise: something happens in every frame."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / sample_rate
    tone = np.sin(2 * np.pi * (150 + 60 * seed) * time * (1 + 2 * time))
    loudness = 0.2 * rng.uniform(0.5, 1.5)
    return (loudness * tone + 0.1 * rng.standard_normal(num_samples)).astype(np.float32)


def settings(codec: Codec) -> EncodeSettings:
    return EncodeSettings(
        compute_class=compute_class("cpu"), threshold=0.8 if codec.is_variable_rate else None
    )


def make_subject(preset: str, folder_path: Path) -> Subject:
    built = random_codec(preset)
    manifest = save_codec(built, CARD, folder_path)
    codec = load_codec(str(folder_path), settings(built))
    return Subject(codec, Engine(codec), manifest, folder_path)


@pytest.fixture(scope="module", params=TINY, ids=[f"{family}/{name}" for family, name in TINY])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    _, preset = request.param
    return make_subject(preset, tmp_path_factory.mktemp("codec") / "codec")


def frames_of(tokens: ClipTokens) -> int:
    """Base frames."""
    return tokens.num_frames if tokens.frame_spans is None else int(tokens.frame_spans.sum())


def assert_same(found: ClipTokens, expected: ClipTokens) -> None:
    assert found.num_frames == expected.num_frames
    assert found.num_samples == expected.num_samples
    assert found.codes.keys() == expected.codes.keys()
    for name, codes in expected.codes.items():
        np.testing.assert_array_equal(found.codes[name], codes)
    assert (found.frame_spans is None) == (expected.frame_spans is None)
    if expected.frame_spans is not None:
        np.testing.assert_array_equal(found.frame_spans, expected.frame_spans)


def token_batch(codec: Codec, clips: Sequence[Clip]) -> TokenBatch:
    return codec.encode(*batch_of(clips))


def batch_of(clips: Sequence[Clip]) -> tuple[torch.Tensor, torch.Tensor]:
    audio = np.zeros((len(clips), 1, max(map(len, clips))), np.float32)
    for row, clip in enumerate(clips):
        audio[row, 0, : len(clip)] = clip
    return torch.from_numpy(audio), torch.tensor([len(clip) for clip in clips])


def frame_codes(codec: Codec, clips: Sequence[Clip]) -> FrameCodes:
    audio, num_samples = batch_of(clips)
    return codec.encode_frames(audio, num_samples, with_margins=True)


def test_every_family_has_a_tiny_preset() -> None:
    for family in FAMILIES:
        assert [name for name in presets(family) if "tiny" in name], family


def test_codes_have_the_shape_that_the_spec_tells(subject: Subject) -> None:
    codec = subject.codec
    tokens = subject.engine.encode_clips([subject.clip(codec.hop_length * 9 + 7)])[0]
    assert [stream.name for stream in codec.streams] == list(tokens.codes)
    for stream in codec.streams:
        codes = tokens.codes[stream.name]
        assert codes.shape == (stream.num_codebooks, tokens.num_frames)
        assert codes.dtype == np.int32
        assert 0 <= codes.min()
        assert codes.max() < stream.codebook_size
    assert codec.spec.frame_rate == subject.manifest.frame_rate


def test_number_of_frames_follows_the_law(subject: Subject) -> None:
    codec, hop = subject.codec, subject.codec.hop_length
    shortest, tail = codec.spec.min_samples, codec.spec.manifest.min_tail_samples
    lengths = sorted(
        {shortest, hop, hop + 1, 2 * hop - 1, hop + tail, max(shortest, hop + tail - 1), 7 * hop}
    )
    for length, tokens in zip(
        lengths, subject.engine.encode_clips([subject.clip(n) for n in lengths]), strict=True
    ):
        assert frames_of(tokens) == codec.spec.num_frames(length), length
        assert tokens.num_samples == length


def test_the_law_is_one_for_numbers_and_arrays(subject: Subject) -> None:
    lengths = np.arange(0, 5 * subject.codec.hop_length, 7)
    singly = [subject.codec.spec.num_frames(int(n)) for n in lengths]
    np.testing.assert_array_equal(subject.manifest.num_frames(lengths), singly)
    assert subject.codec.spec.num_frames(subject.codec.spec.min_samples) == 1
    assert subject.codec.spec.num_frames(subject.codec.spec.min_samples - 1) == 0


def test_encoding_twice_gives_the_same(subject: Subject) -> None:
    clip = subject.clip(subject.codec.hop_length * 12 + 5)
    first, second = (subject.engine.encode_clips([clip])[0] for _ in range(2))
    assert_same(first, second)


def test_codes_tell_signals_apart(subject: Subject) -> None:
    assert is_lively(subject.codec), "codes hardly change with the signal: nothing is tested"


@pytest.mark.parametrize("seed", [1, 2])
def test_neighbours_change_nothing(subject: Subject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hop = subject.codec.hop_length
    lengths = rng.integers(subject.codec.spec.min_samples, 20 * hop, size=6)
    lengths[3] = lengths[1]
    clips = [subject.clip(int(n), index) for index, n in enumerate(lengths)]
    alone = [subject.engine.encode_clips([clip])[0] for clip in clips]
    order = rng.permutation(len(clips))
    for index, tokens in zip(
        order, subject.engine.encode_clips([clips[i] for i in order]), strict=True
    ):
        assert_same(tokens, alone[index])


def test_decoding_does_not_depend_on_neighbours(subject: Subject) -> None:
    hop = subject.codec.hop_length
    clips = [subject.clip(n, index) for index, n in enumerate((3 * hop, 3 * hop + 1, 11 * hop))]
    tokens = subject.engine.encode_clips(clips)
    together = subject.engine.decode_clips(tokens)
    for one, audio in zip(tokens, together, strict=True):
        np.testing.assert_array_equal(subject.engine.decode_clips([one])[0], audio)


def test_batch_of_any_shape_gives_the_codes_of_the_clip_alone(subject: Subject) -> None:
    """In float64, where no near tie hides or excuses a dependence on the batch's shape.

    Margins show a dependence that is too small to change a code of these few frames.
    """
    hop = subject.codec.hop_length
    clips = [subject.clip(n, index) for index, n in enumerate((11 * hop, 2 * hop + 3, 5 * hop))]
    exact = load_codec(str(subject.folder_path), settings(subject.codec)).double()
    together = frame_codes(exact, clips)
    for row, clip in enumerate(clips):
        alone = frame_codes(exact, [clip])
        frames = int(alone.num_frames[0])
        assert together.num_frames[row] == frames
        for name, codes in alone.codes.items():
            assert torch.equal(together.codes[name][row, :, :frames], codes[0, :, :frames])
            found, expected = (
                each.margins[name][index, :, :frames]
                for each, index in ((together, row), (alone, 0))
            )
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_batch_of_any_shape_gives_the_audio_of_the_clip_alone(subject: Subject) -> None:
    hop = subject.codec.hop_length
    clips = [subject.clip(n, index) for index, n in enumerate((11 * hop, 2 * hop + 3, 5 * hop))]
    exact = load_codec(str(subject.folder_path), settings(subject.codec)).double()
    together = exact.decode(token_batch(exact, clips))
    for row, clip in enumerate(clips):
        alone = exact.decode(token_batch(exact, [clip]))[0, 0]
        torch.testing.assert_close(together[row, 0, : len(clip)], alone, atol=1e-9, rtol=1e-9)


def test_what_lies_past_a_clips_end_is_ignored(subject: Subject) -> None:
    codec, hop = subject.codec, subject.codec.hop_length
    audio = torch.zeros(2, 1, 9 * hop)
    audio[0, 0] = torch.from_numpy(subject.clip(9 * hop))
    audio[1, 0, : 4 * hop + 3] = torch.from_numpy(subject.clip(4 * hop + 3, 1))
    num_samples = torch.tensor([9 * hop, 4 * hop + 3])
    clean = codec.encode(audio, num_samples)
    audio[1, 0, 4 * hop + 3 :] = float("nan")
    dirty = codec.encode(audio, num_samples)
    for name, codes in clean.codes.items():
        np.testing.assert_array_equal(dirty.codes[name], codes)


def test_unused_rows_get_no_frames(subject: Subject) -> None:
    codec, hop = subject.codec, subject.codec.hop_length
    audio = torch.zeros(2, 1, 4 * hop)
    audio[0, 0] = torch.from_numpy(subject.clip(4 * hop))
    tokens = codec.encode(audio, torch.tensor([4 * hop, 0]))
    assert tokens.num_frames.tolist()[1] == 0
    assert all((codes[1] == 0).all() for codes in tokens.codes.values())
    assert codec.decode(tokens).shape == (2, 1, 4 * hop)
    assert not codec.decode(tokens)[1].any()


def test_audio_comes_back_at_the_clips_length(subject: Subject) -> None:
    hop, shortest = subject.codec.hop_length, subject.codec.spec.min_samples
    lengths = [shortest, hop - 1 if hop > shortest else hop, 3 * hop + 1, 8 * hop]
    clips = [subject.clip(max(shortest, n), i) for i, n in enumerate(lengths)]
    decoded = subject.engine.decode_clips(subject.engine.encode_clips(clips))
    assert [len(audio) for audio in decoded] == [len(clip) for clip in clips]
    assert all(np.isfinite(audio).all() and audio.dtype == np.float32 for audio in decoded)
    assert decoded[-1].std() > 1e-4, "the decoder is silent: nothing is tested"


def test_audio_past_a_clips_end_is_zero(subject: Subject) -> None:
    hop = subject.codec.hop_length
    tokens = token_batch(subject.codec, [subject.clip(6 * hop), subject.clip(2 * hop + 3, 1)])
    assert not subject.codec.decode(tokens)[1, 0, 2 * hop + 3 :].any()


def test_fewer_codebooks_decode_where_the_family_says_so(subject: Subject) -> None:
    codec = subject.codec
    tokens = token_batch(codec, [subject.clip(10 * codec.hop_length)])
    most = max(stream.num_codebooks for stream in codec.streams)
    cut = TokenBatch(
        codes={name: codes[:, :1] for name, codes in tokens.codes.items()},
        num_frames=tokens.num_frames,
        num_samples=tokens.num_samples,
        encode_id=tokens.encode_id,
        codebook_id=tokens.codebook_id,
        frame_spans=tokens.frame_spans,
    )
    if most == 1:
        assert torch.equal(codec.decode(tokens, 1), codec.decode(tokens))
        return
    if not codec.decodes_prefixes:
        for refused in (lambda: codec.decode(tokens, 1), lambda: codec.decode(cut)):
            with pytest.raises(ConfigError, match="all its codebooks"):
                refused()
        return
    one = codec.decode(tokens, 1)
    assert torch.equal(one, codec.decode(cut))
    assert not torch.equal(one, codec.decode(tokens))
    assert torch.equal(codec.decode(tokens, most), codec.decode(tokens))


def test_no_codebook_is_refused(subject: Subject) -> None:
    tokens = token_batch(subject.codec, [subject.clip(4 * subject.codec.hop_length)])
    with pytest.raises(ConfigError, match="num_codebooks"):
        subject.codec.decode(tokens, 0)


def test_foreign_tokens_are_refused(subject: Subject) -> None:
    tokens = subject.engine.encode_clips([subject.clip(4 * subject.codec.hop_length)])
    with pytest.raises(ForeignTokensError, match="codebooks"):
        subject.engine.decode_clips(tokens, codebook_id="0" * 32)


@pytest.mark.parametrize("is_above", [False, True])
def test_codes_out_of_range_are_refused(subject: Subject, is_above: bool) -> None:
    tokens = subject.engine.encode_clips([subject.clip(4 * subject.codec.hop_length)])[0]
    for stream in subject.codec.streams:
        codes = {name: values.copy() for name, values in tokens.codes.items()}
        codes[stream.name][0, 0] = stream.codebook_size if is_above else -1
        bad = ClipTokens(codes, tokens.num_frames, tokens.num_samples, tokens.frame_spans)
        with pytest.raises(ConfigError, match=f"{stream.name}.*codebook 0, frame 0"):
            subject.engine.decode_clips([bad])


def test_claimed_length_must_fit_the_codes(subject: Subject) -> None:
    tokens = subject.engine.encode_clips([subject.clip(4 * subject.codec.hop_length)])[0]
    long = ClipTokens(
        tokens.codes, tokens.num_frames, 7 * subject.codec.hop_length, tokens.frame_spans
    )
    with pytest.raises(ConfigError, match="samples"):
        subject.engine.decode_clips([long])


def test_empty_and_very_short_clips(subject: Subject) -> None:
    with pytest.raises(AudioError) as empty:
        subject.engine.encode_clips([subject.clip(0)])
    assert empty.value.reason is QuarantineReason.EMPTY
    shortest = subject.codec.spec.min_samples
    if shortest > 1:
        for refuse in (
            lambda: subject.engine.encode_clips([subject.clip(shortest - 1)]),
            lambda: token_batch(subject.codec, [subject.clip(shortest - 1)]),
        ):
            with pytest.raises(AudioError) as short:
                refuse()
            assert short.value.reason is QuarantineReason.TOO_SHORT
    tokens = subject.engine.encode_clips([subject.clip(shortest)])
    assert frames_of(tokens[0]) == 1
    assert len(subject.engine.decode_clips(tokens)[0]) == shortest


def test_silence_and_overload_are_coded(subject: Subject) -> None:
    size = 6 * subject.codec.hop_length
    square = np.where(np.arange(size) % 50 < 25, 1, -1).astype(np.float32)
    clips = [np.zeros(size, np.float32), square, 8 * square, np.full(size, 1e-30, np.float32)]
    tokens = subject.engine.encode_clips(clips)
    for audio in subject.engine.decode_clips(tokens):
        assert audio.shape == (size,)
        assert np.isfinite(audio).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(subject: Subject, bad: float) -> None:
    clip = subject.clip(4 * subject.codec.hop_length)
    clip[5] = bad
    with pytest.raises(AudioError) as refused:
        subject.engine.encode_clips([clip])
    assert refused.value.reason is QuarantineReason.NON_FINITE
    with pytest.raises(ConfigError, match="Sample 5 of clip 0"):
        token_batch(subject.codec, [clip])


def test_saving_and_loading_changes_no_bit(subject: Subject, tmp_path: Path) -> None:
    clip = subject.clip(7 * subject.codec.hop_length + 1)
    again_path = tmp_path / "again"
    assert save_codec(subject.codec, CARD, again_path) == subject.manifest
    engine = Engine(load_codec(str(again_path), settings(subject.codec)))
    tokens = engine.encode_clips([clip])
    assert_same(tokens[0], subject.engine.encode_clips([clip])[0])
    np.testing.assert_array_equal(
        engine.decode_clips(tokens)[0], subject.engine.decode_clips(tokens)[0]
    )


def test_every_part_has_its_own_digest(subject: Subject) -> None:
    """A changed tensor changes the digest of its part, and of no other."""
    codec = load_codec(str(subject.folder_path), settings(subject.codec))
    before = part_digests(codec).model_dump()
    by_part: dict[Part, list[str]] = {}
    for key in codec.state_dict():
        by_part.setdefault(codec.part_of(key), []).append(key)
    assert by_part.keys() >= {Part.ENCODER, Part.CODEBOOKS, Part.DECODER}
    for part, keys in by_part.items():
        tensor = codec.state_dict()[keys[-1]]
        kept = tensor.clone()
        tensor.add_(1)
        after = part_digests(codec).model_dump()
        tensor.copy_(kept)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == ({part.value} if part is not Part.TRAINING else set())


@pytest.mark.parametrize("changed", [(Part.DECODER, Part.TRAINING), (Part.ENCODER, Part.SSL)])
def test_parts_decide_what_their_names_say(subject: Subject, changed: tuple[Part, ...]) -> None:
    """``encode_id`` and ``decode_id`` rest on this: what a digest leaves out must not matter."""
    codec = load_codec(str(subject.folder_path), settings(subject.codec))
    audio = torch.from_numpy(subject.clip(9 * codec.hop_length))[None, None]
    num_samples = torch.tensor([audio.shape[2]])
    tokens = codec.encode(audio, num_samples)
    decoded = codec.decode(tokens)
    for key, value in codec.state_dict().items():
        if codec.part_of(key) in changed:
            value.mul_(1.5).add_(0.1)
    if Part.ENCODER in changed:
        assert torch.equal(codec.decode(tokens), decoded)
        return
    assert not torch.equal(codec.decode(tokens), decoded)
    for name, codes in codec.encode(audio, num_samples).codes.items():
        np.testing.assert_array_equal(codes, tokens.codes[name])


def test_margins_say_how_clear_each_decision_is(subject: Subject) -> None:
    clip = torch.from_numpy(subject.clip(5 * subject.codec.hop_length))[None, None]
    frames = subject.codec.encode_frames(clip, torch.tensor([clip.shape[2]]), with_margins=True)
    assert frames.margins is not None
    for name, codes in frames.codes.items():
        assert frames.margins[name].shape == codes.shape
        assert (frames.margins[name] >= 0).all()
