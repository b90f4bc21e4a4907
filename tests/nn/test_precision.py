"""Under autocast, what the specification keeps in float32 stays there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.precision import at_least_float32
from hcodec_core.nn.projected_transformer import ProjectedTransformer, TransformerLayer
from hcodec_core.nn.quantize import ResidualQuantizer
from hcodec_core.nn.spectral import log_mel, mel_bank
from hcodec_core.nn.ssl import SslModel, _Layer
from hcodec_core.nn.ssl_config import SslConfig
from hcodec_core.nn.transformer import LstmTransformer, LstmTransformerLayer
from hcodec_core.nn.transformer_config import TransformerConfig

BF16 = torch.bfloat16


def stream_types(model: nn.Module, kind: type[nn.Module], run) -> set[torch.dtype]:
    """Types of what goes into and comes out of the layers of ``kind``."""
    found: set[torch.dtype] = set()

    def look(_, given, made):
        found.update((given[0].dtype, made.dtype))

    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(look)
    with torch.autocast("cpu", BF16), torch.inference_mode():
        run()
    return found


def test_nothing_is_widened_twice():
    assert at_least_float32(torch.zeros(1, dtype=BF16)).dtype == torch.float32
    for kept in (torch.zeros(1), torch.zeros(1, dtype=torch.float64)):
        assert at_least_float32(kept) is kept


@pytest.mark.parametrize("is_stable", [False, True])
def test_ssl_residual_stream_and_states(is_stable):
    config = SslConfig(
        model_type="hubert",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        conv_bias=False,
        feat_extract_norm="group",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=is_stable,
    )
    model = SslModel(config).eval()
    states: list[torch.dtype] = []

    def run():
        audio, lengths = torch.randn(2, 700), Lengths(torch.tensor([700, 400]), 700)
        states.extend(state.dtype for state, _ in model.hidden_states(audio, lengths))

    assert stream_types(model, _Layer, run) == {torch.float32}
    assert set(states) == {torch.float32}


def test_residual_stream_of_the_lstm_transformer():
    model = LstmTransformer(16, 2, 32, 2).eval()
    lengths = Lengths(torch.tensor([9, 5]), 9)
    x = torch.randn(2, 16, 9).to(BF16)
    assert stream_types(model, LstmTransformerLayer, lambda: model(x, lengths)) == {torch.float32}


@pytest.mark.parametrize("in_dim", [16, 24])
def test_residual_stream_of_the_projected_transformer(in_dim):
    config = TransformerConfig(dim=16, num_heads=2, num_layers=2, hidden_dim=32, layer_scale=0.1)
    model = ProjectedTransformer(config, in_dim, 16).eval()
    lengths = Lengths(torch.tensor([9, 5]), 9)
    x = torch.randn(2, in_dim, 9).to(BF16)
    assert stream_types(model, TransformerLayer, lambda: model(x, lengths)) == {torch.float32}


def test_search_and_mel_features_give_the_same_bits():
    torch.manual_seed(0)
    quantizer, x, audio = ResidualQuantizer(8, 4, 64), torch.randn(1, 8, 50), torch.randn(1, 3200)
    bank = mel_bank(20, 640, 16000)
    expected, mels = quantizer.encode(x), log_mel(audio, bank, 320)
    with torch.autocast("cpu", BF16):
        found = quantizer.encode(x)
        assert torch.equal(log_mel(audio, bank, 320), mels)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.vectors, expected.vectors)
