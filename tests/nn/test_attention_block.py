"""Single-head attention over time."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hcodec_core.nn.attention_block import AttentionBlock
from hcodec_core.nn.lengths import Lengths


def test_block_is_what_its_formula_says_up_to_each_rows_end():
    torch.manual_seed(0)
    block = AttentionBlock(32).double().requires_grad_(False)
    block.norm.weight.copy_(torch.rand(32))
    x = torch.randn(2, 32, 10, dtype=torch.float64)
    found = block(x, Lengths(torch.tensor([10, 4]), 10))
    for row, end in ((0, 10), (1, 4)):
        alone = x[row, :, :end]
        normal = F.group_norm(alone[None], 32, block.norm.weight, block.norm.bias, eps=1e-6)[0].T
        scores = block.query(normal) @ block.key(normal).T / 32**0.5
        expected = alone + block.out(scores.softmax(dim=1) @ block.value(normal)).T
        torch.testing.assert_close(found[row, :, :end], expected)
