import numpy as np
import pytest

from hcodec_core.audio.measures import log_spectral_distance, si_sdr, spectrogram

RATE = 16000


def noise(seed, size=RATE):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_si_sdr_is_that_of_torchmetrics():
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as theirs

    reference = noise(0)
    for share in (0.01, 0.5, 3.0):
        estimate = reference * 0.3 + share * noise(1) + 0.1
        expected = theirs(
            torch.from_numpy(estimate).double(),
            torch.from_numpy(reference).double(),
            zero_mean=True,
        )
        assert si_sdr(reference, estimate) == pytest.approx(float(expected), abs=1e-6)


def test_si_sdr_at_its_ends():
    assert si_sdr(noise(0), 2 * noise(0)) == np.inf
    assert np.isnan(si_sdr(np.zeros(100, np.float32), noise(0, 100)))
    assert np.isnan(si_sdr(noise(0, 0), noise(0, 0)))
    assert si_sdr(noise(0), np.zeros(RATE, np.float32)) == -np.inf


def test_log_spectral_distance_of_a_gain_is_the_gain():
    assert log_spectral_distance(noise(0), noise(0), RATE) == 0
    assert log_spectral_distance(noise(0), 0.5 * noise(0), RATE) == pytest.approx(6.0206, abs=1e-3)
    assert np.isnan(log_spectral_distance(noise(0, 0), noise(0, 0), RATE))


@pytest.mark.parametrize("size", [1, 511, 512, 513, RATE])
def test_spectrogram_covers_every_sample(size):
    levels = spectrogram(noise(0, size), RATE)
    assert levels.shape[0] == 257
    assert (levels.shape[1] - 1) * 128 + 512 >= size
    assert np.isfinite(levels).all()


def test_a_sine_stands_at_its_level_and_frequency():
    time = np.arange(RATE) / RATE
    levels = spectrogram((0.1 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32), RATE)
    middle = levels[:, levels.shape[1] // 2]
    assert middle.argmax() == 32
    assert middle.max() == pytest.approx(-20, abs=0.01)
    assert spectrogram(np.zeros(RATE, np.float32), RATE).max() == -100
