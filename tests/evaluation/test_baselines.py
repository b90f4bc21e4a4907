"""Opus and the trivial coder: rates, lengths, determinism."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hcodec_core.errors import ConfigError
from hcodec_core.evaluation import perception
from hcodec_core.evaluation.baselines import open_baseline
from hcodec_core.evaluation.held_out import first_seconds
from hcodec_core.evaluation.opus import Opus

CLIPS = Path(__file__).parent.parent / "corpus" / "clips"
RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return first_seconds(CLIPS / "english" / "weather-report.flac", RATE, 4.0)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
def test_opus_keeps_length_and_place(rate, speech):
    clip = first_seconds(CLIPS / "english" / "weather-report.flac", rate, 3.0)[:-7]
    done = Opus(rate, 24).transcode(clip)
    assert done.audio.shape == clip.shape
    correlation = float(np.corrcoef(clip, done.audio)[0, 1])
    assert correlation > 0.8  # a shift of a few samples would show
    assert 10_000 < done.num_bits / 3 < 30_000


def test_opus_at_six_kilobits(speech):
    done = Opus(RATE, 6).transcode(speech)
    assert 3000 < done.num_bits / (len(speech) / RATE) < 7000  # variable, around 6000


def test_one_sample_and_a_little_more_survive_opus():
    for size in (1, 100):
        clip = np.full(size, 0.1, np.float32)
        assert Opus(RATE, 6).transcode(clip).audio.shape == (size,)


@pytest.fixture(scope="module")
def trivial():
    return open_baseline("trivial1", RATE, CLIPS / "english")


def test_the_trivial_coder_is_intelligible_at_its_bit_rate(trivial, speech):
    done = trivial.transcode(speech)
    assert done.audio.shape == speech.shape
    assert done.codes["acoustic"].shape == (2, 200)
    assert trivial.facts.nominal_bits_per_second == 1000
    assert perception.stoi(speech, done.audio, RATE) > 0.6


def test_the_trivial_coder_is_deterministic(trivial, speech):
    again = open_baseline("trivial1", RATE, CLIPS / "english")
    assert again.facts == trivial.facts
    clip = speech[:16_000]
    assert np.array_equal(trivial.transcode(clip).audio, again.transcode(clip).audio)


@pytest.mark.parametrize(
    ("name", "folder", "sentence"),
    [
        ("opus5", None, "6 to 64"),
        ("opus6.5", None, "6 to 64"),
        ("trivial2", None, "--fit-audio"),
        ("trivial0.3", CLIPS / "english", "multiples of 500 bit/s"),
        ("trivial2", CLIPS / "short", "it needs at least"),
        ("flac", None, "no baseline 'flac'"),
    ],
)
def test_what_cannot_be_is_refused(name, folder, sentence):
    with pytest.raises(ConfigError, match=sentence):
        open_baseline(name, RATE, folder)
