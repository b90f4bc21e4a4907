import dataclasses

import numpy as np
import pytest
import torch

from hcodec_core.errors import ConfigError, ForeignTokensError
from hcodec_core.models.hcodec.config import tiny
from hcodec_core.models.hcodec.model import HCodec
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings, TokenBatch

SETTINGS = EncodeSettings(compute_class="cpu-test")


@pytest.fixture(scope="module")
def nano():
    return load_codec("hcodec-nano", SETTINGS)


def noise(num_samples, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, num_samples, generator=generator) * 0.1


def test_tokens_say_what_they_are(nano):
    tokens = nano.encode(noise(2000, rows=3), torch.tensor([2000, 0, 641]))
    assert tokens.num_frames.tolist() == [4, 0, 2]
    assert tokens.num_samples.tolist() == [2000, 0, 641]
    assert (tokens.encode_id, tokens.codebook_id) == (nano.spec.encode_id, nano.spec.codebook_id)
    assert list(tokens.codes) == ["semantic", "acoustic"]
    for codes in tokens.codes.values():
        assert codes.shape == (3, 4, 4)
        assert codes.dtype == np.int32
        assert not codes[1].any()
        assert not codes[2, :, 2:].any()
    assert tokens.frame_spans is None


def test_what_lies_past_an_end_is_ignored(nano):
    audio = noise(2000, rows=2)
    clean = nano.encode(audio, torch.tensor([2000, 700]))
    audio[1, 0, 700:] = float("nan")
    dirty = nano.encode(audio, torch.tensor([2000, 700]))
    for name, codes in clean.codes.items():
        assert np.array_equal(codes, dirty.codes[name])


def test_decoded_audio_is_trimmed(nano):
    tokens = nano.encode(noise(2000, rows=3), torch.tensor([1999, 0, 641]))
    audio = nano.decode(tokens)
    assert audio.shape == (3, 1, 1999)
    assert audio.dtype == torch.float32
    assert audio[0].abs().sum() > 0
    assert not audio[1].any()
    assert not audio[2, 0, 641:].any()
    assert audio[2, 0, :641].abs().sum() > 0


def test_fewer_codebooks_decode_to_other_audio(nano):
    tokens = nano.encode(noise(6400), torch.tensor([6400]))
    whole, coarse = nano.decode(tokens), nano.decode(tokens, num_codebooks=1)
    assert whole.shape == coarse.shape
    assert not torch.allclose(whole, coarse)
    prefix = dataclasses.replace(tokens, codes={k: v[:, :1] for k, v in tokens.codes.items()})
    assert torch.equal(nano.decode(prefix), coarse)


def test_nothing_decodes_to_nothing(nano):
    tokens = nano.encode(noise(640), torch.tensor([0]))
    assert nano.decode(tokens).shape == (1, 1, 0)


@pytest.mark.parametrize(
    ("audio", "num_samples", "message"),
    [
        (torch.zeros(1, 640), torch.tensor([640]), r"\[B, 1, N\]"),
        (torch.zeros(1, 2, 640), torch.tensor([640]), r"\[B, 1, N\]"),
        (torch.zeros(1, 1, 640, dtype=torch.float64), torch.tensor([640]), "float32"),
        (torch.zeros(1, 1, 640), torch.tensor([640, 1]), r"int64 \[1\]"),
        (torch.zeros(1, 1, 640), torch.tensor([640.0]), r"int64 \[1\]"),
        (torch.zeros(2, 1, 640), torch.tensor([1, 641]), "Clip 1 claims 641"),
        (torch.zeros(1, 1, 640), torch.tensor([-1]), "Clip 0 claims -1"),
        (torch.full((1, 1, 640), float("nan")), torch.tensor([1]), "Sample 0 of clip 0"),
        (torch.full((1, 1, 640), float("inf")), torch.tensor([640]), "not a finite number"),
    ],
)
def test_bad_audio_is_refused(nano, audio, num_samples, message):
    with pytest.raises(ConfigError, match=message):
        nano.encode(audio, num_samples)


def tokens_of(nano, **changes):
    values = {
        "codes": {name: np.zeros((1, 4, 2), dtype=np.int32) for name in ("semantic", "acoustic")},
        "num_frames": np.array([2]),
        "num_samples": np.array([1280]),
        "encode_id": "another",
        "codebook_id": nano.spec.codebook_id,
    }
    return TokenBatch(**(values | changes))


def test_tokens_of_another_encoder_with_the_same_codebooks_are_decoded(nano):
    assert nano.decode(tokens_of(nano)).shape == (1, 1, 1280)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codebook_id": "0" * 32}, ForeignTokensError, "codebooks 000000000000"),
        ({"codes": {"semantic": np.zeros((1, 4, 2), np.int32)}}, ForeignTokensError, "acoustic"),
        (
            {"codes": {n: np.full((1, 4, 2), 1024, np.int32) for n in ("semantic", "acoustic")}},
            ConfigError,
            "outside 0..1023",
        ),
        ({"num_samples": np.array([10**9])}, ConfigError, "Clip 0 claims 1000000000"),
        ({"num_samples": np.array([-5])}, ConfigError, "Clip 0 claims -5"),
        ({"frame_spans": np.ones((1, 2), np.int32)}, ConfigError, "frame_spans"),
    ],
)
def test_foreign_or_broken_tokens_are_refused(nano, changes, error, message):
    with pytest.raises(error, match=message):
        nano.decode(tokens_of(nano, **changes))


def test_at_least_one_codebook(nano):
    with pytest.raises(ConfigError, match="at least 1"):
        nano.decode(tokens_of(nano), num_codebooks=0)


def test_a_codec_without_a_manifest_says_so():
    codec = HCodec(tiny())
    with pytest.raises(ConfigError, match="load_codec"):
        codec.encode(noise(640), torch.tensor([640]))
    with pytest.raises(ConfigError, match="training"):
        codec(noise(640), torch.tensor([640]))


def test_margins_are_given_when_asked_for(nano):
    frames = nano.encode_frames(noise(6400), torch.tensor([6400]), with_margins=True)
    assert frames.margins is not None
    for name, margins in frames.margins.items():
        assert margins.shape == frames.codes[name].shape
        assert (margins >= 0).all()
