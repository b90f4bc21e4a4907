"""Convolutions along time that treat each row's true end as the end of the signal.

Shape letters: B batch, D feature, T step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.lengths import Lengths

PadMode = Literal["reflect", "replicate", "constant"]


class EdgeConv1d(nn.Module):
    """Convolution whose window slides over the signal extended at both true ends.

    EnCodec (arXiv 2210.13438, section 3.1; its ``SConv1d``). With the effective kernel
    k = (kernel_size - 1) * dilation + 1 the padding is k - stride in all: to the left when causal,
    else half each with the odd one left; on the right also what completes the last window. T steps
    become ceil(T / stride). A signal not longer than its padding is first extended with zeros on
    the right. Weight norm of released checkpoints is folded when they are converted.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        pad_mode: PadMode = "reflect",
        is_causal: bool = False,
        has_bias: bool = True,
    ) -> None:
        """Build the convolution; dimensions are channels, the rest is in steps."""
        super().__init__()
        padding = (kernel_size - 1) * dilation + 1 - stride
        assert padding >= 0, "a stride longer than the kernel skips signal"
        self.stride = stride
        self.right = 0 if is_causal else padding // 2
        self.left = padding - self.right
        self.pad_mode = pad_mode
        self.conv = nn.Conv1d(
            in_dim, out_dim, kernel_size, stride=stride, dilation=dilation, bias=has_bias
        )

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, ceil(T / stride)]; past a row's end anything finite."""
        x = pad_ends(x, lengths, self.left, self.right, self.stride, self.pad_mode)
        y: Tensor = self.conv(x)
        return y


def pad_ends(
    x: Tensor, lengths: Lengths, left: int, right: int, stride: int, mode: PadMode
) -> Tensor:
    """Extend each row of ``x`` [B, D, T] at its true ends.

    Row b gets ``left`` steps before, and after its last valid step ``right`` plus what makes its
    length a multiple of ``stride``. The result has ceil(T / stride) * stride + left + right steps.
    """
    if left + right + stride == 1:
        return x
    extra = -lengths.size % stride
    longest_pad = max(left, right + extra)
    if lengths.is_full and lengths.size > longest_pad:
        # The general path below copies the same values; this one is one kernel.
        return F.pad(x, (left, right + extra), mode=mode)
    x = F.pad(lengths.zero_past(x), (left, right + extra))
    if mode != "constant":
        _fill_left(x, lengths, left, mode)
        _fill_right(x, lengths, left, right, stride, mode)
    return x


def _fill_left(padded: Tensor, lengths: Lengths, left: int, mode: PadMode) -> None:
    if mode == "replicate":
        padded[:, :, :left] = padded[:, :, left : left + 1]
        return
    # Zeros past the end already stand for the extension of a short signal, but the tensor itself
    # may be shorter than the reflection.
    available = padded.shape[2] - left - 1
    taken = min(left, available)
    padded[:, :, left - taken : left] = padded[:, :, left + 1 : left + 1 + taken].flip(2)


def _fill_right(
    padded: Tensor, lengths: Lengths, left: int, right: int, stride: int, mode: PadMode
) -> None:
    if right + stride == 1:
        return
    ends = lengths.valid[:, None]
    own_right = right + (-ends) % stride
    # Rows that need fewer steps than others write their last one again.
    steps = torch.arange(right + stride - 1, device=padded.device)[None, :]
    target = ends + torch.minimum(steps, own_right - 1)
    if mode == "replicate":
        source = (ends - 1).expand_as(target)
    else:
        extended = torch.maximum(ends, own_right.clamp(min=left) + 1)
        source = torch.where(target < extended, target, 2 * (extended - 1) - target)
    index = (source + left)[:, None, :].expand(-1, padded.shape[1], -1)
    values = padded.gather(2, index).masked_fill((source >= ends)[:, None, :], 0.0)
    padded.scatter_(2, (target + left)[:, None, :].expand_as(index), values)


class SameConv1d(nn.Module):
    """Convolution of odd kernel over the signal with kernel_size // 2 zeros at both ends.

    T steps become ceil(T / stride).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        has_bias: bool = True,
    ) -> None:
        """Build the convolution; dimensions are channels."""
        super().__init__()
        assert kernel_size % 2 == 1
        self.conv = nn.Conv1d(
            in_dim,
            out_dim,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=has_bias,
        )

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, ceil(T / stride)]; past a row's end anything finite."""
        y: Tensor = self.conv(lengths.zero_past(x))
        return y


class HalfPaddedConv1d(nn.Module):
    """Convolution with (kernel_size - 1) // 2 zeros at both ends: T steps become T / stride.

    The down-sampling layer of X-Codec's semantic encoder (arXiv 2408.17175): kernel 2 * stride when
    stride > 1, else 3. T must be a multiple of the stride.
    """

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        """Build the convolution; dimensions are channels."""
        super().__init__()
        kernel_size = 2 * stride if stride > 1 else 3
        self.conv = nn.Conv1d(
            in_dim, out_dim, kernel_size, stride=stride, padding=(kernel_size - 1) // 2
        )

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T / stride]; past a row's end anything finite."""
        y: Tensor = self.conv(lengths.zero_past(x))
        return y


class RepeatedStepsConv1d(nn.Module):
    """Transposed convolution with kernel 2 * stride: T steps become T * stride.

    The up-sampling layer of X-Codec's semantic decoder; a plain kernel-3 convolution at stride 1.
    """

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        """Build the layer; dimensions are channels."""
        super().__init__()
        self.conv: nn.Conv1d | nn.ConvTranspose1d
        if stride == 1:
            self.conv = nn.Conv1d(in_dim, out_dim, 3, padding=1)
        else:
            self.conv = nn.ConvTranspose1d(
                in_dim,
                out_dim,
                2 * stride,
                stride=stride,
                padding=(stride + 1) // 2,
                output_padding=stride % 2,
            )

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T * stride]; past a row's end anything finite."""
        y: Tensor = self.conv(lengths.zero_past(x))
        return y


class SubPixelUpsample1d(nn.Module):
    """Up-sampling by a pointwise convolution whose channels are spread over time (H-Codec 1.0).

    Channel s * out_dim + c of step t becomes channel c of step t * factor + s; a depthwise
    convolution of kernel 5 follows.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: int) -> None:
        """Build the layer; dimensions are channels."""
        super().__init__()
        self.factor = factor
        self.expand = nn.Conv1d(in_dim, out_dim * factor, 1)
        self.smooth = SameConv1d(out_dim, out_dim, 5, groups=out_dim)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T * factor]; past a row's end anything finite."""
        batch, _, steps = x.shape
        x = self.expand(x).view(batch, self.factor, -1, steps)
        x = x.permute(0, 2, 3, 1).reshape(batch, -1, steps * self.factor)
        y: Tensor = self.smooth(x, lengths.multiplied(self.factor))
        return y


class RepeatUpsample1d(nn.Module):
    """Up-sampling by repeating each step ``factor`` times, then a convolution (H-Codec 2.0)."""

    def __init__(self, in_dim: int, out_dim: int, factor: int) -> None:
        """Build the layer for an even ``factor``; dimensions are channels."""
        super().__init__()
        self.factor = factor
        self.smooth = SameConv1d(in_dim, out_dim, factor + 1)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T * factor]; past a row's end anything finite."""
        repeated = x.repeat_interleave(self.factor, dim=2)
        y: Tensor = self.smooth(repeated, lengths.multiplied(self.factor))
        return y
