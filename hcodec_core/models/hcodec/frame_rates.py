"""How many tokens H-Codec 1.5 makes of audio at which threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from hcodec_core.models.hcodec.model import AdaptiveHCodec
from hcodec_core.nn.grouping import similarity_to_previous


@dataclass(frozen=True)
class FrameRate:
    """What was measured at one threshold. ``bits_per_token``: codes of both streams and the span.

    span_shares: share of the tokens that span 1, 2, ... base frames.
    """

    threshold: float
    num_tokens: int
    audio_seconds: float
    bits_per_token: float
    span_shares: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Mean frame rate, Hz."""
        return self.num_tokens / self.audio_seconds

    @property
    def bits_per_second(self) -> float:
        """Mean bit rate without entropy coding."""
        return self.tokens_per_second * self.bits_per_token


def measure_frame_rates(
    codec: AdaptiveHCodec,
    clips: Sequence[npt.NDArray[np.float32]],
    thresholds: Sequence[float],
) -> list[FrameRate]:
    """Mean frame rate over all ``clips`` at each threshold, without encoding them anew for each.

    Args:
        codec: Its own threshold plays no part.
        clips: float32 [N] at the codec's sample rate, at least one sample each.
        thresholds: Each above 0 and at most 1.
    """
    spans: list[list[npt.NDArray[np.int64]]] = [[] for _ in thresholds]
    codec.eval()
    with torch.inference_mode():
        for clip in clips:
            size = torch.tensor([len(clip)], device=codec.device)
            audio = torch.from_numpy(clip).to(codec.device, codec.dtype)
            padded = F.pad(audio, (0, -len(clip) % codec.hop_length))[None, None]
            latents, frames = codec.embed(padded, size)
            similarity = similarity_to_previous(latents["semantic"])
            for found, threshold in zip(spans, thresholds, strict=True):
                groups = codec.groups(similarity - threshold, frames)
                found.append(groups.spans[0].cpu().numpy())
    seconds = sum(len(clip) for clip in clips) / codec.sample_rate
    bits = sum(stream.num_codebooks * log2(stream.codebook_size) for stream in codec.streams)
    bits += log2(codec.max_frame_span)
    rates = []
    for threshold, found in zip(thresholds, spans, strict=True):
        counts = np.bincount(np.concatenate(found), minlength=codec.max_frame_span + 1)[1:]
        shares = tuple((counts / counts.sum()).tolist())
        rates.append(FrameRate(threshold, int(counts.sum()), seconds, bits, shares))
    return rates
