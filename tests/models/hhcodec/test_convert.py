"""Reading HH-Codec checkpoints: which weights are taken, what is ignored, what is refused."""

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
from hcodec_core.models.conversion import ConvertRequest
from hcodec_core.models.hhcodec.config import HHCodecConfig
from hcodec_core.models.hhcodec.convert import convert_checkpoint, released_name
from hcodec_core.models.hhcodec.model import HHCodec
from hcodec_core.tokens import CodecManifest

GOLDEN = Path(__file__).parents[2] / "golden" / "hhcodec-tiny"
FILTER = "bigvqgan.resblocks.3.activations.2.upsample.filter"
SHARED = "quantize.layers.1.code_transform.0.weight"
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return load_file(GOLDEN / "codec.safetensors")


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., CodecManifest]:
    def run(
        state: Any, weights: str | None = None, config_path: Path | None = None
    ) -> CodecManifest:
        checkpoint_path = tmp_path / "last.ckpt"
        torch.save(state, checkpoint_path)
        request = ConvertRequest(
            checkpoint_path,
            tmp_path / "codec",
            config_path=config_path,
            options={} if weights is None else {"weights": weights},
        )
        return convert_checkpoint(request)

    return run


def averages(state: State, num_updates: int = -1) -> State:
    """Moving averages as the published code stores them: no buffers, shared tensors once."""
    buffers = ("frozen_codebook", ".filter")
    shadows = {
        f"model_ema.{key.replace('.', '')}": value.clone()
        for key, value in state.items()
        if not key.endswith(buffers) and "layers.1.code_transform" not in key
    }
    counts = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(num_updates)}
    return shadows | {f"model_ema.{key}": value for key, value in counts.items()}


def spoiled(state: State) -> State:
    buffers = ("frozen_codebook", ".filter")
    return {
        key: value if key.endswith(buffers) else value * 0.5 + 0.1 for key, value in state.items()
    }


def test_averaged_weights_are_taken_unless_raw_ones_are_asked_for(convert, state: State):
    plain = convert(state, "raw")
    assert convert(spoiled(state) | averages(state)) == plain
    assert convert(state | averages(spoiled(state)), "raw") == plain
    assert convert(state | averages(spoiled(state)), "ema").parts != plain.parts


def test_what_inference_does_not_use_is_ignored(convert, state: State):
    plain = convert(state, "raw")
    more = {"decoder.model.0.conv.conv.bias": 1, "conv_transpose.weight": 2, "loss.dac.x": 3}
    padded = state | {key: torch.ones(value) for key, value in more.items()}
    assert convert({"state_dict": padded, "epoch": 12}, "raw") == plain


def test_released_names_are_the_published_ones(convert, state: State):
    config = HHCodecConfig.from_architecture(convert(state, "raw").architecture)
    with torch.device("meta"):
        keys = HHCodec(config).state_dict()
    names = {released_name(key, config) for key in keys}
    published = {
        key.removesuffix("_g").removesuffix("_v")
        for key in state
        if not key.endswith(".filter") and "layers.1.code_transform" not in key
    }
    assert names == published


def test_checkpoints_without_useful_averages_are_refused(convert, state: State):
    with pytest.raises(CheckpointError, match="weights=raw"):
        convert(state)
    with pytest.raises(CheckpointError, match="never updated"):
        convert(state | averages(state, num_updates=0))
    some = averages(state)
    del some["model_ema.meltransconvbias".replace("mel", "melhead")]
    with pytest.raises(CheckpointError, match=r"lacks.*melheadtransconvbias"):
        convert(state | some)


@pytest.mark.parametrize("options", [{"weights": "best"}, {"weight": "raw"}])
def test_unknown_options_are_refused(options: dict[str, str]):
    with pytest.raises(ConfigError, match="weights=ema or weights=raw"):
        convert_checkpoint(
            ConvertRequest(GOLDEN / "codec.safetensors", Path("nowhere"), options=options)
        )


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("backbone.convnext.0.norm.bias", None, "lacks.*norm.bias"),
        ("melhead.transconv.bias", lambda value: value[:50], "melhead"),
        ("backbone.surprise", lambda _: torch.ones(2), "surprise"),
        (FILTER, lambda value: value * 1.01, "filter"),
        (SHARED, lambda value: value + 1e-3, "share one map"),
        ("encoder.model.1.shortcut.conv.conv.weight_v", None, "lacks"),
    ],
)
def test_wrong_tensors_are_named(convert, state: State, key: str, change, message: str):
    if change is None:
        del state[key]
    else:
        state[key] = change(state.get(key))
    with pytest.raises(CheckpointError, match=message):
        convert(state, "raw")


@pytest.mark.parametrize(
    ("sections", "field", "value"),
    [
        ((), "audio_normalize", True),
        ((), "sample_rate", 16000),
        (("ddconfig",), "ratios", [8, 5, 4, 2]),
        (("ddconfig",), "causal", False),
        (("bigvgan",), "activation", "snake"),
        (("bigvgan",), "resblock_dilation_sizes", [[1, 2, 3]] * 3),
    ],
)
def test_a_configuration_of_other_weights_is_refused(
    convert, state: State, tmp_path: Path, sections: tuple[str, ...], field: str, value: object
):
    config = json.loads((GOLDEN / "config.json").read_text())
    target = config
    for name in sections:
        target = target[name]
    target[field] = value
    config_path = tmp_path / "config.json"
    config_path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=field):
        convert(state, "raw", config_path)
