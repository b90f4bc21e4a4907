import torch
from torch import nn

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.norm import RmsNorm, ValidGroupNorm


def test_group_norm_sees_valid_steps_only():
    torch.manual_seed(0)
    ours, theirs = ValidGroupNorm(4, 8, eps=1e-6), nn.GroupNorm(4, 8, eps=1e-6)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.5, 2, 8))
            norm.bias.copy_(torch.linspace(-1, 1, 8))
    lengths = [3, 10, 1]
    x = torch.randn(3, 8, 10) + 5
    for row, length in enumerate(lengths):
        x[row, :, length:] = -1e5
    out = ours(x, Lengths(torch.tensor(lengths), 10))
    for row, length in enumerate(lengths):
        alone = theirs(x[row : row + 1, :, :length])
        torch.testing.assert_close(out[row : row + 1, :, :length], alone, rtol=1e-4, atol=1e-5)


def test_rms_norm():
    norm = RmsNorm(2, eps=0.0)
    out = norm(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(out, torch.tensor([[3.0, 4.0]]) / (12.5**0.5))
