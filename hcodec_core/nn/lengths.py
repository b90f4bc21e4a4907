"""How much of each row of a padded batch is signal.

Every layer that looks along time takes a ``Lengths`` beside its tensor, so that a clip's result
depends on its own samples alone. Skipping a mask where nothing is padded is allowed only where
the masked and the unmasked path give the same bits (copies and zero fills, never sums).

Shape letters: B batch, D feature, T step.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Lengths:
    """Valid steps of each row (int64 [B], 1..size) of a tensor of ``size`` steps."""

    def __init__(self, valid: Tensor, size: int) -> None:
        """Keep the lengths; asks for no value of a tensor on an accelerator."""
        self.valid = valid
        self.size = size

    @cached_property
    def padding(self) -> Tensor:
        """Bool [B, T]: true past each row's end."""
        steps = torch.arange(self.size, device=self.valid.device)
        return steps >= self.valid[:, None]

    @cached_property
    def is_full(self) -> bool:
        """Whether no row is known to be padded (always false off the CPU, to spare a wait)."""
        return self.valid.device.type == "cpu" and bool((self.valid == self.size).all())

    @cached_property
    def attention_mask(self) -> Tensor:
        """Bool [B, 1, 1, T]: keys that may be attended to."""
        return ~self.padding[:, None, None, :]

    def zero_past(self, x: Tensor) -> Tensor:
        """``x`` [B, D, T] with zeros past each row's end."""
        return x if self.is_full else x.masked_fill(self.padding[:, None, :], 0.0)

    def zero_past_rows(self, x: Tensor) -> Tensor:
        """``x`` [B, T, D] with zeros past each row's end."""
        return x if self.is_full else x.masked_fill(self.padding[:, :, None], 0.0)

    def divided(self, stride: int) -> Lengths:
        """Lengths after a layer that takes every ``stride``-th step, the last one included."""
        if stride == 1:
            return self
        return Lengths((self.valid + stride - 1) // stride, -(-self.size // stride))

    def multiplied(self, factor: int) -> Lengths:
        """Lengths after a layer that makes ``factor`` steps of each."""
        return self if factor == 1 else Lengths(self.valid * factor, self.size * factor)

    def unpadded_conv(self, kernel_size: int, stride: int) -> Lengths:
        """Lengths after a convolution without padding."""
        return Lengths(
            (self.valid - kernel_size) // stride + 1, (self.size - kernel_size) // stride + 1
        )
