"""The generator: lengths, ends of rows, range. Its arithmetic is held by HH-Codec's golden data."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from hcodec_core.nn.bigvgan import BigVganGenerator
from hcodec_core.nn.bigvgan_config import BigVganConfig
from hcodec_core.nn.lengths import Lengths

CONFIG = BigVganConfig(
    num_mels=6,
    initial_dim=8,
    upsample_rates=(4, 2),
    upsample_kernels=(8, 4),
    block_kernels=(3, 5),
    block_dilations=(1, 3),
)


@pytest.fixture(scope="module")
def generator() -> BigVganGenerator:
    torch.manual_seed(0)
    return BigVganGenerator(CONFIG).double().eval().requires_grad_(False)


def test_rows_end_where_they_end_alone(generator: BigVganGenerator):
    mel = torch.randn(3, 6, 12, dtype=torch.float64)
    ends = [12, 1, 7]
    together = generator(mel, Lengths(torch.tensor(ends), 12))
    assert together.shape == (3, 1, 12 * CONFIG.hop_length)
    for row, end in enumerate(ends):
        alone = generator(mel[row : row + 1, :, :end], Lengths(torch.tensor([end]), end))
        assert alone.std() > 0
        torch.testing.assert_close(together[row : row + 1, :, : end * CONFIG.hop_length], alone)


def test_audio_is_kept_within_full_scale(generator: BigVganGenerator):
    loud = generator(100 * torch.randn(1, 6, 9, dtype=torch.float64), Lengths(torch.tensor([9]), 9))
    assert loud.abs().max() == 1.0


def test_final_tanh_and_bias_are_options():
    config = CONFIG.model_copy(update={"has_final_bias": True, "has_final_tanh": True})
    generator = BigVganGenerator(config)
    with torch.no_grad():
        generator.conv_out.conv.weight.zero_()
        generator.conv_out.conv.bias.fill_(0.7)
        audio = generator(torch.randn(1, 6, 3), Lengths(torch.tensor([3]), 3))
    torch.testing.assert_close(audio, torch.full_like(audio, 0.7).tanh())
    assert BigVganGenerator(CONFIG).conv_out.conv.bias is None


@pytest.mark.parametrize(
    "wrong", [{"upsample_kernels": (8,)}, {"upsample_kernels": (7, 4)}, {"initial_dim": 6}]
)
def test_impossible_shapes_are_refused(wrong: dict[str, object]):
    with pytest.raises(ValidationError):
        BigVganConfig.model_validate(CONFIG.model_dump() | wrong)
