"""Spectral distances between an original and what a codec made of it. Plain numpy, float64.

Shape letters: N sample, M mel, F frequency, T window.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.native import Samples

Matrix = npt.NDArray[np.float64]

# Windows and bands of the multi-scale mel loss of DAC (arXiv 2306.06546, section 3.4), in samples
# of the codec's own rate.
MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
# Windows of Parallel WaveGAN (arXiv 1910.11480): samples of window, of FFT, of hop.
STFT_SCALES = ((240, 512, 50), (600, 1024, 120), (1200, 2048, 240))

_MEL_FLOOR = 1e-5
_STFT_FLOOR = 1e-7
_WINDOWS_AT_ONCE = 4096
_LINEAR_HZ = 200.0 / 3.0
_BREAK_HZ = 1000.0
_LOG_STEP = np.log(6.4) / 27.0


def mel_distance_db(reference: Samples, estimate: Samples, sample_rate: int) -> float:
    """Mean absolute difference of mel levels in dB, averaged over seven windows.

    Magnitudes of Hann windows (32 to 2048 samples, hop a quarter) in 5 to 320 Slaney bands, at
    least 1e-5. Both float [N] of equal length, N >= 1.
    """
    assert reference.shape == estimate.shape
    return float(
        np.mean([_mel_scale(reference, estimate, sample_rate, *scale) for scale in MEL_SCALES])
    )


def stft_distance(reference: Samples, estimate: Samples) -> float:
    """Spectral convergence plus mean difference of log magnitudes, averaged over three windows.

    As in Parallel WaveGAN, natural logarithm. Both float [N] of equal length, N >= 1. NaN when the
    reference is silent: convergence is relative to it.
    """
    assert reference.shape == estimate.shape
    return float(np.mean([_stft_scale(reference, estimate, *scale) for scale in STFT_SCALES]))


def mel_bank(num_mels: int, n_fft: int, sample_rate: int) -> Matrix:
    """Triangular filters of equal area on Slaney's mel scale, [M, n_fft / 2 + 1]."""
    edges = _to_hz(np.linspace(0.0, _to_mel(sample_rate / 2.0), num_mels + 2))
    frequencies = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    widths = np.diff(edges)[:, None]
    rising = (frequencies - edges[:-2, None]) / widths[:-1]
    falling = (edges[2:, None] - frequencies) / widths[1:]
    triangles = np.clip(np.minimum(rising, falling), 0.0, None)
    bank: Matrix = triangles * 2.0 / (edges[2:] - edges[:-2])[:, None]
    return bank


def magnitudes(audio: Samples, size: int, n_fft: int, hop: int) -> Iterator[Matrix]:
    """Magnitudes of Hann windows, [T, F] in slices; both ends padded with zeros by half a window.

    ``size``: samples of a window; ``n_fft``: of the transform.
    """
    padded = np.pad(audio.astype(np.float64), n_fft // 2)
    window = np.zeros(n_fft)
    start = (n_fft - size) // 2
    window[start : start + size] = np.hanning(size + 1)[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    for first in range(0, len(frames), _WINDOWS_AT_ONCE):
        part = frames[first : first + _WINDOWS_AT_ONCE]
        yield np.abs(np.fft.rfft(part * window, axis=1))


@cache
def _cached_bank(num_mels: int, n_fft: int, sample_rate: int) -> Matrix:
    return mel_bank(num_mels, n_fft, sample_rate).T.copy()


def _mel_scale(
    reference: Samples, estimate: Samples, sample_rate: int, size: int, num_mels: int
) -> float:
    bank = _cached_bank(num_mels, size, sample_rate)
    total, count = 0.0, 0
    pairs = (magnitudes(audio, size, size, size // 4) for audio in (reference, estimate))
    for one, other in zip(*pairs, strict=True):
        levels = [np.log10(np.maximum(part @ bank, _MEL_FLOOR)) for part in (one, other)]
        total += float(np.abs(levels[0] - levels[1]).sum())
        count += levels[0].size
    return 20 * total / count


def _stft_scale(reference: Samples, estimate: Samples, size: int, n_fft: int, hop: int) -> float:
    wrong, energy, logs, count = 0.0, 0.0, 0.0, 0
    pairs = (magnitudes(audio, size, n_fft, hop) for audio in (reference, estimate))
    for one, other in zip(*pairs, strict=True):
        wrong += float(np.square(one - other).sum())
        energy += float(np.square(one).sum())
        floored = [np.log(np.maximum(part, _STFT_FLOOR)) for part in (one, other)]
        logs += float(np.abs(floored[0] - floored[1]).sum())
        count += one.size
    return float("nan") if energy == 0.0 else float(np.sqrt(wrong / energy)) + logs / count


def _to_mel(frequency: float) -> float:
    if frequency < _BREAK_HZ:
        return frequency / _LINEAR_HZ
    return float(_BREAK_HZ / _LINEAR_HZ + np.log(frequency / _BREAK_HZ) / _LOG_STEP)


def _to_hz(mel: Matrix) -> Matrix:
    above = _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_HZ / _LINEAR_HZ))
    hz: Matrix = np.where(mel < _BREAK_HZ / _LINEAR_HZ, mel * _LINEAR_HZ, above)
    return hz
