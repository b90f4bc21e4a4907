"""The pre-norm transformer: its branches against formulas, its masks, its ends of rows."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.projected_transformer import ProjectedTransformer, TransformerLayer, sinusoids
from hcodec_core.nn.transformer_config import TransformerConfig

PLAIN = TransformerConfig(dim=8, num_heads=2, num_layers=2, hidden_dim=12, layer_scale=0.7)
GATED = TransformerConfig(
    dim=8, num_heads=1, num_layers=1, hidden_dim=6, norm="rms_norm", positions="sin", gating="silu"
)
CAUSAL = TransformerConfig(
    dim=8, num_heads=2, num_layers=1, hidden_dim=12, is_causal=True, context=3
)


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def make(config: TransformerConfig, in_dim: int = 5, out_dim: int = 7) -> ProjectedTransformer:
    return ProjectedTransformer(config, in_dim, out_dim).double().eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def run(model: ProjectedTransformer, x: Tensor) -> Tensor:
    y: Tensor = model(x, Lengths(torch.full((len(x),), x.shape[2]), x.shape[2]))
    return y


@pytest.mark.parametrize("config", [PLAIN, GATED, CAUSAL], ids=["plain", "gated", "causal"])
def test_padding_is_never_seen(config: TransformerConfig):
    model, x = make(config), noise(3, 5, 11)
    ends = [11, 1, 6]
    together = model(x, Lengths(torch.tensor(ends), 11))
    assert torch.isfinite(together).all()
    for row, end in enumerate(ends):
        alone = run(model, x[row : row + 1, :, :end])
        torch.testing.assert_close(together[row : row + 1, :, :end], alone)


def test_causal_steps_see_their_context_alone():
    model, x = make(CAUSAL), noise(1, 5, 12)
    before = run(model, x)
    x[0, :, 6] += 1.0
    changed = (run(model, x) - before).abs().amax(dim=1)[0] > 1e-12
    assert changed.nonzero().flatten().tolist() == [6, 7, 8]


def test_full_attention_sees_everything():
    model, x = make(PLAIN), noise(1, 5, 12)
    before = run(model, x)
    x[0, :, 6] += 1.0
    assert ((run(model, x) - before).abs().amax(dim=1) > 1e-12).all()


def turned(x: Tensor) -> Tensor:
    """RoPE on neighbouring pairs of [T, D] as multiplication of complex numbers."""
    steps, dim = x.shape
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(steps, dtype=torch.float64)[:, None] * rates
    pairs = torch.view_as_complex(x.reshape(steps, dim // 2, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(x.shape)


def test_a_layer_is_what_its_formula_says():
    layer = TransformerLayer(PLAIN).double().eval()
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5)
    x = noise(1, 6, 8)
    found = layer(x, torch.ones(1, 1, 1, 6, dtype=torch.bool))[0]

    norm1, norm2, y = layer.attention_norm, layer.mlp_norm, x[0]
    normal = F.layer_norm(y, (8,), norm1.weight, norm1.bias, eps=1e-5)
    query, key, value = (normal @ layer.attention.query_key_value.weight.T).split(8, dim=1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = turned(query[:, head]) @ turned(key[:, head]).T / math.sqrt(4)
        heads.append(scores.softmax(dim=1) @ value[:, head])
    y = y + layer.attention_scale * (torch.cat(heads, dim=1) @ layer.attention.out.weight.T)
    hidden = F.layer_norm(y, (8,), norm2.weight, norm2.bias, eps=1e-5) @ layer.mlp.expand.weight.T
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    y = y + layer.mlp_scale * (hidden @ layer.mlp.reduce.weight.T)
    torch.testing.assert_close(found, y)


def test_a_gated_layer_multiplies_by_its_first_half():
    layer = TransformerLayer(GATED).double()
    x = noise(3, 8)
    first, second = (x @ layer.mlp.expand.weight.T).split(6, dim=1)
    expected = (first * torch.sigmoid(first) * second) @ layer.mlp.reduce.weight.T
    torch.testing.assert_close(layer.mlp(x), expected)
    scale = (x.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(layer.mlp_norm(x), x * scale)


def test_sinusoids_are_cosines_then_sines():
    found = sinusoids(torch.zeros(1, 4, 6, dtype=torch.float64), 10000.0)
    for step in range(4):
        phases = [step, step / 100, step / 10000]
        expected = [math.cos(p) for p in phases] + [math.sin(p) for p in phases]
        assert found[step].tolist() == pytest.approx(expected)


def test_projections_are_left_out_where_widths_agree():
    model = ProjectedTransformer(PLAIN, 8, 8)
    assert model.project_in is None
    assert model.project_out is None


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"context": 2}, {"gating": "maxout"}])
def test_impossible_shapes_are_refused(wrong: dict[str, object]):
    with pytest.raises(ValidationError):
        TransformerConfig.model_validate(PLAIN.model_dump() | wrong)
