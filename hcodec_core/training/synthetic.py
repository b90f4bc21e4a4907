"""Synthesised speech-like and musical sound: data without licence, from a generator alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.native import Samples

_NUM_HARMONICS = 24
_FORMANT_RANGES_HZ = ((250, 850), (700, 2300), (1800, 3200))

Times = npt.NDArray[np.float64]


def synthesise(num_samples: int, sample_rate: int, rng: np.random.Generator) -> Samples:
    """A voice with gliding pitch and formants, or plucked chords: float32 [num_samples]."""
    seconds = np.arange(num_samples) / sample_rate
    make = _voice if rng.random() < 0.6 else _music
    audio = make(seconds, sample_rate, rng)
    peak = np.abs(audio).max()
    return (0.8 * audio / max(float(peak), 1e-6)).astype(np.float32)


def _voice(seconds: Times, sample_rate: int, rng: np.random.Generator) -> Times:
    glide = np.sin(2 * np.pi * rng.uniform(0.3, 3) * seconds + rng.uniform(0, 6))
    pitch = rng.uniform(80, 280) * (1 + rng.uniform(0.02, 0.25) * glide)
    phase = 2 * np.pi * np.cumsum(pitch / sample_rate)
    formants = [_wandering(seconds, low, high, rng) for low, high in _FORMANT_RANGES_HZ]
    voice = np.zeros_like(seconds)
    for number in range(1, _NUM_HARMONICS + 1):
        gain = sum(1 / (1 + ((number * pitch - f) / (60 + 0.08 * f)) ** 2) for f in formants)
        voice += gain * np.sin(number * phase) * (number * pitch < 0.45 * sample_rate)
    breath = np.diff(rng.standard_normal(len(seconds)), prepend=0.0)
    pace, shift = rng.uniform(1.5, 5), rng.uniform(0, 6)
    opened = np.clip(np.sin(2 * np.pi * pace * seconds + shift) + 0.4, 0, 1)
    hissing = np.clip(np.sin(2 * np.pi * pace * seconds + shift + 2.2) - 0.6, 0, 1)
    return opened * voice + rng.uniform(0.1, 1.0) * hissing * breath + 2e-3 * breath


def _wandering(seconds: Times, low: float, high: float, rng: np.random.Generator) -> Times:
    places = rng.uniform(low, high, int(seconds[-1] * 6) + 3)
    return np.interp(seconds * 6, np.arange(len(places)), places)


def _music(seconds: Times, sample_rate: int, rng: np.random.Generator) -> Times:
    audio = np.zeros_like(seconds)
    root = rng.uniform(100, 400)
    beat_seconds = rng.uniform(0.15, 0.6)
    for beat in range(int(seconds[-1] / beat_seconds) + 1):
        since = seconds - beat * beat_seconds
        for interval in rng.choice([0, 3, 4, 7, 9, 12, 16], size=int(rng.integers(1, 4))):
            audio += _note(since, root * 2 ** (interval / 12), sample_rate, rng)
    return audio


def _note(since: Times, pitch: float, sample_rate: int, rng: np.random.Generator) -> Times:
    decay, brightness = rng.uniform(2, 9), rng.uniform(0.8, 1.8)
    partials = [k for k in range(1, 11) if k * pitch < 0.45 * sample_rate]
    shifts = rng.uniform(0, 2 * np.pi, len(partials))
    tone = sum(
        np.sin(2 * np.pi * k * pitch * since + shift) / k**brightness
        for k, shift in zip(partials, shifts, strict=True)
    )
    sounding = np.exp(-decay * since.clip(0)) * (1 - np.exp(-200 * since.clip(0)))
    return np.asarray(tone * sounding * (since >= 0))
