"""Files to samples: the same bits however they are read, and nothing lost without a word."""

import contextlib
import hashlib
import math
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from hcodec_core.audio.containers import Container, Layout
from hcodec_core.audio.decode import DecodedInfo, DecodeSettings, Decoding, decode_all
from hcodec_core.audio.mp3 import parse_frame_header
from hcodec_core.audio.native import Samples, open_native
from hcodec_core.errors import AudioError, ConfigError, QuarantineReason

CLIPS = Path(__file__).parents[1] / "corpus" / "clips"
SETTINGS = DecodeSettings(sample_rate=16_000)


def noise(num_frames: int, num_channels: int = 1, seed: int = 0) -> Samples:
    shape = (num_frames, num_channels)
    return 0.1 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_float_wav(path: Path, samples: Samples, rate: int) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT", format="WAV")
    return path


def reason_of(path: Path, settings: DecodeSettings = SETTINGS) -> QuarantineReason:
    with pytest.raises(AudioError) as refusal:
        decode_all(path, settings)
    assert str(refusal.value).endswith(".")
    return refusal.value.reason


# Channels, gain, resampling ---------------------------------------------------------------------


def test_samples_at_the_codecs_rate_come_out_untouched(tmp_path: Path) -> None:
    audio = noise(100_000)
    path = write_float_wav(tmp_path / "a.wav", audio, 16_000)
    samples, info = decode_all(path, SETTINGS)
    np.testing.assert_array_equal(samples, audio[:, 0])
    assert info.pcm_sha256 == hashlib.sha256(audio.astype("<f4").tobytes()).hexdigest()
    assert info.peak == np.abs(audio).max()
    assert info.rms_db == pytest.approx(20 * math.log10(np.sqrt(np.mean(audio**2))), abs=1e-4)
    assert info.duration_seconds == 6.25


@pytest.mark.parametrize("num_channels", [2, 5, 8])
def test_channel_rules(tmp_path: Path, num_channels: int) -> None:
    audio = noise(70_001, num_channels)
    path = write_float_wav(tmp_path / "a.wav", audio, 16_000)
    first, _ = decode_all(path, DecodeSettings(16_000, channel="first"))
    np.testing.assert_array_equal(first, audio[:, 0])
    mean, info = decode_all(path, DecodeSettings(16_000, channel="mean"))
    np.testing.assert_allclose(mean, audio.mean(axis=1, dtype=np.float64), atol=1e-8)
    assert info.num_channels == num_channels


def test_gain_is_applied(tmp_path: Path) -> None:
    audio = noise(1000)
    path = write_float_wav(tmp_path / "a.wav", audio, 16_000)
    samples, _ = decode_all(path, DecodeSettings(16_000, gain=0.5))
    np.testing.assert_array_equal(samples, audio[:, 0] * np.float32(0.5))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 37_800, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("num_frames", [50, 65_536, 200_003])
def test_streamed_resampling_is_one_shot_resampling(
    tmp_path: Path, rate: int, num_frames: int
) -> None:
    audio = noise(num_frames)
    path = write_float_wav(tmp_path / "a.wav", audio, rate)
    samples, info = decode_all(path, SETTINGS)
    whole = soxr.resample(audio[:, 0], rate, 16_000, quality="HQ")
    np.testing.assert_array_equal(samples, whole)
    assert info.num_samples == (2 * num_frames * 16_000 + rate) // (2 * rate)
    assert info.num_native_frames == num_frames


def test_running_digest_covers_what_was_given(tmp_path: Path) -> None:
    path = write_float_wav(tmp_path / "a.wav", noise(150_000), 44_100)
    decoding = Decoding(path, SETTINGS)
    given = hashlib.sha256()
    for block in decoding:
        given.update(block.tobytes())
        assert decoding.digest == given.digest()
    assert decoding.info.pcm_sha256 == given.hexdigest()


def test_info_survives_json() -> None:
    info = decode_all(CLIPS / "short/blip.wav", SETTINGS)[1]
    assert DecodedInfo.from_dict(info.to_dict()) == info


def test_clipping_is_counted() -> None:
    info = decode_all(CLIPS / "noise/overdriven.wav", SETTINGS)[1]
    audio, _ = soundfile.read(CLIPS / "noise/overdriven.wav", dtype="int16")
    expected = np.mean((audio >= 32767) | (audio <= -32767))
    assert 0.01 < info.clipped_share == pytest.approx(expected)


# Limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_refused_by_position(tmp_path: Path, value: float) -> None:
    audio = noise(80_000, 2)
    audio[70_000, 1] = value
    path = write_float_wav(tmp_path / "a.wav", audio, 16_000)
    with pytest.raises(AudioError, match="70000") as refusal:
        decode_all(path, SETTINGS)
    assert refusal.value.reason is QuarantineReason.NON_FINITE


def test_caps(tmp_path: Path) -> None:
    path = write_float_wav(tmp_path / "a.wav", noise(48_000), 16_000)
    assert decode_all(path, DecodeSettings(16_000, max_seconds=3.0))
    too_large = QuarantineReason.TOO_LARGE
    assert reason_of(path, DecodeSettings(16_000, max_seconds=2.9)) is too_large
    assert reason_of(path, DecodeSettings(16_000, max_bytes=190_000)) is too_large
    streamed = CLIPS / "streamed/live.flac"  # its length is known only at the end
    assert reason_of(streamed, DecodeSettings(16_000, max_seconds=1.5)) is too_large


def test_form_limits(tmp_path: Path) -> None:
    slow = write_float_wav(tmp_path / "slow.wav", noise(1000), 7_999)
    assert reason_of(slow) is QuarantineReason.UNSUPPORTED_RATE
    fast = write_float_wav(tmp_path / "fast.wav", noise(1000), 192_001)
    assert reason_of(fast) is QuarantineReason.UNSUPPORTED_RATE
    wide = write_float_wav(tmp_path / "wide.wav", noise(1000, 9), 16_000)
    assert reason_of(wide) is QuarantineReason.TOO_MANY_CHANNELS
    short = write_float_wav(tmp_path / "short.wav", noise(2), 192_000)
    assert reason_of(short) is QuarantineReason.TOO_SHORT


@pytest.mark.parametrize(
    "values",
    [
        {"sample_rate": 100},
        {"sample_rate": 16_000, "channel": "left"},
        {"sample_rate": 16_000, "gain": 0.0},
        {"sample_rate": 16_000, "max_seconds": math.inf},
        {"sample_rate": 16_000, "timeout_seconds": -1.0},
    ],
)
def test_settings_are_checked(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DecodeSettings(**values)  # type: ignore[arg-type]


# Damage -----------------------------------------------------------------------------------------

WHOLE = [
    "english/steady.wav",
    "swahili/habari.aiff",
    "german/Grüße.flac",
    "english/two-speakers.flac",
    "spanish/niño.ogg",
    "french/météo.opus",
    "german/nachricht.mp3",
    "english/variable-rate.mp3",
    "german/zug.m4a",
    "swedish/skogen.m4a",
]


@pytest.mark.parametrize("file", WHOLE)
def test_a_cut_is_seen_wherever_it_is(tmp_path: Path, file: str) -> None:
    data = (CLIPS / file).read_bytes()
    path = tmp_path / "cut"
    rng = np.random.default_rng(len(data))
    cuts = [int(at) for at in rng.integers(6000, len(data) - 5, 20)]
    for at in [*cuts, len(data) - 5]:
        path.write_bytes(data[:at])
        assert reason_of(path) is QuarantineReason.TRUNCATED, at


def test_mp3_without_xing_header_cut_between_frames_cannot_be_told(tmp_path: Path) -> None:
    """Known limit: nothing in such a file says that more was to come."""
    data = (CLIPS / "english/variable-rate.mp3").read_bytes()
    end = 0
    while end < len(data) // 2:
        header = parse_frame_header(data[end : end + 4])
        assert header is not None
        end += header.num_bytes
    path = tmp_path / "cut.mp3"
    path.write_bytes(data[:end])
    assert decode_all(path, SETTINGS)[1].duration_seconds == pytest.approx(3.7, abs=0.7)


@pytest.mark.parametrize("file", ["german/Grüße.flac", "spanish/niño.ogg", "french/météo.opus"])
def test_no_flipped_byte_changes_samples_silently(tmp_path: Path, file: str) -> None:
    data = (CLIPS / file).read_bytes()
    samples, _ = decode_all(CLIPS / file, SETTINGS)
    path = tmp_path / "damaged"
    num_refused = 0
    for at in np.random.default_rng(1).integers(100, len(data), 60):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(decode_all(path, SETTINGS)[0], samples)
        except AudioError:
            num_refused += 1
    assert num_refused > 40


@pytest.mark.parametrize(
    ("file", "encoding"),
    [("a.wav", "PCM_16"), ("a.aiff", "PCM_16"), ("a.flac", "PCM_16"), ("a.ogg", "VORBIS")],
)
def test_a_container_without_samples_is_empty(tmp_path: Path, file: str, encoding: str) -> None:
    path = tmp_path / file
    with soundfile.SoundFile(path, "w", 16_000, 1, subtype=encoding):
        pass
    assert reason_of(path) is QuarantineReason.EMPTY


def test_fewer_samples_than_promised_are_seen_after_decoding(tmp_path: Path) -> None:
    data = bytearray((CLIPS / "swahili/habari.aiff").read_bytes())
    count_at = data.index(b"COMM") + 10
    num_frames = int.from_bytes(data[count_at : count_at + 4], "big")
    data[count_at : count_at + 4] = (num_frames + 1).to_bytes(4, "big")
    path = tmp_path / "more.aiff"
    path.write_bytes(data)
    assert reason_of(path) is QuarantineReason.TRUNCATED


def test_flipped_flac_is_damaged_and_cut_flac_is_truncated(tmp_path: Path) -> None:
    data = bytearray((CLIPS / "german/Grüße.flac").read_bytes())
    path = tmp_path / "damaged"
    path.write_bytes(data[:-1])
    assert reason_of(path) is QuarantineReason.TRUNCATED
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert reason_of(path) is QuarantineReason.UNDECODABLE


def test_any_damage_ends_in_samples_or_a_reason(tmp_path: Path) -> None:
    """Heads and tails of small clips damaged at random: no other exception ever comes out."""
    rng = np.random.default_rng(3)
    clips = sorted(path for path in CLIPS.rglob("*") if path.is_file())
    clips = [path for path in clips if 500 < path.stat().st_size < 50_000]
    path = tmp_path / "damaged"
    for _ in range(400):
        damaged = bytearray(clips[rng.integers(len(clips))].read_bytes())
        start = rng.choice([0, max(0, len(damaged) - 1500)])
        for at in rng.integers(start, min(len(damaged), start + 1500), 4):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        # A MemoryError is FFmpeg's answer to an absurd length; the decoder process reports it.
        with contextlib.suppress(AudioError, MemoryError):
            decode_all(path, SETTINGS)


# Traps of the libraries -------------------------------------------------------------------------


def test_mp3_of_variable_rate_without_xing_header_is_whole() -> None:
    """libsndfile gives the first fifth of such files and no error."""
    path = CLIPS / "english/variable-rate.mp3"
    _, info = decode_all(path, SETTINGS)
    assert soundfile.info(path).frames < 0.9 * info.num_native_frames
    assert info.duration_seconds == pytest.approx(7.42, abs=0.1)


def test_joined_mp3s_are_decoded_to_their_end(tmp_path: Path) -> None:
    """libsndfile stops at the length in the header of the first."""
    song = (CLIPS / "german/nachricht.mp3").read_bytes()
    path = tmp_path / "joined.mp3"
    path.write_bytes(song + song)
    one = decode_all(CLIPS / "german/nachricht.mp3", SETTINGS)[1]
    both = decode_all(path, SETTINGS)[1]
    assert both.num_samples > 2 * one.num_samples - 100


def test_tags_after_an_mp3_are_no_damage(tmp_path: Path) -> None:
    song = (CLIPS / "german/nachricht.mp3").read_bytes()
    expected = decode_all(CLIPS / "german/nachricht.mp3", SETTINGS)[1]
    path = tmp_path / "tagged.mp3"
    for tail in (b"TAG" + bytes(125), bytes(3000), b"APETAGEX" + bytes(range(200))):
        path.write_bytes(song + tail)
        assert decode_all(path, SETTINGS)[1] == expected


def test_tags_need_not_be_unicode(tmp_path: Path) -> None:
    """PyAV refuses such files unless told not to."""
    clip = CLIPS / "german/zug.m4a"
    path = tmp_path / "tagged.m4a"
    path.write_bytes(clip.read_bytes().replace(b"SoundHandler", b"SoundH\xe4ndler"))
    assert decode_all(path, SETTINGS)[1] == decode_all(clip, SETTINGS)[1]


def test_noise_inside_an_mp3_is_damage(tmp_path: Path) -> None:
    song = (CLIPS / "english/reading.mp3").read_bytes()
    path = tmp_path / "noisy.mp3"
    path.write_bytes(song[:50_000] + np.random.default_rng(0).bytes(9000) + song[50_000:])
    assert reason_of(path) in (QuarantineReason.UNDECODABLE, QuarantineReason.TRUNCATED)


def test_unfinished_wav_keeps_its_samples_whatever_chunk_follows() -> None:
    zeros = decode_all(CLIPS / "streamed/zeros.wav", SETTINGS)[0]
    audio, _ = soundfile.read(CLIPS / "streamed/zeros.wav", dtype="float32")
    assert len(audio) == 0  # libsndfile believes the header
    assert len(zeros) == 24_000
    assert np.abs(zeros).max() > 0.1


def _write_aac(path: Path, audio: Samples, rate: int) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        stream.bit_rate = 96_000
        for start in range(0, len(audio), 1024):
            piece = np.ascontiguousarray(audio[start : start + 1024].T)
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_m4a_starts_and_ends_at_the_true_samples(tmp_path: Path) -> None:
    """Encoder delay and padding are gone: the sound lines up with what was encoded."""
    time = np.arange(50_001, dtype=np.float64) / 16_000
    chirp = 0.3 * np.sin(2 * np.pi * (200 + 900 * time) * time).astype(np.float32)
    path = tmp_path / "chirp.m4a"
    _write_aac(path, chirp[:, None], 16_000)
    samples, info = decode_all(path, SETTINGS)
    assert info.num_native_frames == 50_001
    lags = range(-20, 21)
    scores = [float(samples[1000:49_000] @ np.roll(chirp, lag)[1000:49_000]) for lag in lags]
    assert lags[int(np.argmax(scores))] == 0


def _box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + name + body


def _with_apple_note(data: bytes, num_samples: int) -> bytes:
    """Without an edit list, with Apple's note of delay, padding and length."""
    note = f" 00000000 00000400 00000123 {num_samples:016X} 00000000".encode()
    item = _box(
        b"----",
        _box(b"mean", bytes(4), b"com.apple.iTunes"),
        _box(b"name", bytes(4), b"iTunSMPB"),
        _box(b"data", b"\0\0\0\1\0\0\0\0", note),
    )
    handler = _box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    tags = _box(b"udta", _box(b"meta", bytes(4), handler, _box(b"ilst", item)))
    at = data.index(b"moov") - 4
    index = data[at:].replace(b"edts", b"free", 1).replace(b"udta", b"free", 1)
    size = int.from_bytes(index[:4], "big")
    assert size == len(index)  # the index is the last box
    return data[:at] + struct.pack(">I", size + len(tags)) + index[4:] + tags


def test_apples_gapless_note_is_obeyed(tmp_path: Path) -> None:
    clip = CLIPS / "german/zug.m4a"
    expected, info = decode_all(clip, SETTINGS)
    path = tmp_path / "apple.m4a"
    path.write_bytes(_with_apple_note(clip.read_bytes(), info.num_native_frames))
    samples, _ = decode_all(path, SETTINGS)
    np.testing.assert_array_equal(samples, expected)


def test_names_are_never_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("german/zug.m4a", "german/nachricht.mp3", "noise/silence.flac"):
        path = Path("http:" + Path(file).name)
        path.write_bytes((CLIPS / file).read_bytes())
        assert decode_all(path, SETTINGS)[1] == decode_all(CLIPS / file, SETTINGS)[1]


@pytest.mark.parametrize("container", [Container.MP3, Container.M4A, Container.FLAC])
@pytest.mark.parametrize("file", ["broken/concat-script.flac", "broken/playlist.mp3"])
def test_even_unsniffed_scripts_are_not_followed(container: Container, file: str) -> None:
    """The second line of defence: FFmpeg's demuxer is named, so it does not guess a script."""
    with pytest.raises(AudioError):
        list(open_native(CLIPS / file, Layout(container)).blocks())
