"""What every container reader shares: names of containers, a byte source, and the layout found.

The readers (``riff``, ``flac``, ``mp3``, ``ogg``, ``mp4``) look at structure only and decode
nothing. They work on a whole file and on its first bytes alike: what is not visible is not
judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from hcodec_core.errors import AudioError, QuarantineReason

_WINDOW_BYTES = 1 << 18


class Container(StrEnum):
    """The allow-list. Anything else is refused, whatever a decoder could make of it."""

    WAV = "wav"  # RIFF, RIFX and RF64
    AIFF = "aiff"  # also AIFC
    FLAC = "flac"
    MP3 = "mp3"  # MPEG audio layer 1, 2 and 3
    OGG_VORBIS = "ogg-vorbis"
    OGG_OPUS = "ogg-opus"
    M4A = "m4a"  # ISO base media: m4a, mp4, m4b, mov


@dataclass(frozen=True)
class Layout:
    """What a container promises about its samples.

    num_frames: sample frames (one sample of each channel) at ``sample_rate`` that decoding must
    give, None where the container does not say. sample_rate: Hz, None where not read.
    trim_frames: frames to keep, counted from the first that the decoder gives, where that is
    known better than by the decoder. size_field_offset: byte offset of a WAV data length that
    was never filled in and has to be read as "to the end of the file".
    """

    container: Container
    num_frames: int | None = None
    sample_rate: int | None = None
    trim_frames: int | None = None
    size_field_offset: int | None = None


class ByteSource:
    """Random access to the bytes of a file, or to as many of them as are at hand.

    ``fetch(offset, count)`` returns up to ``count`` bytes; ``size`` is the true size of the file
    in bytes, which may be more than ``fetch`` can show.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        """Read through one cached window, for the many small reads of a frame walk."""
        self.size = size
        self._fetch = fetch
        self._start = 0
        self._window = b""

    @classmethod
    def of_head(cls, head: bytes, size: int) -> ByteSource:
        """Source that shows only the first bytes of a file of ``size`` bytes."""
        return cls(lambda offset, count: head[offset : offset + count], size)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes from ``offset``; fewer than ``count`` where the file or the view ends."""
        if count > _WINDOW_BYTES:
            return self._fetch(offset, count)
        first = offset - self._start
        if first < 0 or first + count > len(self._window):
            self._window = self._fetch(offset, _WINDOW_BYTES)
            self._start, first = offset, 0
        return self._window[first : first + count]

    def shows(self, offset: int, count: int) -> bool:
        """Whether the bytes can be read; False past the end of the file or of the view."""
        return len(self.read(offset, count)) == count


def truncated(message: str) -> AudioError:
    """Error for a file that ends before what its own structure promises."""
    return AudioError(QuarantineReason.TRUNCATED, message)


def undecodable(message: str) -> AudioError:
    """Error for a file whose structure or data makes no sense."""
    return AudioError(QuarantineReason.UNDECODABLE, message)


def empty(message: str) -> AudioError:
    """Error for a container without samples."""
    return AudioError(QuarantineReason.EMPTY, message)
