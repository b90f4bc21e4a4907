"""Losses on waveforms and features.

Shape letters: B batch, N sample, M mel, F frequency, T frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.slaney_mel import slaney_bank

_MEL_FLOOR = 1e-5
_QUIET = 0.05  # mean magnitude below which a target counts as silence and errors weigh no more
_HOPS_PER_WINDOW = 4

Form = Literal["hinge", "least-squares"]


class MultiScaleMelLoss(nn.Module):
    """L1 distance of log10 mel magnitudes over several windows (DAC, arXiv 2306.06546, 3.5)."""

    def __init__(self, sample_rate: int, windows: Sequence[int], bands: Sequence[int]) -> None:
        """``windows`` in samples; ``bands``: mel filters of each."""
        super().__init__()
        self.windows = tuple(windows)
        for window, num_mels in zip(windows, bands, strict=True):
            bank = slaney_bank(num_mels, window, sample_rate).float()
            self.register_buffer(f"bank_{window}", bank, persistent=False)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """[B, 1, N] both -> the sum over the windows, scalar."""
        losses = [
            F.l1_loss(self._log_mel(estimate, window), self._log_mel(target, window))
            for window in self.windows
        ]
        return torch.stack(losses).sum()

    def _log_mel(self, audio: Tensor, window: int) -> Tensor:
        magnitudes = stft(audio, window).abs()  # whose gradient at zero is zero
        bank = self.get_buffer(f"bank_{window}")
        return (bank @ magnitudes).clamp(min=_MEL_FLOOR).log10()


class SpectralLoss(nn.Module):
    """L1 distance of complex spectra relative to the target's magnitudes: phases count."""

    def __init__(self, windows: Sequence[int]) -> None:
        """``windows`` in samples."""
        super().__init__()
        self.windows = tuple(windows)

    def forward(self, estimate: Tensor, target: Tensor) -> Tensor:
        """[B, 1, N] both -> the mean over the windows, scalar."""
        losses = []
        for window in self.windows:
            wanted = stft(target, window)
            distance = (stft(estimate, window) - wanted).abs()
            scale = wanted.abs().mean(dim=(1, 2), keepdim=True).clamp(min=_QUIET)
            losses.append((distance / scale).mean())
        return torch.stack(losses).mean()


def stft(audio: Tensor, window: int) -> Tensor:
    """Complex spectrum [B, window / 2 + 1, T] of [B, 1, N]; hop a quarter, both ends reflected."""
    hann = torch.hann_window(window, device=audio.device)
    hop = window // _HOPS_PER_WINDOW
    spectra: Tensor = torch.stft(audio[:, 0].float(), window, hop, window=hann, return_complex=True)
    return spectra


def feature_distance(estimate: Tensor, target: Tensor, form: Literal["l1", "mse"]) -> Tensor:
    """Distance of features in float32, scalar."""
    distance = F.l1_loss if form == "l1" else F.mse_loss
    return distance(estimate.float(), target.float())


def judge_loss(real: Sequence[Tensor], fake: Sequence[Tensor], form: Form) -> Tensor:
    """What discriminators minimise, mean over them; scores of real and of decoded audio."""
    losses = [
        _judged(r.float(), 1.0, form) + _judged(f.float(), -1.0, form)
        for r, f in _pairs(real, fake)
    ]
    return torch.stack(losses).mean()


def _judged(scores: Tensor, sign: float, form: Form) -> Tensor:
    if form == "hinge":
        return F.relu(1.0 - sign * scores).mean()
    return (scores - (1.0 if sign > 0 else 0.0)).square().mean()


def adversarial_loss(fake: Sequence[Tensor], form: Form) -> Tensor:
    """What the generator minimises, mean over discriminators."""
    if form == "hinge":
        # Bounded below (Vocos): an endless gain from one discriminator would drown the others.
        losses = [F.relu(1.0 - scores.float()).mean() for scores in fake]
    else:
        losses = [(scores.float() - 1.0).square().mean() for scores in fake]
    return torch.stack(losses).mean()


def feature_matching_loss(
    real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]
) -> Tensor:
    """L1 distance of the discriminators' inner features, mean over layers and discriminators."""
    losses = [
        torch.stack([F.l1_loss(f.float(), r.float().detach()) for r, f in _pairs(rs, fs)]).mean()
        for rs, fs in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def _pairs(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(first, second, strict=True))
