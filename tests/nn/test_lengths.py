import torch

from hcodec_core.nn.lengths import Lengths


def test_masks_and_derived_lengths():
    lengths = Lengths(torch.tensor([1, 4, 5]), 5)
    assert lengths.padding.sum(dim=1).tolist() == [4, 1, 0]
    assert lengths.zero_past(torch.ones(3, 2, 5)).sum(dim=(1, 2)).tolist() == [2, 8, 10]
    assert lengths.zero_past_rows(torch.ones(3, 5, 2)).sum(dim=(1, 2)).tolist() == [2, 8, 10]
    assert lengths.attention_mask[0, 0, 0].tolist() == [True, False, False, False, False]
    assert lengths.divided(2).valid.tolist() == [1, 2, 3]
    assert lengths.divided(2).size == 3
    assert lengths.multiplied(3).valid.tolist() == [3, 12, 15]
    assert lengths.unpadded_conv(3, 2).size == 2


def test_only_an_unpadded_batch_is_full():
    assert Lengths(torch.tensor([5, 5]), 5).is_full
    assert not Lengths(torch.tensor([5, 4]), 5).is_full
