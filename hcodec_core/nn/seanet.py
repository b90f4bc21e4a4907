"""SEANet convolutional encoder (arXiv 2009.02095; EnCodec, arXiv 2210.13438, section 3.1).

Shape letters: B batch, D feature, N sample, T frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.conv import EdgeConv1d, PadMode
from hcodec_core.nn.lengths import Lengths


@dataclass(frozen=True)
class SeanetConfig:
    """Shape of a SEANet encoder.

    ``strides`` in the order in which they are used; widths double with each. ``last_kernel`` and
    ``last_stride`` belong to the convolution into ``out_dim``. Residual layer j of a stage has
    dilation ``dilation_base ** j``; its inner width is the stage's over ``compress``.
    """

    num_filters: int
    strides: tuple[int, ...]
    out_dim: int
    last_kernel: int
    last_stride: int = 1
    kernel: int = 7
    residual_kernel: int = 3
    num_residual_layers: int = 1
    dilation_base: int = 2
    compress: int = 2
    has_conv_shortcut: bool = True
    pad_mode: PadMode = "reflect"
    is_causal: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels before each stage, and after the last one."""
        return tuple(self.num_filters * 2**i for i in range(len(self.strides) + 1))

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.strides) * self.last_stride

    def conv(self, in_dim: int, out_dim: int, kernel: int, **options: Any) -> EdgeConv1d:
        """A convolution with this encoder's padding."""
        return EdgeConv1d(
            in_dim, out_dim, kernel, pad_mode=self.pad_mode, is_causal=self.is_causal, **options
        )


class SeanetResidual(nn.Module):
    """ELU, conv k3 to the inner width, ELU, conv k1 back; plus the input or a k1 conv of it."""

    def __init__(self, config: SeanetConfig, dim: int, dilation: int) -> None:
        """Build for ``dim`` channels."""
        super().__init__()
        inner = dim // config.compress
        self.conv1 = config.conv(dim, inner, config.residual_kernel, dilation=dilation)
        self.conv2 = config.conv(inner, dim, 1)
        self.shortcut = config.conv(dim, dim, 1) if config.has_conv_shortcut else None

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, D, T]."""
        inner = F.elu(self.conv1(F.elu(x), lengths))
        skip = x if self.shortcut is None else self.shortcut(x, lengths)
        y: Tensor = skip + self.conv2(inner, lengths)
        return y


class SeanetStage(nn.Module):
    """Residual layers, ELU, and a strided convolution that doubles the width."""

    def __init__(self, config: SeanetConfig, dim: int, stride: int) -> None:
        """Build for ``dim`` channels."""
        super().__init__()
        self.residuals = nn.ModuleList(
            SeanetResidual(config, dim, config.dilation_base**j)
            for j in range(config.num_residual_layers)
        )
        self.down = config.conv(dim, 2 * dim, 2 * stride, stride=stride)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, 2 D, ceil(T / stride)]."""
        for residual in self.residuals:
            x = residual(x, lengths)
        y: Tensor = self.down(F.elu(x), lengths)
        return y


class SeanetEncoder(nn.Module):
    """Audio to frames: conv, stages, an optional module on frames, ELU, conv.

    ``middle`` maps ([B, D, T], lengths) to [B, middle_dim, T]: a transformer in H-Codec, an LSTM
    in others.
    """

    def __init__(
        self,
        config: SeanetConfig,
        middle: nn.Module | None = None,
        middle_dim: int | None = None,
    ) -> None:
        """Build the encoder; ``middle_dim`` None: ``middle`` keeps the width."""
        super().__init__()
        widths = config.widths
        self.strides = config.strides
        self.conv_in = config.conv(1, config.num_filters, config.kernel)
        self.stages = nn.ModuleList(
            SeanetStage(config, dim, stride)
            for dim, stride in zip(widths, config.strides, strict=False)
        )
        self.middle = middle
        self.conv_out = config.conv(
            middle_dim or widths[-1],
            config.out_dim,
            config.last_kernel,
            stride=config.last_stride,
        )

    def forward(self, audio: Tensor, lengths: Lengths) -> Tensor:
        """[B, 1, N] -> [B, out_dim, ceil(N / hop_length)]; past a row's end anything finite."""
        x = self.conv_in(audio, lengths)
        for stage, stride in zip(self.stages, self.strides, strict=True):
            x = stage(x, lengths)
            lengths = lengths.divided(stride)
        if self.middle is not None:
            x = self.middle(x, lengths)
        y: Tensor = self.conv_out(F.elu(x), lengths)
        return y
