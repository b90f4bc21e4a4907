"""What a family of codecs brings to training: one forward pass, and its own losses.

The trainer knows no family. A family adds a class that satisfies ``Objective`` and one line in
``OBJECTIVES``; losses on the waveform, discriminators, data, checkpoints and tracking are common.

Shape letters: B batch, N sample, D feature, T frame.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from hcodec_core.errors import ConfigError
from hcodec_core.models.base import Codec, Part
from hcodec_core.nn.lengths import Lengths
from hcodec_core.training.quantizer import CodebookTrainer, QuantizerPass
from hcodec_core.training.recipe import Recipe

OBJECTIVES: Mapping[str, str] = {
    "hcodec": "hcodec_core.training.hcodec_objective",
    "hhcodec": "hcodec_core.training.hhcodec_objective",
    "ucodec": "hcodec_core.training.ucodec_objective",
    "xcodec": "hcodec_core.training.xcodec_objective",
}
"""Module of each family that can be trained; it offers ``objective(codec, recipe, teacher)``."""

DECIDES_TOKENS = frozenset({Part.ENCODER, Part.SSL, Part.CODEBOOKS})
"""Parts that decoder-only training leaves as they are."""


@dataclass(frozen=True)
class GeneratorPass:
    """What one forward pass gave.

    audio: float32 [B, 1, N]. losses: the family's own, by name, each with a gradient; the recipe's
    ``losses`` holds their weights. quantised: by stream; empty when codebooks do not learn.
    """

    audio: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    quantised: Mapping[str, QuantizerPass] = field(default_factory=dict)


class Objective(Protocol):
    """How one family is trained. ``codec`` is in training mode, frozen parts in eval mode.

    ``beside``: what learns beside the codec and is not exported; on the codec's device.
    """

    codec: Codec
    quantizers: Mapping[str, CodebookTrainer]
    beside: nn.Module

    def latents(self, audio: Tensor) -> Mapping[str, Tensor]:
        """Latents [B, D, T] of each stream, from which codebooks start; without gradients."""

    def generate(self, audio: Tensor, step: int, samples: Sequence[int]) -> GeneratorPass:
        """The training pass over full crops [B, 1, N], N a hop multiple.

        ``samples``: number of each row among all samples of the run. What is drawn must follow from
        the recipe's seed with ``step`` or a sample's number alone; dropout uses torch's global
        generator, which the trainer seeds for each step and rank.
        """

    def reconstruct(self, audio: Tensor) -> Tensor:
        """What the codec as it is makes of [B, 1, N]; eval mode, no gradient."""


def objective_for(codec: Codec, recipe: Recipe, teacher: str | None = None) -> Objective:
    """The objective of a codec's family.

    Args:
        codec: On the device on which it will learn.
        recipe: How it will.
        teacher: SSL model (transformers) of families whose codec holds none; others ignore it.

    Raises:
        ConfigError: It cannot be trained, or not so.
        CheckpointError: The teacher cannot be read.
    """
    if codec.family not in OBJECTIVES:
        raise ConfigError(
            f"Codecs of family {codec.family!r} cannot be trained here: families that can are "
            f"{', '.join(sorted(OBJECTIVES))}."
        )
    module = importlib.import_module(OBJECTIVES[codec.family])
    found: Objective = module.objective(codec, recipe, teacher)
    return found


def freeze(codec: Codec, recipe: Recipe) -> None:
    """Let learn what the recipe says: all parts but the SSL model, or only what decodes.

    Raises ``ConfigError`` when the recipe names a module that the codec lacks.
    """
    modules = [name for name, _ in codec.named_children()]
    if unknown := sorted(recipe.learns_from.keys() - set(modules)):
        raise ConfigError(
            f"learns_from names {unknown[0]!r}, but codec {recipe.codec} consists of "
            f"{', '.join(modules)}."
        )
    frozen = DECIDES_TOKENS | {Part.TRAINING} if recipe.train == "decoder" else {Part.SSL}
    for name, parameter in codec.named_parameters():
        parameter.requires_grad_(codec.part_of(name) not in frozen)
    for module in codec.modules():
        if isinstance(module, nn.Dropout):
            module.p = recipe.dropout


def hold_still(codec: Codec, trained: Iterable[nn.Parameter], recipe: Recipe, step: int) -> None:
    """Keep the modules as they are whose first step is still to come; ``trained``: what learns."""
    if not recipe.learns_from:
        return
    waiting = [name for name, first in recipe.learns_from.items() if step < first]
    held = {id(p) for name in waiting for p in codec.get_submodule(name).parameters()}
    for parameter in trained:
        parameter.requires_grad_(id(parameter) not in held)


def set_training(codec: Codec) -> None:
    """Training mode for modules that learn; what is frozen stays in eval mode."""
    codec.eval()
    codec.training = True
    for child in codec.children():
        child.train(any(parameter.requires_grad for parameter in child.parameters()))


def full_lengths(x: Tensor) -> Lengths:
    """Lengths of a batch of whole crops: [B, D, T] without padding."""
    return Lengths(torch.full((len(x),), x.shape[2], device=x.device), x.shape[2])
