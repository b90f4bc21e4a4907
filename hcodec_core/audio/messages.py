"""Messages between the supervisor and its decoder processes, over pipes.

A message is one byte of kind, four bytes of payload length (big-endian), and the payload. No
object of Python ever crosses: paths, JSON, digests and raw samples only.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import IO

HEADER_BYTES = 5
DIGEST_BYTES = 32
MAX_PAYLOAD_BYTES = 1 << 28
_HEADER = struct.Struct(">cI")


class Kind(Enum):
    """What the payload is."""

    DECODE = b"D"  # to the child: a path, in the bytes of the file system
    READY = b"R"  # nothing; the child can take requests
    BEGUN = b"S"  # nothing; the request was taken up: what happens now is the file's doing
    BLOCK = b"B"  # running sha256 (32 bytes), then float32 samples in native order
    INFO = b"I"  # JSON of DecodedInfo: the file is complete
    REFUSED = b"E"  # JSON {"reason", "message"} of an AudioError
    UNREADABLE = b"U"  # JSON {"message"}: the local file could not be read


def pack_header(kind: Kind, num_bytes: int) -> bytes:
    """The five bytes before a payload of ``num_bytes`` bytes."""
    assert num_bytes <= MAX_PAYLOAD_BYTES
    return _HEADER.pack(kind.value, num_bytes)


def unpack_header(data: bytes | bytearray) -> tuple[Kind, int]:
    """Kind and payload length. Raises ``ValueError`` when this is no header."""
    kind, num_bytes = _HEADER.unpack(data)
    if num_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"message of {num_bytes} bytes")
    return Kind(kind), num_bytes


def send(stream: IO[bytes], kind: Kind, *parts: bytes) -> None:
    """Write one message whose payload is all ``parts``, and flush it."""
    stream.write(pack_header(kind, sum(len(part) for part in parts)))
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Kind, bytes] | None:
    """Read one message; None when the other side has closed the pipe."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    kind, num_bytes = unpack_header(header)
    payload = stream.read(num_bytes)
    return (kind, payload) if len(payload) == num_bytes else None
