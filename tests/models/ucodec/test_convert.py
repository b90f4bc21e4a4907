"""Reading released U-Codec checkpoints: every branch of the format, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.inference.engine import compute_class
from hcodec_core.models.conversion import ConvertRequest
from hcodec_core.models.loading import load_codec
from hcodec_core.models.ucodec.config import UCodecConfig, tiny, tiny_strided
from hcodec_core.models.ucodec.convert import convert_checkpoint, released_name
from hcodec_core.models.ucodec.model import UCodec
from hcodec_core.tokens import CodecManifest, EncodeSettings

GOLDEN = Path(__file__).parents[2] / "golden" / "ucodec-tiny"
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return load_file(GOLDEN / "codec.safetensors")


@pytest.fixture
def config() -> dict[str, Any]:
    return json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., CodecManifest]:
    def run(state: Any, config: Any) -> CodecManifest:
        checkpoint_path, config_path = tmp_path / "generator.pt", tmp_path / "config.json"
        torch.save(state, checkpoint_path)
        config_path.write_text(json.dumps(config))
        return convert_checkpoint(
            ConvertRequest(checkpoint_path, tmp_path / "codec", config_path=config_path)
        )

    return run


def test_wrapped_checkpoints_are_unwrapped(convert, state: State, config: dict[str, Any]):
    plain = convert(state, config)
    wrapped = {"model": {f"module.{key}": value for key, value in state.items()}, "step": 650000}
    assert convert(wrapped, config) == plain
    modern = {
        key.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for key, value in state.items()
    }
    assert convert(modern, config) == plain


def test_training_tensors_are_left_out(convert, state: State, config: dict[str, Any]):
    plain = convert(state, config)
    state["teacher.encoder.weight"] = state["distill_learner.0.weight"] = torch.ones(3)
    assert convert(state, config) == plain


def released_config(config: UCodecConfig) -> dict[str, Any]:
    """The published format's description of a codec of ours."""

    def network(part: str) -> dict[str, Any]:
        convolutions = getattr(config, part)
        transformer = getattr(config, f"{part}_transformer")
        return {
            "seanet_conf": {
                "causal": convolutions.is_causal,
                "pad_mode": convolutions.pad_mode,
                "dilation_base": convolutions.dilation_base,
            },
            "transformer_conf": {
                "num_heads": transformer.num_heads,
                "norm": transformer.norm,
                "positional_embedding": transformer.positions,
                "causal": transformer.is_causal,
                "context": transformer.context,
                "gating": transformer.gating,
                "layer_scale": transformer.layer_scale,
            },
        }

    tokenizer = network("encoder") | {
        "sample_rate": config.sample_rate,
        "audio_do_normalize": config.normalises_audio,
    }
    return {"model": {"tokenizer_conf": tokenizer, "wave_decoder_conf": network("decoder")}}


@pytest.mark.parametrize("make", [tiny, tiny_strided])
def test_every_option_survives_the_round_trip(convert, tmp_path: Path, make):
    """Our codec under the published names and back: gates, norms, strides, causality."""
    ours = UCodec(make())
    released = {}
    for key, value in ours.state_dict().items():
        name = released_name(key, ours.config)
        if make is tiny_strided and "encoder_transformer" in name and ".norm" in name:
            name, value = name.replace(".weight", ".alpha"), value.reshape(1, 1, -1)
        assert name not in released
        released[name] = value.clone()
    convert(released, released_config(ours.config))
    settings = EncodeSettings(compute_class=compute_class("cpu"))
    back = load_codec(str(tmp_path / "codec"), settings)
    assert back.architecture == ours.architecture
    for key, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_released_names_are_the_published_ones(state: State, config: dict[str, Any], convert):
    ours = UCodecConfig.from_architecture(convert(state, config).architecture)
    with torch.device("meta"):
        keys = UCodec(ours).state_dict()
    names = {released_name(key, ours) for key in keys}
    published = {key.removesuffix("_g").removesuffix("_v") for key in state}
    assert names == published


def test_a_configuration_is_needed():
    with pytest.raises(ConfigError, match=r"tokenizer_conf"):
        convert_checkpoint(ConvertRequest(GOLDEN / "codec.safetensors", Path("nowhere")))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tokenizer_conf.seanet_conf.n_filters", 8, "n_filters = 8"),
        ("tokenizer_conf.seanet_conf.ratios", [8, 5, 5, 8, 2], "ratios"),
        ("tokenizer_conf.seanet_conf.true_skip", False, "true_skip"),
        ("tokenizer_conf.seanet_conf.activation", "GELU", "activation"),
        ("tokenizer_conf.vq_conf.codebook_size", 512, "codebook_size = 512"),
        ("tokenizer_conf.ds_rate", 2, "ds_rate"),
        ("wave_decoder_conf.up_rate", 4, "up_rate"),
        ("wave_decoder_conf.transformer_conf.num_layers", 3, "num_layers"),
    ],
)
def test_a_configuration_of_other_weights_is_refused(
    convert, state: State, config: dict[str, Any], path: str, value: object, message: str
):
    *sections, field = path.split(".")
    target = config["model"]
    for name in sections:
        target = target[name]
    target[field] = value
    with pytest.raises(CheckpointError, match=message):
        convert(state, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["tokenizer_conf"]["transformer_conf"].pop("num_heads"), "num_heads"),
        (lambda c: c["tokenizer_conf"]["transformer_conf"].update(num_heads=5), "num_heads"),
        (lambda c: c["tokenizer_conf"]["seanet_conf"].update(pad_mode="circular"), "pad_mode"),
        (lambda c: c.pop("wave_decoder_conf"), "wave_decoder_conf"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    convert, state: State, config: dict[str, Any], change, message: str
):
    change(config["model"])
    with pytest.raises(ConfigError, match=message):
        convert(state, config)


def test_published_defaults_fill_what_a_configuration_leaves_out(
    convert, state: State, config: dict[str, Any]
):
    for name in ("positional_embedding", "causal", "norm", "gating"):
        config["model"]["tokenizer_conf"]["transformer_conf"].pop(name)
    config["model"]["tokenizer_conf"].pop("sample_rate")
    found = UCodecConfig.from_architecture(convert(state, config).architecture)
    assert found.encoder_transformer is not None
    assert found.encoder_transformer.positions == "sin"
    assert found.sample_rate == 24000


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("tokenizer.vq.layers.3.out_proj.weight_v", None, CheckpointError, "lacks.*layers.3"),
        ("tokenizer.vq.layers.3.out_proj.bias", torch.ones(3), CheckpointError, "layers.3"),
        ("tokenizer.surprise", torch.ones(3), CheckpointError, "surprise"),
        ("token2wav.cond.weight", torch.ones(3), ConfigError, "speakers"),
        ("token2wav.proj.convtr.convtr.convtr.weight", torch.ones(40, 1, 4), CheckpointError, "up"),
        ("tokenizer.encoder.model.17.conv.conv.bias", torch.full((48,), torch.nan), None, "finite"),
    ],
)
def test_wrong_tensors_are_named(
    convert, state: State, config: dict[str, Any], key: str, value, error, message: str
):
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(error or CheckpointError, match=message):
        convert(state, config)
