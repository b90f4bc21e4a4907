"""Training U-Codec (arXiv 2510.16718), above all going on from released weights.

No training code was published. Known: reconstruction and adversarial losses, codebooks that learn
by gradients with commitment 0.25 and codebook loss 1 (the released code's defaults). The optional
likeness to WavLM is left out.

Shape letters: B batch, N sample, D feature, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hcodec_core.models.base import Codec
from hcodec_core.models.ucodec.model import UCodec
from hcodec_core.training.gradient_quantizers import FactorisedTrainer
from hcodec_core.training.objective import GeneratorPass, full_lengths
from hcodec_core.training.recipe import Recipe


def objective(codec: Codec, recipe: Recipe, _: str | None) -> UCodecObjective:
    """For ``objective_for``; there is no teacher."""
    assert isinstance(codec, UCodec)
    return UCodecObjective(codec, recipe)


class UCodecObjective:
    """See ``Objective``."""

    def __init__(self, codec: UCodec, recipe: Recipe) -> None:
        """Keep the codec and make the trainer of its codebooks."""
        self.codec, self.recipe, self.beside = codec, recipe, nn.Module()
        self.quantizers = {"fused": FactorisedTrainer(codec.quantizer, recipe.quantizer)}

    def latents(self, audio: Tensor) -> Mapping[str, Tensor]:
        """See ``Objective``."""
        with torch.no_grad():
            return {"fused": self._latents(audio)}

    def generate(self, audio: Tensor, step: int, samples: Sequence[int]) -> GeneratorPass:
        """See ``Objective``."""
        if self.recipe.train == "decoder":
            return GeneratorPass(self._rebuilt(self._nearest(audio)))
        trainer = self.quantizers["fused"]
        num_used = trainer.draw_num_used(self.recipe.seed, "codebooks", "fused", step)
        quantised = trainer.quantise(self._latents(audio), num_used)
        assert quantised.codebook is not None
        losses = {"commitment": quantised.commitment, "codebook": quantised.codebook}
        return GeneratorPass(self._rebuilt(quantised.vectors), losses, {"fused": quantised})

    def reconstruct(self, audio: Tensor) -> Tensor:
        """See ``Objective``."""
        with torch.no_grad():
            return self._rebuilt(self._nearest(audio))

    def _latents(self, audio: Tensor) -> Tensor:
        latents, _, _ = self.codec.embed(audio, full_lengths(audio).valid)
        return latents

    def _nearest(self, audio: Tensor) -> Tensor:
        with torch.no_grad():
            return self.codec.quantizer.encode(self._latents(audio)).vectors

    def _rebuilt(self, vectors: Tensor) -> Tensor:
        return self.codec.rebuild(vectors, full_lengths(vectors))
