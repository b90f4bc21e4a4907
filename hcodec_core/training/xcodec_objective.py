"""Fine-tuning X-Codec (arXiv 2408.17175) from converted weights.

As published: commitment, mean squared distance of the rebuilt SSL features, and codebooks of one
bandwidth drawn for each step. Multi-scale mel stands in for the published full-band and sub-band
STFT losses, and the common discriminators for the published multi-frequency one.

Shape letters: B batch, N sample, D feature, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hcodec_core.models.base import Codec
from hcodec_core.models.xcodec.model import XCodec
from hcodec_core.training.keys import numpy_generator
from hcodec_core.training.losses import feature_distance
from hcodec_core.training.objective import GeneratorPass
from hcodec_core.training.quantizer import QuantizerTrainer
from hcodec_core.training.recipe import Recipe


def objective(codec: Codec, recipe: Recipe, _: str | None) -> XCodecObjective:
    """For ``objective_for``; the teacher is in the codec."""
    assert isinstance(codec, XCodec)
    return XCodecObjective(codec, recipe)


class XCodecObjective:
    """See ``Objective``."""

    def __init__(self, codec: XCodec, recipe: Recipe) -> None:
        """Keep the codec and make the trainer of its codebooks."""
        self.codec, self.recipe, self.beside = codec, recipe, nn.Module()
        self.quantizers = {"fused": QuantizerTrainer(codec.quantizer, recipe.quantizer)}

    def latents(self, audio: Tensor) -> Mapping[str, Tensor]:
        """See ``Objective``."""
        with torch.no_grad():
            return {"fused": self.codec.embed(audio, self._features(audio))}

    def generate(self, audio: Tensor, step: int, samples: Sequence[int]) -> GeneratorPass:
        """See ``Objective``."""
        if self.recipe.train == "decoder":
            return GeneratorPass(self.codec.rebuild(self._nearest(audio)))
        features = self._features(audio)
        latents = self.codec.embed(audio, features)
        quantised = self.quantizers["fused"].quantise(latents, self.num_used(step))
        vectors = quantised.vectors
        rebuilt = self.codec.decoder_semantic(
            self.codec.fc1(vectors.transpose(1, 2)).transpose(1, 2)
        )
        losses = {
            "commitment": quantised.commitment,
            "semantic": feature_distance(rebuilt, features, self.recipe.losses.semantic_form),
        }
        return GeneratorPass(self.codec.rebuild(vectors), losses, {"fused": quantised})

    def reconstruct(self, audio: Tensor) -> Tensor:
        """See ``Objective``."""
        with torch.no_grad():
            return self.codec.rebuild(self._nearest(audio))

    def num_used(self, step: int) -> int:
        """Codebooks of a step: in ``dropout_share`` of them those of a bandwidth, else all."""
        config = self.codec.config
        rng = numpy_generator(self.recipe.seed, "bandwidth", step)
        if rng.random() >= self.recipe.quantizer.dropout_share:
            return config.num_codebooks
        return config.codebooks_of(float(rng.choice(config.target_bandwidths)))

    def _features(self, audio: Tensor) -> Tensor:
        # The teacher: frozen, in eval mode, in float32, without a gradient.
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            return self.codec.features(audio)

    def _nearest(self, audio: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self.codec.embed(audio, self._features(audio))
            return self.codec.quantizer.encode(latents.float()).vectors
