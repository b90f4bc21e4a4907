"""The resampler inside H-Codec 2.0 against torchaudio's, and its ends of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.resample import sinc_resample
from hcodec_core.nn.torchaudio_guard import guard_torchaudio


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def whole(x: Tensor) -> Lengths:
    return Lengths(torch.full((len(x),), x.shape[1]), x.shape[1])


@pytest.mark.parametrize(
    ("from_rate", "to_rate", "size", "tolerance"),
    [
        (48000, 16000, 38400, 1e-6),
        (48000, 16000, 3841, 1e-6),
        (16000, 48000, 1000, 1e-6),
        # torchaudio rounds the phases of 160 outputs to float32.
        (44100, 16000, 4411, 2e-5),
    ],
)
def test_it_is_the_default_of_torchaudio(
    from_rate: int, to_rate: int, size: int, tolerance: float
) -> None:
    guard_torchaudio()
    from torchaudio.functional import resample
    from torchaudio.transforms import Resample

    audio = noise(2, size)
    found = sinc_resample(audio, whole(audio), from_rate, to_rate)
    released = Resample(from_rate, to_rate)(audio)
    assert found.shape == released.shape
    torch.testing.assert_close(found, released, rtol=0, atol=tolerance)
    # The functional form computes its filters in float32.
    torch.testing.assert_close(found, resample(audio, from_rate, to_rate), rtol=0, atol=2e-5)
    exact = audio.double()
    torch.testing.assert_close(
        sinc_resample(exact, whole(exact), from_rate, to_rate),
        resample(exact, from_rate, to_rate),
        rtol=0,
        atol=1e-12,
    )


def test_a_row_ends_where_its_own_signal_ends() -> None:
    audio, ends = noise(3, 3840).double(), [3840, 1920, 960]
    for row, end in enumerate(ends):
        audio[row, end:] = 0
    together = sinc_resample(audio, Lengths(torch.tensor(ends), 3840), 48000, 16000)
    for row, end in enumerate(ends):
        alone = sinc_resample(
            audio[row : row + 1, :end], whole(audio[row : row + 1, :end]), 48000, 16000
        )
        assert alone.shape[1] == end // 3
        torch.testing.assert_close(together[row, : end // 3], alone[0], rtol=1e-12, atol=1e-12)
        assert not together[row, end // 3 :].any()


def test_one_rate_changes_nothing() -> None:
    audio = noise(1, 100)
    assert sinc_resample(audio, whole(audio), 16000, 16000) is audio


def test_half_precision_does_not_touch_the_signal() -> None:
    audio = noise(1, 4800)
    plain = sinc_resample(audio, whole(audio), 48000, 16000)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinc_resample(audio, whole(audio), 48000, 16000), plain)
