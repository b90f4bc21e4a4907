"""Training HH-Codec (arXiv 2507.18897; opendilab/HH-Codec), whose weights nobody published.

As published: both codebooks give losses but only the first is decoded, L1 of the log-mel that the
vocoder hears beside that of the audio ("dual supervision"), tokens made like HuBERT's features over
time, and stages: the vocoder, which comes with weights, learns later (``learns_from``). Put right:
the published mel loss takes the logarithm of log-mel again; here it is plain L1.

Shape letters: B batch, N sample, D feature, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.errors import ConfigError
from hcodec_core.models.base import Codec
from hcodec_core.models.hhcodec.model import HHCodec
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.resample import sinc_resample
from hcodec_core.nn.slaney_mel import slaney_log_mel
from hcodec_core.nn.ssl import SslModel
from hcodec_core.training.gradient_quantizers import SimVqTrainer
from hcodec_core.training.keys import seed_of
from hcodec_core.training.objective import GeneratorPass, full_lengths
from hcodec_core.training.recipe import Recipe
from hcodec_core.training.teacher import read_teacher

_TEACHER_RATE = 16_000
_HOPS_PER_WINDOW = 4


def objective(codec: Codec, recipe: Recipe, teacher: str | None) -> HHCodecObjective:
    """For ``objective_for``. Raises ``ConfigError`` when a teacher is needed and none is named."""
    assert isinstance(codec, HHCodec)
    ssl = None
    if recipe.losses.distillation and recipe.train == "all":
        if teacher is None:
            raise ConfigError(
                "HH-Codec learns from an SSL model (HuBERT base): name its folder with --teacher, "
                "or switch it off with losses.distillation=0."
            )
        ssl = read_teacher(teacher).to(codec.device)
    return HHCodecObjective(codec, recipe, ssl)


class Likeness(nn.Module):
    """How like SSL features tokens are over time (published kernel 11 and stride 2)."""

    def __init__(self, dim: int, feature_dim: int) -> None:
        """Build with random weights."""
        super().__init__()
        self.up = nn.ConvTranspose1d(dim, feature_dim, 11, stride=2, padding=1, output_padding=1)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Loss of tokens [B, D, T] against features [B, F, S], scalar: -log sigmoid of cosines.

        As many steps as there are features; at the published crop of 64 tokens none is moved.
        """
        found = F.interpolate(self.up(tokens), features.shape[2], mode="linear")
        cosines = F.cosine_similarity(found.float(), features, dim=2)
        return -F.logsigmoid(cosines).mean()


class HHCodecObjective:
    """See ``Objective``. ``teacher``: frozen SSL model; None: tokens follow none."""

    def __init__(self, codec: HHCodec, recipe: Recipe, teacher: SslModel | None) -> None:
        """Keep the codec and make the trainer of its codebooks, and the head for the teacher."""
        self.codec, self.recipe, self.teacher = codec, recipe, teacher
        self.quantizers = {"fused": SimVqTrainer(codec.quantizer, recipe.quantizer)}
        self.beside: nn.Module = nn.Module()
        if teacher is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(recipe.seed, "likeness"))
                likeness = Likeness(codec.config.latent_dim, teacher.config.hidden_size)
            self.beside = likeness.to(codec.device)

    def latents(self, audio: Tensor) -> Mapping[str, Tensor]:
        """See ``Objective``."""
        with torch.no_grad():
            return {"fused": self._latents(audio)}

    def generate(self, audio: Tensor, step: int, samples: Sequence[int]) -> GeneratorPass:
        """See ``Objective``."""
        if self.recipe.train == "decoder":
            mel = self._mel(self._nearest(audio))
            return GeneratorPass(self._voiced(mel), {"mel_head": self._mel_distance(mel, audio)})
        quantised = self.quantizers["fused"].quantise(self._latents(audio))
        assert quantised.codebook is not None
        mel = self._mel(quantised.vectors)
        losses = {
            "commitment": quantised.commitment,
            "codebook": quantised.codebook,
            "mel_head": self._mel_distance(mel, audio),
        }
        if self.teacher is not None:
            losses["distillation"] = self.beside(quantised.vectors, self._features(audio))
        return GeneratorPass(self._voiced(mel), losses, {"fused": quantised})

    def reconstruct(self, audio: Tensor) -> Tensor:
        """See ``Objective``."""
        with torch.no_grad():
            return self._voiced(self._mel(self._nearest(audio)))

    def _latents(self, audio: Tensor) -> Tensor:
        latents, _ = self.codec.embed(audio, full_lengths(audio).valid)
        return latents

    def _nearest(self, audio: Tensor) -> Tensor:
        with torch.no_grad():
            return self.codec.quantizer.encode(self._latents(audio), num_codebooks=1).vectors

    def _mel(self, vectors: Tensor) -> Tensor:
        return self.codec.mel(vectors, full_lengths(vectors))

    def _voiced(self, mel: Tensor) -> Tensor:
        audio: Tensor = self.codec.vocoder(mel, full_lengths(mel))
        return audio

    def _mel_distance(self, mel: Tensor, audio: Tensor) -> Tensor:
        vocoder = self.codec.config.vocoder
        hop = vocoder.hop_length
        with torch.no_grad():
            wanted = slaney_log_mel(
                audio[:, 0], self.codec.sample_rate, _HOPS_PER_WINDOW * hop, hop, vocoder.num_mels
            )
        return F.l1_loss(mel.float(), wanted)

    def _features(self, audio: Tensor) -> Tensor:
        """Mean of the teacher's hidden states, float32 [B, F, S], without a gradient."""
        assert self.teacher is not None
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            rate = self.codec.sample_rate
            speech = sinc_resample(audio[:, 0], full_lengths(audio), rate, _TEACHER_RATE)
            valid = torch.full((len(speech),), speech.shape[1], device=speech.device)
            lengths = Lengths(valid, speech.shape[1])
            states = [state for state, _ in self.teacher.hidden_states(speech, lengths)]
            return torch.stack(states).mean(dim=0).transpose(1, 2)
