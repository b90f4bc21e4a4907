"""Variations of training samples, each from the generator of its sample. Plain numpy.

All functions take and return float32 [N] at ``sample_rate`` Hz.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.native import Samples
from hcodec_core.training.recipe import AugmentRecipe

_QUIET = 1e-3  # a peak below this is not scaled up: it would be noise at full scale
_EQUALISER_POINTS = 6
_LOWEST_HZ = 50.0


def num_source_samples(num_samples: int, speed: float) -> int:
    """Samples of the source that become ``num_samples`` at ``speed``."""
    return int(np.ceil(num_samples * speed)) + 1


def change_speed(audio: Samples, speed: float, num_samples: int) -> Samples:
    """Play faster (above 1) or slower, and cut to ``num_samples``."""
    if speed != 1.0:
        import soxr

        audio = soxr.resample(audio, speed, 1.0, quality="HQ")
    cut = np.zeros(num_samples, dtype=np.float32)
    cut[: min(num_samples, len(audio))] = audio[:num_samples]
    return cut


def vary(
    audio: Samples, sample_rate: int, recipe: AugmentRecipe, rng: np.random.Generator
) -> Samples:
    """Equaliser, noise and level, as the recipe asks."""
    # Every number is drawn, whether used or not: a change of one share leaves the others alone.
    chances = rng.random(2)
    curve_db = rng.uniform(-recipe.equaliser_db, recipe.equaliser_db, _EQUALISER_POINTS)
    snr_db, tilt = rng.uniform(*recipe.noise_snr_db), rng.random()
    noise = rng.standard_normal(len(audio), dtype=np.float32)
    level = 1.0 if recipe.peak is None else rng.uniform(*recipe.peak)
    if chances[0] < recipe.equaliser_share:
        audio = _shaped(audio, _gains(len(audio), sample_rate, curve_db))
    if chances[1] < recipe.noise_share:
        audio = _noisy(audio, noise, snr_db, tilt)
    return audio if recipe.peak is None else _scaled(audio, level)


def _gains(length: int, sample_rate: int, curve_db: npt.NDArray[np.float64]) -> Samples:
    frequencies = np.fft.rfftfreq(length, 1 / sample_rate)
    places = np.geomspace(_LOWEST_HZ, sample_rate / 2, len(curve_db))
    levels = np.interp(np.log(frequencies.clip(_LOWEST_HZ)), np.log(places), curve_db)
    return np.asarray(10 ** (levels / 20), dtype=np.float32)


def _shaped(audio: Samples, gains: Samples) -> Samples:
    return np.fft.irfft(np.fft.rfft(audio) * gains, len(audio)).astype(np.float32)


def _noisy(audio: Samples, noise: Samples, snr_db: float, tilt: float) -> Samples:
    """Add noise that falls by up to 6 dB per octave."""
    ramp = np.arange(1, len(noise) // 2 + 2, dtype=np.float32)
    noise = _shaped(noise, ramp ** np.float32(-tilt))
    wanted = float(np.sqrt(np.square(audio, dtype=np.float64).mean())) * 10 ** (-snr_db / 20)
    power = float(np.sqrt(np.square(noise, dtype=np.float64).mean()))
    return (audio + noise * np.float32(wanted / max(power, 1e-9))).astype(np.float32)


def _scaled(audio: Samples, level: float) -> Samples:
    peak = float(np.abs(audio).max())
    return audio if peak < _QUIET else audio * np.float32(level / peak)
