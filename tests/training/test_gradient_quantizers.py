"""Codebooks that learn by gradients quantise as encoding does and learn from the right losses."""

from __future__ import annotations

import pytest
import torch
from lessons import lesson, recipe_of_lesson
from runs import write_teacher

from hcodec_core.errors import ConfigError
from hcodec_core.nn.factorised import FactorisedResidualQuantizer
from hcodec_core.nn.simvq import ResidualSimVq
from hcodec_core.training.gradient_quantizers import FactorisedTrainer, SimVqTrainer
from hcodec_core.training.hhcodec_objective import HHCodecObjective
from hcodec_core.training.recipe import QuantizerRecipe
from hcodec_core.training.xcodec_objective import XCodecObjective

RECIPE = QuantizerRecipe(decay=0.9)


def factorised() -> FactorisedTrainer:
    torch.manual_seed(0)
    return FactorisedTrainer(FactorisedResidualQuantizer(6, 3, 16, 4), RECIPE)


def simvq() -> tuple[SimVqTrainer, ResidualSimVq]:
    torch.manual_seed(0)
    quantizer = ResidualSimVq(6, 2, 16, 8)
    return SimVqTrainer(quantizer, RECIPE), quantizer


def hits(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.bincount(row.flatten(), minlength=16) for row in codes.unbind(1)])


def test_factorised_books_quantise_as_they_encode():
    torch.manual_seed(0)
    quantizer = FactorisedResidualQuantizer(6, 3, 16, 4)
    trainer = FactorisedTrainer(quantizer, RECIPE)
    x = torch.randn(2, 6, 30)
    passed, encoded = trainer.quantise(x, 3), quantizer.encode(x)
    assert torch.allclose(passed.vectors, encoded.vectors, atol=1e-5)
    assert torch.equal(passed.counts, hits(encoded.codes).float())
    assert torch.equal(trainer.quantise(x, 2).counts, passed.counts[:2])


def test_factorised_losses_pull_from_both_sides():
    """Commitment moves what is quantised, the codebook loss moves entries; neither the other."""
    trainer = factorised()
    x = torch.randn(2, 6, 30)
    passed = trainer.quantise(x, 1)
    book = trainer.books[0]
    entries, projection = book.entries, book.project_in.weight
    moved = torch.autograd.grad(passed.commitment, [entries, projection], allow_unused=True)
    assert moved[0] is None
    assert moved[1].abs().sum() > 0
    passed = trainer.quantise(x, 1)
    moved = torch.autograd.grad(passed.codebook, [entries, projection], allow_unused=True)
    assert moved[0].abs().sum() > 0
    assert moved[1] is None
    assert torch.equal(passed.commitment, passed.codebook)  # one distance, seen from both sides


def test_only_the_first_mapped_book_is_decoded():
    trainer, quantizer = simvq()
    x = torch.randn(2, 6, 30, requires_grad=True)
    passed = trainer.quantise(x)
    both = quantizer.encode(x.detach())
    first = quantizer.encode(x.detach(), num_codebooks=1)
    assert torch.allclose(passed.vectors, first.vectors, atol=1e-5)
    assert torch.equal(passed.counts, hits(both.codes).float())
    (gradient,) = torch.autograd.grad(passed.vectors.square().sum(), x, retain_graph=True)
    assert gradient.abs().sum() > 0
    moved = torch.autograd.grad(passed.codebook, list(quantizer.transform.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in moved)


def test_use_follows_hits():
    trainer = factorised()
    trainer.go_on_from(60)
    passed = trainer.quantise(torch.randn(2, 6, 30), 2)
    trainer.apply(passed.counts, passed.sums)
    expected = 0.9 * 60 / 16 + 0.1 * passed.counts
    assert torch.allclose(trainer.cluster_sizes[:2], expected)
    assert torch.equal(trainer.cluster_sizes[2], torch.full((16,), 60 / 16))
    assert len(trainer.use()["perplexity"]) == 3


def test_replacement_of_entries_is_refused():
    with pytest.raises(ConfigError, match="dead_below must be 0"):
        lesson(recipe_of_lesson("ucodec-tiny", {"quantizer.dead_below": 0.2}))


def test_a_teacher_that_is_needed_must_be_named():
    changes = {"quantizer.dead_below": 0, "losses.distillation": 1.0}
    with pytest.raises(ConfigError, match="name its folder with --teacher"):
        lesson(recipe_of_lesson("hhcodec-tiny", changes))


def test_tokens_become_like_the_teacher(tmp_path):
    teacher = str(write_teacher(tmp_path))
    changes = {"quantizer.dead_below": 0, "losses.distillation": 1.0, "losses.mel": 0}
    changes |= {"losses.mel_head": 0, "optimizer.learning_rate": 3e-3}
    given = lesson(recipe_of_lesson("hhcodec-tiny", changes), num_hops=40, teacher=teacher)
    objective = given.learner.objective
    assert isinstance(objective, HHCodecObjective)
    before = {k: v.clone() for k, v in objective.teacher.state_dict().items()}
    losses = [numbers["loss/distillation"] for numbers in given.learn(12)]
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(v, before[k]) for k, v in objective.teacher.state_dict().items())
    names = given.learner.tensors()
    assert "beside.up.weight" in names  # a resumed run needs the head, but not the teacher
    assert not any("feature_projection" in name for name in names)
    assert not any(name.startswith("beside") for name in given.codec.state_dict())


def test_xcodec_draws_bandwidths():
    given = lesson(recipe_of_lesson("xcodec-tiny", {"quantizer.dropout_share": 1.0}))
    objective = given.learner.objective
    assert isinstance(objective, XCodecObjective)
    config = objective.codec.config
    drawn = [objective.num_used(step) for step in range(60)]
    assert drawn == [objective.num_used(step) for step in range(60)]
    assert set(drawn) == {config.codebooks_of(kbps) for kbps in config.target_bandwidths}
