"""How far decoded audio is from the original, and spectrograms to look at. Plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.native import Samples

Levels = npt.NDArray[np.float64]

_FLOOR_DB = -100.0
_WINDOW_SECONDS = 0.032
_HOPS_PER_WINDOW = 4


def si_sdr(reference: Samples, estimate: Samples) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv 1811.02508), means removed.

    Both float [N] of equal length. NaN when the reference is silent or empty, minus infinite
    when the estimate holds nothing of it, infinite when it is the reference times a factor.
    """
    assert reference.shape == estimate.shape
    target, other = (_centred(x) for x in (reference, estimate))
    energy = float(target @ target)
    if energy == 0.0:
        return float("nan")
    target = target * (float(other @ target) / energy)
    wanted, unwanted = (float(np.square(x).sum()) for x in (target, target - other))
    if wanted == 0.0:
        return float("-inf")
    return 10 * float(np.log10(wanted / unwanted)) if unwanted else float("inf")


def log_spectral_distance(reference: Samples, estimate: Samples, sample_rate: int) -> float:
    """Mean over frames of the root mean square difference of two spectrograms, in dB.

    Both float [N] of equal length; see ``spectrogram``. NaN without samples.
    """
    assert reference.shape == estimate.shape
    if not len(reference):
        return float("nan")
    difference = spectrogram(reference, sample_rate) - spectrogram(estimate, sample_rate)
    return float(np.sqrt(np.square(difference).mean(axis=0)).mean())


def spectrogram(audio: Samples, sample_rate: int) -> Levels:
    """Levels in dB of full scale [F, T], at least -100; 32 ms Hann windows every 8 ms.

    A full-scale sine has 0 dB at its frequency. Zeros fill the last window.
    """
    size = round(_WINDOW_SECONDS * sample_rate)
    hop = size // _HOPS_PER_WINDOW
    num_frames = max(1, -(-(len(audio) - size) // hop) + 1)
    padded = np.zeros((num_frames - 1) * hop + size)
    padded[: len(audio)] = audio
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    window = np.hanning(size + 1)[:-1]
    return _levels(frames, window)


def _levels(frames: npt.NDArray[Any], window: npt.NDArray[Any]) -> Levels:
    # In slices: the windows of an hour of audio would fill gigabytes.
    slices = np.array_split(frames, max(1, len(frames) // 4096))
    magnitudes = [np.abs(np.fft.rfft(part * window)) for part in slices]
    level = 2 * np.concatenate(magnitudes).T / window.sum()
    levels: Levels = np.maximum(20 * np.log10(np.maximum(level, 1e-30)), _FLOOR_DB)
    return levels


def _centred(x: Samples) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide - wide.mean() if len(wide) else wide
