"""Learning codebooks by moving averages (VQ-VAE, arXiv 1711.00937, appendix A.1; SoundStream).

The entries of a ``ResidualQuantizer`` follow the mean of the vectors assigned to them, over all
ranks. A pass counts assignments; ``apply`` moves the entries later, once the step is known to be
good. Follows the behaviour of vector-quantize-pytorch, with which H-Codec was published, but: the
straight-through gradient, where chosen, goes around all codebooks at once (the library adds it once
per codebook), and all ranks see the same vectors when codebooks start.

Shape letters: B batch, Q codebook, K entry, D feature, T frame, P point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hcodec_core.nn.quantize import ResidualQuantizer, nearest_entries
from hcodec_core.training.keys import Key, seed_of
from hcodec_core.training.ranks import Ranks
from hcodec_core.training.recipe import QuantizerRecipe

_NUM_CANDIDATES = 256  # vectors of each rank that may replace dead entries


@dataclass(frozen=True)
class QuantizerPass:
    """What quantising one batch gave, with q codebooks in use.

    vectors: [B, D, T], with a gradient. commitment: mean over the codebooks in use. counts [q, K],
    sums [q, K, D]: of this rank's assignments. candidates: [q, C, D], vectors that were quantised.
    codebook: loss that moves entries, mean over those in use; None where they follow averages (sums
    and candidates are empty otherwise).
    """

    vectors: Tensor
    commitment: Tensor
    counts: Tensor
    sums: Tensor
    candidates: Tensor
    codebook: Tensor | None = None


class CodebookTrainer:
    """How often the entries of one quantiser are hit: all there is where entries are parameters.

    ``cluster_sizes`` [Q, K]: moving averages of hits per step over all ranks.
    """

    def __init__(self, cluster_sizes: Tensor, recipe: QuantizerRecipe) -> None:
        """Before the first pass call ``start`` or ``go_on_from``, or load the tensors."""
        self.cluster_sizes, self.recipe = cluster_sizes, recipe

    @property
    def num_codebooks(self) -> int:
        """Codebooks in all."""
        return len(self.cluster_sizes)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the codec."""
        return {"cluster_sizes": self.cluster_sizes}

    def draw_num_used(self, *key: Key) -> int:
        """How many codebooks a step uses; the same on all ranks."""
        generator = torch.Generator().manual_seed(seed_of(*key))
        chance = torch.rand(1, generator=generator).item()
        if chance >= self.recipe.dropout_share:
            return self.num_codebooks
        return 1 + int(torch.randint(self.num_codebooks, (1,), generator=generator))

    def start(self, points: Tensor, points_per_step: int, *key: Key) -> None:
        """Begin with ``points`` [P, D], the same on all ranks; entries come of them if they can.

        ``points_per_step``: vectors that a step quantises over all ranks.
        """
        self.go_on_from(points_per_step)

    def go_on_from(self, points_per_step: int) -> None:
        """Take the entries as they are, as if each had been hit equally often."""
        self.cluster_sizes.fill_(points_per_step / self.cluster_sizes.shape[1])

    def apply(self, counts: Tensor, sums: Tensor) -> None:
        """Take what was assigned over all ranks into the averages."""
        self.cluster_sizes[: len(counts)].lerp_(counts, 1.0 - self.recipe.decay)

    def replace_dead(self, candidates: Tensor, ranks: Ranks, *key: Key) -> int:
        """Put vectors of the batch in place of entries that are hardly hit; returns how many.

        ``candidates``: of this rank, [q, C, D]. All ranks must call; the same entries become the
        same vectors on each.
        """
        return 0

    def use(self) -> Mapping[str, list[float]]:
        """Per codebook: ``perplexity`` of the entries, and the share of them that is hit."""
        shares = self.cluster_sizes / self.cluster_sizes.sum(dim=1, keepdim=True).clamp(min=1e-9)
        entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=1)
        is_hit = shares > 0.05 / shares.shape[1]
        return {"perplexity": entropy.exp().tolist(), "used": is_hit.float().mean(dim=1).tolist()}


class QuantizerTrainer(CodebookTrainer):
    """A quantiser whose entries follow moving averages.

    ``cluster_sums`` [Q, K, D]: moving averages of the sums of the vectors that hit.
    """

    def __init__(self, quantizer: ResidualQuantizer, recipe: QuantizerRecipe) -> None:
        """See ``CodebookTrainer``."""
        books = quantizer.codebooks
        super().__init__(torch.zeros(books.shape[:2], device=books.device), recipe)
        self.quantizer = quantizer
        self.cluster_sums = torch.zeros_like(books)

    def tensors(self) -> dict[str, Tensor]:
        """See ``CodebookTrainer``."""
        return super().tensors() | {"cluster_sums": self.cluster_sums}

    def quantise(self, x: Tensor, num_used: int, mask: Tensor | None = None) -> QuantizerPass:
        """Quantise [B, D, T] with the first ``num_used`` codebooks, in float32.

        ``mask``: bool [B, T], steps that are signal; the others teach nothing. None: all.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.transpose(1, 2).float()
            valid = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
            residual, total = x, torch.zeros_like(x)
            losses, counts, sums, candidates = [], [], [], []
            for book in self.quantizer.codebooks[:num_used]:
                points = residual.detach().flatten(0, 1)
                codes = nearest_entries(points, book)
                entries = book[codes].view_as(residual)
                losses.append(((residual - entries).square().mean(dim=-1) * valid).sum())
                # A product, not an indexed sum: on a GPU that would add in any order.
                hits = F.one_hot(codes, len(book)).to(x.dtype) * valid.view(-1, 1)
                counts.append(hits.sum(dim=0))
                sums.append(hits.T @ points)
                told = points if mask is None else points[mask.flatten()]
                candidates.append(spread_out(told, _NUM_CANDIDATES))
                total = total + self._with_gradient(residual, entries)
                residual = residual - entries
            if self.recipe.gradient == "straight-through":
                total = x + (total - x).detach()
        return QuantizerPass(
            vectors=total.transpose(1, 2),
            commitment=torch.stack(losses).mean() / valid.sum(),
            counts=torch.stack(counts),
            sums=torch.stack(sums),
            candidates=torch.stack(candidates),
        )

    def _with_gradient(self, x: Tensor, entries: Tensor) -> Tensor:
        return rotated(x, entries) if self.recipe.gradient == "rotation" else entries

    def start(self, points: Tensor, points_per_step: int, *key: Key) -> None:
        """Make k-means centres of ``points`` the first entries; see ``CodebookTrainer``."""
        scale = points_per_step / len(points)
        for index, book in enumerate(self.quantizer.codebooks):
            generator = torch.Generator().manual_seed(seed_of(*key, index))
            centres = kmeans(points, len(book), self.recipe.kmeans_steps, generator)
            nearest = nearest_entries(points, centres)
            sizes = torch.bincount(nearest, minlength=len(book)).to(points.dtype) * scale
            book.copy_(centres)
            self.cluster_sizes[index] = sizes
            self.cluster_sums[index] = centres * sizes[:, None]
            points = points - centres[nearest]

    def go_on_from(self, points_per_step: int) -> None:
        """See ``CodebookTrainer``."""
        super().go_on_from(points_per_step)
        self.cluster_sums.copy_(self.quantizer.codebooks * self.cluster_sizes[:, :, None])

    def apply(self, counts: Tensor, sums: Tensor) -> None:
        """Move the entries towards what was assigned to them over all ranks."""
        share = 1.0 - self.recipe.decay
        for index in range(len(counts)):
            sizes = self.cluster_sizes[index].lerp_(counts[index], share)
            vectors = self.cluster_sums[index].lerp_(sums[index], share)
            total = sizes.sum()
            epsilon = self.recipe.epsilon
            smooth = (sizes + epsilon) / (total + len(sizes) * epsilon) * total
            self.quantizer.codebooks[index].copy_(vectors / smooth[:, None])

    def replace_dead(self, candidates: Tensor, ranks: Ranks, *key: Key) -> int:
        """See ``CodebookTrainer``."""
        pool = ranks.stack(candidates).transpose(0, 1).flatten(1, 2)
        num_dead = 0
        for index, vectors in enumerate(pool):
            sizes = self.cluster_sizes[index]
            dead = (sizes < self.recipe.dead_below).nonzero()[:, 0]
            if not len(dead):
                continue
            generator = torch.Generator().manual_seed(seed_of(*key, index))
            picked = torch.randint(len(vectors), (len(dead),), generator=generator)
            entries = vectors[picked.to(vectors.device)]
            self.quantizer.codebooks[index][dead] = entries
            sizes[dead] = self.recipe.dead_below
            self.cluster_sums[index][dead] = entries * self.recipe.dead_below
            num_dead += len(dead)
        return num_dead


def rotated(x: Tensor, entries: Tensor) -> Tensor:
    """``entries``, with the gradient of turning and stretching ``x`` onto them.

    The rotation trick (arXiv 2410.06424, section 4): [..., D].
    """
    with torch.no_grad():
        size = x.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        wanted = entries.norm(dim=-1, keepdim=True)
        source, target = x / size, entries / wanted.clamp(min=1e-6)
        middle = F.normalize(source + target, dim=-1, eps=1e-6)
    turned = x - 2 * (x * middle).sum(dim=-1, keepdim=True) * middle
    turned = turned + 2 * (x * source).sum(dim=-1, keepdim=True) * target
    y: Tensor = turned * (wanted / size)
    return y


def kmeans(points: Tensor, num_centres: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Centres [K, D] of points [P, D]; with fewer points than centres some points come twice."""
    if len(points) >= num_centres:
        chosen = torch.randperm(len(points), generator=generator)[:num_centres]
    else:
        chosen = torch.randint(len(points), (num_centres,), generator=generator)
    centres = points[chosen.to(points.device)].clone()
    for _ in range(num_steps):
        nearest = nearest_entries(points, centres)
        counts = torch.bincount(nearest, minlength=num_centres)[:, None]
        sums = F.one_hot(nearest, num_centres).to(points.dtype).T @ points
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def spread_out(points: Tensor, num_wanted: int) -> Tensor:
    """So many of the points [P, D] at even distances, some twice where there are too few."""
    places = torch.arange(num_wanted, device=points.device) * len(points) // num_wanted
    return points[places]
