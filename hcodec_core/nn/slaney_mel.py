"""The log-mel spectrogram that BigVGAN's published vocoders understand (its ``mel_spectrogram``).

Shape letters: B batch, N sample, M mel, T mel frame.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

_LINEAR_HZ = 200.0 / 3.0  # Hz per mel below 1 kHz, where Slaney's scale is linear
_BREAK_HZ = 1000.0
_LOG_STEP = log(6.4) / 27.0  # of the natural logarithm of the frequency, per mel above


def slaney_log_mel(
    audio: Tensor, sample_rate: int, n_fft: int = 1024, hop_length: int = 256, num_mels: int = 100
) -> Tensor:
    """Natural logarithm of mel magnitudes, at least 1e-5: [B, N] -> [B, M, N / hop_length].

    Args:
        audio: Samples in -1..1; N a multiple of the hop, longer than ``n_fft``.
        sample_rate: Hz; the filters reach from 0 to half of it.
        n_fft: Samples of a window (periodic Hann).
        hop_length: Samples between windows. Both ends are reflected so that frames tile the audio.
        num_mels: Number of filters.
    """
    assert audio.shape[1] % hop_length == 0
    edge = (n_fft - hop_length) // 2
    padded = F.pad(audio[:, None], (edge, edge), mode="reflect")[:, 0]
    window = torch.hann_window(n_fft, device=audio.device, dtype=audio.dtype)
    spectrum = torch.stft(
        padded, n_fft, hop_length, window=window, center=False, return_complex=True
    )
    # The small constant gives silence a gradient.
    magnitudes = torch.sqrt(torch.view_as_real(spectrum).square().sum(dim=-1) + 1e-9)
    bank = slaney_bank(num_mels, n_fft, sample_rate).to(audio)
    return (bank @ magnitudes).clamp(min=1e-5).log()


def slaney_bank(num_mels: int, n_fft: int, sample_rate: int) -> Tensor:
    """Triangular filters of equal area [M, n_fft / 2 + 1] (float64) on Slaney's mel scale."""
    top = _to_mel(sample_rate / 2.0)
    edges = _to_hz(torch.linspace(0.0, top, num_mels + 2, dtype=torch.float64))
    frequencies = torch.linspace(0.0, sample_rate / 2.0, n_fft // 2 + 1, dtype=torch.float64)
    widths = edges.diff()[:, None]
    rising = (frequencies - edges[:-2, None]) / widths[:-1]
    falling = (edges[2:, None] - frequencies) / widths[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return triangles * 2.0 / (edges[2:] - edges[:-2])[:, None]


def _to_mel(frequency: float) -> float:
    if frequency < _BREAK_HZ:
        return frequency / _LINEAR_HZ
    return _BREAK_HZ / _LINEAR_HZ + log(frequency / _BREAK_HZ) / _LOG_STEP


def _to_hz(mels: Tensor) -> Tensor:
    above = mels - _BREAK_HZ / _LINEAR_HZ
    return torch.where(above < 0, mels * _LINEAR_HZ, _BREAK_HZ * torch.exp(above * _LOG_STEP))
