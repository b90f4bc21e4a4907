"""Discriminators of waveforms: by period, by resolution, and by sub-band of complex spectra.

H-Codec names these three kinds; their shapes are not published, so those of the papers cited are
taken. Each returns scores of any shape and the features of its layers.

Shape letters: B batch, C channel, N sample, T frame, F frequency.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from hcodec_core.training.losses import stft
from hcodec_core.training.recipe import DiscriminatorRecipe

_SLOPE = 0.1


@dataclass(frozen=True)
class Judgement:
    """Scores and inner features (without the scores) of each discriminator."""

    scores: list[Tensor]
    features: list[list[Tensor]]


class _Stack(nn.Module):
    """Convolutions with leaky ReLUs between them; the last one gives scores."""

    def __init__(self, layers: Sequence[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.last = last

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.last(x), features


class PeriodDiscriminator(nn.Module):
    """Looks at every ``period``-th sample (HiFi-GAN, arXiv 2010.05646, section 2.3)."""

    def __init__(self, period: int, width: int) -> None:
        """``width``: channels of the first layer; four times as many in the next two."""
        super().__init__()
        self.period = period
        widths = (1, width, 4 * width, 16 * width, 32 * width)
        layers = [_conv(a, b, (5, 1), (3, 1)) for a, b in itertools.pairwise(widths)]
        layers.append(_conv(widths[-1], widths[-1], (5, 1), (1, 1)))
        self.stack = _Stack(layers, _conv(widths[-1], 1, (3, 1), (1, 1)))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 1, N] -> scores, features."""
        x = F.pad(audio, (0, -audio.shape[2] % self.period), mode="reflect")
        result: tuple[Tensor, list[Tensor]] = self.stack(x.view(*x.shape[:2], -1, self.period))
        return result


class ResolutionDiscriminator(nn.Module):
    """Looks at magnitudes of one spectrogram (UnivNet, arXiv 2106.07889, section 2.2)."""

    def __init__(self, window: int, width: int) -> None:
        """``window`` in samples."""
        super().__init__()
        self.window = window
        layers = [
            _conv(1, width, (9, 3), (1, 1)),
            *(_conv(width, width, (9, 3), (2, 1)) for _ in range(3)),
            _conv(width, width, (3, 3), (1, 1)),
        ]
        self.stack = _Stack(layers, _conv(width, 1, (3, 3), (1, 1)))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 1, N] -> scores, features."""
        result: tuple[Tensor, list[Tensor]] = self.stack(stft(audio, self.window).abs()[:, None])
        return result


class SubbandDiscriminator(nn.Module):
    """Looks at sub-bands of one complex spectrogram, each by its own layers (DAC, 3.4)."""

    def __init__(self, window: int, width: int, edges: Sequence[float]) -> None:
        """``window`` in samples; ``edges``: of the bands, as shares of the frequencies."""
        super().__init__()
        self.window = window
        num_bins = window // 2 + 1
        places = [round(edge * num_bins) for edge in edges]
        self.bands = tuple(itertools.pairwise(places))
        self.stacks = nn.ModuleList(nn.ModuleList(_band_layers(width)) for _ in self.bands)
        self.last = _conv(width, 1, (3, 3), (1, 1))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, 1, N] -> scores, features."""
        spectra = torch.view_as_real(stft(audio, self.window)).permute(0, 3, 1, 2)
        features, ends = [], []
        for (low, high), stack in zip(self.bands, self.stacks, strict=True):
            x = spectra[:, :, low:high]
            assert isinstance(stack, nn.ModuleList)
            for layer in stack:
                x = F.leaky_relu(layer(x), _SLOPE)
                features.append(x)
            ends.append(x)
        return self.last(torch.cat(ends, dim=2)), features


class Discriminators(nn.Module):
    """All discriminators of a recipe."""

    def __init__(self, recipe: DiscriminatorRecipe) -> None:
        """Build with random weights."""
        super().__init__()
        self.members = nn.ModuleList(
            [
                *(PeriodDiscriminator(p, recipe.period_width) for p in recipe.periods),
                *(ResolutionDiscriminator(w, recipe.resolution_width) for w in recipe.resolutions),
                *(
                    SubbandDiscriminator(w, recipe.subband_width, recipe.subband_edges)
                    for w in recipe.subband_windows
                ),
            ]
        )

    def forward(self, audio: Tensor) -> Judgement:
        """Judge [B, 1, N]."""
        judged = [member(audio) for member in self.members]
        return Judgement([scores for scores, _ in judged], [features for _, features in judged])


def _conv(in_dim: int, out_dim: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    conv: nn.Module = weight_norm(nn.Conv2d(in_dim, out_dim, kernel, stride, padding))
    return conv


def _band_layers(width: int) -> list[nn.Module]:
    return [
        _conv(2, width, (9, 3), (1, 1)),
        *(_conv(width, width, (9, 3), (2, 1)) for _ in range(3)),
        _conv(width, width, (3, 3), (1, 1)),
    ]
