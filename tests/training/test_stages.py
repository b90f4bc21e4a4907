"""Modules that learn later are left alone until then, on every number of ranks; so are averages."""

from __future__ import annotations

import itertools

import pytest
import torch
from lessons import Lesson, lesson, recipe_of_lesson

from hcodec_core.errors import ConfigError
from hcodec_core.models.random_weights import random_codec
from hcodec_core.training.objective import freeze
from hcodec_core.training.recipe import load_recipe

FROM = 3
CHANGES = {
    "learns_from": {"vocoder": FROM},
    "optimizer.ema_decay": 0.9,
    "optimizer.ema_from": FROM,
    "quantizer.dead_below": 0,
}


def vocoder_of(given: Lesson) -> list[torch.Tensor]:
    return [p.detach().clone() for p in given.codec.get_submodule("vocoder").parameters()]


def test_a_stage_holds_its_module_until_it_begins():
    given = lesson(recipe_of_lesson("hhcodec-tiny", CHANGES), num_hops=16)
    first = vocoder_of(given)
    for step in range(FROM):
        given.learn(1, first=step)
        assert all(map(torch.equal, first, vocoder_of(given)))
        assert not given.codec.get_submodule("vocoder").training
        average = given.learner.average
        assert average is not None
        for name, parameter in given.codec.named_parameters():
            assert torch.equal(average.tensors()[name], parameter), name
    before = given.state()
    given.learn(1, first=FROM)
    after = given.state()
    changed = [
        n for n in after if n.startswith("vocoder.") and not torch.equal(before[n], after[n])
    ]
    assert len(changed) == len(first)
    assert given.codec.get_submodule("vocoder").training
    average = given.learner.average.tensors()["vocoder.conv_in.conv.weight"]
    expected = before["vocoder.conv_in.conv.weight"].lerp(after["vocoder.conv_in.conv.weight"], 0.1)
    assert torch.allclose(average, expected)


def test_gradients_pass_through_what_is_held():
    given = lesson(recipe_of_lesson("hhcodec-tiny", CHANGES), num_hops=16)
    given.learn(1)
    for name, parameter in given.codec.named_parameters():
        assert (parameter.grad is None) == name.startswith("vocoder."), name
        # The optimiser has not counted a step either: its own warm-up is still to come.
        steps = given.learner.generator.tensors()[f"{name}.step"]
        assert steps.item() == (0 if name.startswith("vocoder.") else 1)


def test_a_stage_of_a_module_that_is_not_there_is_refused():
    recipe = recipe_of_lesson("hcodec-tiny", {"learns_from": {"vocoder": 3}})
    with pytest.raises(ConfigError, match="learns_from names 'vocoder', but codec hcodec-tiny"):
        freeze(random_codec("hcodec-tiny"), recipe)


def test_runs_begun_before_there_were_stages_go_on():
    """Digests as they were before ``learns_from`` and what came with it."""
    assert load_recipe("nano").digest == "c06e76fc37ba894c0a985910ecd21120"
    assert load_recipe("hcodec-1.0").digest == "b95a63386980e29d4829f56363927f3c"
    changes: list[dict[str, object]] = [
        {},
        {"learns_from": {"decoder": 1}},
        {"optimizer.ema_from": 1},
        {"losses.codebook": 2.0},
        {"losses.mel_head": 2.0},
        {"losses.distillation": 2.0},
    ]
    digests = [load_recipe("nano", change).digest for change in changes]
    assert all(a != b for a, b in itertools.combinations(digests, 2))
