"""The encoder on spectra: what it sees, and its ends of rows."""

from __future__ import annotations

import math

import pytest
import torch

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
    audio[1, 2000:] = 0
    wanted = Spectrogram(1920, hop_length=960, center=False, power=None)(
        torch.nn.functional.pad(audio, (480, 480))
    )
    found = spectrum(audio, 1920, 960)
    assert found.shape == wanted.shape == (2, 961, 4)
    torch.testing.assert_close(found, wanted)
    # Also the signs of zeros: they decide phases in digital silence.
    torch.testing.assert_close(found.angle(), wanted.angle(), rtol=0, atol=1e-5)


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
