"""The vocoder's log-mel spectrogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hcodec_core.nn.slaney_mel import slaney_bank, slaney_log_mel


def test_filters_peak_where_slaneys_scale_says():
    bank = slaney_bank(100, 4096, 24000)
    step = 24000 / 4096
    mels = np.linspace(0, 15 + np.log(12) / (np.log(6.4) / 27), 102)[1:-1]
    centres = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    np.testing.assert_allclose(bank.argmax(dim=1).numpy() * step, centres, atol=step)
    # Equal area: each filter integrates to 1 over Hz.
    np.testing.assert_allclose((bank.sum(dim=1) * step).numpy(), 1.0, atol=0.02)


@pytest.mark.parametrize("frequency", [440.0, 3000.0])
def test_a_tone_shows_in_its_filter_alone(frequency: float):
    time = torch.arange(24000 // 256 * 256, dtype=torch.float64) / 24000
    mel = slaney_log_mel(torch.sin(2 * torch.pi * frequency * time)[None], 24000)
    assert mel.shape == (1, 100, 93)
    loudest = mel[0, :, 10:-10].mean(dim=1)
    bank = slaney_bank(100, 1024, 24000)
    assert int(loudest.argmax()) == int(bank[:, round(frequency * 1024 / 24000)].argmax())


def test_silence_is_clamped_and_has_a_gradient():
    audio = torch.zeros(1, 2560, requires_grad=True)
    mel = slaney_log_mel(audio, 24000)
    torch.testing.assert_close(mel, torch.full_like(mel, np.log(1e-5)))
    mel.sum().backward()
    assert audio.grad is not None
    assert torch.isfinite(audio.grad).all()
