"""What is let in, by bytes and never by name."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest

from hcodec_core.audio.containers import Container
from hcodec_core.audio.sniff import HEAD_BYTES, inspect_file, sniff
from hcodec_core.errors import AudioError, QuarantineReason

CLIPS = Path(__file__).parents[1] / "corpus" / "clips"


def reason_of(head: bytes, size: int | None = None) -> QuarantineReason:
    with pytest.raises(AudioError) as refusal:
        sniff(head, len(head) if size is None else size)
    return refusal.value.reason


@pytest.mark.parametrize(
    ("file", "container"),
    [
        ("english/a short greeting.wav", Container.WAV),
        ("swahili/habari.aiff", Container.AIFF),
        ("german/Grüße.flac", Container.FLAC),
        ("english/reading.mp3", Container.MP3),
        ("spanish/niño.ogg", Container.OGG_VORBIS),
        ("french/météo.opus", Container.OGG_OPUS),
        ("german/zug.m4a", Container.M4A),
    ],
)
def test_containers_are_known_by_their_first_bytes(file: str, container: Container) -> None:
    data = (CLIPS / file).read_bytes()
    assert sniff(data[:4096], len(data)) is container
    assert inspect_file(CLIPS / file).container is container


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile 'a.wav'\n",
        "\n  FFCONCAT version 1.0\nfile a.wav",
        "#EXTM3U\n#EXTINF:3,\na.wav\n",
        "\N{ZERO WIDTH NO-BREAK SPACE}#EXTM3U\na.wav\n",
        "[playlist]\nFile1=a.wav\n",
        "[Reference]\nRef1=http://example.org/a\n",
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nm=audio 5004 RTP/AVP 0\r\n",
        '<?xml version="1.0"?><playlist version="1" xmlns="http://xspf.org/ns/0/"></playlist>',
        "<asx version='3.0'><entry><ref href='a.wma'/></entry></asx>",
        '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        "<SmoothStreamingMedia MajorVersion='2'></SmoothStreamingMedia>",
        "<smil><body><audio src='a.wav'/></body></smil>",
    ],
)
def test_scripts_and_playlists_are_refused_as_such(text: str) -> None:
    assert reason_of(text.encode()) is QuarantineReason.REFUSED_CONTAINER


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        b"RIFF\x00\x00\x00\x00AVI LIST",
        b"OggS" + bytes(23) + b"\x80theora",
        b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(500),  # AAC in ADTS, close to an mp3 header
        b"\xff\xfb\x90\x64" + bytes(500),  # one mp3 header that no second one follows
        bytes(5000),
        b"\x1aE\xdf\xa3" + bytes(100),  # Matroska
    ],
)
def test_everything_else_is_no_audio(data: bytes) -> None:
    assert reason_of(data) is QuarantineReason.NOT_AUDIO


def test_no_bytes_is_empty() -> None:
    assert reason_of(b"") is QuarantineReason.EMPTY


def test_fuzz_never_raises_anything_but_audio_errors(tmp_path: Path) -> None:
    """Clips with heads damaged in many ways are judged, not crashed on."""
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for clip in [*(CLIPS / "short").iterdir(), CLIPS / "french/météo.opus"]:
        data = clip.read_bytes()
        for _ in range(150):
            damaged = bytearray(data)
            for at in rng.integers(0, min(len(data), 3000), 4):
                damaged[at] = rng.integers(0, 256)
            path.write_bytes(damaged[: rng.integers(1, len(data) + 1)])
            for judge in (lambda: inspect_file(path), lambda d=damaged: sniff(d[:600], len(d))):
                with contextlib.suppress(AudioError):
                    judge()


# Headers that lie -------------------------------------------------------------------------------


def wav(data_size: int, riff_size: int, samples: bytes, after: bytes = b"") -> bytes:
    fmt = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    head = b"RIFF" + struct.pack("<I", riff_size) + b"WAVEfmt " + fmt
    return head + b"data" + struct.pack("<I", data_size) + samples + after


def test_wav_that_promises_too_much_is_found_from_its_head() -> None:
    data = wav(100_000, 100_036, bytes(50_000))
    assert reason_of(data[:100], len(data)) is QuarantineReason.TRUNCATED
    assert sniff(data[:100], 100_044) is Container.WAV


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_wav_of_unknown_length_is_accepted(size: int) -> None:
    data = wav(size, size, bytes(5000))
    assert sniff(data, len(data)) is Container.WAV


def test_wav_without_samples_is_empty_though_chunks_follow() -> None:
    after = b"LIST" + struct.pack("<I", 10) + b"INFOabcdef"
    assert reason_of(wav(0, 36 + len(after), b"", after)) is QuarantineReason.EMPTY
    assert reason_of(wav(0, 0, b"")) is QuarantineReason.EMPTY


def test_wav_cut_inside_an_early_chunk_is_truncated() -> None:
    data = b"RIFF" + struct.pack("<I", 9000) + b"WAVELIST" + struct.pack("<I", 8000) + bytes(100)
    assert reason_of(data) is QuarantineReason.TRUNCATED


def test_long_wav_counts_by_its_64_bit_length(tmp_path: Path) -> None:
    fmt = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, 5_000_000_072, 5_000_000_000, 2_500_000_000, 0)
    head = b"RF64\xff\xff\xff\xffWAVE" + ds64 + b"fmt " + fmt + b"data\xff\xff\xff\xff"
    assert reason_of(head, 80_000) is QuarantineReason.TRUNCATED
    path = tmp_path / "long.wav"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + 5_000_000_000)  # sparse
    assert inspect_file(path).num_frames == 2_500_000_000


def test_mp3_behind_a_large_tag_is_found_in_the_file(tmp_path: Path) -> None:
    tag_bytes = HEAD_BYTES + 1000
    size = bytes(tag_bytes >> shift & 0x7F for shift in (21, 14, 7, 0))
    data = b"ID3\x04\x00\x00" + size + bytes(tag_bytes)
    song = (CLIPS / "english/reading.mp3").read_bytes()
    path = tmp_path / "tagged"
    path.write_bytes(data + song)
    assert sniff(data[:HEAD_BYTES], len(data) + len(song)) is Container.MP3
    assert inspect_file(path).num_frames == 531_822
    path.write_bytes(data[:-1])
    with pytest.raises(AudioError, match="ID3") as refusal:
        inspect_file(path)
    assert refusal.value.reason is QuarantineReason.TRUNCATED


def test_mp4_with_media_elsewhere_is_refused(tmp_path: Path) -> None:
    data = bytearray((CLIPS / "german/zug.m4a").read_bytes())
    flags_at = data.index(b"url \x00\x00\x00\x01") + 7
    data[flags_at] = 0
    path = tmp_path / "elsewhere.m4a"
    path.write_bytes(data)
    with pytest.raises(AudioError, match="other files") as refusal:
        inspect_file(path)
    assert refusal.value.reason is QuarantineReason.REFUSED_CONTAINER


def test_encrypted_mp4_is_refused(tmp_path: Path) -> None:
    data = (CLIPS / "german/zug.m4a").read_bytes().replace(b"mp4a", b"enca", 1)
    path = tmp_path / "locked.m4a"
    path.write_bytes(data)
    with pytest.raises(AudioError, match="'enca'"):
        inspect_file(path)
