"""Sequences for language models from codes, and back: pure functions with a vocabulary map.

Codes are int [Q, T] (Q codebooks of ``codebook_size``, T frames); sequences are int64. Layouts:

* flat: frame by frame, id = code + codebook_size * codebook. U-Codec's own form (32 books of 256).
* interleaved: steps of two streams in turn, frame by frame, ids as in flat. QuarkAudio draws one
  acoustic step, then one semantic step per frame.
* delay: codebook q shifted right by q steps, pad ids at both ends, [Q, T + Q - 1] (QuarkAudio).
* span offsets: id = code + codebook_size * (span - 1), where an adaptive codec (H-Codec 1.5) says
  in every id how many base frames its token spans.

Special ids (pad, begin, end, one per stream) lie above all codes, so codes keep their ids whatever
specials are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hcodec_core.errors import ConfigError
from hcodec_core.tokens import Codes, StreamSpec

Ids = npt.NDArray[np.int64]
_SPECIALS = ("pad", "begin", "end")


@dataclass(frozen=True)
class Vocabulary:
    """Ids of all codes of some streams, in the order given, and of the special tokens.

    Stream s has the ids ``first_id(s)`` and up, codebook q of it ``codebook_size`` ids from there.
    """

    streams: tuple[StreamSpec, ...]

    def first_id(self, stream_name: str) -> int:
        """Id of code 0 of a stream's first codebook. Raises ``ConfigError``."""
        first = 0
        for stream in self.streams:
            if stream.name == stream_name:
                return first
            first += stream.num_codebooks * stream.codebook_size
        raise ConfigError(f"The vocabulary has no stream {stream_name!r}.")

    @property
    def num_codes(self) -> int:
        """Ids of codes; the special ids come after them."""
        return sum(stream.num_codebooks * stream.codebook_size for stream in self.streams)

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of ``pad``, ``begin``, ``end`` and of ``<stream>``, which announces a stream."""
        names = (*_SPECIALS, *(f"<{stream.name}>" for stream in self.streams))
        return {name: self.num_codes + index for index, name in enumerate(names)}

    def __len__(self) -> int:
        """Number of ids: rows of an embedding table."""
        return self.num_codes + len(self.special_ids)

    def describe(self) -> dict[str, Any]:
        """The map as plain values, to store beside a model."""
        return {
            "size": len(self),
            "streams": [
                {**stream.model_dump(), "first_id": self.first_id(stream.name)}
                for stream in self.streams
            ],
            "special_ids": self.special_ids,
        }


def flatten(codes: Codes, codebook_size: int, first_id: int = 0) -> Ids:
    """Codes [Q, T] as ids [T * Q], frame-major. Raises ``ConfigError`` for a code out of range."""
    _check(codes, codebook_size)
    offsets = first_id + codebook_size * np.arange(len(codes), dtype=np.int64)
    return np.ascontiguousarray((codes + offsets[:, None]).T).reshape(-1)


def unflatten(ids: Ids, num_codebooks: int, codebook_size: int, first_id: int = 0) -> Codes:
    """Inverse of ``flatten``. Raises ``ConfigError`` for ids that it cannot have made."""
    if num_codebooks < 1 or len(ids) % num_codebooks:
        raise ConfigError(f"{len(ids)} ids are no frames of {num_codebooks} codebooks.")
    offsets = first_id + codebook_size * np.arange(num_codebooks, dtype=np.int64)
    codes = ids.reshape(-1, num_codebooks).T - offsets[:, None]
    _check(codes, codebook_size)
    return np.ascontiguousarray(codes, dtype=np.int32)


def interleave(codes: Mapping[str, Codes], order: Sequence[str], vocabulary: Vocabulary) -> Ids:
    """Streams in turn, frame by frame: all codebooks of ``order[0]``, then of ``order[1]``, ...

    Raises ``ConfigError`` when the streams do not have the same number of frames.
    """
    lengths = {codes[name].shape[1] for name in order}
    if len(lengths) > 1:
        raise ConfigError(f"Streams of {sorted(lengths)} frames cannot be interleaved.")
    steps = [
        flatten(codes[name], _spec(vocabulary, name).codebook_size, vocabulary.first_id(name))
        for name in order
    ]
    frames = [
        step.reshape(-1, _spec(vocabulary, name).num_codebooks)
        for name, step in zip(order, steps, strict=True)
    ]
    return np.concatenate(frames, axis=1).reshape(-1)


def deinterleave(ids: Ids, order: Sequence[str], vocabulary: Vocabulary) -> dict[str, Codes]:
    """Inverse of ``interleave``. Raises ``ConfigError`` for ids that it cannot have made."""
    widths = [_spec(vocabulary, name).num_codebooks for name in order]
    if len(ids) % sum(widths):
        raise ConfigError(f"{len(ids)} ids are no frames of {sum(widths)} codes.")
    frames = ids.reshape(-1, sum(widths))
    found: dict[str, Codes] = {}
    start = 0
    for name, width in zip(order, widths, strict=True):
        step = np.ascontiguousarray(frames[:, start : start + width]).reshape(-1)
        size, first = _spec(vocabulary, name).codebook_size, vocabulary.first_id(name)
        found[name] = unflatten(step, width, size, first)
        start += width
    return found


def _spec(vocabulary: Vocabulary, name: str) -> StreamSpec:
    vocabulary.first_id(name)
    return next(stream for stream in vocabulary.streams if stream.name == name)


def delay(codes: npt.NDArray[Any], pad_id: int) -> Ids:
    """Codes or ids [Q, T] as [Q, T + Q - 1]: row q begins with q pads, and ends with Q - 1 - q."""
    num_codebooks, num_frames = codes.shape
    steps = np.full((num_codebooks, num_frames + num_codebooks - 1), pad_id, dtype=np.int64)
    for book in range(num_codebooks):
        steps[book, book : book + num_frames] = codes[book]
    return steps


def undelay(steps: Ids, pad_id: int) -> Codes:
    """Inverse of ``delay``. Raises ``ConfigError`` where a pad is missing or is not expected."""
    num_codebooks = len(steps)
    num_frames = steps.shape[1] - num_codebooks + 1
    if num_frames < 0:
        raise ConfigError(f"{steps.shape[1]} steps are too few for {num_codebooks} codebooks.")
    rows = [steps[book, book : book + num_frames] for book in range(num_codebooks)]
    codes = np.array(rows, dtype=np.int64).reshape(num_codebooks, num_frames)
    if not np.array_equal(delay(codes, pad_id), steps) or (codes == pad_id).any():
        raise ConfigError("These steps are no delay pattern: a pad is missing or out of place.")
    return codes.astype(np.int32)


def add_spans(codes: Codes, spans: npt.NDArray[np.int32], codebook_size: int) -> Ids:
    """Ids [Q, T] that carry each token's span: code + codebook_size * (span - 1).

    Raises ``ConfigError`` for codes out of range, and spans below 1 or of another length.
    """
    _check(codes, codebook_size)
    if spans.shape != (codes.shape[1],) or (spans < 1).any():
        raise ConfigError(f"{codes.shape[1]} tokens need as many spans of at least one frame.")
    return codes + codebook_size * (spans.astype(np.int64) - 1)


def split_spans(ids: Ids, codebook_size: int) -> tuple[Codes, npt.NDArray[np.int32]]:
    """Inverse of ``add_spans``. Raises ``ConfigError`` when codebooks disagree on a span.

    Upstream reads the first codebook's span and never looks at the others; here they must agree.
    """
    spans, codes = np.divmod(ids, codebook_size)
    if not len(ids) or (ids < 0).any() or (spans != spans[:1]).any():
        raise ConfigError("These ids do not agree on spans: they are not of add_spans.")
    return codes.astype(np.int32), (spans[0] + 1).astype(np.int32)


def _check(codes: npt.NDArray[Any], codebook_size: int) -> None:
    if codes.size and not (0 <= codes.min() and codes.max() < codebook_size):
        raise ConfigError(
            f"Codes from {codes.min()} to {codes.max()} do not fit codebooks of {codebook_size}."
        )
