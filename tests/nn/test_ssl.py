import pytest
import torch

from hcodec_core.errors import CheckpointError
from hcodec_core.models.conversion import ssl_state
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.ssl import SslModel
from hcodec_core.nn.ssl_config import SslConfig
from hcodec_core.nn.torchaudio_guard import guard_torchaudio

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


@pytest.fixture(scope="module", params=["hubert", "wav2vec2-layer-norm"])
def pair(request):
    """A random model of transformers, and ours with its weights."""
    guard_torchaudio()
    import transformers

    torch.manual_seed(0)
    if request.param == "hubert":
        config = transformers.HubertConfig(**SHAPE)
        theirs = transformers.HubertModel(config)
    else:
        config = transformers.Wav2Vec2Config(
            **SHAPE, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True
        )
        theirs = transformers.Wav2Vec2Model(config)
    theirs = theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours = SslModel(SslConfig.from_transformers(config.to_dict()))
    ours.load_state_dict(ssl_state(theirs.state_dict(), ours.config))
    return theirs, ours.eval()


def states_of(model, audio, lengths):
    with torch.no_grad():
        known = Lengths(torch.tensor(lengths), audio.shape[1])
        return list(model.hidden_states(audio, known))


def test_agrees_with_transformers(pair):
    theirs, ours = pair
    audio = torch.randn(1, 4000) * 0.1
    with torch.no_grad():
        expected = theirs(audio, output_hidden_states=True).hidden_states
    found = states_of(ours, audio, [4000])
    assert len(found) == len(expected) == 3
    for (state, lengths), wanted in zip(found, expected, strict=True):
        assert lengths.valid.tolist() == [state.shape[1]] == [wanted.shape[1]]
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=2e-5)


def test_padding_does_not_show(pair):
    _, ours = pair
    ours = ours.double()
    torch.manual_seed(1)
    audio = torch.randn(2, 6400, dtype=torch.float64) * 0.1
    audio[1, 2560:] = 0
    together = states_of(ours, audio, [6400, 2560])
    alone = states_of(ours, audio[1:, :2560], [2560])
    for (state, lengths), (wanted, _) in zip(together, alone, strict=True):
        valid = int(lengths.valid[1])
        assert valid == wanted.shape[1]
        torch.testing.assert_close(state[1:, :valid], wanted, rtol=1e-9, atol=1e-9)
    ours.float()


def test_a_cut_model_yields_the_first_states(pair):
    _, ours = pair
    config = ours.config.model_copy(update={"num_hidden_layers": 1})
    cut = SslModel(config)
    cut.load_state_dict(ssl_state(ours.state_dict(), config))
    audio = torch.randn(1, 4000)
    for (state, _), (wanted, _) in zip(
        states_of(cut, audio, [4000]), states_of(ours, audio, [4000]), strict=False
    ):
        assert torch.equal(state, wanted)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "data2vec-audio"}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm"),
    ],
)
def test_other_models_are_refused_by_name(change, field):
    values = {
        **SHAPE,
        "model_type": "hubert",
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "conv_bias": False,
        "feat_extract_norm": "group",
        "some_other_field": 1,
    }
    assert SslConfig.from_transformers(values).hop_length == 320
    with pytest.raises(CheckpointError, match=field):
        SslConfig.from_transformers({**values, **change})


def test_missing_tensors_are_named(pair):
    theirs, ours = pair
    tensors = dict(theirs.state_dict())
    del tensors["feature_projection.projection.bias"]
    with pytest.raises(CheckpointError, match=r"feature_projection\.projection\.bias"):
        ssl_state(tensors, ours.config)
