"""Frames of MPEG audio (ISO 11172-3, 13818-3): where the audio starts and how long it is.

What is detected: a stream cut inside a frame, and fewer frames or bytes than its Xing/Info header
promises. What cannot be: a stream without such a header that was cut exactly between two frames,
and flipped bits inside a frame (the format has no mandatory checksum).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hcodec_core.audio.containers import ByteSource, Container, Layout, truncated

_RATES = (44100, 48000, 32000)
_KBITS_1 = {
    1: (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_KBITS_2 = {
    1: (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MAX_PADDING_BYTES = 1 << 16


@dataclass(frozen=True)
class FrameHeader:
    """Four header bytes read: sizes in bytes, rate in Hz, samples per channel."""

    version: int
    layer: int
    sample_rate: int
    num_samples: int
    num_bytes: int
    is_mono: bool

    def agrees_with(self, other: FrameHeader) -> bool:
        """Whether both can be frames of one stream."""
        mine = (self.version, self.layer, self.sample_rate)
        return mine == (other.version, other.layer, other.sample_rate)


def parse_frame_header(data: bytes) -> FrameHeader | None:
    """Header of one MPEG audio frame; None when these bytes are none (or free format)."""
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    version = (data[1] >> 3) & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    layer = 4 - ((data[1] >> 1) & 3)
    bitrate_code, rate_code = data[2] >> 4, (data[2] >> 2) & 3
    if version == 1 or layer == 4 or rate_code == 3 or bitrate_code in (0, 15):
        return None
    is_version_1 = version == 3
    rate = _RATES[rate_code] >> {3: 0, 2: 1, 0: 2}[version]
    bits = (_KBITS_1 if is_version_1 else _KBITS_2)[layer][bitrate_code] * 1000
    samples = {1: 384, 2: 1152, 3: 1152 if is_version_1 else 576}[layer]
    slot = 4 if layer == 1 else 1
    num_bytes = (samples // 8 // slot * bits // rate + ((data[2] >> 1) & 1)) * slot
    return FrameHeader(version, layer, rate, samples, num_bytes, data[3] >> 6 == 3)


def audio_start(source: ByteSource) -> int:
    """Offset of the first byte after ID3v2 tags and zero padding.

    May lie past what the source shows, or past the end of a file that was cut inside its tag.
    """
    offset = 0
    while source.read(offset, 3) == b"ID3" and source.shows(offset, 10):
        head = source.read(offset, 10)
        size = sum(
            (byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)
        )
        offset += 10 + size + (10 if head[5] & 0x10 else 0)
    padding = source.read(offset, _MAX_PADDING_BYTES)
    return offset + len(padding) - len(padding.lstrip(b"\0"))


def is_mpeg_audio(source: ByteSource, start: int) -> bool:
    """Whether a frame begins at ``start`` and, as far as visible, another one follows it."""
    first = parse_frame_header(source.read(start, 4))
    if first is None:
        return False
    following = start + first.num_bytes
    if not source.shows(following, 4):
        return True
    second = parse_frame_header(source.read(following, 4))
    return second is not None and second.agrees_with(first)


def inspect_mp3(source: ByteSource, start: int) -> Layout:
    """Layout of the MPEG audio that begins at byte ``start``.

    ``num_frames`` counts samples per channel: as promised by a Xing/Info header (encoder delay
    and padding taken off), else as many as the frames that follow each other hold.

    Raises:
        AudioError: TRUNCATED when the stream ends inside a frame or holds fewer frames or bytes
            than promised.
    """
    first = parse_frame_header(source.read(start, 4))
    if first is None:
        return Layout(Container.MP3)
    num_walked = _count_frames(source, start, first)
    promise = _read_promise(source, start, first)
    if promise is None:
        return Layout(Container.MP3, num_walked * first.num_samples, first.sample_rate)
    if start + promise.num_bytes > source.size:
        raise truncated(
            f"The MPEG audio header promises {promise.num_bytes} bytes, the file holds "
            f"{source.size - start}: copy it again."
        )
    # FFmpeg forgets to cut the padding off when something follows the last frame. In files joined
    # end to end the length is that of the first only, so nothing may be cut.
    is_one_stream = num_walked <= promise.num_frames + 2
    trim = promise.num_samples if is_one_stream else None
    return Layout(Container.MP3, promise.num_samples, first.sample_rate, trim_frames=trim)


def _count_frames(source: ByteSource, start: int, first: FrameHeader) -> int:
    """Frames that follow each other from ``start``; the last must be whole."""
    num_frames, end = 0, start
    for offset, frame in _frames(source, start, first):
        num_frames, end = num_frames + 1, offset + frame.num_bytes
    is_cut_in_header = source.size - end < 4 and source.read(end, 1) == b"\xff"
    if end > source.size or is_cut_in_header:
        raise truncated("The MPEG audio stream ends inside a frame: copy it again.")
    return num_frames


def _frames(
    source: ByteSource, start: int, first: FrameHeader
) -> Iterator[tuple[int, FrameHeader]]:
    """Frames that follow each other without a gap; ends where something else begins."""
    offset = start
    while source.shows(offset, 4):
        frame = parse_frame_header(source.read(offset, 4))
        if frame is None or not frame.agrees_with(first):
            return
        yield offset, frame
        offset += frame.num_bytes


@dataclass(frozen=True)
class _Promise:
    num_frames: int
    num_samples: int | None
    num_bytes: int


def _read_promise(source: ByteSource, start: int, first: FrameHeader) -> _Promise | None:
    """What the Xing/Info header in the first frame says; None without one."""
    if first.layer != 3:
        return None
    side = (17 if first.is_mono else 32) if first.version == 3 else (9 if first.is_mono else 17)
    tag = source.read(start + 4 + side, 156)
    if tag[:4] not in (b"Xing", b"Info") or len(tag) < 156:
        return None
    flags = tag[7]
    num_frames = int.from_bytes(tag[8:12], "big") if flags & 1 else None
    at = 8 + (4 if flags & 1 else 0)
    num_bytes = int.from_bytes(tag[at : at + 4], "big") if flags & 2 else 0
    if num_frames is None:
        return _Promise(0, None, num_bytes)
    samples = num_frames * first.num_samples
    lame_at = at + (4 if flags & 2 else 0) + (100 if flags & 4 else 0) + (4 if flags & 8 else 0)
    gapless = _gapless_samples(tag[lame_at : lame_at + 36])
    return _Promise(num_frames, samples - gapless, num_bytes)


def _gapless_samples(lame: bytes) -> int:
    """Encoder delay plus padding (samples) from the LAME extension; 0 without one."""
    if len(lame) < 24 or not lame[:4].isalpha():
        return 0
    packed = int.from_bytes(lame[21:24], "big")
    return (packed >> 12) + (packed & 0xFFF)
