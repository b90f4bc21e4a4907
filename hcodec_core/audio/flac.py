"""The head and the last frame of a FLAC file (RFC 9639)."""

from __future__ import annotations

from hcodec_core.audio.containers import ByteSource, Container, Layout, truncated, undecodable

_STREAMINFO_BYTES = 34
_TAIL_BYTES = 1 << 18
_BLOCK_SIZES = {1: 192, **{code: 576 << (code - 2) for code in range(2, 6)}}
_BLOCK_SIZES |= {code: 256 << (code - 8) for code in range(8, 16)}


def inspect_flac(source: ByteSource, start: int = 0) -> Layout:
    """Layout of a FLAC stream whose magic bytes are at ``start``.

    ``num_frames`` is None when the writer did not know the length (0 in the header).
    Raises ``AudioError``: TRUNCATED when not even the head is complete, UNDECODABLE when it is
    not a stream head.
    """
    if start + 8 + _STREAMINFO_BYTES > source.size:
        raise truncated("The FLAC file ends inside its header: copy it again.")
    head = source.read(start, 8 + _STREAMINFO_BYTES)
    if len(head) < 8 + _STREAMINFO_BYTES:
        return Layout(Container.FLAC)
    if head[4] & 0x7F != 0:
        raise undecodable("The FLAC file does not begin with stream information.")
    packed = int.from_bytes(head[18:26], "big")
    num_frames = packed & ((1 << 36) - 1)
    return Layout(Container.FLAC, num_frames or None, packed >> 44)


def reaches_promised_end(source: ByteSource, start: int, num_frames: int) -> bool:
    """Whether the last of ``num_frames`` frames is in the file, whole.

    ``start`` is the offset of the magic bytes. Tells a file that was cut (False) from one that
    was damaged on the way (True), once decoding has failed. A frame that is both last and damaged
    counts as cut.
    """
    block = int.from_bytes(source.read(start + 8, 2), "big")
    tail_start = max(0, source.size - _TAIL_BYTES)
    tail = source.read(tail_start, _TAIL_BYTES)
    position = tail.rfind(b"\xff")
    while position >= 0:
        end = _end_sample(tail[position : position + 16], block)
        if end is not None and end <= num_frames:
            return end == num_frames and _crc16(tail[position:]) == 0
        position = tail.rfind(b"\xff", 0, position)
    return False


def _end_sample(head: bytes, stream_block: int) -> int | None:
    """First sample after the frame whose header this is; None when it is no frame header."""
    if len(head) < 16 or head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    number, length = _coded_number(head[4:])
    size_code = head[2] >> 4
    size_bytes = {6: 1, 7: 2}.get(size_code, 0)
    rate_bytes = {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    crc_at = 4 + length + size_bytes + rate_bytes
    if length == 0 or size_code == 0 or crc_at >= 16 or _crc8(head[:crc_at]) != head[crc_at]:
        return None
    written = int.from_bytes(head[4 + length : 4 + length + size_bytes], "big") + 1
    block = written if size_bytes else _BLOCK_SIZES[size_code]
    is_variable = head[1] & 1
    return (number if is_variable else number * stream_block) + block


def _coded_number(data: bytes) -> tuple[int, int]:
    """Frame or sample number in the extended UTF-8 code, and its length in bytes (0: invalid)."""
    first = data[0]
    if first < 0x80:
        return first, 1
    length = 8 - (first ^ 0xFF).bit_length()
    if length < 2 or length > 7:
        return 0, 0
    number = first & (0x7F >> length)
    for byte in data[1:length]:
        number = number << 6 | byte & 0x3F
    return number, length


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07 if value & 0x80 else value << 1) & 0xFF
    return value


def _crc16(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte << 8
        for _ in range(8):
            value = (value << 1 ^ 0x8005 if value & 0x8000 else value << 1) & 0xFFFF
    return value
