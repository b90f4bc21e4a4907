import pytest
import torch

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.spectral import IstftHead, log_mel, mel_bank, overlap_add, spectrum


def istft_of_one(frames, hop):
    """Plain overlap-add of one clip's frames [T, n_fft], as published."""
    steps, n_fft = frames.shape
    window = torch.hann_window(n_fft, periodic=True, dtype=frames.dtype)
    audio = torch.zeros((steps - 1) * hop + n_fft, dtype=frames.dtype)
    envelope = torch.zeros_like(audio)
    for t in range(steps):
        audio[t * hop : t * hop + n_fft] += frames[t] * window
        envelope[t * hop : t * hop + n_fft] += window**2
    margin = (n_fft - hop) // 2
    return audio[margin:-margin] / envelope[margin:-margin]


def test_each_row_has_its_own_window_envelope():
    torch.manual_seed(0)
    frames = torch.randn(3, 9, 32, dtype=torch.float64)
    lengths = [9, 4, 1]
    audio = overlap_add(frames, Lengths(torch.tensor(lengths), 9), 8)
    assert audio.shape == (3, 1, 72)
    for row, length in enumerate(lengths):
        alone = istft_of_one(frames[row, :length], 8)
        torch.testing.assert_close(audio[row, 0, : 8 * length], alone)
        assert not audio[row, 0, 8 * length :].any()


def test_spectrum_and_overlap_add_are_inverse():
    torch.manual_seed(0)
    audio = torch.randn(2, 80, dtype=torch.float64)
    frames = torch.fft.irfft(spectrum(audio, 32, 8).transpose(1, 2))
    assert frames.shape == (2, 10, 32)
    restored = overlap_add(frames, Lengths(torch.tensor([10, 10]), 10), 8)
    torch.testing.assert_close(restored[:, 0], audio)


def test_head_clips_magnitudes():
    head = IstftHead(2, 16, 4)
    with torch.no_grad():
        head.out.weight.zero_()
        head.out.bias.zero_()
        head.out.bias[:9] = 50.0
    audio = head(torch.zeros(1, 2, 5), Lengths(torch.tensor([5]), 5))
    assert torch.isfinite(audio).all()
    assert audio.abs().max() <= 100.0 * 16


def test_log_mel_of_a_padded_row_is_its_own():
    torch.manual_seed(0)
    audio = torch.randn(1, 640 * 4)
    bank = mel_bank(20, 640, 16000)
    alone = log_mel(audio, bank, 320)
    padded = torch.nn.functional.pad(audio, (0, 640 * 3))
    torch.testing.assert_close(log_mel(padded, bank, 320)[:, :, :8], alone)
    assert alone.shape == (1, 20, 8)


@pytest.mark.parametrize(("num_mels", "n_fft"), [(80, 640), (20, 512), (100, 1024)])
def test_mel_filters_follow_the_scale(num_mels, n_fft):
    bank = mel_bank(num_mels, n_fft, 16000)
    assert (bank >= 0).all()
    assert (bank.sum(dim=1) > 0).all()
    centres = bank.argmax(dim=1)
    assert (centres[1:] >= centres[:-1]).all()
    # A 1 kHz tone lies at 1000 mel (HTK), the top of the range at 2840 mel.
    tone = bank[:, round(1000 / (16000 / n_fft))].argmax()
    assert abs(int(tone) - 1000 / 2840.02 * (num_mels + 1)) <= 1.5
