"""One vector for each group of frames (FlexiCodec, arXiv 2510.00981; H-Codec 1.5).

Shape letters: B batch, D feature, G group, T frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcodec_core.nn.grouping import Groups, taken
from hcodec_core.nn.projected_transformer import ProjectedTransformer
from hcodec_core.nn.transformer_config import TransformerConfig


class QueryAggregator(nn.Module):
    """A query after each group's last frame, all through a transformer, the queries read out.

    A query starts as the mean of its group's frames plus a learned vector. Attention sees the whole
    row, as in the published code (whose ``context`` has no effect on a model that is not causal).
    """

    def __init__(self, config: TransformerConfig, max_span: int) -> None:
        """Build for groups of up to ``max_span`` frames."""
        super().__init__()
        self.max_span = max_span
        self.query = nn.Parameter(0.02 * torch.randn(config.dim))
        self.transformer = ProjectedTransformer(config, config.dim, config.dim)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """[B, D, T] -> [B, D, G]; past a row's groups anything finite."""
        rows = x.transpose(1, 2)
        queries = groups.means(rows, self.max_span) + self.query
        lengths = groups.interleaved
        places = torch.cat((groups.frame_places, groups.group_places), dim=1)
        steps = torch.cat((rows, queries), dim=1)
        # The places are a permutation: no two steps are written to one.
        mixed = torch.empty_like(steps).scatter(1, places[:, :, None].expand_as(steps), steps)
        mixed = self.transformer(mixed.transpose(1, 2), lengths).transpose(1, 2)
        return taken(mixed, groups.group_places).transpose(1, 2)
