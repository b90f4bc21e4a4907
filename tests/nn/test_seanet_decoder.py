"""The convolutional decoder and its transposed convolution."""

from __future__ import annotations

import pytest
import torch

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.seanet import SeanetConfig
from hcodec_core.nn.seanet_decoder import SeanetDecoder, TrimmedConvTranspose1d


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("stride", [2, 5])
def test_overhang_is_cut(stride: int, is_causal: bool):
    torch.manual_seed(0)
    layer = TrimmedConvTranspose1d(3, 2, stride, is_causal=is_causal).requires_grad_(False)
    x = torch.randn(1, 3, 4)
    full = torch.zeros(2, 5 * stride)
    for step in range(4):
        piece = torch.einsum("i,iok->ok", x[0, :, step], layer.conv.weight)
        full[:, step * stride : (step + 2) * stride] += piece
    left = 0 if is_causal else stride - stride // 2
    expected = full[:, left : left + 4 * stride] + layer.conv.bias[:, None]
    found = layer(x, Lengths(torch.tensor([4]), 4))
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pad_mode", ["reflect", "constant"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_end_where_they_end_alone(pad_mode: str, is_causal: bool):
    torch.manual_seed(0)
    config = SeanetConfig(
        num_filters=2,
        strides=(2, 5),
        out_dim=3,
        last_kernel=7,
        num_residual_layers=2,
        has_conv_shortcut=False,
        pad_mode=pad_mode,
        is_causal=is_causal,
    )
    decoder = SeanetDecoder(config).double().requires_grad_(False)
    x = torch.randn(3, 3, 9, dtype=torch.float64)
    ends = [9, 1, 4]
    together = decoder(x, Lengths(torch.tensor(ends), 9))
    assert together.shape == (3, 1, 90)
    for row, end in enumerate(ends):
        alone = decoder(x[row : row + 1, :, :end], Lengths(torch.tensor([end]), end))
        torch.testing.assert_close(together[row : row + 1, :, : 10 * end], alone)
