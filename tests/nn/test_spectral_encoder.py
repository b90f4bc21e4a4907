"""The encoder on spectra: what it sees, and its ends of rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hcodec_core.nn.conv import RepeatUpsample1d, SameConv1d
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.spectral import spectrum
from hcodec_core.nn.spectral_encoder import SpectralEncoder, SpectralEncoderConfig, polar_features
from hcodec_core.nn.torchaudio_guard import guard_torchaudio
from hcodec_core.nn.transformer import LstmTransformer

CONFIG = SpectralEncoderConfig(
    n_fft=64,
    hop_length=32,
    dim=16,
    convnext_dim=24,
    num_convnext_layers=2,
    out_dim=8,
    stride=4,
)


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def test_spectra_are_those_of_torchaudio() -> None:
    guard_torchaudio()
    from torchaudio.transforms import Spectrogram

    audio = torch.randn(2, 3840)
    wanted = Spectrogram(1920, hop_length=960, center=False, power=None)(
        torch.nn.functional.pad(audio, (480, 480))
    )
    found = spectrum(audio, 1920, 960)
    assert found.shape == wanted.shape == (2, 961, 4)
    torch.testing.assert_close(found, wanted)


def numpy_features(audio: Tensor) -> Tensor:
    """Features by another FFT library."""
    padded = np.pad(audio.numpy(), ((0, 0), (480, 480)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 1920, axis=1)[:, ::960]
    window = torch.hann_window(1920, dtype=audio.dtype).numpy()
    spectra = np.fft.rfft(frames * window).transpose(0, 2, 1)
    return polar_features(torch.from_numpy(spectra))


def test_features_do_not_depend_on_the_fft_library() -> None:
    """Audio that was once sampled at 16 kHz: two thirds of the bins hold next to nothing."""
    wide = torch.randn(1, 3 * 3840).double()
    spectra = torch.fft.rfft(wide)
    spectra[:, spectra.shape[1] // 3 :] = 0
    audio = torch.fft.irfft(spectra).float()
    audio[:, -1920:] = 0
    differences = {}
    for kind in (torch.float64, torch.float32):
        mine = polar_features(spectrum(audio.to(kind), 1920, 960))
        other = numpy_features(audio.to(kind))
        turn = (mine - other)[:, 961:].abs()
        differences[kind] = torch.minimum(turn, 2 - turn).max()
    assert differences[torch.float64] < 1e-6
    assert differences[torch.float32] > 0.01, "the example does not show why float64 is needed"


@pytest.mark.parametrize("sign", [0.0, -0.0])
def test_silence_has_one_phase_whatever_the_signs_of_zeros(sign: float) -> None:
    silent = torch.full((1, 961, 2), complex(sign, sign), dtype=torch.complex64)
    phases = polar_features(silent)[0, 961:, 0]
    assert not phases[:481].any()
    assert (phases[481:960] == 1).all()
    assert phases[960] == 0
    turned = torch.tensor([[[-3.0 + 0j]], [[complex(-3.0, sign)]]])
    assert (polar_features(turned)[:, 1] == 1).all()


def test_spectra_are_exact_unless_asked_for_as_published() -> None:
    audio = torch.randn(1, 1, 1280)
    lengths = Lengths(torch.tensor([1280]), 1280)
    encoder = SpectralEncoder(CONFIG, LstmTransformer(16, 2, 32, 1)).eval()
    encoder.conv_in = Recorder(encoder.conv_in)
    encoder(audio, lengths)
    exact = polar_features(spectrum(audio[:, 0].double(), 64, 32)).float()
    assert torch.equal(encoder.conv_in.seen, exact)
    encoder.config = replace(CONFIG, fft_is_exact=False)
    encoder(audio, lengths)
    assert torch.equal(encoder.conv_in.seen, polar_features(spectrum(audio[:, 0], 64, 32)))
    assert not torch.equal(encoder.conv_in.seen, exact)


class Recorder(nn.Module):
    """Keeps what a layer is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        self.seen = x
        return self.layer(x, lengths)


def test_features_are_log_magnitudes_and_phases() -> None:
    spectra = torch.tensor([[[1j, 0j, -2.0 + 0j]]], dtype=torch.complex128)
    magnitudes, phases = polar_features(spectra)[0]
    torch.testing.assert_close(
        magnitudes, torch.tensor([0.0, math.log(1e-5), math.log(2)], dtype=torch.float64)
    )
    assert phases.tolist() == [0.5, 0.0, 1.0]


def test_padded_rows_are_single_files() -> None:
    encoder = SpectralEncoder(CONFIG, LstmTransformer(16, 2, 32, 1)).double().eval()
    audio, ends = torch.randn(3, 1, 1280, dtype=torch.float64), [1280, 128, 640]
    for row, end in enumerate(ends):
        audio[row, :, end:] = 0
    together = encoder(audio, Lengths(torch.tensor(ends), 1280))
    assert together.shape == (3, 8, 10)
    assert torch.isfinite(together).all()
    for row, end in enumerate(ends):
        own = audio[row : row + 1, :, :end]
        alone = encoder(own, Lengths(torch.tensor([end]), end))
        assert alone.shape[2] == end // 128
        torch.testing.assert_close(together[row : row + 1, :, : end // 128], alone)


def test_a_strided_convolution_has_zeros_around_the_signal() -> None:
    layer = SameConv1d(3, 5, 9, stride=4).double()
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    found = layer(x, Lengths(torch.tensor([24, 12]), 24))
    assert found.shape == (2, 5, 6)
    alone = layer(x[1:, :, :12], Lengths(torch.tensor([12]), 12))
    torch.testing.assert_close(found[1:, :, :3], alone)


def test_repeated_steps_are_smoothed_within_the_row() -> None:
    layer = RepeatUpsample1d(3, 5, 4).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    found = layer(x, Lengths(torch.tensor([6, 2]), 6))
    assert found.shape == (2, 5, 24)
    alone = layer(x[1:, :, :2], Lengths(torch.tensor([2]), 2))
    torch.testing.assert_close(found[1:, :, :8], alone)
    # In the middle of a long run of equal steps the kernel's sum is all that counts.
    constant = layer(torch.ones(1, 3, 6, dtype=torch.float64), Lengths(torch.tensor([6]), 6))
    wanted = layer.smooth.conv.weight.sum(dim=(1, 2)) + layer.smooth.conv.bias
    torch.testing.assert_close(constant[0, :, 12], wanted)
