"""Known answers of the spectral distances."""

from __future__ import annotations

import numpy as np
import pytest

from hcodec_core.audio.measures import si_sdr
from hcodec_core.evaluation.distances import mel_bank, mel_distance_db, stft_distance

RATE = 16_000


def noise(seconds: float = 1.0, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (0.1 * samples).astype(np.float32)


def test_distances_of_a_signal_to_itself_are_zero():
    x = noise()
    assert mel_distance_db(x, x, RATE) == 0.0
    assert stft_distance(x, x) == 0.0


def test_mel_distance_of_a_signal_at_a_tenth_is_twenty_decibels():
    x = noise()
    assert mel_distance_db(x, 0.1 * x, RATE) == pytest.approx(20.0, abs=0.01)


def test_stft_distance_of_a_signal_at_half_is_half_plus_log_two():
    x = noise()
    assert stft_distance(x, 0.5 * x) == pytest.approx(0.5 + np.log(2.0), abs=1e-3)


def test_stft_distance_to_silence_is_not_a_number():
    assert np.isnan(stft_distance(np.zeros(RATE, np.float32), noise()))


def test_si_sdr_by_hand():
    # Energy 4 along the reference, 0.04 across it: 10 log10(100) = 20 dB, whatever the scale.
    reference = np.array([1, -1, 1, -1], np.float32)
    across = 0.1 * np.array([1, 1, -1, -1], np.float32)
    assert si_sdr(reference, 3 * (reference + across)) == pytest.approx(20.0, abs=1e-4)


def test_one_sample_of_audio_has_distances():
    x = np.array([0.5], np.float32)
    assert np.isfinite(mel_distance_db(x, x, RATE))
    assert np.isfinite(stft_distance(x, x))


def test_mel_bank_is_that_of_the_vocoders():
    from hcodec_core.nn.slaney_mel import slaney_bank

    assert np.allclose(mel_bank(80, 1024, RATE), slaney_bank(80, 1024, RATE).numpy(), atol=1e-12)


def test_mel_bank_of_an_odd_transform_ends_below_half_the_rate():
    bank = mel_bank(120, 321, RATE)
    assert bank.shape == (120, 161)
    assert bank[-1, -1] > 0
