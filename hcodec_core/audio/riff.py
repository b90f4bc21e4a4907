"""Chunks of WAV (RIFF, RIFX, RF64) and AIFF files: does the file hold the samples it promises.

A WAV whose data length was never filled in is accepted and read to the end of the file. Writers
that cannot seek leave 0 (with a RIFF length that is not final either), 0xFFFFFFFF, or, in sox,
0x7FFFF000. Any other length beyond the end of the file is a truncated file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hcodec_core.audio.containers import (
    ByteSource,
    Container,
    Layout,
    empty,
    truncated,
    undecodable,
)

_ByteOrder = Literal["little", "big"]
_UNKNOWN_SIZES = (0xFFFFFFFF, 0x7FFFF000)
_UNKNOWN_SIZE_64 = 0xFFFFFFFFFFFFFFFF
_EXTENSIBLE = 0xFFFE
# PCM, float, A-law, mu-law: formats whose block is exactly one sample frame.
_FRAMED_FORMATS = (1, 3, 6, 7)


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    size_offset: int
    size: int

    @property
    def start(self) -> int:
        return self.size_offset + 4


def _chunks(source: ByteSource, order: _ByteOrder) -> Iterator[_Chunk]:
    """Chunks as far as they can be seen; the last may reach past the end of the file."""
    offset = 12
    while source.shows(offset, 8):
        head = source.read(offset, 8)
        chunk = _Chunk(head[:4], offset + 4, int.from_bytes(head[4:], order))
        yield chunk
        offset = chunk.start + chunk.size + chunk.size % 2


def inspect_wav(source: ByteSource) -> Layout:
    """Layout of a WAV file.

    Raises ``AudioError``: TRUNCATED when the data chunk claims more bytes than the file has,
    EMPTY when there are no samples.
    """
    order: _ByteOrder = "big" if source.read(0, 4) == b"RIFX" else "little"
    format_chunk: bytes = b""
    long_size = None
    for chunk in _chunks(source, order):
        if chunk.name == b"ds64":
            long_size = int.from_bytes(source.read(chunk.start + 8, 8), "little")
        elif chunk.name == b"fmt ":
            format_chunk = source.read(chunk.start, min(chunk.size, 40))
        elif chunk.name == b"data":
            return _wav_layout(source, chunk, long_size, order, format_chunk)
        elif chunk.start + chunk.size > source.size:
            name = chunk.name.decode("latin-1")
            raise truncated(f"The WAV file ends inside its chunk {name!r}: copy it again.")
    if source.shows(source.size - 1, 1):
        raise empty("The WAV file has no data chunk.")
    return Layout(Container.WAV)


def _wav_layout(
    source: ByteSource, chunk: _Chunk, long_size: int | None, order: _ByteOrder, fmt: bytes
) -> Layout:
    available = source.size - chunk.start
    size = chunk.size
    if source.read(0, 4) == b"RF64" and size == 0xFFFFFFFF and long_size:
        size = long_size
    patch = None
    if size == 0 and _was_never_finished(source, order):
        patch, size = chunk.size_offset, available
    elif size in (*_UNKNOWN_SIZES, _UNKNOWN_SIZE_64):
        size = min(size, available)
    if available <= 0 or size == 0:
        raise empty("The WAV file has an empty data chunk.")
    if size > available:
        raise truncated(
            f"The WAV header promises {size} bytes of samples, the file holds {available}: "
            "copy it again."
        )
    rate, block_bytes = _wav_format(fmt, order)
    num_frames = size // block_bytes if block_bytes else None
    return Layout(Container.WAV, num_frames, rate, size_field_offset=patch)


def _was_never_finished(source: ByteSource, order: _ByteOrder) -> bool:
    return int.from_bytes(source.read(4, 4), order) + 8 < source.size - 1


def _wav_format(fmt: bytes, order: _ByteOrder) -> tuple[int | None, int]:
    """Sample rate in Hz, and bytes per sample frame (0 for formats with larger blocks)."""
    if len(fmt) < 16:
        raise undecodable("The WAV file has no usable format chunk before its samples.")
    tag = int.from_bytes(fmt[:2], order)
    if tag == _EXTENSIBLE and len(fmt) >= 26:
        tag = int.from_bytes(fmt[24:26], order)
    block_bytes = int.from_bytes(fmt[12:14], order) if tag in _FRAMED_FORMATS else 0
    return int.from_bytes(fmt[4:8], order), block_bytes


def inspect_aiff(source: ByteSource) -> Layout:
    """Layout of an AIFF or AIFC file.

    Raises ``AudioError``: TRUNCATED when the sound chunk claims more bytes than the file has,
    EMPTY when there are no samples.
    """
    num_frames = None
    for chunk in _chunks(source, "big"):
        if chunk.name == b"COMM":
            num_frames = int.from_bytes(source.read(chunk.start + 2, 4), "big")
        if chunk.start + chunk.size > source.size:
            raise truncated(
                f"The AIFF header promises {chunk.size} bytes, the file holds "
                f"{source.size - chunk.start}: copy it again."
            )
        if chunk.name == b"SSND" and num_frames is not None:
            if num_frames == 0:
                raise empty("The AIFF file has no samples.")
            return Layout(Container.AIFF, num_frames)
    if source.shows(source.size - 1, 1):
        raise empty("The AIFF file has no sound chunk.")
    return Layout(Container.AIFF)
