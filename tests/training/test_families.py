"""Every family that can be trained learns where it should, and only there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from lessons import Lesson, codes_of, exported, lesson, recipe_of_lesson
from runs import write_teacher

from hcodec_core.models.base import Part
from hcodec_core.models.loading import part_digests
from hcodec_core.models.random_weights import random_codec
from hcodec_core.training.objective import DECIDES_TOKENS


@dataclass(frozen=True)
class Case:
    """A tiny codec and how it is taught: ``loss`` must fall to ``share`` of the first."""

    codec: str
    changes: dict[str, object] = field(default_factory=dict)
    num_hops: int = 10
    num_steps: int = 24
    loss: str = "mel"
    share: float = 0.85


CASES = [
    Case("hcodec-tiny"),
    Case("hcodec-1.5-tiny"),
    Case("ucodec-tiny", {"quantizer.dead_below": 0}),
    Case("xcodec-tiny", {"losses.semantic_form": "mse"}, num_hops=20),
    Case("hhcodec-tiny", {"quantizer.dead_below": 0, "losses.distillation": 1}, num_hops=40),
]
FROZEN_ENTRIES = {"quantizer.books.0.entries", "quantizer.books.1.entries"}
COMMON = {"optimizer.learning_rate": 3e-3, "quantizer.dropout_share": 0}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What HH-Codec learns from; the others hold theirs or have none."""
    return str(write_teacher(tmp_path_factory.mktemp("teacher")))


@dataclass(frozen=True)
class Taught:
    case: Case
    lesson: Lesson
    before: dict[str, torch.Tensor]
    losses: list[float]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.codec)
def taught(request: pytest.FixtureRequest, teacher: str) -> Taught:
    """A codec after some steps on one batch."""
    case: Case = request.param
    recipe = recipe_of_lesson(case.codec, COMMON | case.changes)
    given = lesson(recipe, num_hops=case.num_hops, teacher=teacher)
    given.learner.start_codebooks(iter([given.batch]))
    before = given.state()
    numbers = given.learn(case.num_steps)
    return Taught(case, given, before, [n[f"loss/{case.loss}"] for n in numbers])


def test_the_loss_falls(taught: Taught):
    assert sum(taught.losses[-4:]) / 4 < taught.case.share * taught.losses[0], taught.losses


def test_gradients_reach_all_that_learns_and_nothing_else(taught: Taught):
    codec = taught.lesson.codec
    beside = taught.lesson.learner.objective.beside
    assert all(parameter.grad.abs().sum() > 0 for parameter in beside.parameters())
    for name, parameter in codec.named_parameters():
        is_teacher = codec.part_of(name) is Part.SSL
        assert parameter.requires_grad != is_teacher, name
        if is_teacher:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_all_parts_change_but_the_teacher(taught: Taught):
    codec = taught.lesson.codec
    after = taught.lesson.state()
    for name, value in taught.before.items():
        # SimVQ's entries are drawn once; the map before them learns.
        is_fixed = codec.part_of(name) is Part.SSL or (
            codec.family == "hhcodec" and name in FROZEN_ENTRIES
        )
        assert torch.equal(value, after[name]) == is_fixed, name


def test_the_teacher_stays_in_eval_mode(taught: Taught):
    taught.lesson.learn(1, first=taught.case.num_steps)
    objective = taught.lesson.learner.objective
    codec = taught.lesson.codec
    teacher = getattr(codec, "ssl", getattr(objective, "teacher", None))
    decoder = next(n for n, _ in codec.named_parameters() if codec.part_of(n) is Part.DECODER)
    assert codec.get_submodule(decoder.partition(".")[0]).training
    assert teacher is None or not any(module.training for module in teacher.modules())


def test_the_exported_codec_gives_the_same_codes(taught: Taught, tmp_path: Path):
    with taught.lesson.learner.as_exported():
        loaded = exported(taught.lesson.codec, tmp_path)
        audio = taught.lesson.batch.audio
        before, after = codes_of(taught.lesson.codec, audio), codes_of(loaded, audio)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(len(set(codes.flatten().tolist())) > 2 for codes in before.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.codec)
def test_decoder_only_training_keeps_every_token(case: Case, tmp_path: Path):
    changes = COMMON | case.changes | {"train": "decoder"}
    base = exported(random_codec(case.codec), tmp_path / "base")
    given = lesson(recipe_of_lesson(case.codec, changes), base, num_hops=case.num_hops)
    audio = given.batch.audio
    codes, parts = codes_of(base, audio), part_digests(base)
    encode_id = base.spec.encode_id
    numbers = given.learn(6)
    tuned = exported(given.codec, tmp_path / "tuned")
    same = codes_of(tuned, audio)
    assert all(torch.equal(codes[name], same[name]) for name in codes)
    assert tuned.spec.encode_id == encode_id
    for name, parameter in given.codec.named_parameters():
        keeps = given.codec.part_of(name) in DECIDES_TOKENS | {Part.TRAINING}
        assert (parameter.grad is None) == keeps, name
    assert part_digests(tuned).decoder != parts.decoder
    assert numbers[-1]["loss/mel"] < numbers[0]["loss/mel"]
