"""Is it audio that we decode? By magic bytes against an allow-list, never by name.

Text that would make a decoder open other files (ffconcat scripts, HLS and other playlists, SDP) is
refused as such, so that a report shows the attempt. A header that promises more than the file
holds is found here, before anything is decoded.
"""

from __future__ import annotations

import os
from pathlib import Path

from hcodec_core.audio.containers import ByteSource, Container, Layout, truncated
from hcodec_core.audio.flac import inspect_flac
from hcodec_core.audio.mp3 import audio_start, inspect_mp3, is_mpeg_audio
from hcodec_core.audio.mp4 import inspect_mp4
from hcodec_core.audio.ogg import identify_ogg, inspect_ogg
from hcodec_core.audio.riff import inspect_aiff, inspect_wav
from hcodec_core.errors import AudioError, QuarantineReason

HEAD_BYTES = 1 << 16
_SCRIPT_STARTS = (
    "ffconcat",
    "#extm3u",
    "[playlist]",
    "[reference]",
    "v=0",
    "<asx",
    "<smil",
    "<mpd",
)
_SCRIPT_PARTS = ("xspf.org", "<mpd", "<playlist", "<smoothstreamingmedia", "<compositionplaylist")


def sniff(head: bytes, size: int) -> Container:
    """Container of a file by its first bytes, for refusing it before it is fetched whole.

    ``head`` holds the first bytes (``HEAD_BYTES`` or the whole file), ``size`` is the size of the
    whole file in bytes. What lies beyond ``head`` is judged by ``inspect_file`` only.

    Raises:
        AudioError: EMPTY (no bytes), NOT_AUDIO (on no allow-list), REFUSED_CONTAINER (playlist or
            script), TRUNCATED (header promises more than ``size``), UNDECODABLE (broken header).
    """
    source = ByteSource.of_head(head, size)
    container, start = _identify(source)
    if container in (Container.WAV, Container.AIFF, Container.FLAC, Container.M4A):
        _inspect(source, container, start)
    return container


def inspect_file(path: Path) -> Layout:
    """Check the structure of a local file from end to end, decoding nothing.

    Reads headers only, or for mp3 and ogg every frame or page head. Raises ``AudioError`` as
    ``sniff`` does, and ``OSError`` when the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        source = ByteSource(lambda offset, count: os.pread(descriptor, count, offset), size)
        container, start = _identify(source)
        return _inspect(source, container, start)
    finally:
        os.close(descriptor)


def _inspect(source: ByteSource, container: Container, start: int) -> Layout:
    if container is Container.WAV:
        return inspect_wav(source)
    if container is Container.AIFF:
        return inspect_aiff(source)
    if container is Container.FLAC:
        return inspect_flac(source, start)
    if container is Container.MP3:
        return inspect_mp3(source, start)
    if container is Container.M4A:
        return inspect_mp4(source)
    return inspect_ogg(source, container)


def _identify(source: ByteSource) -> tuple[Container, int]:
    """Container, and the byte at which its audio begins (after tags)."""
    if source.size == 0:
        raise AudioError(QuarantineReason.EMPTY, "The file has no bytes.")
    container = _by_magic(source.read(0, 512))
    if container is not None:
        return container, 0
    start = audio_start(source)
    if start > source.size:
        raise truncated("The file ends inside its ID3 tag: copy it again.")
    if source.read(start, 4) == b"fLaC":
        return Container.FLAC, start
    is_hidden = start > 0 and start < source.size and not source.shows(start, 1)
    if is_hidden or is_mpeg_audio(source, start):
        return Container.MP3, start
    raise _refusal(source.read(0, 4096))


def _by_magic(head: bytes) -> Container | None:
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return Container.WAV
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return Container.AIFF
    if head[:4] == b"fLaC":
        return Container.FLAC
    if head[4:8] == b"ftyp":
        return Container.M4A
    return identify_ogg(head)


def _refusal(head: bytes) -> AudioError:
    text = head.decode("latin-1").lstrip("\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_SCRIPT_STARTS) or any(part in text for part in _SCRIPT_PARTS):
        return AudioError(
            QuarantineReason.REFUSED_CONTAINER,
            "The file is a playlist or script that makes decoders open other files: "
            "list those files themselves.",
        )
    return AudioError(
        QuarantineReason.NOT_AUDIO,
        "The file is no audio of an allowed kind "
        f"({', '.join(container.value for container in Container)}).",
    )
