"""Recipes, losses, discriminators, schedule, gradients over ranks, checkpoints and history."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.storage import FileStorage
from hcodec_core.training.checkpoints import CheckpointFacts, CheckpointPlace, Checkpoints
from hcodec_core.training.discriminators import Discriminators
from hcodec_core.training.history import History, read_history
from hcodec_core.training.learner import rate_share
from hcodec_core.training.losses import (
    MultiScaleMelLoss,
    SpectralLoss,
    adversarial_loss,
    feature_matching_loss,
    judge_loss,
)
from hcodec_core.training.ranks import Ranks
from hcodec_core.training.recipe import (
    DiscriminatorRecipe,
    OptimizerRecipe,
    load_recipe,
    recipe_names,
    recipe_of,
)

SMALL = DiscriminatorRecipe(
    periods=(2, 3),
    period_width=2,
    resolutions=(256,),
    resolution_width=2,
    subband_windows=(256,),
    subband_width=2,
)


SHIPPED = {"nano", "tiny", "hcodec-1.0", "hcodec-1.5", "hhcodec-24khz", "ucodec-5hz", "xcodec"}


def test_recipes_that_ship_can_be_read():
    assert SHIPPED <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe_of(recipe.model_dump(mode="json")) == recipe


def test_changes_replace_entries():
    recipe = load_recipe("tiny", {"steps": 7, "losses.mel": 45})
    assert (recipe.steps, recipe.losses.mel) == (7, 45)


def test_nano_keeps_to_its_size():
    from hcodec_core.models.registry import facts as facts_of

    assert load_recipe("nano").codec == "hcodec-nano"
    num_values = facts_of("hcodec")["hcodec-nano"].num_parameters
    assert num_values <= 2_500_000
    assert num_values * 4 + 100_000 <= 10_000_000  # bytes of the float32 file, header included


def test_cadence_decides_no_weights():
    recipe = load_recipe("tiny")
    assert load_recipe("tiny", {"cadence.log_every": 9}).digest == recipe.digest
    assert load_recipe("tiny", {"data.max_bad_share": 0.9}).digest == recipe.digest
    assert load_recipe("tiny", {"seed": 2}).digest != recipe.digest


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nope", {}, "There is no recipe 'nope'"),
        ("missing.toml", {}, "cannot be read"),
        ("tiny", {"stepz": 3}, "stepz"),
        ("tiny", {"steps": 0}, "steps"),
        ("tiny", {"losses.mel_bands": [1]}, "same length"),
        ("tiny", {"cadence.checkpoint_every": 7}, "multiple of validate_every"),
    ],
)
def test_wrong_recipes_are_refused(name: str, changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        load_recipe(name, changes)


def test_losses_are_zero_for_equal_audio_and_grow():
    audio = torch.randn(2, 1, 8000) * 0.1
    for loss in (MultiScaleMelLoss(16000, (64, 512), (5, 40)), SpectralLoss((256, 512))):
        same, near, far = (loss(audio + noise, audio) for noise in (0.0, 0.01, 0.2))
        assert same < 1e-3
        assert same < near < far


def test_silence_has_finite_gradients():
    estimate = torch.zeros(1, 1, 4000, requires_grad=True)
    target = torch.zeros(1, 1, 4000)
    total = MultiScaleMelLoss(16000, (64, 512), (5, 40))(estimate, target)
    (total + SpectralLoss((512,))(estimate, target)).backward()
    assert torch.isfinite(estimate.grad).all()


def test_discriminators_judge_and_teach():
    torch.manual_seed(0)
    judges = Discriminators(SMALL)
    audio = torch.randn(2, 1, 4001) * 0.1
    fake = (audio * 0.5).requires_grad_()
    real, judged = judges(audio), judges(fake)
    assert len(real.scores) == len(real.features) == 4
    for form in ("hinge", "least-squares"):
        assert judge_loss(real.scores, judged.scores, form) > 0
        loss = adversarial_loss(judged.scores, form)
        (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert feature_matching_loss(real.features, real.features) == 0
    assert feature_matching_loss(real.features, judged.features) > 0


def test_discriminators_learn_to_tell_apart():
    torch.manual_seed(0)
    judges = Discriminators(SMALL)
    optimizer = torch.optim.AdamW(judges.parameters(), lr=1e-2)
    tone = torch.sin(torch.arange(2000) * 0.2)[None, None]
    real, fake = tone * torch.tensor([0.2, 0.5])[:, None, None], torch.randn(2, 1, 2000) * 0.2
    losses = []
    for _ in range(20):
        loss = judge_loss(judges(real).scores, judges(fake).scores, "hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_schedule_warms_up_and_falls():
    recipe = OptimizerRecipe(warmup_steps=10, final_share=0.1)
    shares = [rate_share(step, 100, recipe) for step in range(100)]
    assert shares[0] == 0.1
    assert shares[9] == shares[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))
    assert 0.1 <= shares[-1] < 0.11


def place(path: Path, keep_last: int = 2) -> CheckpointPlace:
    (path / "scratch").mkdir(exist_ok=True)
    return CheckpointPlace(FileStorage(), f"file://{path}/run", path / "scratch", keep_last)


def facts(step: int, score: float | None = None) -> CheckpointFacts:
    return CheckpointFacts(step=step, recipe_digest="r", data_digest="d", num_ranks=1, score=score)


def steps_kept(path: Path) -> list[int]:
    markers = (path / "run").glob("checkpoints/*/complete.json")
    return sorted(int(marker.parent.name[5:]) for marker in markers)


def test_checkpoints_come_back_and_the_best_stays(tmp_path: Path):
    checkpoints = Checkpoints(place(tmp_path), Ranks())
    tensors = {"a": torch.zeros(3, 2), "b": torch.zeros(1), "c": torch.zeros(2).int()}
    assert checkpoints.load_latest(tensors, "r", "d") is None
    for step, score in ((1, 0.5), (2, 0.1), (3, 0.3), (4, None), (5, 0.4)):
        for tensor in tensors.values():
            tensor.fill_(step)
        checkpoints.save(facts(step, score), tensors)
    assert steps_kept(tmp_path) == [2, 4, 5]
    for tensor in tensors.values():
        tensor.zero_()
    assert checkpoints.load_latest(tensors, "r", "d").step == 5
    assert all((tensor == 5).all() for tensor in tensors.values())
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("fault", ["flip", "cut", "file gone", "marker gone", "marker damaged"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, fault: str):
    checkpoints = Checkpoints(place(tmp_path), Ranks())
    tensors = {"a": torch.zeros(3, 2)}
    for step in (1, 2):
        tensors["a"].fill_(step)
        checkpoints.save(facts(step), tensors)
    folder = tmp_path / "run" / "checkpoints" / "step-000000002"
    victim = next(folder.glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    if fault == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif fault == "cut":
        victim.write_bytes(content[:-4])
    elif fault == "file gone":
        victim.unlink()
    elif fault == "marker gone":
        (folder / "complete.json").unlink()
    else:
        (folder / "complete.json").write_text("{")
    assert checkpoints.load_latest(tensors, "r", "d").step == 1
    assert (tensors["a"] == 1).all()


def test_without_a_whole_checkpoint_nothing_starts_anew(tmp_path: Path):
    """Going on from the first step would throw the run's work away without a word."""
    checkpoints = Checkpoints(place(tmp_path), Ranks())
    tensors = {"a": torch.zeros(3, 2)}
    for step in (1, 2):
        checkpoints.save(facts(step), tensors)
    for victim in (tmp_path / "run").glob("checkpoints/*/*.safetensors"):
        victim.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"No checkpoint under .* is whole"):
        checkpoints.load_latest(tensors, "r", "d")


def test_checkpoints_of_another_run_are_refused(tmp_path: Path):
    checkpoints = Checkpoints(place(tmp_path), Ranks())
    tensors = {"a": torch.zeros(3)}
    checkpoints.save(facts(1), tensors)
    with pytest.raises(ConfigError, match="another recipe"):
        checkpoints.load_latest(tensors, "other", "d")
    with pytest.raises(ConfigError, match="other data"):
        checkpoints.load_latest(tensors, "r", "other")
    with pytest.raises(ConfigError, match="does not fit"):
        checkpoints.load_latest({"a": torch.zeros(3), "z": torch.zeros(2)}, "r", "d")


def test_history_takes_what_was_written_last(tmp_path: Path):
    uri = f"file://{tmp_path}"
    assert read_history(FileStorage(), f"{uri}/none") == {}
    history = History(FileStorage(), uri)
    for step in (1, 2, 3):
        history.add(step, {"loss": float(step)})
    history.write()
    history.add(3, {"loss": 30.0})
    history.add(4, {"loss": 4.0})
    history.write()
    found = read_history(FileStorage(), uri)
    assert {step: n["loss"] for step, n in found.items()} == {1: 1.0, 2: 2.0, 3: 30.0, 4: 4.0}


def test_one_rank_keeps_gradients_as_they_are():
    from hcodec_core.training.ranks import GradientSum

    layer = nn.Linear(3, 2)
    total = GradientSum(list(layer.parameters()), Ranks())
    layer(torch.ones(1, 3)).sum().backward()
    before = layer.weight.grad.clone()
    total.finish()
    assert torch.equal(layer.weight.grad, before)
