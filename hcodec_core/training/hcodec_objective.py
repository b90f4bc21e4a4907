"""Training H-Codec 1.0, 1.5 and 2.0, and codecs of their plan.

Both latents are quantised and decoded together; the semantic decoder rebuilds the features from the
quantised semantic latent (UniTok-Audio, arXiv 2510.26372). No training code was published; losses
and weights that are not known are taken from DAC (arXiv 2306.06546) and Vocos (2306.00814).

1.5: every sample of every step has a threshold of its own, drawn from the range that the codec
names; frames that are alike become one token, as when encoding.

Shape letters: B batch, N sample, D feature, T base frame, G token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcodec_core.models.base import Codec
from hcodec_core.models.hcodec.model import AdaptiveHCodec, HCodec
from hcodec_core.nn.grouping import Groups, similarity_to_previous, spread
from hcodec_core.nn.quantize import ResidualQuantizer
from hcodec_core.training.keys import numpy_generator
from hcodec_core.training.losses import feature_distance
from hcodec_core.training.objective import GeneratorPass, full_lengths
from hcodec_core.training.quantizer import QuantizerPass, QuantizerTrainer, spread_out
from hcodec_core.training.recipe import Recipe

_STREAMS = ("acoustic", "semantic")  # in the order in which the decoder takes them


def objective(codec: Codec, recipe: Recipe, _: str | None) -> HCodecObjective:
    """For ``objective_for``; the teacher is in the codec."""
    assert isinstance(codec, HCodec)
    if isinstance(codec, AdaptiveHCodec):
        return AdaptiveObjective(codec, recipe)
    return HCodecObjective(codec, recipe)


@dataclass(frozen=True)
class _Tokens:
    """What is quantised: latents [B, D, G] of each stream. groups: None at a fixed rate (G = T)."""

    latents: Mapping[str, Tensor]
    groups: Groups | None = None

    @property
    def mask(self) -> Tensor | None:
        """Bool [B, G]: which tokens there are; None: all."""
        return None if self.groups is None else ~self.groups.lengths.padding


class HCodecObjective:
    """See ``Objective``."""

    def __init__(self, codec: HCodec, recipe: Recipe) -> None:
        """Keep the codec and make the trainers of its codebooks."""
        self.codec: HCodec = codec
        self.recipe = recipe
        self.beside = nn.Module()
        self.quantizers = {
            name: QuantizerTrainer(_quantizer(codec, name), recipe.quantizer) for name in _STREAMS
        }

    def latents(self, audio: Tensor) -> Mapping[str, Tensor]:
        """See ``Objective``."""
        with torch.no_grad():
            return self._latents(audio, self._features(audio))

    def generate(self, audio: Tensor, step: int, samples: Sequence[int]) -> GeneratorPass:
        """See ``Objective``."""
        if self.recipe.train == "decoder":
            return GeneratorPass(self._decode(self._nearest(audio, samples)))
        features = self._features(audio)
        tokens = self._tokens(self._latents(audio, features), samples)
        quantised = {
            name: self._quantizer_pass(name, latent, step, tokens.mask)
            for name, latent in tokens.latents.items()
        }
        vectors = {name: self._at_base_rate(q.vectors, tokens) for name, q in quantised.items()}
        semantic = vectors["semantic"]
        rebuilt = self.codec.semantic_decoder(semantic, full_lengths(semantic))
        losses = {
            "commitment": quantised["acoustic"].commitment + quantised["semantic"].commitment,
            "semantic": feature_distance(rebuilt, features, self.recipe.losses.semantic_form),
        }
        both = torch.cat([vectors[name] for name in _STREAMS], dim=1)
        return GeneratorPass(self._decode(both), losses, quantised)

    def reconstruct(self, audio: Tensor) -> Tensor:
        """See ``Objective``."""
        with torch.no_grad():
            return self._decode(self._nearest(audio, None))

    def _tokens(self, latents: Mapping[str, Tensor], samples: Sequence[int] | None) -> _Tokens:
        """What is quantised of latents at the base rate; ``samples``: None outside training."""
        return _Tokens(latents)

    def _quantizer_pass(
        self, name: str, latent: Tensor, step: int, mask: Tensor | None
    ) -> QuantizerPass:
        trainer = self.quantizers[name]
        num_used = trainer.draw_num_used(self.recipe.seed, "codebooks", name, step)
        return trainer.quantise(latent, num_used, mask)

    def _features(self, audio: Tensor) -> Tensor:
        # The teacher: frozen, in eval mode, in float32, without a gradient.
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            return self.codec.features(audio, full_lengths(audio))

    def _latents(self, audio: Tensor, features: Tensor) -> dict[str, Tensor]:
        return {
            "acoustic": self.codec.acoustic_encoder(audio, full_lengths(audio)),
            "semantic": self.codec.semantic_encoder(features, full_lengths(features)),
        }

    def _nearest(self, audio: Tensor, samples: Sequence[int] | None) -> Tensor:
        """What the decoder gets of audio when it is encoded as it will be; without a gradient."""
        with torch.no_grad():
            tokens = self._tokens(self._latents(audio, self._features(audio)), samples)
            parts = [
                _quantizer(self.codec, name).encode(tokens.latents[name].float()).vectors
                for name in _STREAMS
            ]
            return torch.cat([self._at_base_rate(part, tokens) for part in parts], dim=1)

    def _at_base_rate(self, vectors: Tensor, tokens: _Tokens) -> Tensor:
        groups = tokens.groups
        return vectors if groups is None else spread(vectors, groups.spans, groups.frames.size)

    def _decode(self, vectors: Tensor) -> Tensor:
        audio: Tensor = self.codec.decoder(vectors, full_lengths(vectors))
        return audio


class AdaptiveObjective(HCodecObjective):
    """H-Codec 1.5: frames are joined before they are quantised, and spread before decoding."""

    codec: AdaptiveHCodec

    def latents(self, audio: Tensor) -> Mapping[str, Tensor]:
        """See ``Objective``; tokens of the whole range of thresholds, as many as base frames."""
        with torch.no_grad():
            latents = self._latents(audio, self._features(audio))
            lowest, highest = self.codec.trained_thresholds
            thresholds = torch.linspace(lowest, highest, len(audio), dtype=torch.float64)
            tokens = self._joined(latents, thresholds)
            # Ranks must give equally many.
            return {name: self._evenly(latent, tokens) for name, latent in tokens.latents.items()}

    def thresholds(self, samples: Sequence[int]) -> Tensor:
        """The threshold of each sample of the run, float64 [B]: follows from seed and sample."""
        lowest, highest = self.codec.trained_thresholds
        seed = self.recipe.seed
        drawn = [numpy_generator(seed, "threshold", s).uniform(lowest, highest) for s in samples]
        return torch.tensor(drawn, dtype=torch.float64)

    def _tokens(self, latents: Mapping[str, Tensor], samples: Sequence[int] | None) -> _Tokens:
        if samples is None:
            threshold = latents["semantic"].new_tensor(self.codec.threshold, dtype=torch.float64)
            return self._joined(latents, threshold.expand(len(latents["semantic"])))
        return self._joined(latents, self.thresholds(samples))

    def _joined(self, latents: Mapping[str, Tensor], thresholds: Tensor) -> _Tokens:
        semantic = latents["semantic"].detach()
        margins = similarity_to_previous(semantic) - thresholds.to(semantic.device)[:, None]
        groups = self.codec.groups(margins, full_lengths(semantic))
        return _Tokens(
            {name: self.codec.aggregators[name](x, groups) for name, x in latents.items()}, groups
        )

    def _evenly(self, latent: Tensor, tokens: _Tokens) -> Tensor:
        groups = tokens.groups
        assert groups is not None
        points = latent.transpose(1, 2)[tokens.mask]
        spaced = spread_out(points, len(latent) * groups.frames.size)
        return spaced.view(len(latent), groups.frames.size, -1).transpose(1, 2)

    def _decode(self, vectors: Tensor) -> Tensor:
        return super()._decode(self.codec.bottleneck(vectors, full_lengths(vectors)))


def _quantizer(codec: HCodec, stream: str) -> ResidualQuantizer:
    quantizer = codec.quantizers[stream]
    assert isinstance(quantizer, ResidualQuantizer)
    return quantizer
