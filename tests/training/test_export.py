"""Codecs made of checkpoints: the bits that training would export, at any of its checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import write_clips, write_teacher

from hcodec_core.cli import main
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings
from hcodec_core.training.recipe import load_recipe
from hcodec_core.training.run import TrainContext, TrainOptions, TrainRequest, train

SETTINGS = EncodeSettings(compute_class="test")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 10 steps with averaged weights, which keeps the checkpoints of 5 and 10."""
    path = tmp_path_factory.mktemp("export")
    data = write_clips(path / "clips", 8)
    recipe = load_recipe("tiny", {"steps": 10, "cadence.num_samples": 0})
    assert recipe.optimizer.ema_decay is not None
    teacher = str(write_teacher(path / "teacher"))
    request = TrainRequest(recipe, (data,), f"file://{path}/run", teacher=teacher, licence="MIT")
    train(request, TrainOptions(path), TrainContext())
    return path / "run"


def export(run_path: Path, *options: str) -> int:
    config = ["--config", str(run_path / "none.toml")]
    return main(["export-codec", str(run_path), *config, *options])


def test_the_last_checkpoint_gives_the_codec_of_the_run(trained: Path, tmp_path: Path) -> None:
    """Averaged weights too; the run may be over or not: only its checkpoints are read."""
    assert export(trained, "--checkpoint", "last", "--to", str(tmp_path / "codec")) == 0
    made, known = tmp_path / "codec", trained / "codec"
    assert (made / WEIGHTS).read_bytes() == (known / WEIGHTS).read_bytes()
    assert (made / "codec.json").read_bytes() == (known / "codec.json").read_bytes()


def test_an_earlier_checkpoint_gives_another_codec(trained: Path) -> None:
    assert export(trained, "--checkpoint", "5", "--licence", "CC-BY-4.0") == 0
    made = load_codec(str(trained / "exports" / "step-000000005"), SETTINGS)
    last = load_codec(str(trained / "codec"), SETTINGS)
    assert ", 5 steps," in made.spec.manifest.source
    assert made.spec.manifest.weights_licence == "CC-BY-4.0"
    assert last.spec.manifest.weights_licence == "MIT"
    assert made.spec.manifest.parts.decoder != last.spec.manifest.parts.decoder
    assert made.spec.manifest.parts.ssl == last.spec.manifest.parts.ssl
    audio = torch.randn(1, 1, 3200)
    assert made.decode(made.encode(audio, torch.tensor([3200]))).shape == audio.shape


@pytest.mark.parametrize("better", [5, 10])
def test_the_best_is_that_of_the_lowest_score(
    trained: Path, tmp_path: Path, better: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run_path = shutil.copytree(trained, tmp_path / "run")
    for step in (5, 10):
        marker = run_path / "checkpoints" / f"step-{step:09d}" / "complete.json"
        facts = json.loads(marker.read_text())
        marker.write_text(json.dumps(facts | {"score": 1.0 if step == better else 2.0}))
    assert export(run_path, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["step"], made["score"]) == (better, 1.0)
    assert made["codec_uri"] == f"file://{run_path}/exports/step-{better:09d}"


def test_what_cannot_be_exported_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_path = shutil.copytree(trained, tmp_path / "run")
    assert export(run_path, "--checkpoint", "7") == 43
    assert "it has 5, 10; name one of these steps, 'last' or 'best'" in capsys.readouterr().err
    shard = next((run_path / "checkpoints" / "step-000000010").glob("*.safetensors"))
    shard.write_bytes(b"nothing")
    assert export(run_path, "--checkpoint", "last") == 43
    assert "The checkpoint of step 10 is damaged" in capsys.readouterr().err
    assert not (run_path / "exports" / "step-000000010").exists()
    shutil.rmtree(run_path / "checkpoints")
    assert export(run_path, "--checkpoint", "last") == 43
    assert "it has no complete one" in capsys.readouterr().err
    assert export(tmp_path / "elsewhere") == 43
    assert "holds no training run" in capsys.readouterr().err
