"""Training H-Codec 1.0 and 2.0, and codecs of their plan.

Both latents are quantised and decoded together; the semantic decoder rebuilds the features from the
quantised semantic latent (UniTok-Audio, arXiv 2510.26372). No training code was published; losses
and weights that are not known are taken from DAC (arXiv 2306.06546) and Vocos (2306.00814).

Shape letters: B batch, N sample, D feature, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hcodec_core.errors import ConfigError
from hcodec_core.models.base import Codec
from hcodec_core.models.hcodec.model import AdaptiveHCodec, HCodec
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.quantize import ResidualQuantizer
from hcodec_core.training.losses import feature_distance
from hcodec_core.training.objective import GeneratorPass
from hcodec_core.training.quantizer import QuantizerPass, QuantizerTrainer
from hcodec_core.training.recipe import Recipe

_STREAMS = ("acoustic", "semantic")  # in the order in which the decoder takes them


def objective(codec: Codec, recipe: Recipe) -> HCodecObjective:
    """For ``objective_for``. Raises ``ConfigError`` for versions that cannot be trained yet."""
    assert isinstance(codec, HCodec)
    if isinstance(codec, AdaptiveHCodec):
        raise ConfigError("H-Codec 1.5 cannot be trained here yet: train 1.0 or 2.0.")
    return HCodecObjective(codec, recipe)


class HCodecObjective:
    """See ``Objective``."""

    def __init__(self, codec: HCodec, recipe: Recipe) -> None:
        """Keep the codec and make the trainers of its codebooks."""
        self.codec: HCodec = codec
        self.recipe = recipe
        self.quantizers: Mapping[str, QuantizerTrainer] = {
            name: QuantizerTrainer(_quantizer(codec, name), recipe.quantizer) for name in _STREAMS
        }

    def latents(self, audio: Tensor) -> Mapping[str, Tensor]:
        """See ``Objective``."""
        with torch.no_grad():
            return self._latents(audio, self._features(audio))

    def generate(self, audio: Tensor, step: int) -> GeneratorPass:
        """See ``Objective``."""
        if self.recipe.train == "decoder":
            return GeneratorPass(self._decode(self._quantised(audio)))
        features = self._features(audio)
        quantised = {
            name: self._quantizer_pass(name, latent, step)
            for name, latent in self._latents(audio, features).items()
        }
        semantic = quantised["semantic"].vectors
        rebuilt = self.codec.semantic_decoder(semantic, _full(semantic))
        losses = {
            "commitment": quantised["acoustic"].commitment + quantised["semantic"].commitment,
            "semantic": feature_distance(rebuilt, features, self.recipe.losses.semantic_form),
        }
        vectors = torch.cat([quantised[name].vectors for name in _STREAMS], dim=1)
        return GeneratorPass(self._decode(vectors), losses, quantised)

    def reconstruct(self, audio: Tensor) -> Tensor:
        """See ``Objective``."""
        with torch.no_grad():
            return self._decode(self._quantised(audio))

    def _quantizer_pass(self, name: str, latent: Tensor, step: int) -> QuantizerPass:
        trainer = self.quantizers[name]
        num_used = trainer.draw_num_used(self.recipe.seed, "codebooks", name, step)
        return trainer.quantise(latent, num_used)

    def _features(self, audio: Tensor) -> Tensor:
        # The teacher: frozen, in eval mode, in float32, without a gradient.
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            return self.codec.features(audio, _full(audio))

    def _latents(self, audio: Tensor, features: Tensor) -> dict[str, Tensor]:
        return {
            "acoustic": self.codec.acoustic_encoder(audio, _full(audio)),
            "semantic": self.codec.semantic_encoder(features, _full(features)),
        }

    def _quantised(self, audio: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self._latents(audio, self._features(audio))
            parts = [_quantizer(self.codec, n).encode(latents[n].float()).vectors for n in _STREAMS]
            return torch.cat(parts, dim=1)

    def _decode(self, vectors: Tensor) -> Tensor:
        audio: Tensor = self.codec.decoder(vectors, _full(vectors))
        return audio


def _quantizer(codec: HCodec, stream: str) -> ResidualQuantizer:
    quantizer = codec.quantizers[stream]
    assert isinstance(quantizer, ResidualQuantizer)
    return quantizer


def _full(x: Tensor) -> Lengths:
    """Lengths of a batch of whole crops: [B, D, T] without padding."""
    return Lengths(torch.full((len(x),), x.shape[2], device=x.device), x.shape[2])
