import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.models.conversion import ConvertRequest, read_ssl_model
from hcodec_core.models.hcodec.config import PRESETS
from hcodec_core.models.hcodec.convert import (
    AdaptiveFacts,
    config_from_shapes,
    convert_checkpoint,
)
from hcodec_core.models.hcodec.released_names import released_keys
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDER = GOLDEN / "hcodec-1.0-tiny"
VERSIONS = ["1.0", "1.5", "2.0"]


def key_list(path):
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {name: ast.literal_eval(shape) for name, shape, _ in rows}


@pytest.fixture
def state():
    return load_file(FOLDER / "codec.safetensors")


def convert(path, out, **changes):
    request = {"checkpoint_path": path, "out_path": out, "ssl": str(path.parent / "ssl")}
    if not Path(request["ssl"]).is_dir():
        request["ssl"] = str(FOLDER / "ssl")
    return convert_checkpoint(ConvertRequest(**(request | changes)))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_full_size_has_exactly_the_released_keys(version):
    wanted = key_list(GOLDEN / "keys" / f"hcodec_keys_{version}.txt")
    assert released_keys(PRESETS[f"hcodec-{version}"]()) == wanted


@pytest.mark.parametrize("version", VERSIONS)
def test_shapes_tell_the_full_size_configuration(version):
    config = PRESETS[f"hcodec-{version}"]()
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in released_keys(config).items()}
    assert config_from_shapes(state, config.ssl) == config


def test_shapes_tell_the_golden_configuration_of_1_0(state):
    config = config_from_shapes(state, read_ssl_model(str(FOLDER / "ssl"))[0])
    wanted = json.loads((FOLDER / "config.json").read_text())
    assert config.strides == tuple(reversed(wanted["encoder"]["ratios"]))
    assert config.latent_dim == wanted["encoder"]["dimension"]
    assert config.num_filters == wanted["encoder"]["n_filters"]
    assert config.encoder_layers == wanted["encoder"]["transformer"]["layers"]
    assert config.decoder_dim == wanted["decoder"]["dim"]
    assert config.convnext_dim == wanted["decoder"]["intermediate_dim"]
    assert config.convnext_layers == wanted["decoder"]["convnext_layers"]
    assert config.n_fft == wanted["decoder"]["n_fft"]
    assert config.decoder_hop_length == wanted["decoder"]["hop_length"]
    assert config.num_codebooks == wanted["quantizer"]["num_quantizers"]
    assert config.codebook_size == wanted["quantizer"]["codebook_size"]
    assert config.semantic_strides == tuple(wanted["semantic"]["strides"])
    assert config.hop_length == wanted["hop_length"]


def test_shapes_and_facts_tell_the_golden_configuration_of_1_5():
    folder = GOLDEN / "hcodec-1.5-tiny"
    wanted = json.loads((folder / "config.json").read_text())
    adaptive = wanted["adaptive_config"]
    ssl = read_ssl_model(str(folder / "ssl"))[0]
    config = config_from_shapes(
        load_file(folder / "codec.safetensors"), ssl, AdaptiveFacts.of(wanted)
    )
    assert config.version == "1.5"
    assert config.strides == tuple(reversed(wanted["encoder_config"]["ratios"]))
    assert config.last_stride == 2
    assert config.decoder_dim == wanted["decoder_config"]["decoder"]["dim"]
    for found, stated in (
        (config.aggregator, adaptive["aggregators"]["semantic_aggregator"]),
        (config.bottleneck, adaptive["transformer_kwargs"]),
    ):
        assert found.num_heads == stated["num_heads"]
        assert found.num_layers == stated["num_layers"]
        assert found.hidden_dim == stated["dim_feedforward"]
        assert found.dim == stated.get("dim", stated.get("d_model"))
    assert (config.max_frame_span, config.released_threshold) == (8, 0.6)
    assert config.trained_thresholds == (0.7, 1.0)
    assert AdaptiveFacts() == AdaptiveFacts.of(
        json.loads((folder / "config.json").read_text().replace('"num_heads": 4', '"num_heads": 8'))
    )


def test_shapes_tell_the_golden_configuration_of_2_0():
    folder = GOLDEN / "hcodec-2.0-tiny"
    wanted = json.loads((folder / "config.json").read_text())
    ssl = read_ssl_model(str(folder / "ssl"))[0]
    config = config_from_shapes(load_file(folder / "codec.safetensors"), ssl)
    encoder, decoder = wanted["encoder_config"], wanted["decoder_config"]
    assert (config.version, config.sample_rate) == ("2.0", wanted["sampling_rate"])
    assert config.encoder_dim == encoder["dim"]
    assert config.encoder_n_fft == encoder["n_fft"]
    assert config.encoder_hop_length == encoder["hop_length"]
    assert config.encoder_convnext_layers == encoder["convnext_layers"]
    assert config.encoder_layers == encoder["transformer_layers"]
    assert config.hop_length == wanted["sampling_rate"] / encoder["target_frame_rate"]
    assert config.decoder_hop_length == decoder["hop_length"]
    assert config.num_codebooks == wanted["quantizer_config"]["num_quantizers"]
    assert config.semantic_strides == tuple(wanted["semantic_encoder_config"]["strides"])


@pytest.mark.parametrize("version", VERSIONS)
def test_intermediates_agree_with_the_published_code(tmp_path, version):
    folder = GOLDEN / f"hcodec-{version}-tiny"
    convert(folder / "codec.safetensors", tmp_path, config_path=folder / "config.json")
    codec = load_codec(str(tmp_path) + "/", EncodeSettings(compute_class="cpu-test"))
    with np.load(folder / "expected.npz") as arrays, torch.no_grad():
        audio = torch.from_numpy(arrays["wav_0"])
        size = len(audio)
        padded = torch.nn.functional.pad(audio, (0, -size % codec.hop_length))[None, None]
        latents, frames = codec.embed(padded, torch.tensor([size]))
        quantised = codec.quantizers["semantic"].encode(latents["semantic"]).vectors
        found = {
            "ssl_features_0": codec.features(padded, frames.multiplied(codec.hop_length)),
            "acoustic_embedding_0": latents["acoustic"],
            "semantic_embedding_0": latents["semantic"],
            "predicted_ssl_0": codec.semantic_decoder(quantised, frames),
        }
        names = found.keys() & arrays.keys()
        assert len(names) >= 3
        for name in names:
            ours, expected = found[name][0], torch.from_numpy(arrays[name])
            if name == "ssl_features_0":
                ours, expected = uncompressed(ours), uncompressed(expected)
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-4, msg=name)


def uncompressed(features):
    """Before |x| ** 0.3, which lifts rounding of 1e-8 near zero to 4e-3."""
    return features.sign() * features.abs().pow(1 / 0.3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {f"generator.{k}": v for k, v in s.items()},
        lambda s: {
            "state_dict": {f"generator.{k}": v for k, v in s.items()} | {"disc.w": torch.ones(1)}
        },
        lambda s: {f"module.model.{k}": v for k, v in s.items()},
        lambda s: {
            k.replace("weight_g", "parametrizations.weight.original0").replace(
                "weight_v", "parametrizations.weight.original1"
            ): v
            for k, v in s.items()
        },
        lambda s: {
            k: v for k, v in s.items() if not k.endswith(("initted", "cluster_size", "embed_avg"))
        },
    ],
)
def test_wrappers_prefixes_and_spellings(tmp_path, state, wrap):
    plain = convert(FOLDER / "codec.safetensors", tmp_path / "plain", name="x")
    torch.save(wrap(state), tmp_path / "weights.pt")
    assert convert(tmp_path / "weights.pt", tmp_path / "out", name="x") == plain


def test_the_manifest_says_where_weights_came_from(tmp_path):
    manifest = convert(
        FOLDER / "codec.safetensors",
        tmp_path,
        is_trained=False,
        weights_licence="Apache-2.0",
        source="here",
    )
    assert manifest.name == "hcodec-1.0"
    assert (manifest.is_trained, manifest.weights_licence) == (False, "Apache-2.0")
    assert manifest.source == "here"
    assert manifest.parts.ssl
    assert manifest.frame_rate == 25


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("decoder.norm.bias"), CheckpointError, r"lacks the tensor 'decoder\.norm"),
        (
            lambda s: s.pop("encoder.model.0.conv.conv.weight_g"),
            CheckpointError,
            r"encoder\.model\.0\.conv\.conv\.weight_g",
        ),
        (
            lambda s: s.update({"decoder.more": torch.ones(1)}),
            CheckpointError,
            r"'decoder\.more', unknown",
        ),
        (
            lambda s: s.update({"decoder.norm.bias": torch.ones(3)}),
            CheckpointError,
            r"'decoder\.norm\.bias' .* \(3,\); expected \(64,\)",
        ),
        (
            lambda s: s.update({"decoder.head.istft.window": torch.ones(1280)}),
            CheckpointError,
            "Hann window",
        ),
        (
            lambda s: s.update({"decoder.norm.bias": torch.full((64,), float("nan"))}),
            CheckpointError,
            "not finite",
        ),
    ],
)
def test_wrong_checkpoints_are_refused_by_name(tmp_path, state, change, error, message):
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(error, match=message):
        convert(tmp_path / "weights.safetensors", tmp_path / "out")


def test_other_files_are_refused(tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="another model"):
        convert(tmp_path / "other.pt", tmp_path / "out")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(tmp_path / "text.pt", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        convert(tmp_path / "missing.pt", tmp_path / "out")


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path(MARK),))


MARK = "never-made"


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.model": Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="without running code"):
        convert(tmp_path / "weights.pt", tmp_path / "out")
    assert not (tmp_path / MARK).exists()


def test_the_ssl_model_must_be_named_and_there(tmp_path):
    with pytest.raises(ConfigError, match="bosonai/hubert_base"):
        convert(FOLDER / "codec.safetensors", tmp_path, ssl=None)
    with pytest.raises(ConfigError, match="no folder"):
        convert(FOLDER / "codec.safetensors", tmp_path, ssl="./missing")
    shutil.copytree(FOLDER / "ssl", tmp_path / "ssl")
    (tmp_path / "ssl" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors or pytorch_model\.bin"):
        convert(FOLDER / "codec.safetensors", tmp_path, ssl=str(tmp_path / "ssl"))


def test_an_ssl_model_as_a_pickle_of_tensors(tmp_path):
    shutil.copytree(FOLDER / "ssl", tmp_path / "ssl")
    tensors = load_file(tmp_path / "ssl" / "model.safetensors")
    (tmp_path / "ssl" / "model.safetensors").unlink()
    old_names = {
        f"hubert.{key}".replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in tensors.items()
    }
    torch.save(old_names, tmp_path / "ssl" / "pytorch_model.bin")
    plain = convert(FOLDER / "codec.safetensors", tmp_path / "a")
    assert convert(FOLDER / "codec.safetensors", tmp_path / "b", ssl=str(tmp_path / "ssl")) == plain


@pytest.mark.parametrize("version", ["1.5", "2.0"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": {f"generator.{k}": v for k, v in s.items()}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
)
def test_later_versions_are_known_by_their_keys_however_wrapped(tmp_path, version, wrap):
    folder = GOLDEN / f"hcodec-{version}-tiny"
    wanted = {"ssl": str(folder / "ssl"), "config_path": folder / "config.json"}
    plain = convert(folder / "codec.safetensors", tmp_path / "plain", **wanted)
    assert (plain.name, plain.architecture["version"]) == (f"hcodec-{version}", version)
    torch.save(wrap(load_file(folder / "codec.safetensors")), tmp_path / "weights.pt")
    assert convert(tmp_path / "weights.pt", tmp_path / "out", **wanted) == plain


def test_spatial_checkpoints_are_refused(tmp_path, state):
    state["spatial_encoder.model.0.conv.conv.bias"] = torch.ones(1)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match="Spatial, which is not supported"):
        convert(tmp_path / "weights.safetensors", tmp_path / "out")


def test_an_ssl_model_without_a_layer_to_spare_is_refused(tmp_path):
    folder = GOLDEN / "hcodec-1.5-tiny"
    shutil.copytree(folder / "ssl", tmp_path / "ssl")
    values = json.loads((folder / "ssl" / "config.json").read_text()) | {"num_hidden_layers": 16}
    (tmp_path / "ssl" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"has 16 layers; .* more than 16"):
        convert(folder / "codec.safetensors", tmp_path / "out", ssl=str(tmp_path / "ssl"))
    with pytest.raises(ConfigError, match=r"wav2vec2-large-xlsr-53 for 1\.5"):
        convert(folder / "codec.safetensors", tmp_path / "out", ssl=None)


def test_a_configuration_that_lacks_a_field_is_refused(tmp_path):
    folder = GOLDEN / "hcodec-1.5-tiny"
    values = json.loads((folder / "config.json").read_text())
    del values["adaptive_config"]["max_tokens_per_group"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="max_tokens_per_group"):
        convert(
            folder / "codec.safetensors", tmp_path / "out", config_path=tmp_path / "config.json"
        )


def test_spectra_of_2_0_are_exact_unless_the_published_rounding_is_asked_for(tmp_path):
    path = GOLDEN / "hcodec-2.0-tiny" / "codec.safetensors"
    exact = convert(path, tmp_path / "a")
    published = convert(path, tmp_path / "b", options={"fft": "float32"})
    assert exact.architecture["encoder_fft"] == "float64"
    assert published.architecture["encoder_fft"] == "float32"
    assert exact.parts.encoder != published.parts.encoder
    assert exact.parts.decoder == published.parts.decoder
    with pytest.raises(ConfigError, match="float64 or float32"):
        convert(path, tmp_path / "c", options={"fft": "half"})
    with pytest.raises(ConfigError, match=r"H-Codec 1\.0 has no option 'fft'"):
        convert(FOLDER / "codec.safetensors", tmp_path / "c", options={"fft": "float32"})
