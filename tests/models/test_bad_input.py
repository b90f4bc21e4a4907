"""Wrong checkpoints of every family: a typed error that names the tensor or the field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.models.conversion import ConvertRequest
from hcodec_core.models.library.config import from_library as library_config
from hcodec_core.models.registry import conversion, presets
from hcodec_core.models.xcodec.config import XCodecConfig

GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True)
class Released:
    """A released layout: golden folder, a tensor of it, and where its sample rate is stated."""

    family: str
    folder: str
    tensor: str
    rate: tuple[str, ...]


RELEASED = [
    Released("hcodec", "hcodec-1.0-tiny", "decoder.norm.bias", ("sample_rate",)),
    Released("hcodec", "hcodec-1.5-tiny", "decoder.norm.bias", ("sample_rate",)),
    Released("hcodec", "hcodec-2.0-tiny", "decoder.norm.bias", ("sampling_rate",)),
    Released("xcodec", "xcodec-tiny", "fc_post2.bias", ("sample_rate",)),
    Released("xcodec", "xcodec-tiny", "fc_post2.bias", ("acoustic_model_config", "sampling_rate")),
    Released("hhcodec", "hhcodec-tiny", "melhead.transconv.bias", ("sample_rate",)),
    Released("hhcodec", "hhcodec-tiny", "melhead.transconv.bias", ("bigvgan", "sampling_rate")),
    Released(
        "ucodec",
        "ucodec-tiny",
        "tokenizer.vq.layers.1.out_proj.bias",
        ("model", "tokenizer_conf", "sample_rate"),
    ),
]
ONE_EACH = list({released.folder: released for released in RELEASED}.values())


@dataclass
class Copy:
    """A golden folder that may be spoilt."""

    released: Released
    path: Path

    def change_tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        state = load_file(self.path / "codec.safetensors")
        change(state)
        save_file({k: v.contiguous() for k, v in state.items()}, self.path / "codec.safetensors")

    def convert(self, checkpoint: str = "codec.safetensors") -> None:
        ssl = self.path / "ssl"
        conversion(self.released.family).convert_checkpoint(
            ConvertRequest(
                checkpoint_path=self.path / checkpoint,
                out_path=self.path / "out",
                ssl=str(ssl) if ssl.is_dir() else None,
                config_path=self.path / "config.json",
                is_trained=False,
                options={"weights": "raw"} if self.released.family == "hhcodec" else {},
            )
        )

    def assert_nothing_was_written(self) -> None:
        assert not (self.path / "out" / "codec.json").exists()


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Copy:
    released: Released = request.param
    shutil.copytree(GOLDEN / released.folder, tmp_path / "golden")
    return Copy(released, tmp_path / "golden")


each_layout = pytest.mark.parametrize("copy", ONE_EACH, indirect=True, ids=lambda r: r.folder)


@each_layout
def test_what_is_not_spoilt_converts(copy: Copy) -> None:
    copy.convert()
    assert (copy.path / "out" / "codec.json").exists()


@each_layout
def test_a_missing_tensor_is_named(copy: Copy) -> None:
    copy.change_tensors(lambda state: state.pop(copy.released.tensor))
    with pytest.raises(CheckpointError, match=_name_of(copy)):
        copy.convert()
    copy.assert_nothing_was_written()


@each_layout
def test_an_extra_tensor_is_named(copy: Copy) -> None:
    extra = copy.released.tensor.rpartition(".")[0] + ".surprise"
    copy.change_tensors(lambda state: state.update({extra: torch.ones(2)}))
    with pytest.raises(CheckpointError, match="surprise"):
        copy.convert()
    copy.assert_nothing_was_written()


@each_layout
def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Copy) -> None:
    copy.change_tensors(lambda state: state.update({copy.released.tensor: torch.ones(3)}))
    with pytest.raises(CheckpointError, match=rf"{_name_of(copy)}.*\(3,\).*\(\d+,\)"):
        copy.convert()
    copy.assert_nothing_was_written()


@each_layout
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(copy: Copy, bad: float) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[copy.released.tensor][1] = bad

    copy.change_tensors(spoil)
    with pytest.raises(CheckpointError, match=r"'.*bias'.*not finite"):
        copy.convert()
    copy.assert_nothing_was_written()


@each_layout
def test_a_checkpoint_with_code_in_it_is_not_run(copy: Copy) -> None:
    marker = copy.path / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (marker,))

    state: dict[str, Any] = load_file(copy.path / "codec.safetensors")
    torch.save(state | {"harmful": Harmful()}, copy.path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt.*without running code"):
        copy.convert("weights.pt")
    assert not marker.exists()
    copy.assert_nothing_was_written()


# U-Codec's tensors tell no rate: only what is none can be refused there.
WRONG_RATES = [
    pytest.param(released, rate, id=f"{released.folder}-{'.'.join(released.rate)}-{rate}")
    for released in RELEASED
    for rate in ((0,) if released.family == "ucodec" else (0, 22050))
]


@pytest.mark.parametrize(("copy", "rate"), WRONG_RATES, indirect=["copy"])
def test_another_sample_rate_is_named(copy: Copy, rate: int) -> None:
    config = json.loads((copy.path / "config.json").read_text())
    section = config
    for name in copy.released.rate[:-1]:
        section = section[name]
    section[copy.released.rate[-1]] = rate
    (copy.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"{copy.released.rate[-1]}"):
        copy.convert()
    copy.assert_nothing_was_written()


@pytest.mark.parametrize("name", ["mimi", "dac-16khz", "encodec-24khz"])
def test_a_rate_that_is_none_is_named(name: str) -> None:
    values = presets("library")[name]().architecture()
    with pytest.raises(ConfigError, match="sampling_rate"):
        library_config(values | {"sampling_rate": 0})


def test_a_library_rate_must_give_the_stated_frame_rate() -> None:
    values = presets("library")["mimi"]().architecture() | {"frame_rate": 12.5}
    library_config(values)
    with pytest.raises(ConfigError, match=r"frame_rate is 12\.5"):
        library_config(values | {"sampling_rate": 16_000})


def test_xcodec_of_another_rate_than_its_ssl_model_is_refused() -> None:
    values = presets("xcodec")["xcodec-tiny"]().architecture()
    with pytest.raises(ConfigError, match="sample_rate"):
        XCodecConfig.from_library(values | {"sample_rate": 24_000})


def _name_of(copy: Copy) -> str:
    """The tensor's released name, or ours where the family maps names first."""
    ours = {"fc_post2.bias": "fc2.bias"}
    return ours.get(copy.released.tensor, copy.released.tensor).replace(".", r"\.")
