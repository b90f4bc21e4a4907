"""Clips and their tokens, one at a time: what goes into an engine and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hcodec_core.tokens import Codes

Clip = npt.NDArray[np.float32]
Cuts = Sequence[int]
"""Base frames of a clip at which a token has to begin."""


@dataclass(frozen=True)
class ClipTokens:
    """Tokens of one clip: codes per stream int32 [Q, T], T = num_frames.

    num_samples: length of the audio at the codec's sample rate. frame_spans: int32 [T], base frames
    per token, only for variable rates.
    """

    codes: Mapping[str, Codes]
    num_frames: int
    num_samples: int
    frame_spans: npt.NDArray[np.int32] | None = None

    def part(self, first: int, end: int, num_samples: int) -> ClipTokens:
        """Tokens ``first`` to ``end`` as a clip of their own, of ``num_samples`` samples."""
        spans = self.frame_spans
        return ClipTokens(
            {name: codes[:, first:end] for name, codes in self.codes.items()},
            end - first,
            num_samples,
            None if spans is None else spans[first:end],
        )
