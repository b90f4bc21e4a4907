import pytest
import torch
from torch.nn import functional as F

from hcodec_core.nn.conv import (
    EdgeConv1d,
    HalfPaddedConv1d,
    RepeatedStepsConv1d,
    SameConv1d,
    SubPixelUpsample1d,
    pad_ends,
)
from hcodec_core.nn.lengths import Lengths


def encodec_pad(x, left, right, mode):
    """EnCodec's rule for one signal: a short one is extended with zeros, then cut again."""
    if mode != "reflect":
        return F.pad(x, (left, right), mode=mode)
    extra = max(0, max(left, right) - x.shape[-1] + 1)
    padded = F.pad(F.pad(x, (0, extra)), (left, right), mode="reflect")
    return padded[..., : padded.shape[-1] - extra]


def garbage_batch(lengths, size, dim=3, seed=0):
    """Rows whose steps past the end hold large numbers that must not show anywhere."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), dim, size, generator=generator)
    for row, length in enumerate(lengths):
        x[row, :, length:] = 1e6
    return x, Lengths(torch.tensor(lengths), size)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize(
    ("left", "right", "stride"),
    [(3, 3, 1), (1, 0, 2), (2, 1, 3), (0, 0, 4), (8, 0, 5), (6, 0, 1), (0, 5, 1), (5, 4, 8)],
)
@pytest.mark.parametrize("lengths", [[1, 2, 3, 5, 12], [24, 24], [7, 23, 24, 9], [1], [2, 1]])
def test_every_row_is_padded_as_if_alone(mode, left, right, stride, lengths):
    size = max(lengths)
    x, known = garbage_batch(lengths, size)
    padded = pad_ends(x, known, left, right, stride, mode)
    assert padded.shape[2] == -(-size // stride) * stride + left + right
    for row, length in enumerate(lengths):
        own_right = right + -length % stride
        alone = encodec_pad(x[row : row + 1, :, :length], left, own_right, mode)
        assert torch.equal(padded[row : row + 1, :, : alone.shape[2]], alone)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(7, 1, 1), (4, 2, 1), (3, 1, 4), (16, 8, 1)]
)
def test_edge_conv_gives_a_row_the_frames_it_has_alone(is_causal, kernel, stride, dilation):
    conv = EdgeConv1d(3, 5, kernel, stride=stride, dilation=dilation, is_causal=is_causal).double()
    lengths = [3, 40, 17, 41]
    x, known = garbage_batch(lengths, 41)
    together = conv(x.double(), known)
    for row, length in enumerate(lengths):
        x_alone = x[row : row + 1, :, :length].double()
        alone = conv(x_alone, Lengths(torch.tensor([length]), length))
        assert alone.shape[2] == -(-length // stride)
        torch.testing.assert_close(together[row : row + 1, :, : alone.shape[2]], alone)


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (SameConv1d(3, 4, 5), 1),
        (HalfPaddedConv1d(3, 4, 1), 1),
        (HalfPaddedConv1d(3, 4, 2), 1 / 2),
        (RepeatedStepsConv1d(3, 4, 1), 1),
        (RepeatedStepsConv1d(3, 4, 2), 2),
        (RepeatedStepsConv1d(3, 4, 3), 3),
        (SubPixelUpsample1d(3, 4, 2), 2),
    ],
)
def test_zero_padded_layers_keep_rows_apart(layer, factor):
    layer = layer.double()
    lengths = [2, 8, 12, 4]
    x, known = garbage_batch(lengths, 12)
    together = layer(x.double(), known)
    assert together.shape[2] == 12 * factor
    for row, length in enumerate(lengths):
        x_alone = x[row : row + 1, :, :length].double()
        alone = layer(x_alone, Lengths(torch.tensor([length]), length))
        torch.testing.assert_close(together[row : row + 1, :, : int(length * factor)], alone)


def test_sub_pixel_channels_become_steps():
    layer = SubPixelUpsample1d(1, 2, 2)
    with torch.no_grad():
        layer.expand.weight.copy_(torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None, None])
        layer.expand.bias.zero_()
        layer.smooth.conv.weight.zero_()
        layer.smooth.conv.weight[:, 0, 2] = 1.0
        layer.smooth.conv.bias.zero_()
    out = layer(torch.tensor([[[1.0, 2.0]]]), Lengths(torch.tensor([2]), 2))
    assert out[0].tolist() == [[1.0, 100.0, 2.0, 200.0], [10.0, 1000.0, 20.0, 2000.0]]
