"""A bidirectional LSTM whose backward pass starts at each row's true end.

Shape letters: B batch, D feature, T step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcodec_core.nn.lengths import Lengths


class BiLstm(nn.Module):
    """Bidirectional LSTM with the input, once per direction, added (EnCodec's ``SLSTM``).

    The backward pass runs over each row reversed in place, not over packed sequences: those
    multiply as many rows as are still alive at a step, so that a row's bits depend on its
    neighbours' lengths (seen on a CPU: 8e-8 off). Reversing gives the same bits.
    """

    def __init__(self, dim: int, num_layers: int) -> None:
        """Build for ``dim`` features in, 2 * ``dim`` out."""
        super().__init__()
        widths = [dim] + [2 * dim] * (num_layers - 1)
        self.ahead = nn.ModuleList(nn.LSTM(width, dim, batch_first=True) for width in widths)
        self.back = nn.ModuleList(nn.LSTM(width, dim, batch_first=True) for width in widths)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """[B, D, T] -> [B, 2 D, T]; past a row's end anything finite."""
        order = reversed_steps(lengths)
        y = x.transpose(1, 2)
        for ahead, back in zip(self.ahead, self.back, strict=True):
            forwards, _ = ahead(y)
            backwards, _ = back(_reordered(y, order))
            y = torch.cat((forwards, _reordered(backwards, order)), dim=2)
        return y.transpose(1, 2) + torch.cat((x, x), dim=1)


def reversed_steps(lengths: Lengths) -> Tensor:
    """Int64 [B, T]: each row's valid steps in reverse order, the padding left where it is."""
    steps = torch.arange(lengths.size, device=lengths.valid.device)
    ends = lengths.valid[:, None]
    return torch.where(steps < ends, ends - 1 - steps, steps)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))
