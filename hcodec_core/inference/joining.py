"""Tokens of segments to the tokens of a file: halos dropped, lengths and ranges checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hcodec_core.errors import AudioError, QuarantineReason
from hcodec_core.inference.engine import ClipTokens
from hcodec_core.tokens import CodecSpec, Codes


@dataclass(frozen=True)
class FileTokens:
    """Tokens of a whole file: per stream int32 [Q, T]; frame_spans int32 [T] or None."""

    codes: Mapping[str, Codes]
    frame_spans: npt.NDArray[np.int32] | None


def interior_of(tokens: ClipTokens, first_frame: int, end_frame: int | None) -> FileTokens:
    """Tokens of base frames ``first_frame`` to ``end_frame`` (None: the end) of a clip.

    A token of an adaptive rate that lies across a bound keeps the base frames inside: none ever
    spans a cut. (Codecs of this package are told of the bounds and let a token begin there, so
    that none is about frames that are dropped; see ``Engine.encode_clips``.)
    """
    if tokens.frame_spans is None:
        kept = {name: codes[:, first_frame:end_frame] for name, codes in tokens.codes.items()}
        return FileTokens(kept, None)
    ends = np.cumsum(tokens.frame_spans)
    starts = ends - tokens.frame_spans
    bound = int(ends[-1]) if end_frame is None else end_frame
    inside = (ends > first_frame) & (starts < bound)
    spans = np.minimum(ends, bound) - np.maximum(starts, first_frame)
    return FileTokens(
        {name: codes[:, inside] for name, codes in tokens.codes.items()},
        spans[inside].astype(np.int32),
    )


def join(pieces: Sequence[FileTokens], num_samples: int, spec: CodecSpec) -> FileTokens:
    """One contiguous stream from the interiors of all segments of a file.

    ``num_samples``: of the file at the codec's rate. Raises ``AudioError`` (mismatch) when the
    tokens do not fit the audio or a code is out of range.
    """
    spans = [piece.frame_spans for piece in pieces if piece.frame_spans is not None]
    joined = FileTokens(
        {
            stream.name: np.concatenate([piece.codes[stream.name] for piece in pieces], axis=1)
            for stream in spec.streams
        },
        np.concatenate(spans) if spans else None,
    )
    _check(joined, num_samples, spec)
    return joined


def _check(joined: FileTokens, num_samples: int, spec: CodecSpec) -> None:
    expected = spec.num_frames(num_samples)
    for stream in spec.streams:
        codes = joined.codes[stream.name]
        spans = joined.frame_spans
        found = codes.shape[1] if spans is None else int(spans.sum())
        if found != expected or codes.shape[0] != stream.num_codebooks:
            raise AudioError(
                QuarantineReason.MISMATCH,
                f"Stream {stream.name} has {codes.shape[0]} x {found} frames for {num_samples} "
                f"samples; expected {stream.num_codebooks} x {expected}.",
            )
        if codes.size and (codes.min() < 0 or codes.max() >= stream.codebook_size):
            raise AudioError(
                QuarantineReason.MISMATCH,
                f"Stream {stream.name} has codes outside 0..{stream.codebook_size - 1}.",
            )
