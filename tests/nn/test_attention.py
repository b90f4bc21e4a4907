import pytest
import torch

from hcodec_core.nn.attention import attend, rotate, split_heads
from hcodec_core.nn.lengths import Lengths


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_rotation_is_a_complex_product(pairs):
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    turned = rotate(x, pairs, period=100.0)
    if pairs == "halves":
        before, after = torch.complex(*x.chunk(2, -1)), torch.complex(*turned.chunk(2, -1))
    else:
        before, after = (torch.view_as_complex(v.unflatten(-1, (4, 2))) for v in (x, turned))
    for step in range(7):
        for pair in range(4):
            angle = torch.tensor(step * 100.0 ** (-2 * pair / 8), dtype=torch.float64)
            expected = before[:, :, step, pair] * torch.polar(torch.ones_like(angle), angle)
            torch.testing.assert_close(after[:, :, step, pair], expected)


def test_keys_past_the_end_are_never_seen():
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)
    lengths = Lengths(torch.tensor([6, 4]), 6)
    before = attend(query, key, value, lengths)
    key[1, :, 4:], value[1, :, 4:] = 1e4, -1e4
    after = attend(query, key, value, lengths)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1, :4], after[1, :4])
    scores = (query[1, :, :4] @ key[1, :, :4].transpose(1, 2) / 2).softmax(-1) @ value[1, :, :4]
    torch.testing.assert_close(after[1, :4], scores.transpose(0, 1).flatten(1))


def test_heads_are_consecutive_features():
    x = torch.arange(6.0).view(1, 1, 6)
    assert split_heads(x, 2)[0, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
