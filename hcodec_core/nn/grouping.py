"""Runs of similar frames as groups: the arithmetic of an adaptive frame rate.

FlexiCodec (arXiv 2510.00981) and H-Codec 1.5. Shape letters: B batch, D feature, G group, T frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcodec_core.nn.lengths import Lengths


def similarity_to_previous(x: Tensor) -> Tensor:
    """Cosine between each step of [B, D, T] and the one before: float64 [B, T], -inf for the first.

    In float64 whatever ``x`` is, since boundaries hang on a comparison with it; at most 1, so that
    a threshold of 1 keeps even equal steps apart. A step of zeros is like nothing (0).
    """
    exact = x.double()
    norms = torch.linalg.vector_norm(exact, dim=1)
    products = (exact[:, :, 1:] * exact[:, :, :-1]).sum(dim=1)
    cosines = products / (norms[:, 1:] * norms[:, :-1]).clamp(min=1e-16)
    first = cosines.new_full((len(x), 1), -torch.inf)
    return torch.cat((first, cosines.clamp(max=1.0)), dim=1)


def split_long_runs(starts: Tensor, max_span: int) -> Tensor:
    """``starts`` (bool [B, T]) with further ones every ``max_span`` steps from each of them on."""
    steps = torch.arange(starts.shape[1], device=starts.device)
    run_starts = torch.where(starts, steps, 0).cummax(dim=1).values
    return starts | ((steps - run_starts) % max_span == 0)


class Groups:
    """Frames of each row as groups that follow each other.

    index: int64 [B, T], group of each frame. first: int64 [B, G], first frame of each group (T
    where there is none). spans: int64 [B, G], frames in each. lengths: valid groups, of ``size`` G.
    Frames past a row's end are groups of one frame behind its own.
    """

    def __init__(self, starts: Tensor, frames: Lengths) -> None:
        """Take the first frames of groups, bool [B, T]; frame 0 is one whatever it says."""
        batch, num_steps = starts.shape
        starts = starts | frames.padding
        starts[:, 0] = True
        self.frames = frames
        self.index = starts.long().cumsum(dim=1) - 1
        num_groups = self.index.gather(1, frames.valid[:, None] - 1)[:, 0] + 1
        # The number of groups of a batch must not follow from its rows together. One row is its
        # own company.
        size = int(num_groups[0]) if batch == 1 else num_steps
        self.lengths = Lengths(num_groups, size)
        numbers = torch.arange(size + 1, device=starts.device).expand(batch, -1).contiguous()
        bounds = torch.searchsorted(self.index, numbers)
        self.first, self.spans = bounds[:, :-1], bounds.diff(dim=1)

    @property
    def interleaved(self) -> Lengths:
        """Lengths of frames with one more step after each group's last frame, T + G in all."""
        return Lengths(self.frames.valid + self.lengths.valid, self.frames.size + self.lengths.size)

    @property
    def frame_places(self) -> Tensor:
        """Where each frame stands among ``interleaved`` steps: int64 [B, T]."""
        steps = torch.arange(self.frames.size, device=self.index.device)
        return steps + self.index.clamp(max=self.lengths.size)

    @property
    def group_places(self) -> Tensor:
        """Where each group's own step stands among ``interleaved`` steps: int64 [B, G]."""
        numbers = torch.arange(self.lengths.size, device=self.index.device)
        return self.first + self.spans + numbers

    def means(self, x: Tensor, max_span: int) -> Tensor:
        """Mean of each group's frames: [B, T, D] -> [B, G, D]; spans are at most ``max_span``.

        Summed in the order of time, so that nothing but the frames themselves decides the bits, and
        in float32 or better.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = torch.zeros(len(x), self.lengths.size, x.shape[2], device=x.device, dtype=x.dtype)
        for offset in range(max_span):
            frames = (self.first + offset).clamp(max=self.frames.size - 1)
            inside = (offset < self.spans)[:, :, None]
            total = total + taken(x, frames).masked_fill(~inside, 0.0)
        return total / self.spans.clamp(min=1)[:, :, None]


def taken(x: Tensor, places: Tensor) -> Tensor:
    """Steps ``places`` (int64 [B, G]) of [B, T, D]: [B, G, D]."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


def spread(x: Tensor, spans: Tensor, num_steps: int) -> Tensor:
    """Each of G steps repeated over its span: [B, D, G] -> [B, D, num_steps].

    Args:
        x: Steps to repeat.
        spans: int64 [B, G], 0 for steps that are not wanted, none between wanted ones.
        num_steps: Steps out; what is past a row's sum of spans repeats its last step.
    """
    steps = torch.arange(num_steps, device=x.device).expand(len(x), -1).contiguous()
    places = torch.searchsorted(spans.cumsum(dim=1), steps, right=True)
    index = places.clamp(max=x.shape[2] - 1)[:, None, :].expand(-1, x.shape[1], -1)
    return x.gather(2, index)
