"""One step of training: losses, gradients, and the state that they change.

Shape letters: B batch, N sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hcodec_core.errors import DivergedError
from hcodec_core.models.base import Part
from hcodec_core.training.batches import Batch, Origin, Share
from hcodec_core.training.discriminators import Discriminators
from hcodec_core.training.keys import seed_of
from hcodec_core.training.losses import (
    MultiScaleMelLoss,
    SpectralLoss,
    adversarial_loss,
    feature_matching_loss,
    judge_loss,
)
from hcodec_core.training.objective import GeneratorPass, Objective, hold_still, set_training
from hcodec_core.training.ranks import GradientSum, Ranks
from hcodec_core.training.recipe import OptimizerRecipe, Recipe

_MAX_START_POINTS = 32_768
_NUM_NAMED = 8


@dataclass(frozen=True)
class StepResult:
    """Means over all ranks of one step. ``should_stop``: whether any rank was asked to."""

    numbers: Mapping[str, float]
    should_stop: bool = False


class Learner:
    """Codec, discriminators, optimisers and averages of one rank; equal on all ranks."""

    def __init__(
        self, objective: Objective, recipe: Recipe, ranks: Ranks, device: torch.device
    ) -> None:
        """The codec must be on ``device``, with its parts frozen as the recipe says."""
        self.objective, self.recipe, self.ranks, self.device = objective, recipe, ranks, device
        self.share = Share(recipe.batch_size, ranks.rank, ranks.size)
        codec = objective.codec
        trained = [(n, p) for n, p in codec.named_parameters() if p.requires_grad]
        trained += [(f"beside.{n}", p) for n, p in objective.beside.named_parameters()]
        self.generator = TrainedPart(
            trained, recipe.optimizer.learning_rate, recipe.optimizer, ranks
        )
        self.judge: TrainedPart | None = None
        if recipe.is_adversarial:
            self.discriminators = self._make_discriminators()
            rate = recipe.optimizer.discriminator_learning_rate
            named = list(self.discriminators.named_parameters())
            self.judge = TrainedPart(named, rate, recipe.optimizer, ranks)
        losses = recipe.losses
        self.mel = MultiScaleMelLoss(codec.sample_rate, losses.mel_windows, losses.mel_bands)
        self.mel.to(device)
        self.spectral = SpectralLoss(losses.spectral_windows)
        decay = recipe.optimizer.ema_decay
        self.average = None if decay is None else WeightAverage(trained, decay)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, for checkpoints; the frozen teacher is not."""
        codec = self.objective.codec
        state = {
            f"codec.{key}": value
            for key, value in codec.state_dict().items()
            if codec.part_of(key) is not Part.SSL
        }
        beside = self.objective.beside.state_dict()
        state |= {f"beside.{key}": value for key, value in beside.items()}
        for name, trainer in self.objective.quantizers.items():
            state |= {f"quantizer.{name}.{key}": v for key, v in trainer.tensors().items()}
        state |= {f"generator.{key}": value for key, value in self.generator.tensors().items()}
        if self.judge is not None:
            judged = self.discriminators.state_dict()
            state |= {f"discriminators.{key}": value for key, value in judged.items()}
            state |= {f"judge.{key}": value for key, value in self.judge.tensors().items()}
        if self.average is not None:
            state |= {f"average.{key}": value for key, value in self.average.tensors().items()}
        return state

    @property
    def learns_codebooks(self) -> bool:
        """Whether the recipe lets codebooks move."""
        return self.recipe.train == "all"

    def start_codebooks(self, batches: Iterator[Batch]) -> None:
        """Make k-means centres of the latents of some batches the first codebooks."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.objective.quantizers}
        self.objective.codec.eval()
        num_batches = 0
        for batch in batches:
            num_batches += 1
            for name, latent in self.objective.latents(batch.audio.to(self.device)).items():
                found[name].append(latent.float().transpose(1, 2).flatten(0, 1))
        for name, trainer in self.objective.quantizers.items():
            points = self.ranks.stack(torch.cat(found[name])).flatten(0, 1)
            per_step = len(points) // num_batches
            places = torch.linspace(0, len(points) - 1, min(len(points), _MAX_START_POINTS))
            points = points[places.long().to(points.device)]
            trainer.start(points, per_step, self.recipe.seed, "kmeans", name)

    def step(self, step: int, batch: Batch, is_stopping: bool) -> StepResult:
        """Learn from one batch.

        Raises ``DivergedError`` naming the batch, before any weight of the codec has moved, when a
        loss or a gradient is not finite.
        """
        # Dropout draws from torch's global generator.
        torch.manual_seed(seed_of(self.recipe.seed, "step", step, self.ranks.rank))
        hold_still(self.objective.codec, self.generator.parameters, self.recipe, step)
        set_training(self.objective.codec)
        audio = batch.audio.to(self.device, non_blocking=True)
        with self._autocast():
            result = self.objective.generate(audio, step, self.share.indices(step))
        estimate = result.audio.float()
        numbers: dict[str, Tensor] = {}
        if self._is_adversarial_at(step):
            numbers |= self._teach_judge(step, estimate.detach(), audio)
        losses = self._losses(step, result, estimate, audio)
        total = torch.stack([self._weight(name) * loss for name, loss in losses.items()]).sum()
        numbers |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        numbers |= {"loss/total": total.detach()}
        numbers |= {"gradient_norm/generator": self.generator.backward(total)}
        means, should_stop = self._means(step, numbers, batch.origins, is_stopping)
        self.generator.update(self._rate_share(step))
        if self.learns_codebooks:
            self._move_codebooks(step, result)
        if self.average is not None:
            self.average.update(follows=step >= self.recipe.optimizer.ema_from)
        return StepResult(means, should_stop)

    def codebook_use(self) -> dict[str, float]:
        """Perplexity and share in use of each codebook."""
        numbers = {}
        for name, trainer in self.objective.quantizers.items():
            for kind, values in trainer.use().items():
                for index, value in enumerate(values):
                    numbers[f"codebook_{kind}/{name}_{index}"] = value
        return numbers

    def rates(self, step: int) -> dict[str, float]:
        """Learning rates of a step."""
        share, optimizer = self._rate_share(step), self.recipe.optimizer
        rates = {"learning_rate/generator": share * optimizer.learning_rate}
        if self._is_adversarial_at(step):
            rates["learning_rate/judge"] = share * optimizer.discriminator_learning_rate
        return rates

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """Within: the weights that are validated and exported, in eval mode."""
        self.objective.codec.eval()
        if self.average is None:
            yield
            return
        with self.average.in_place():
            yield

    def _make_discriminators(self) -> Discriminators:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.recipe.seed, "discriminators"))
            return Discriminators(self.recipe.discriminators).to(self.device)

    def _teach_judge(self, step: int, estimate: Tensor, audio: Tensor) -> dict[str, Tensor]:
        assert self.judge is not None
        with self._autocast():
            real = self.discriminators(audio).scores
            fake = self.discriminators(estimate).scores
        loss = judge_loss(real, fake, self.recipe.losses.adversarial_form)
        norm = self.judge.backward(loss)
        self.judge.update(self._rate_share(step))
        return {"loss/judge": loss.detach(), "gradient_norm/judge": norm}

    def _losses(
        self, step: int, result: GeneratorPass, estimate: Tensor, audio: Tensor
    ) -> dict[str, Tensor]:
        weights = self.recipe.losses
        losses = {"mel": self.mel(estimate, audio), **result.losses}
        if weights.waveform:
            losses["waveform"] = (estimate - audio).abs().mean()
        if weights.spectral:
            losses["spectral"] = self.spectral(estimate, audio)
        if self._is_adversarial_at(step):
            losses |= self._judged(estimate, audio)
        return losses

    def _judged(self, estimate: Tensor, audio: Tensor) -> dict[str, Tensor]:
        self.discriminators.requires_grad_(False)
        with self._autocast():
            with torch.no_grad():
                real = self.discriminators(audio)
            fake = self.discriminators(estimate)
        self.discriminators.requires_grad_(True)
        form = self.recipe.losses.adversarial_form
        return {
            "adversarial": adversarial_loss(fake.scores, form),
            "feature_matching": feature_matching_loss(real.features, fake.features),
        }

    def _weight(self, name: str) -> float:
        return float(getattr(self.recipe.losses, name))

    def _is_adversarial_at(self, step: int) -> bool:
        return self.judge is not None and step >= self.recipe.losses.adversarial_from

    def _rate_share(self, step: int) -> float:
        return rate_share(step, self.recipe.steps, self.recipe.optimizer)

    def _autocast(self) -> AbstractContextManager[None]:
        is_narrow = self.recipe.precision == "bfloat16" and self.device.type != "cpu"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_narrow)

    def _means(
        self,
        step: int,
        numbers: Mapping[str, Tensor],
        origins: Sequence[Origin],
        is_stopping: bool,
    ) -> tuple[dict[str, float], bool]:
        own = torch.stack([value.float().reshape(()) for value in numbers.values()])
        flag = own.new_tensor([float(is_stopping)])
        sums = self.ranks.sum_(torch.cat([own, flag])).tolist()
        means = {name: s / self.ranks.size for name, s in zip(numbers, sums, strict=False)}
        wrong = [name for name, mean in means.items() if not math.isfinite(mean)]
        if wrong:
            self._refuse(step, wrong, own, origins)
        return means, sums[-1] > 0

    def _refuse(
        self, step: int, wrong: Sequence[str], own: Tensor, origins: Sequence[Origin]
    ) -> None:
        is_guilty = not bool(torch.isfinite(own).all())
        named = [f"{origin.uri} from sample {origin.start_sample}" for origin in origins]
        everyone = self.ranks.gather(named if is_guilty else [])
        batch = [name for names in everyone for name in names]
        more = f" and {len(batch) - _NUM_NAMED} more" if len(batch) > _NUM_NAMED else ""
        raise DivergedError(
            f"Step {step + 1} gave {', '.join(wrong)} that is not finite, on the batch of "
            f"{'; '.join(batch[:_NUM_NAMED])}{more}: the last checkpoint is good. Make a "
            "codec of it (hcodec export-codec) and train on from that (--base) at a lower learning "
            "rate, or leave out files that are wrong."
        )

    def _move_codebooks(self, step: int, result: GeneratorPass) -> None:
        parts = [(p.counts, p.sums) for p in result.quantised.values()]
        flat = torch.cat([tensor.flatten() for part in parts for tensor in part])
        self.ranks.sum_(flat)
        sizes = [tensor.numel() for part in parts for tensor in part]
        pieces = iter(torch.split(flat, sizes))
        for name, passed in result.quantised.items():
            trainer = self.objective.quantizers[name]
            counts, sums = next(pieces), next(pieces)
            trainer.apply(counts.view_as(passed.counts), sums.view_as(passed.sums))
        quantizer = self.recipe.quantizer
        if quantizer.dead_below and (step + 1) % quantizer.replace_every == 0:
            for name, passed in result.quantised.items():
                key = (self.recipe.seed, "dead", name, step)
                self.objective.quantizers[name].replace_dead(passed.candidates, self.ranks, *key)


class TrainedPart:
    """Parameters, their optimiser, and the sum of their gradients over ranks."""

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        learning_rate: float,
        recipe: OptimizerRecipe,
        ranks: Ranks,
    ) -> None:
        """``named`` in an order that all ranks share."""
        self._names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._learning_rate, self._clip_norm = learning_rate, recipe.clip_norm
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        # Made now, not in the first step: a checkpoint is loaded into these.
        for parameter in self.parameters:
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._sum = GradientSum(self.parameters, ranks)

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter."""
        state = {}
        for name, parameter in zip(self._names, self.parameters, strict=True):
            for key, value in self._optimizer.state[parameter].items():
                state[f"{name}.{key}"] = value.view(1) if value.ndim == 0 else value
        return state

    def backward(self, loss: Tensor) -> Tensor:
        """Compute gradients, their mean over ranks, and clip them; the norm before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._sum.finish()
        for parameter in self.parameters:
            if not parameter.requires_grad:  # held still: no step, no decay
                parameter.grad = None
        return nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)

    def update(self, rate_share: float) -> None:
        """Take the optimiser's step."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * rate_share
        self._optimizer.step()


class WeightAverage:
    """Moving averages of parameters."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], decay: float) -> None:
        """Start from the parameters as they are."""
        self._named, self._decay = list(named), decay
        self._averages = {name: p.detach().clone() for name, p in named}

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter."""
        return self._averages

    def update(self, follows: bool = True) -> None:
        """Move the averages towards the parameters, or put them there when they do not follow."""
        current = [parameter.detach() for _, parameter in self._named]
        share = 1.0 - self._decay if follows else 1.0
        torch._foreach_lerp_(list(self._averages.values()), current, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within: the parameters hold the averages."""
        kept = [parameter.detach().clone() for _, parameter in self._named]
        self._put(list(self._averages.values()))
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for (_, parameter), value in zip(self._named, values, strict=True):
                parameter.copy_(value)


def rate_share(step: int, num_steps: int, recipe: OptimizerRecipe) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine to ``final_share``."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return recipe.final_share + (1.0 - recipe.final_share) * cosine
