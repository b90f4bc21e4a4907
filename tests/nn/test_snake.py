"""The alias-free activation against a plain numpy version, and at the true ends of rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.snake import (
    AliasFreeSnake,
    half_band_filter,
    half_band_taps,
    halved,
    upsampled_twice,
)

Array = npt.NDArray[np.float64]


def whole(x: Tensor) -> Lengths:
    return Lengths(torch.full((x.shape[0],), x.shape[2]), x.shape[2])


def up_by_hand(x: Array) -> Array:
    """Zeros between samples, convolution, and the delay of the filter cut off."""
    taps = np.array(half_band_taps())
    extended = np.pad(x, 10, mode="edge")
    stuffed = np.zeros(2 * len(extended))
    stuffed[::2] = extended
    full = 2 * np.convolve(stuffed, taps)
    return full[25 : 25 + 2 * len(x)]


def down_by_hand(x: Array) -> Array:
    taps = np.array(half_band_taps())
    return np.convolve(np.pad(x, (5, 6), mode="edge"), taps, mode="valid")[::2]


def test_filter_passes_the_lower_half_of_the_band():
    taps = np.array(half_band_taps())
    np.testing.assert_allclose(taps, taps[::-1], atol=1e-15)
    response = np.abs(np.fft.rfft(taps, 512))
    assert response[0] == pytest.approx(1.0)
    assert response[:64].min() > 0.97
    assert response[220:].max() < 0.01


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_resamplers_agree_with_plain_convolutions(size: int):
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, dtype=torch.float64)
    doubled = upsampled_twice(x, whole(x), half_band_filter(x))
    back = halved(doubled, whole(doubled), half_band_filter(x))
    for row in range(2):
        for dim in range(3):
            expected = up_by_hand(x[row, dim].numpy())
            np.testing.assert_allclose(doubled[row, dim].numpy(), expected, atol=1e-12)
            np.testing.assert_allclose(back[row, dim].numpy(), down_by_hand(expected), atol=1e-12)


def test_activation_is_the_snake_between_the_resamplers():
    torch.manual_seed(0)
    snake = AliasFreeSnake(2).double().requires_grad_(False)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.3, -0.2]))
        snake.beta.copy_(torch.tensor([-0.5, 0.1]))
        x = torch.randn(1, 2, 40, dtype=torch.float64)
        found = snake(x, whole(x), half_band_filter(x))
    for dim in range(2):
        alpha, beta = (float(p[dim].exp()) for p in (snake.alpha, snake.beta))
        high = up_by_hand(x[0, dim].numpy())
        expected = down_by_hand(high + np.sin(alpha * high) ** 2 / (beta + 1e-9))
        np.testing.assert_allclose(found[0, dim].numpy(), expected, atol=1e-12)


def test_each_row_ends_at_its_own_end():
    torch.manual_seed(0)
    snake = AliasFreeSnake(3).double()
    x = torch.randn(3, 3, 30, dtype=torch.float64)
    ends = [30, 1, 17]
    with torch.no_grad():
        together = snake(x, Lengths(torch.tensor(ends), 30), half_band_filter(x))
        for row, end in enumerate(ends):
            alone = x[row : row + 1, :, :end]
            expected = snake(alone, whole(alone), half_band_filter(x))
            torch.testing.assert_close(together[row : row + 1, :, :end], expected)
