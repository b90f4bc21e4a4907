"""STOI, PESQ and DNSMOS: published packages where they are used, recorded values where not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hcodec_core.evaluation import perception
from hcodec_core.evaluation.held_out import first_seconds
from hcodec_core.evaluation.perception import Dnsmos, NotMeasurableError

CLIPS = Path(__file__).parent.parent / "corpus" / "clips"
RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return first_seconds(CLIPS / "english" / "weather-report.flac", RATE, 6.0)


@pytest.fixture(scope="module")
def noisy(speech) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    return speech + 0.02 * noise


def test_stoi_falls_with_noise(speech, noisy):
    assert perception.stoi(speech, speech, RATE) == pytest.approx(1.0, abs=1e-3)
    assert 0.1 < perception.stoi(speech, noisy, RATE) < 0.99


def test_pesq_falls_with_noise_and_is_higher_for_nothing_changed(speech, noisy):
    assert perception.pesq(speech, speech, RATE) == pytest.approx(4.64, abs=0.01)
    assert perception.pesq(speech, noisy, RATE) < 3.0
    narrow = speech[::2].copy()
    assert perception.pesq(narrow, narrow, 8_000) == pytest.approx(4.55, abs=0.01)


@pytest.mark.parametrize("seconds", [0.05, 1.0])
def test_silence_has_no_score(seconds):
    silence = np.zeros(int(seconds * RATE), np.float32)
    with pytest.raises(NotMeasurableError, match="silent"):
        perception.stoi(silence, silence, RATE)
    with pytest.raises(NotMeasurableError, match="silent"):
        perception.pesq(silence, silence, RATE)


def test_what_is_too_short_has_no_score(speech):
    with pytest.raises(NotMeasurableError):
        perception.stoi(speech[:800], speech[:800], RATE)
    with pytest.raises(NotMeasurableError):
        perception.pesq(speech[:800], speech[:800], RATE)


def test_dnsmos_gives_the_values_of_the_package():
    # Recorded with speechmos 0.0.1.1 and librosa 0.11.0 (speechmos.dnsmos.run) on this signal.
    samples = np.random.default_rng(5).standard_normal(10 * RATE)
    tone = np.sin(2 * np.pi * 220 * np.arange(10 * RATE) / RATE)
    scores = Dnsmos().scores((0.05 * samples + 0.2 * tone).astype(np.float32))
    expected = {"ovrl": 1.02126, "sig": 1.18369, "bak": 1.04540, "p808": 2.36119}
    assert scores == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_dnsmos_is_that_of_the_package(noisy):
    dnsmos = pytest.importorskip("speechmos.dnsmos")
    theirs = dnsmos.run(np.clip(noisy, -1, 1), RATE)
    ours = Dnsmos().scores(noisy)
    for part in ("ovrl", "sig", "bak", "p808"):
        assert ours[part] == pytest.approx(float(theirs[f"{part}_mos"]), abs=1e-3)
