"""What tests of families share: a tiny codec that learns from one small batch in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hcodec_core.models.base import Codec
from hcodec_core.models.loading import CodecCard, load_codec, save_codec
from hcodec_core.models.random_weights import random_codec
from hcodec_core.tokens import EncodeSettings
from hcodec_core.training.batches import Batch, Origin
from hcodec_core.training.learner import Learner
from hcodec_core.training.objective import freeze, objective_for
from hcodec_core.training.ranks import Ranks
from hcodec_core.training.recipe import Recipe, load_recipe
from hcodec_core.training.synthetic import synthesise

QUIET = {
    "batch_size": 2,
    "dropout": 0.0,
    "optimizer.warmup_steps": 0,
    "optimizer.ema_decay": None,
    "losses.adversarial": 0,
    "losses.feature_matching": 0,
}


@dataclass
class Lesson:
    """A learner and the one batch that it sees again and again."""

    learner: Learner
    batch: Batch

    @property
    def codec(self) -> Codec:
        return self.learner.objective.codec

    def learn(self, num_steps: int, first: int = 0) -> list[Mapping[str, float]]:
        """The numbers of each step."""
        steps = range(first, first + num_steps)
        return [self.learner.step(step, self.batch, False).numbers for step in steps]

    def state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.codec.state_dict().items()}


def recipe_of_lesson(codec: str, changes: Mapping[str, object] | None = None) -> Recipe:
    """The recipe ``tiny`` for a codec, without discriminators unless ``changes`` say so."""
    return load_recipe("tiny", {**QUIET, "codec": codec, **(changes or {})})


def lesson(
    recipe: Recipe, codec: Codec | None = None, num_hops: int = 8, teacher: str | None = None
) -> Lesson:
    """A lesson for a codec (default: random weights) on crops of so many hops."""
    codec = codec or random_codec(recipe.codec)
    freeze(codec, recipe)
    objective = objective_for(codec, recipe, teacher)
    learner = Learner(objective, recipe, Ranks(), torch.device("cpu"))
    size = num_hops * codec.hop_length
    clips = [
        synthesise(size, codec.sample_rate, np.random.default_rng(number))
        for number in range(recipe.batch_size)
    ]
    origins = tuple(Origin(f"clip-{number}", 0) for number in range(recipe.batch_size))
    return Lesson(learner, Batch(torch.from_numpy(np.stack(clips))[:, None], origins))


def exported(codec: Codec, folder_path: Path) -> Codec:
    """The codec as it is, written and loaded again."""
    save_codec(codec, CodecCard("test", True, "none", source="a test"), folder_path)
    return load_codec(str(folder_path), EncodeSettings(compute_class="test"))


def codes_of(codec: Codec, audio: Tensor) -> dict[str, Tensor]:
    """Codes of whole clips, and spans where there are any."""
    frames = codec.encode_frames(audio, torch.full((len(audio),), audio.shape[2]))
    found = dict(frames.codes)
    return found if frames.frame_spans is None else found | {"spans": frames.frame_spans}
