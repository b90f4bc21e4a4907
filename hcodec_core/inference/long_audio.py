"""Decoding token rows of any length in bounded memory: in pieces with halos, cross-faded.

A row is cut where the encoder cuts a file (``audio.segments``), so a token of a variable rate is
never torn. Each piece is decoded with a halo of neighbouring tokens on both sides, and the pieces
go over into each other around the cut: decoders that look at everything (attention, norms over
time) give two pieces slightly different levels, and a step would click.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.segments import SegmentRule
from hcodec_core.inference.clips import Clip, ClipTokens

Bounds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenPiece:
    """Some tokens of a row: halo, interior, halo.

    Positions are samples of the whole row: ``start_sample`` of ``tokens``, ``first_sample`` to
    ``end_sample`` the interior.
    """

    tokens: ClipTokens
    start_sample: int
    first_sample: int
    end_sample: int
    is_last: bool


def is_long(num_samples: int, rule: SegmentRule) -> bool:
    """Whether a row is decoded in pieces: whether the encoder cut its file."""
    return num_samples >= rule.segment_samples + rule.min_tail_samples


def token_pieces(clip: ClipTokens, rule: SegmentRule) -> Iterator[TokenPiece]:
    """The pieces of a row, in order; interiors follow each other without gap or overlap."""
    hop = rule.hop_length
    bounds = _bounds(clip)
    ahead = clip.num_samples - rule.min_tail_samples
    cuts = np.arange(rule.segment_samples, ahead + 1, rule.segment_samples) // hop
    # Where a token lies across a cut (tokens of another rule), its beginning is the cut.
    firsts = np.unique(np.searchsorted(bounds, [0, *cuts], side="right") - 1)
    ends = [*firsts[1:], clip.num_frames]
    halo = rule.halo_samples // hop
    for first, end in zip(firsts, ends, strict=True):
        start = max(0, int(np.searchsorted(bounds, bounds[first] - halo, side="right")) - 1)
        stop = min(clip.num_frames, int(np.searchsorted(bounds, bounds[end] + halo)))
        start_sample = int(bounds[start]) * hop
        is_last = end == clip.num_frames
        stop_sample = clip.num_samples if stop == clip.num_frames else int(bounds[stop]) * hop
        yield TokenPiece(
            clip.part(start, stop, stop_sample - start_sample),
            start_sample,
            int(bounds[first]) * hop,
            clip.num_samples if is_last else int(bounds[end]) * hop,
            is_last,
        )


def faded(pieces: Iterable[tuple[TokenPiece, Clip]], fade_samples: int) -> Iterator[Clip]:
    """Audio of a row from the audio of its pieces, float32 [n] each, in order.

    ``fade_samples``: length of the cross-fade around each cut; at most twice the halo.
    """
    half = fade_samples // 2
    rising = ((np.arange(2 * half) + 0.5) / max(1, 2 * half)).astype(np.float32)
    held: Clip | None = None
    for piece, audio in pieces:
        begin = piece.first_sample - piece.start_sample
        end = piece.end_sample - piece.start_sample
        if held is not None:
            around = audio[begin - half : begin + half]
            yield held * (1 - rising) + around * rising
            begin += half
        if not piece.is_last:
            end -= half
        yield audio[begin:end]
        held = audio[end : end + 2 * half]


def _bounds(clip: ClipTokens) -> Bounds:
    """Base frames at which tokens begin, and the end of the last: [T + 1]."""
    if clip.frame_spans is None:
        return np.arange(clip.num_frames + 1)
    return np.concatenate(([0], np.cumsum(clip.frame_spans, dtype=np.int64)))
