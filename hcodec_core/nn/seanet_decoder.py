"""SEANet convolutional decoder, the mirror of ``seanet`` (EnCodec, arXiv 2210.13438, section 3.1).

Shape letters: B batch, D feature, N sample, T frame.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.seanet import SeanetConfig, SeanetResidual


class TrimmedConvTranspose1d(nn.Module):
    """Transposed convolution of kernel 2 * stride without its overhang: T steps become T * stride.

    The ``stride`` surplus steps are cut at the right when causal, else half at each end with the
    odd one at the left.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        stride: int,
        *,
        groups: int = 1,
        is_causal: bool = False,
        has_bias: bool = True,
    ) -> None:
        """Build the convolution; dimensions are channels."""
        super().__init__()
        self.stride = stride
        self.left = 0 if is_causal else stride - stride // 2
        self.conv = nn.ConvTranspose1d(
            in_dim, out_dim, 2 * stride, stride=stride, groups=groups, bias=has_bias
        )

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, in_dim, T] -> [B, out_dim, T * stride]; past a row's end anything finite."""
        y: Tensor = self.conv(lengths.zero_past(x))
        return y[:, :, self.left : self.left + x.shape[2] * self.stride]


class SeanetDecoderStage(nn.Module):
    """ELU, a transposed convolution that halves the width, and residual layers."""

    def __init__(self, config: SeanetConfig, dim: int, stride: int) -> None:
        """Build for ``dim`` channels out."""
        super().__init__()
        self.stride = stride
        self.up = TrimmedConvTranspose1d(2 * dim, dim, stride, is_causal=config.is_causal)
        self.residuals = nn.ModuleList(
            SeanetResidual(config, dim, config.dilation_base**j)
            for j in range(config.num_residual_layers)
        )

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, 2 D, T] -> [B, D, T * stride]."""
        x = self.up(F.elu(x), lengths)
        for residual in self.residuals:
            x = residual(x, lengths.multiplied(self.stride))
        return x


class SeanetDecoder(nn.Module):
    """Frames to audio: conv, stages in the reverse order of ``config.strides``, ELU, conv.

    ``config`` describes the encoder that this decoder mirrors; its ``out_dim`` is the width here of
    what comes in, its ``kernel`` and ``last_kernel`` belong to the first and the last convolution.
    """

    def __init__(self, config: SeanetConfig) -> None:
        """Build the decoder."""
        super().__init__()
        assert config.last_stride == 1
        widths = config.widths
        self.strides = config.strides[::-1]
        self.conv_in = config.conv(config.out_dim, widths[-1], config.kernel)
        self.stages = nn.ModuleList(
            SeanetDecoderStage(config, dim, stride)
            for dim, stride in zip(widths[-2::-1], self.strides, strict=True)
        )
        self.conv_out = config.conv(config.num_filters, 1, config.last_kernel)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, out_dim, T] -> [B, 1, T * hop_length]; past a row's end anything."""
        x = self.conv_in(x, lengths)
        for stage, stride in zip(self.stages, self.strides, strict=True):
            x = stage(x, lengths)
            lengths = lengths.multiplied(stride)
        y: Tensor = self.conv_out(F.elu(x), lengths)
        return y
