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
from hcodec_core.models.hcodec.config import hcodec_1_0
from hcodec_core.models.hcodec.convert import (
    config_from_shapes,
    convert_checkpoint,
    released_keys,
)
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDER = GOLDEN / "hcodec-1.0-tiny"


def key_list(path):
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return {name: ast.literal_eval(shape) for name, shape, _ in rows}


@pytest.fixture
def state():
    return load_file(FOLDER / "codec.safetensors")


def convert(path, out, **changes):
    request = {"checkpoint_path": path, "out_path": out, "ssl": str(FOLDER / "ssl")}
    return convert_checkpoint(ConvertRequest(**(request | changes)))


def test_the_full_size_has_exactly_the_released_keys():
    assert released_keys(hcodec_1_0()) == key_list(GOLDEN / "keys" / "hcodec_keys_1.0.txt")


def test_shapes_tell_the_full_size_configuration():
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in released_keys(hcodec_1_0()).items()}
    assert config_from_shapes(state, hcodec_1_0().ssl) == hcodec_1_0()


def test_shapes_tell_the_golden_configuration(state):
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


def test_intermediates_agree_with_the_published_code(tmp_path):
    convert(FOLDER / "codec.safetensors", tmp_path)
    codec = load_codec(str(tmp_path) + "/", EncodeSettings(compute_class="cpu-test"))
    with np.load(FOLDER / "expected.npz") as arrays, torch.no_grad():
        audio = torch.from_numpy(arrays["wav_0"])
        size = len(audio)
        padded = torch.nn.functional.pad(audio, (0, -size % 640))[None, None]
        latents, frames = codec.embed(padded, torch.tensor([size]))
        features = codec.features(padded, frames.multiplied(640))
        predicted = codec.semantic_decoder(
            codec.quantizers["semantic"].encode(latents["semantic"]).vectors, frames
        )
        for name, found in (
            ("ssl_features_0", features),
            ("acoustic_embedding_0", latents["acoustic"]),
            ("semantic_embedding_0", latents["semantic"]),
            ("predicted_ssl_0", predicted),
        ):
            expected = torch.from_numpy(arrays[name])
            torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=2e-4, msg=name)


def save_pt(state, path):
    torch.save(state, path)


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
