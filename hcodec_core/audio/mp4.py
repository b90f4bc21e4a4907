"""Boxes of an ISO base media file (ISO 14496-12): is it whole, self-contained, and how long.

Players start AAC at the true first sample by an edit list or Apple's iTunSMPB note; both also tell
the true length, which decoders overrun by up to one AAC frame. A file with neither keeps its
encoder delay (often 1024 or 2112 samples), and a fragmented file without edits cannot be trimmed.
A fragmented file that was cut exactly between two fragments cannot be told from a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from hcodec_core.audio.containers import (
    ByteSource,
    Container,
    Layout,
    empty,
    truncated,
    undecodable,
)
from hcodec_core.errors import AudioError, QuarantineReason

_MAX_INDEX_BYTES = 1 << 28
_CODECS = (b"mp4a", b"alac", b"Opus", b"fLaC", b".mp3")


@dataclass(frozen=True)
class _Box:
    name: bytes
    start: int
    end: int


def inspect_mp4(source: ByteSource) -> Layout:
    """Layout of an m4a, mp4 or mov file: its first audio track.

    ``num_frames`` and ``sample_rate`` are in the time scale of the track, which is its sample rate
    (half of it for some HE-AAC). Raises ``AudioError``: TRUNCATED when a box reaches past the end
    of the file or the index is missing, REFUSED_CONTAINER when media lie in other files, NOT_AUDIO
    without an audio track, UNDECODABLE for encrypted or unknown codecs, EMPTY for no samples.
    """
    index = None
    for box in _top_boxes(source):
        if box.end > source.size:
            raise truncated("The MP4 file ends inside a box: copy it again.")
        if box.name == b"moov":
            index = box
    if index is None:
        if source.shows(source.size - 1, 1):
            raise truncated("The MP4 file has no index (moov box): it was cut, or never finished.")
        return Layout(Container.M4A)
    if index.end - index.start > _MAX_INDEX_BYTES:
        raise undecodable("The index (moov box) of the MP4 file is larger than 256 MiB.")
    data = source.read(index.start, index.end - index.start)
    if len(data) < index.end - index.start:
        return Layout(Container.M4A)
    return _Movie(data).layout()


def _top_boxes(source: ByteSource) -> Iterator[_Box]:
    offset = 0
    while source.shows(offset, 8):
        head = source.read(offset, 16)
        size, header = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = source.size - offset
        if size < header:
            raise undecodable(f"The MP4 box at byte {offset} has no valid length.")
        yield _Box(head[4:8], offset + header, offset + size)
        offset += size


class _Movie:
    """The index (moov box) of one file, as bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._all = _Box(b"moov", 0, len(data))

    def layout(self) -> Layout:
        """See ``inspect_mp4``."""
        tracks = list(self._children(self._all, b"trak"))
        self._refuse_references(tracks)
        track = next((t for t in tracks if self._handler(t) == b"soun"), None)
        if track is None:
            raise AudioError(QuarantineReason.NOT_AUDIO, "The MP4 file has no audio track.")
        self._check_codec(track)
        timescale, media_length = self._media_header(track)
        if timescale == 0:
            raise undecodable("The audio track of the MP4 file has no time scale.")
        if self._find(self._all, b"mvex"):
            return Layout(Container.M4A, None, timescale)
        num_frames = self._gapless_note() or self._edited_length(track, timescale, media_length)
        if num_frames is not None and num_frames <= 0:
            raise empty("The audio track of the MP4 file has no samples.")
        return Layout(Container.M4A, num_frames, timescale, trim_frames=num_frames)

    def _refuse_references(self, tracks: list[_Box]) -> None:
        is_external = self._find(self._all, b"rmra") is not None
        for track in tracks:
            table = self._find(track, b"mdia", b"minf", b"dinf", b"dref")
            for entry in self._boxes(table.start + 8, table.end) if table else ():
                is_external |= not self._number(entry.start, 4) & 1
        if is_external:
            raise AudioError(
                QuarantineReason.REFUSED_CONTAINER,
                "The MP4 file refers to media in other files: make it self-contained.",
            )

    def _check_codec(self, track: _Box) -> None:
        table = self._find(track, b"mdia", b"minf", b"stbl", b"stsd")
        entries = list(self._boxes(table.start + 8, table.end)) if table else []
        if not entries or entries[0].name not in _CODECS:
            name = entries[0].name.decode("latin-1") if entries else "none"
            raise undecodable(f"The audio codec {name!r} in the MP4 file is not supported.")

    def _handler(self, track: _Box) -> bytes:
        box = self._find(track, b"mdia", b"hdlr")
        return self._data[box.start + 8 : box.start + 12] if box else b""

    def _media_header(self, track: _Box) -> tuple[int, int]:
        """Time scale (ticks per second) and length (ticks) of the media of a track."""
        box = self._find(track, b"mdia", b"mdhd")
        return self._times(box, after_dates=True) if box else (0, 0)

    def _times(self, box: _Box, *, after_dates: bool) -> tuple[int, int]:
        width = 8 if self._number(box.start, 1) == 1 else 4
        at = box.start + 4 + (2 * width if after_dates else 0)
        return self._number(at, 4), self._number(at + 4, width)

    def _edited_length(self, track: _Box, timescale: int, media_length: int) -> int | None:
        """Length to keep in ticks of the media: exact where the coarse edit agrees with it."""
        table = self._find(track, b"edts", b"elst")
        if table is None:
            return media_length
        edit = self._only_edit(table)
        movie = self._find(self._all, b"mvhd")
        if edit is None or movie is None:
            return None
        movie_scale, _ = self._times(movie, after_dates=True)
        length, media_start = edit
        from_edit = Fraction(length * timescale, max(movie_scale, 1))
        from_media = media_length - media_start
        is_same = abs(from_edit - from_media) <= Fraction(timescale, max(movie_scale, 1))
        return from_media if is_same or length == 0 else round(from_edit)

    def _only_edit(self, table: _Box) -> tuple[int, int] | None:
        """Length (movie ticks) and media start (media ticks) of the single edit, if it is one."""
        width = 8 if self._number(table.start, 1) == 1 else 4
        start = self._number(table.start + 8 + width, width)
        is_gap = start == (1 << (8 * width)) - 1
        if self._number(table.start + 4, 4) != 1 or is_gap:
            return None
        return self._number(table.start + 8, width), start

    def _gapless_note(self) -> int | None:
        """True length in samples by Apple's iTunSMPB note, None without one."""
        at = self._data.find(b"iTunSMPB")
        if at < 0:
            return None
        value = self._data[at + 8 : at + 256].split(b"data", 1)[-1][8:]
        fields = value.split()
        try:
            return int(fields[3], 16) or None
        except (IndexError, ValueError):
            return None

    def _find(self, box: _Box, *path: bytes) -> _Box | None:
        found: _Box | None = box
        for name in path:
            found = next(self._children(found, name), None) if found else None
        return found

    def _children(self, box: _Box, name: bytes) -> Iterator[_Box]:
        return (child for child in self._boxes(box.start, box.end) if child.name == name)

    def _boxes(self, start: int, end: int) -> Iterator[_Box]:
        while start + 8 <= end:
            size = self._number(start, 4) or end - start
            if size < 8 or start + size > end:
                return
            yield _Box(self._data[start + 4 : start + 8], start + 8, start + size)
            start += size

    def _number(self, at: int, num_bytes: int) -> int:
        return int.from_bytes(self._data[at : at + num_bytes], "big")
