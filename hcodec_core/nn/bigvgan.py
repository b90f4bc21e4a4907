"""BigVGAN generator: mel spectrogram to waveform (arXiv 2206.04658; version 2 of NVIDIA/BigVGAN).

The kind with ``snakebeta`` on a logarithmic scale and ``resblock`` "1". Deliberate differences:
rows of a batch end at their own lengths; weight norm is folded when a checkpoint is converted.
Shape letters: B batch, D feature, T mel frame, N sample.
"""

from __future__ import annotations

from torch import Tensor, nn

from hcodec_core.nn.bigvgan_config import BigVganConfig
from hcodec_core.nn.conv import EdgeConv1d
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.snake import AliasFreeSnake, half_band_filter

_OUTER_KERNEL = 7


class BigVganGenerator(nn.Module):
    """Mel frames to samples in -1..1 by alternating up-sampling and residual blocks."""

    def __init__(self, config: BigVganConfig) -> None:
        """Build the generator."""
        super().__init__()
        self.config = config
        self.conv_in = _zero_padded(config.num_mels, config.initial_dim, _OUTER_KERNEL)
        self.stages = nn.ModuleList(
            BigVganStage(config, index) for index in range(len(config.upsample_rates))
        )
        self.activation = AliasFreeSnake(config.widths[-1])
        self.conv_out = _zero_padded(
            config.widths[-1], 1, _OUTER_KERNEL, has_bias=config.has_final_bias
        )

    def forward(self, mel: Tensor, lengths: Lengths) -> Tensor:
        """Natural-log mel [B, num_mels, T] -> audio [B, 1, T * hop_length]."""
        taps = half_band_filter(mel)
        x = self.conv_in(mel, lengths)
        for stage, rate in zip(self.stages, self.config.upsample_rates, strict=True):
            x = stage(x, lengths, taps)
            lengths = lengths.multiplied(rate)
        x = self.conv_out(self.activation(x, lengths, taps), lengths)
        audio: Tensor = x.tanh() if self.config.has_final_tanh else x.clamp(-1.0, 1.0)
        return audio


class BigVganStage(nn.Module):
    """Transposed convolution, then the mean of residual blocks of different kernels."""

    def __init__(self, config: BigVganConfig, index: int) -> None:
        """Build stage ``index``."""
        super().__init__()
        dim = config.widths[index]
        kernel = config.upsample_kernels[index]
        self.rate = config.upsample_rates[index]
        self.up = nn.ConvTranspose1d(
            2 * dim, dim, kernel, stride=self.rate, padding=(kernel - self.rate) // 2
        )
        self.blocks = nn.ModuleList(
            AmpBlock(dim, kernel, config.block_dilations) for kernel in config.block_kernels
        )

    def forward(self, x: Tensor, lengths: Lengths, taps: Tensor) -> Tensor:
        """[B, 2 D, T] -> [B, D, T * rate]."""
        x = self.up(lengths.zero_past(x))
        lengths = lengths.multiplied(self.rate)
        total = self.blocks[0](x, lengths, taps)
        for block in self.blocks[1:]:
            total = total + block(x, lengths, taps)
        y: Tensor = total / len(self.blocks)
        return y


class AmpBlock(nn.Module):
    """Steps of (snake, dilated conv, snake, conv), each added to its input."""

    def __init__(self, dim: int, kernel: int, dilations: tuple[int, ...]) -> None:
        """Build for ``dim`` channels."""
        super().__init__()
        self.activations1 = nn.ModuleList(AliasFreeSnake(dim) for _ in dilations)
        self.convs1 = nn.ModuleList(
            _zero_padded(dim, dim, kernel, dilation=dilation) for dilation in dilations
        )
        self.activations2 = nn.ModuleList(AliasFreeSnake(dim) for _ in dilations)
        self.convs2 = nn.ModuleList(_zero_padded(dim, dim, kernel) for _ in dilations)

    def forward(self, x: Tensor, lengths: Lengths, taps: Tensor) -> Tensor:
        """[B, D, N] -> [B, D, N]."""
        for snake1, conv1, snake2, conv2 in zip(
            self.activations1, self.convs1, self.activations2, self.convs2, strict=True
        ):
            inner = conv1(snake1(x, lengths, taps), lengths)
            x = x + conv2(snake2(inner, lengths, taps), lengths)
        return x


def _zero_padded(
    in_dim: int, out_dim: int, kernel: int, *, dilation: int = 1, has_bias: bool = True
) -> EdgeConv1d:
    return EdgeConv1d(
        in_dim, out_dim, kernel, dilation=dilation, pad_mode="constant", has_bias=has_bias
    )
