"""The ids in which H-Codec 1.5's published tokeniser tells codes and spans at once. No torch here.

There every id of every codebook is code + (span - 1) * codebook_size, span being the base frames of
its token: with spans of 1 to 8 and codebooks of 1024 an id is 0..8191. Our tokens hold plain codes,
and spans once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hcodec_core.errors import ConfigError
from hcodec_core.tokens import Codes

Ids = np.ndarray[Any, np.dtype[np.integer[Any]]]

MAX_FRAME_SPAN = 8
CODEBOOK_SIZE = 1024


def split_offset_ids(
    ids: Mapping[str, Ids],
    codebook_size: int = CODEBOOK_SIZE,
    *,
    num_base_frames: int | None = None,
) -> tuple[dict[str, Codes], npt.NDArray[np.int32]]:
    """Codes and spans of one clip from the published ids.

    Args:
        ids: Per stream integers [Q, T]. Columns at the end whose ids are all below 0 are dropped:
            so the published code pads the shorter clips of a batch.
        codebook_size: Codes of each codebook.
        num_base_frames: What the spans have to add up to, where that is known.

    Returns:
        Codes per stream int32 [Q, T], and spans int32 [T].

    Raises:
        ConfigError: An id is out of range, the ids of a token tell different spans, streams differ
            in length, or the spans do not add up.
    """
    assert ids, "there is no stream"
    trimmed = {stream: _without_padding(stream, values) for stream, values in ids.items()}
    first_stream, first = next(iter(trimmed.items()))
    spans = (first[0] // codebook_size + 1).astype(np.int32)
    for stream, values in trimmed.items():
        _check_range(stream, values, codebook_size * MAX_FRAME_SPAN)
        if values.shape[1] != len(spans):
            raise ConfigError(
                f"Stream {stream!r} has {values.shape[1]} tokens, stream {first_stream!r} "
                f"{len(spans)}."
            )
        bad = np.argwhere(values // codebook_size + 1 != spans)
        if len(bad):
            book, token = (int(i) for i in bad[0])
            raise ConfigError(
                f"Id {int(values[book, token])} of stream {stream!r}, codebook {book}, token "
                f"{token} tells a span of {int(values[book, token]) // codebook_size + 1}; "
                f"codebook 0 of stream {first_stream!r} tells {int(spans[token])}."
            )
    _check_sum(spans, num_base_frames)
    return {s: (values % codebook_size).astype(np.int32) for s, values in trimmed.items()}, spans


def join_offset_ids(
    codes: Mapping[str, Codes],
    frame_spans: npt.NDArray[np.int32],
    codebook_size: int = CODEBOOK_SIZE,
) -> dict[str, npt.NDArray[np.int32]]:
    """The published ids of one clip: per stream int32 [Q, T], in the order of ``codes``.

    Args:
        codes: Per stream [Q, T].
        frame_spans: [T], base frames per token.
        codebook_size: Codes of each codebook.

    Raises:
        ConfigError: A code or a span is out of range, or there are not as many of both.
    """
    outside = (frame_spans < 1) | (frame_spans > MAX_FRAME_SPAN)
    if outside.any():
        token = int(outside.argmax())
        raise ConfigError(
            f"Token {token} spans {int(frame_spans[token])} base frames; ids can tell "
            f"1..{MAX_FRAME_SPAN}."
        )
    offsets = (frame_spans.astype(np.int32) - 1) * codebook_size
    for stream, values in codes.items():
        if values.ndim != 2 or values.shape[1] != len(offsets):
            raise ConfigError(
                f"Codes of stream {stream!r} have shape {values.shape}; expected "
                f"[Q, {len(offsets)}], as there are {len(offsets)} spans."
            )
        _check_range(stream, values, codebook_size)
    return {stream: values.astype(np.int32) + offsets for stream, values in codes.items()}


def _without_padding(stream: str, ids: Ids) -> Ids:
    if ids.ndim != 2 or len(ids) == 0:
        raise ConfigError(f"Ids of stream {stream!r} have shape {ids.shape}; expected [Q, T].")
    used = np.flatnonzero((ids >= 0).any(axis=0))
    return ids[:, : used[-1] + 1 if len(used) else 0]


def _check_range(stream: str, values: Ids, bound: int) -> None:
    bad = np.argwhere((values < 0) | (values >= bound))
    if len(bad):
        book, token = (int(i) for i in bad[0])
        raise ConfigError(
            f"{int(values[book, token])} of stream {stream!r}, codebook {book}, token {token} is "
            f"outside 0..{bound - 1}."
        )


def _check_sum(spans: npt.NDArray[np.int32], num_base_frames: int | None) -> None:
    total = int(spans.sum(dtype=np.int64))
    if num_base_frames is not None and total != num_base_frames:
        raise ConfigError(
            f"The spans add up to {total} base frames; the clip has {num_base_frames}."
        )
