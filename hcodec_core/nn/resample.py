"""Resampling inside a codec, where the released models fix the filter.

The corpus itself is resampled by a far better filter before it gets here (see ``audio``); this one
is part of what a model was trained with. Shape letters: B batch, N sample.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from hcodec_core.nn.lengths import Lengths

_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99


def sinc_resample(audio: Tensor, lengths: Lengths, from_rate: int, to_rate: int) -> Tensor:
    """Audio [B, N] at another rate, [B, ceil(N * to_rate / from_rate)], zero past each row's end.

    A windowed sinc as ``torchaudio.transforms.Resample`` has by default: 6 zero crossings on each
    side under a squared cosine, cut off at 0.99 of the lower Nyquist rate; filters computed in
    float64.

    Args:
        audio: Zero past each row's end; beyond both ends the signal counts as silence.
        lengths: Valid samples.
        from_rate: Rate of ``audio``, Hz.
        to_rate: Rate wanted, Hz.
    """
    ratio = Fraction(to_rate, from_rate)
    if ratio == 1:
        return audio
    num_in, num_out = ratio.denominator, ratio.numerator
    filters, reach = _filters(num_in, num_out)
    padded = F.pad(audio, (reach, reach + num_in))[:, None]
    # Not in half precision under autocast: this is the signal itself.
    with torch.autocast(audio.device.type, enabled=False):
        # Output s of each step is the phase s of ``num_out`` phases.
        phases = F.conv1d(padded, filters.to(audio)[:, None], stride=num_in)
    valid = -(-lengths.valid * num_out // num_in)
    resampled = Lengths(valid, -(-lengths.size * num_out // num_in))
    # The filter rings past a row's end; a single file is cut there.
    flat = phases.transpose(1, 2).flatten(1)[:, None, : resampled.size]
    return resampled.zero_past(flat)[:, 0]


def _filters(num_in: int, num_out: int) -> tuple[Tensor, int]:
    """Filters [num_out, taps] (float64) that make ``num_out`` samples of ``num_in``; their reach.

    ``reach`` is the number of samples of the input before the first one that a filter sees.
    """
    cutoff = min(num_in, num_out) * _ROLLOFF
    reach = ceil(_ZERO_CROSSINGS * num_in / cutoff)
    inputs = torch.arange(-reach, reach + num_in, dtype=torch.float64) / num_in
    outputs = torch.arange(num_out, dtype=torch.float64) / num_out
    times = ((inputs - outputs[:, None]) * cutoff).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(times * torch.pi / (2 * _ZERO_CROSSINGS)).square()
    return torch.sinc(times) * window * (cutoff / num_in), reach
