"""Pages of an Ogg stream (RFC 3533): every page is checked before anything is decoded.

Decoders skip damaged pages and stop at the end of the first of several chained streams without a
word; here both are refused. A stream whose last page lacks the end mark is taken as truncated,
though some live recorders never write it: remux such files. What comes after the marked last page
(tags, padding) is ignored.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from hcodec_core.audio.containers import ByteSource, Container, Layout, truncated, undecodable

_HEADER_BYTES = 27
_IS_FIRST, _IS_LAST = 2, 4


@dataclass(frozen=True)
class _Page:
    flags: int
    serial: int
    sequence: int
    num_bytes: int


def identify_ogg(head: bytes) -> Container | None:
    """Which of the allowed codecs the first page of an Ogg file holds."""
    if len(head) < _HEADER_BYTES or not head.startswith(b"OggS"):
        return None
    packet = head[_HEADER_BYTES + head[26] :]
    if packet.startswith(b"OpusHead"):
        return Container.OGG_OPUS
    if packet.startswith(b"\x01vorbis"):
        return Container.OGG_VORBIS
    return None


def inspect_ogg(source: ByteSource, container: Container) -> Layout:
    """Walk all pages of a file that is fully visible.

    Raises ``AudioError``: TRUNCATED when the file ends inside a page or without an end mark,
    UNDECODABLE for a damaged or missing page and for several streams in one file.
    """
    offset, sequence, serial = 0, None, None
    while offset < source.size:
        page = _read_page(source, offset)
        if serial is not None and page.serial != serial:
            raise undecodable(
                "The Ogg file holds several streams, of which only one would be decoded: split it."
            )
        if sequence is not None and page.sequence != sequence + 1:
            raise undecodable(f"Pages are missing before byte {offset} of the Ogg file.")
        serial, sequence, offset = page.serial, page.sequence, offset + page.num_bytes
        if page.flags & _IS_LAST:
            _refuse_chain(source, offset)
            return Layout(container)
    raise truncated("The Ogg stream has no last page: it was cut, or never finished.")


def _refuse_chain(source: ByteSource, offset: int) -> None:
    if source.read(offset, 4) == b"OggS":
        raise undecodable(
            "The Ogg file is a chain of several streams, of which only the first would be "
            "decoded: split it."
        )


def _read_page(source: ByteSource, offset: int) -> _Page:
    head = source.read(offset, _HEADER_BYTES)
    if head[:4] != b"OggS"[: len(head)]:
        raise undecodable(f"No Ogg page begins at byte {offset}, where one should: damaged.")
    if len(head) < _HEADER_BYTES:
        raise truncated("The Ogg file ends inside a page header: copy it again.")
    table = source.read(offset + _HEADER_BYTES, head[26])
    num_bytes = _HEADER_BYTES + len(table) + sum(table)
    if len(table) < head[26] or offset + num_bytes > source.size:
        raise truncated("The Ogg file ends inside a page: copy it again.")
    page = source.read(offset, num_bytes)
    if _checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(head[22:26], "little"):
        raise undecodable(f"The Ogg page at byte {offset} fails its checksum: damaged.")
    return _Page(
        head[5],
        int.from_bytes(head[14:18], "little"),
        int.from_bytes(head[18:22], "little"),
        num_bytes,
    )


def _reverse(value: int, num_bits: int) -> int:
    return int(f"{value:0{num_bits}b}"[::-1], 2)


_REVERSED = bytes(_reverse(value, 8) for value in range(256))


def _checksum(page: bytes) -> int:
    """CRC-32 of Ogg, which is zlib's with the bits of all bytes reversed and no inversion."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return _reverse(mirrored, 32)
