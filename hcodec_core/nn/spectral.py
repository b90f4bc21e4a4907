"""Between waveforms and spectra: framing, mel features, and the inverse transform.

Shape letters: B batch, F frequency, T frame, N sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.precision import at_least_float32


def spectrum(audio: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """Complex spectrum [B, n_fft / 2 + 1, T] of audio [B, N], N a hop multiple, T = N / hop.

    Frame t is centred on hop t: (n_fft - hop) / 2 zeros lie before and after the audio. Periodic
    Hann window, not normalised.
    """
    margin = (n_fft - hop_length) // 2
    frames = F.pad(audio, (margin, margin)).unfold(1, n_fft, hop_length)
    window = _hann(n_fft, audio)
    spectra: Tensor = torch.fft.rfft(frames * window)
    return spectra.transpose(1, 2)


def log_mel(audio: Tensor, bank: Tensor, hop_length: int) -> Tensor:
    """Natural logarithm of the mel magnitudes, at least 1e-5: [B, N] -> [B, num_mels, T].

    ``bank``: [num_mels, n_fft / 2 + 1], see ``mel_bank``. In the type of ``audio`` also under
    autocast.
    """
    magnitudes = spectrum(audio, 2 * (bank.shape[1] - 1), hop_length).abs()
    bank = bank.to(audio)
    with torch.autocast(audio.device.type, enabled=False):
        return (bank @ magnitudes).clamp(min=1e-5).log()


def mel_bank(num_mels: int, n_fft: int, sample_rate: int) -> Tensor:
    """Triangular filters [num_mels, n_fft / 2 + 1] (float64) on the HTK mel scale, 0 Hz to Nyquist.

    Each filter's peak is 1. With few frequencies per mel the lowest filters may be narrow; every
    filter reaches at least its nearest frequency.
    """
    top = 2595.0 * torch.log10(torch.tensor(1.0 + sample_rate / 1400.0, dtype=torch.float64))
    mels = torch.linspace(0.0, float(top), num_mels + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    frequencies = torch.linspace(0.0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    step = sample_rate / n_fft
    rise = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2]).clamp(min=step)[:, None]
    fall = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1]).clamp(min=step)[:, None]
    return torch.minimum(rise, fall).clamp(min=0.0)


class IstftHead(nn.Module):
    """Linear layer to log magnitude and phase, then the inverse transform (Vocos).

    Magnitudes are exponentials clipped at 100. Each row's frames are overlap-added with a periodic
    Hann window and divided by the summed squared windows of its own frames.
    """

    def __init__(self, dim: int, n_fft: int, hop_length: int) -> None:
        """Build for ``dim`` channels; lengths in samples."""
        super().__init__()
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.out = nn.Linear(dim, n_fft + 2)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, 1, T * hop_length]; zero past a row's end."""
        # Under autocast products may be narrow; phases and the transform may not.
        log_magnitude, phase = at_least_float32(self.out(x.transpose(1, 2))).chunk(2, dim=-1)
        spectra = torch.polar(log_magnitude.exp().clamp(max=100.0), phase)
        return overlap_add(torch.fft.irfft(spectra), lengths, self.hop_length)


def overlap_add(frames: Tensor, lengths: Lengths, hop_length: int) -> Tensor:
    """Windowed frames [B, T, n_fft] to audio [B, 1, T * hop], (n_fft - hop) / 2 cut at both ends.

    Frames past a row's end are left out of the sum and of the envelope that it is divided by.
    """
    n_fft = frames.shape[2]
    margin = (n_fft - hop_length) // 2
    window = _hann(n_fft, frames)
    valid = (~lengths.padding).to(frames.dtype)[:, :, None]
    audio = _fold(lengths.zero_past_rows(frames * window), hop_length)
    envelope = _fold(window.square() * valid, hop_length)
    size = lengths.size * hop_length
    # Beyond a row's last frame the envelope falls to zero; nothing there is audio.
    inside = ~lengths.multiplied(hop_length).padding
    ratio = audio[:, margin : margin + size] / envelope[:, margin : margin + size].clamp(min=1e-11)
    return ratio.masked_fill(~inside, 0.0)[:, None]


def _fold(frames: Tensor, hop_length: int) -> Tensor:
    """Sum overlapping frames [B, T, n_fft] into [B, (T - 1) * hop + n_fft]."""
    steps, n_fft = frames.shape[1:]
    size = (steps - 1) * hop_length + n_fft
    folded = F.fold(frames.transpose(1, 2), (1, size), (1, n_fft), stride=(1, hop_length))
    return folded[:, 0, 0]


def _hann(size: int, like: Tensor) -> Tensor:
    return torch.hann_window(size, periodic=True, device=like.device, dtype=like.dtype)
