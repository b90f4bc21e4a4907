"""Decoded samples of a local file at its own rate and channels, block by block.

libsndfile decodes WAV, AIFF, FLAC, Vorbis and Opus; it gets a file descriptor, never a name, so it
cannot look for neighbours of the file. FFmpeg (through PyAV, which brings its own libraries)
decodes MP4 and MP3, and FLAC of unknown length, with the demuxer named, only the ``file`` protocol
allowed and external references off. MP3 goes to FFmpeg because libsndfile stops at an estimated
length when a variable-rate stream has no Xing header: it gave 6.6 of 30 s, without an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.containers import (
    ByteSource,
    Container,
    Layout,
    empty,
    truncated,
    undecodable,
)
from hcodec_core.audio.flac import reaches_promised_end
from hcodec_core.audio.mp3 import audio_start

Samples = npt.NDArray[np.float32]
BLOCK_FRAMES = 1 << 16
_FORMATS = {
    Container.WAV: ("WAV", "WAVEX", "RF64"),
    Container.AIFF: ("AIFF",),
    Container.FLAC: ("FLAC",),
    Container.OGG_VORBIS: ("OGG",),
    Container.OGG_OPUS: ("OGG",),
}
_DEMUXERS = {Container.M4A: "mov", Container.MP3: "mp3", Container.FLAC: "flac"}
_CODECS = {
    Container.M4A: ("aac", "alac", "opus", "libopus", "flac", "mp3", "mp3float"),
    Container.MP3: ("mp3", "mp3float", "mp2", "mp2float", "mp1", "mp1float"),
    Container.FLAC: ("flac",),
}
# Lossy decoders may end up to two frames early; one frame is at most 2048 samples.
_TOLERANCE_FRAMES = {Container.MP3: 2304, Container.M4A: 4096}


class NativeReader(Protocol):
    """An open file: its own sample rate (Hz) and channels, and its blocks."""

    sample_rate: int
    num_channels: int

    def blocks(self) -> Iterator[Samples]:
        """Blocks float32 [frames, channels], nominal range -1..1, about ``BLOCK_FRAMES`` long."""

    def close(self) -> None:
        """Give the file back; may be called twice."""


def open_native(path: Path, layout: Layout) -> NativeReader:
    """Open a file that ``inspect_file`` accepted.

    Raises ``AudioError`` UNDECODABLE when the decoder does not accept it after all. While reading,
    blocks raise TRUNCATED when fewer sample frames come than the container promises, and
    UNDECODABLE when the data are damaged.
    """
    is_endless_flac = layout.container is Container.FLAC and layout.num_frames is None
    if layout.container in (Container.M4A, Container.MP3) or is_endless_flac:
        return _FfmpegReader(path, layout)
    return _SndfileReader(path, layout)


def _check_count(num_frames: int, promised: int | None, container: Container) -> None:
    if num_frames == 0:
        raise empty(f"The {container} file has no samples.")
    if promised is not None and num_frames + _TOLERANCE_FRAMES.get(container, 0) < promised:
        raise truncated(
            f"The {container} file promises {promised} sample frames, only {num_frames} could be "
            "decoded: copy it again."
        )


class _SndfileReader:
    """libsndfile through a file descriptor."""

    def __init__(self, path: Path, layout: Layout) -> None:
        import soundfile

        self._path, self._layout = path, layout
        self._error: type[Exception] = soundfile.LibsndfileError
        self._raw = _open_raw(path, layout)
        try:
            self._file = soundfile.SoundFile(self._raw)
        except soundfile.LibsndfileError as error:
            self._close_raw()
            raise undecodable(
                f"The {layout.container} file cannot be opened: {error.error_string}"
            ) from error
        if self._file.format not in _FORMATS[layout.container]:
            self.close()
            raise undecodable(f"The {layout.container} file is decoded as {self._file.format}.")
        self.sample_rate: int = self._file.samplerate
        self.num_channels: int = self._file.channels

    def blocks(self) -> Iterator[Samples]:
        num_frames = 0
        promised = self._layout.num_frames or self._file.frames
        while True:
            try:
                block = self._file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            except self._error as error:
                raise self._failure(promised) from error
            if len(block) == 0:
                break
            num_frames += len(block)
            yield block
        _check_count(num_frames, promised, self._layout.container)

    def _failure(self, promised: int) -> Exception:
        if self._layout.container is Container.FLAC:
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                source = ByteSource(lambda at, count: os.pread(descriptor, count, at), size)
                start = 0 if source.read(0, 4) == b"fLaC" else audio_start(source)
                if not reaches_promised_end(source, start, promised):
                    return truncated("The FLAC file ends before its last frame: copy it again.")
            finally:
                os.close(descriptor)
        return undecodable(f"The {self._layout.container} data are damaged: copy the file again.")

    def close(self) -> None:
        self._file.close()
        self._close_raw()

    def _close_raw(self) -> None:
        if not isinstance(self._raw, int):
            self._raw.close()


def _open_raw(path: Path, layout: Layout) -> Any:
    """Descriptor for libsndfile, which closes it; or a view with the data length filled in."""
    if layout.size_field_offset is None:
        return os.open(path, os.O_RDONLY)
    return _FilledIn(path, layout.size_field_offset)


class _FilledIn(io.RawIOBase):
    """A WAV file that reads as if its never written data length were 0xFFFFFFFF.

    libsndfile takes that for "to the end of the file", but takes 0 for "no samples".
    """

    def __init__(self, path: Path, size_field_offset: int) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._field = size_field_offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any, /) -> int:
        start = self._file.tell()
        count = self._file.readinto(buffer)
        for index in range(4):
            at = self._field + index - start
            if 0 <= at < count:
                buffer[at : at + 1] = b"\xff"
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _FfmpegReader:
    """FFmpeg with one named demuxer and the first audio track."""

    def __init__(self, path: Path, layout: Layout) -> None:
        import av
        from av.error import FFmpegError

        self._layout = layout
        self._error: type[Exception] = FFmpegError
        options = {"protocol_whitelist": "file", "enable_drefs": "0", "use_absolute_path": "0"}
        demuxer = _DEMUXERS[layout.container]
        try:
            # The explicit protocol keeps a name such as "http:x" a local name. Tags are not read;
            # by default one that is not UTF-8 would be an error.
            self._container: Any = av.open(
                f"file:{path}",
                format=demuxer,
                options=options if demuxer == "mov" else {"protocol_whitelist": "file"},
                metadata_errors="replace",
            )
        except FFmpegError as error:
            _pass_on_memory(error)
            raise undecodable(
                f"The {layout.container} file cannot be opened: {error.strerror}"
            ) from error
        self._stream = self._audio_stream()
        self.sample_rate: int = self._stream.codec_context.sample_rate
        self.num_channels: int = self._stream.codec_context.layout.nb_channels
        self._decoded: Iterator[Any] = self._frames()
        first = next(self._decoded, None)
        if first is not None:
            # Only a decoded frame tells the true rate and channels of HE-AAC.
            self.sample_rate, self.num_channels = first.sample_rate, first.layout.nb_channels
            self._decoded = chain([first], self._decoded)

    def _audio_stream(self) -> Any:
        stream = next(iter(self._container.streams.audio), None)
        codec = "none" if stream is None else stream.codec_context.name
        if stream is None or codec not in _CODECS[self._layout.container]:
            self.close()
            raise undecodable(f"The {self._layout.container} file holds audio codec {codec!r}.")
        # One thread: the supervisor runs one process per core already.
        stream.codec_context.thread_count = 1
        return stream

    def blocks(self) -> Iterator[Samples]:
        limit = self._scaled(self._layout.trim_frames)
        num_frames = 0
        for joined in self._joined():
            block = self._to_block(joined)
            if limit is not None:
                block = block[: max(0, limit - num_frames)]
            num_frames += len(block)
            if len(block):
                yield block
        promised = self._scaled(self._layout.num_frames)
        _check_count(num_frames, promised, self._layout.container)

    def _joined(self) -> Iterator[Any]:
        """The short frames of the decoder joined to long ones."""
        from av import AudioFifo

        queue = AudioFifo()
        for frame in self._decoded:
            self._check_form(frame)
            frame.pts = None  # The queue refuses gaps in time, which edit lists make.
            queue.write(frame)
            if queue.samples >= BLOCK_FRAMES:
                yield queue.read(BLOCK_FRAMES)
        if queue.samples:
            yield queue.read(queue.samples)

    def _scaled(self, num_frames: int | None) -> int | None:
        """Sample frames counted in the container's time scale, at the decoder's rate."""
        scale = self._layout.sample_rate
        if num_frames is None or not scale:
            return num_frames
        return -(-num_frames * self.sample_rate // scale)

    def _frames(self) -> Iterator[Any]:
        """Decoded frames; data that fail are damage unless nothing decodable follows them."""
        has_failed = False
        for packet in self._packets():
            try:
                frames = packet.decode()
            except self._error as error:
                _pass_on_memory(error)
                has_failed = True
                continue
            for frame in frames:
                if has_failed:
                    raise undecodable(
                        f"The {self._layout.container} data are damaged: copy the file again."
                    )
                yield frame
        if has_failed and self._layout.container is not Container.MP3:
            raise undecodable(
                f"The {self._layout.container} data are damaged at the end: copy the file again."
            )

    def _packets(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._stream)
        except self._error as error:
            _pass_on_memory(error)
            raise undecodable(
                f"The {self._layout.container} file cannot be read on: copy it again."
            ) from error

    def _check_form(self, frame: Any) -> None:
        if frame.sample_rate != self.sample_rate or frame.layout.nb_channels != self.num_channels:
            raise undecodable("The audio changes its sample rate or channels on the way: split it.")

    def _to_block(self, frame: Any) -> Samples:
        data = frame.to_ndarray()
        is_planar = frame.format.is_planar
        return _scaled_to_unit(data.T if is_planar else data.reshape(-1, self.num_channels))

    def close(self) -> None:
        self._container.close()


def _pass_on_memory(error: Exception) -> None:
    """PyAV's own MemoryError is also one of FFmpeg's errors, but says nothing about the data."""
    if isinstance(error, MemoryError):
        raise error


def _scaled_to_unit(data: npt.NDArray[Any]) -> Samples:
    """Samples of any FFmpeg format as float32 in -1..1, in rows one after the other."""
    samples = np.ascontiguousarray(data, dtype=np.float32)
    if data.dtype.kind == "u":
        samples = (samples - np.float32(128)) / np.float32(128)
    elif data.dtype.kind == "i":
        samples *= np.float32(2.0 ** (1 - 8 * data.dtype.itemsize))
    return samples
