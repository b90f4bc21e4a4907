"""The bidirectional LSTM against torch's own, and its independence of neighbours to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hcodec_core.nn.bilstm import BiLstm, reversed_steps
from hcodec_core.nn.lengths import Lengths

DIM, STEPS = 24, 30


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def make() -> BiLstm:
    torch.manual_seed(0)
    return BiLstm(DIM, 2).eval()


def torchs_own(ours: BiLstm) -> nn.LSTM:
    lstm = nn.LSTM(DIM, DIM, 2, batch_first=True, bidirectional=True).eval()
    state = {}
    for layer, (ahead, back) in enumerate(zip(ours.ahead, ours.back, strict=True)):
        for key, value in ahead.state_dict().items():
            state[key.replace("_l0", f"_l{layer}")] = value
        for key, value in back.state_dict().items():
            state[key.replace("_l0", f"_l{layer}_reverse")] = value
    lstm.load_state_dict(state)
    return lstm


def test_agrees_with_packed_sequences():
    ours = make()
    x = torch.randn(4, DIM, STEPS)
    valid = torch.tensor([STEPS, 1, 7, 29])
    packed = pack_padded_sequence(x.transpose(1, 2), valid, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(
        torchs_own(ours)(packed)[0], batch_first=True, total_length=STEPS
    )
    found = ours(x, Lengths(valid, STEPS)) - torch.cat((x, x), dim=1)
    for row, end in enumerate(valid.tolist()):
        torch.testing.assert_close(found[row, :, :end].T, expected[row, :end], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [8, 200])
def test_neighbours_and_row_change_no_bit(dim: int):
    torch.manual_seed(1)
    lstm = BiLstm(dim, 2).eval()
    clip, end = torch.randn(dim, 23), 23

    def in_company(row: int, others: list[int]) -> Tensor:
        x = torch.randn(len(others), dim, STEPS)
        valid = torch.tensor(others)
        x[row, :, :end], valid[row] = clip, end
        return lstm(x, Lengths(valid, STEPS))[row, :, :end]

    alone = in_company(0, [1] * 6)
    for row, others in ((0, [STEPS] * 6), (3, [1, 2, 3, 4, 5, 6]), (5, [30, 1, 30, 1, 30, 1])):
        assert torch.equal(in_company(row, others), alone)


def test_only_valid_steps_are_reversed():
    order = reversed_steps(Lengths(torch.tensor([3, 5, 1]), 5))
    assert order.tolist() == [[2, 1, 0, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]
