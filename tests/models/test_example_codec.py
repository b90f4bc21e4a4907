"""docs/add-a-codec.md, followed: a family of three modules runs through everything unchanged.

The whole behaviour suite runs over it (its tests are imported below), and so do conversion, parity
with recorded outputs, the list of codecs and the invariance measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from hcodec_core.cli import main
from hcodec_core.errors import CheckpointError
from hcodec_core.models import registry
from hcodec_core.models.conversion import ConvertRequest
from tests.models.test_behaviour import *  # noqa: F403 - every test of the suite, over our subject
from tests.models.test_behaviour import Subject, make_subject

PAGE = Path(__file__).parents[2] / "docs" / "add-a-codec.md"
FOLDER = Path(__file__).parent / "example_codec"
MODULE = "tests.models.example_codec"


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Step 4 of the page: the one line of the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "example", MODULE)  # type: ignore[arg-type]
        yield


@pytest.fixture(scope="module")
def subject(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject("example-tiny", tmp_path_factory.mktemp("codec") / "codec")


def test_the_page_names_every_module_of_the_example() -> None:
    text = PAGE.read_text()
    assert {path.name for path in FOLDER.glob("*.py")} == {"config.py", "model.py", "convert.py"}
    for name in (
        "config.py",
        "model.py",
        "convert.py",
        "registry.py",
        "tests/models/example_codec",
    ):
        assert name in text


def test_facts_are_true(subject: Subject) -> None:
    stated = registry.facts("example")["example-tiny"]
    assert stated.num_parameters == subject.manifest.num_parameters
    assert stated.batching == subject.codec.batching


def released(seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint as its authors would publish it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    return {
        "enc.proj.weight": draw(8, 64),
        "enc.proj.bias": draw(8),
        "enc.conv.weight": draw(8, 8, 3),
        "enc.conv.bias": draw(8),
        "vq.embed": draw(2, 16, 8),
        "dec.proj.weight": draw(64, 8),
        "dec.proj.bias": draw(64),
    }


def published_outputs(state: dict[str, torch.Tensor], audio: torch.Tensor):
    """What the authors' code would give, written as plainly as can be."""
    frames = audio.view(-1, 64) @ state["enc.proj.weight"].T + state["enc.proj.bias"]
    latents = F.conv1d(frames.T[None], state["enc.conv.weight"], state["enc.conv.bias"], padding=1)
    residual, codes = latents[0].T, []
    for book in state["vq.embed"]:
        codes.append(torch.cdist(residual, book).argmin(dim=1))
        residual = residual - book[codes[-1]]
    recon = (latents[0].T - residual) @ state["dec.proj.weight"].T + state["dec.proj.bias"]
    return torch.stack(codes), recon.flatten()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    folder = tmp_path / "example-golden"
    folder.mkdir()
    state = released()
    audio = torch.randn(64 * 30, generator=torch.Generator().manual_seed(1))
    codes, recon = published_outputs(state, audio)
    save_file(state, folder / "codec.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": "example"}))
    np.savez(
        folder / "expected.npz",
        audio=audio.numpy(),
        codes=codes.numpy().astype(np.int32),
        recon=recon.numpy(),
    )
    return folder


def test_released_weights_give_the_published_codes_and_audio(golden: Path, capsys) -> None:
    assert main(["parity", str(golden), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["codes equal"] == "60 of 60"
    arrays = dict(np.load(golden / "expected.npz"))
    arrays["codes"] = (arrays["codes"] + 1) % 16
    np.savez(golden / "expected.npz", **arrays)
    assert main(["parity", str(golden), "--json"]) == 1


@pytest.mark.parametrize("key", ["enc.conv.bias", "vq.embed"])
def test_bad_checkpoints_are_named(tmp_path: Path, key: str) -> None:
    state = released()
    del state[key]
    save_file(state, tmp_path / "x.safetensors")
    request = ConvertRequest(tmp_path / "x.safetensors", tmp_path / "out")
    with pytest.raises(CheckpointError, match=key):
        registry.conversion("example").convert_checkpoint(request)


def test_the_command_line_knows_it(capsys) -> None:
    assert main(["codecs", "--all", "--json"]) == 0
    listed = {row["codec"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["example-tiny"]["bits_per_second"] == 1500
    assert main(["invariance", "--preset", "example-tiny", "--batches", "3", "--json"]) == 0
    (rows,) = json.loads(capsys.readouterr().out).values()
    assert {row["equal"] for row in rows} == {"100.0000 %"}
