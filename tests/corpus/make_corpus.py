"""Make the sample corpus: synthetic speech, music and noise, and files that must be refused.

Run ``python tests/corpus/make_corpus.py`` with espeak-ng on the path. It replaces ``clips/`` and
``manifest.json``. Nothing else in the project needs espeak-ng: the clips are committed. Running it
again gives the same audio, but not always the same bytes (encoders draw stream serial numbers).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from hcodec_core.audio.mp3 import parse_frame_header

ROOT = Path(__file__).parent
CLIPS = ROOT / "clips"
LICENCE = "Apache-2.0"
AAC_FRAME, MP3_FRAME = 1024, 1152
Audio = npt.NDArray[np.float64]  # [frames, channels]

TEXTS = {
    "greeting": ("en-us", "Good morning. The machine is ready when you are."),
    "weather": (
        "en-gb",
        "The wind turns to the west in the evening. Light rain reaches the coast before "
        "midnight, and the hills stay dry until Thursday.",
    ),
    "reading": (
        "en-us+f3",
        "The clerk wrote every number twice. Once in the blue book, once in the green one, "
        "and at the end of the day the two books had to agree. When they did not, nobody went "
        "home until the missing line was found.",
    ),
    "phone": ("en-gb-scotland", "Hello? Yes, I can hear you now. The line was bad for a moment."),
    "question": ("en-us+m3", "How many samples fit in one frame? And who counts the last one?"),
    "answer": ("en-gb+f2", "Six hundred and forty. The last one is padded with zeros."),
    "clock": ("en-gb", "It is seven o'clock, and the shop is closed."),
    "story": (
        "en-us+f4",
        "A lighthouse keeper kept a list of ships. Each night he wrote the name, the hour, and "
        "the colour of the lamps. After thirty years the list was longer than the stairs. One "
        "winter a young captain came and asked whether her father's ship had passed, long ago, "
        "on a night of fog. The keeper climbed down, opened the third book, and turned the pages "
        "slowly. Here, he said. Half past two. One red lamp, one green, and somebody on deck who "
        "waved. The captain read the line again and again. It was the only sentence in the whole "
        "world that proved it. She thanked him and went back to her boat. The keeper took the "
        "newest book, dipped his pen, and wrote her down as well: the name, the hour, the colour "
        "of the lamps.",
    ),
    "steady": (
        "en-029",
        "Nothing lost, nothing twice, nothing silent. That is the whole promise, and it is enough.",
    ),
    "greetings_de": (
        "de",
        "Schöne Grüße aus der Küche. Das Brot ist fertig, die Suppe noch nicht.",
    ),
    "train_de": (
        "de+f2",
        "Der Zug nach Köln fährt heute von Gleis sieben. Bitte Vorsicht am Gleis. Reisende nach "
        "Aachen steigen in Düren um und erreichen dort den Anschluss um zehn nach acht.",
    ),
    "message_de": ("de+m2", "Diese Nachricht ist kurz, aber sie kommt vollständig an."),
    "station_fr": ("fr-fr", "Pardon, où est la gare? Mon train part dans dix minutes."),
    "weather_fr": (
        "fr-fr+f4",
        "Demain, le temps sera doux. Quelques nuages passeront l'après-midi, puis le ciel "
        "redeviendra clair. Sur la côte, le vent du nord tombera pendant la nuit.",
    ),
    "child_es": (
        "es",
        "El niño abrió la ventana y escuchó el mar durante un largo rato. Después escribió una "
        "carta a su abuela y dibujó tres barcos en la última página.",
    ),
    "hello_cmn": ("cmn", "你好。今天的天气很好。"),
    "hello_ru": ("ru", "Привет, как дела? Сегодня хороший день, чтобы слушать музыку."),
    "hello_hi": ("hi", "नमस्ते, आप कैसे हैं? आज मौसम बहुत अच्छा है।"),
    "morning_sw": ("sw", "Habari ya asubuhi. Leo tunasoma vitabu vitatu."),
    "forest_sv": ("sv", "I skogen växer blåbär, och stigen leder ner till sjön."),
}


@dataclass(frozen=True)
class Entry:
    """One line of the manifest; ``expected`` is ``decoded`` or a quarantine reason.

    num_frames: sample frames that were encoded; decoding may give up to ``tolerance_frames`` more
    (never fewer). They are 0 for files that must be refused.
    """

    file: str
    kind: str
    expected: str
    container: str
    encoding: str
    seconds: float
    sample_rate: int
    num_channels: int
    num_frames: int
    tolerance_frames: int
    language: str
    licence: str
    note: str


ENTRIES: list[Entry] = []


# Sound ------------------------------------------------------------------------------------------


def speak(name: str, rate: int, words_per_minute: int = 165) -> Audio:
    """A sentence of ``TEXTS`` by its espeak-ng voice, mono at ``rate`` Hz, with a noise floor."""
    voice, text = TEXTS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "voice.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-w", str(path), text]
        subprocess.run(command, check=True)
        audio, native_rate = soundfile.read(path, dtype="float64", always_2d=True)
    audio = soxr.resample(audio, native_rate, rate, quality="HQ")
    floor = _noise(len(audio), seed=len(text)) * 3e-4
    return 0.6 * audio / np.abs(audio).max() + floor


def _noise(num_frames: int, seed: int) -> Audio:
    return np.random.default_rng(seed).standard_normal((num_frames, 1))


def _time(seconds: float, rate: int) -> Audio:
    return np.arange(round(seconds * rate))[:, None] / rate


def note(frequency: float, seconds: float, rate: int) -> Audio:
    """A plucked tone with eight harmonics."""
    t = _time(seconds, rate)
    partials = [k for k in range(1, 9) if k * frequency < rate / 2.2]
    tone = sum(np.sin(2 * np.pi * k * frequency * t) / k**1.5 for k in partials)
    return np.asarray(tone * np.exp(-3 * t / seconds) * np.minimum(1, t * 200))


def melody(seconds: float, rate: int, seed: int) -> Audio:
    """Notes of a pentatonic scale, four per second."""
    rng = np.random.default_rng(seed)
    scale = 220 * 2 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16]) / 12)
    notes = [note(rng.choice(scale), 0.25, rate) for _ in range(round(seconds * 4))]
    return 0.3 * np.concatenate(notes)


def chords(seconds: float, rate: int) -> Audio:
    """Stereo: slow chords, each channel with its own voicing."""
    roots = (220.0, 174.6, 196.0, 146.8)
    parts = []
    for root in roots:
        left = sum(note(root * ratio, seconds / 4, rate) for ratio in (1, 1.25, 1.5))
        right = sum(note(root * ratio, seconds / 4, rate) for ratio in (1, 1.5, 2))
        parts.append(np.concatenate([np.asarray(left), np.asarray(right)], axis=1))
    return 0.15 * np.concatenate(parts)


def drums(seconds: float, rate: int) -> Audio:
    """A kick on each beat, noise between."""
    t = _time(0.5, rate)
    kick = np.sin(2 * np.pi * 60 * t) * np.exp(-12 * t)
    hat = _noise(len(t), seed=5) * np.exp(-60 * np.abs(t - 0.25)) * 0.2
    return 0.7 * np.tile(kick + hat, (round(seconds * 2), 1))


def pink(seconds: float, rate: int) -> Audio:
    """Noise whose power falls with frequency."""
    num_frames = round(seconds * rate)
    spectrum = np.fft.rfft(_noise(num_frames, seed=7)[:, 0])
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    wave = np.fft.irfft(spectrum, num_frames)[:, None]
    return 0.3 * wave / np.abs(wave).max()


def hum(seconds: float, rate: int) -> Audio:
    """Mains hum with harmonics."""
    t = _time(seconds, rate)
    return 0.2 * sum(np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3, 5)) + np.zeros_like(t)


# Files ------------------------------------------------------------------------------------------


def with_soundfile(path: Path, audio: Audio, rate: int, encoding: str, **options: object) -> None:
    """Write by libsndfile; ``encoding`` is its subtype. In pieces, as its Vorbis needs."""
    kind = {"opus": "OGG", "ogg": "OGG"}.get(path.suffix[1:], path.suffix[1:].upper())
    with soundfile.SoundFile(
        path, "w", rate, audio.shape[1], subtype=encoding, format=kind, **options
    ) as file:
        for start in range(0, len(audio), 4096):
            file.write(audio[start : start + 4096])


def with_ffmpeg(path: Path, audio: Audio, rate: int, codec: str, **options: str) -> None:
    """Write an m4a by FFmpeg; ``codec`` is aac or alac, ``options`` go to the muxer."""
    sample_format = {"aac": "fltp", "alac": "s16p"}[codec]
    samples = audio.T.astype(np.float32)
    if codec == "alac":
        samples = np.round(samples * 32767).astype(np.int16)
    layout = "mono" if audio.shape[1] == 1 else "stereo"
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 64_000 * audio.shape[1]
        for start in range(0, samples.shape[1], AAC_FRAME):
            piece = np.ascontiguousarray(samples[:, start : start + AAC_FRAME])
            frame = av.AudioFrame.from_ndarray(piece, format=sample_format, layout=layout)
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def good(
    file: str,
    audio: Audio,
    rate: int,
    encoding: str,
    *,
    kind: str = "speech",
    text: str = "",
    tolerance: int = 0,
    note: str = "",
    change: Callable[[bytes], bytes] | None = None,
    **options: object,
) -> None:
    """Write a clip that must decode, and its line of the manifest."""
    path = CLIPS / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write = with_ffmpeg if path.suffix == ".m4a" else with_soundfile
    write(path, audio, rate, encoding, **options)
    if change:
        path.write_bytes(change(path.read_bytes()))
    entry = Entry(
        file,
        kind,
        "decoded",
        path.suffix[1:],
        encoding.lower(),
        round(len(audio) / rate, 4),
        rate,
        audio.shape[1],
        len(audio),
        tolerance,
        TEXTS[text][0].split("+")[0] if text else "",
        LICENCE,
        note,
    )
    ENTRIES.append(entry)


def spoken(file: str, text: str, rate: int, encoding: str, **more: object) -> None:
    """A clip with one sentence."""
    good(file, speak(text, rate), rate, encoding, text=text, **more)


def broken(name: str, data: bytes, expected: str, note: str) -> None:
    """Write a file that must be refused with exactly the reason ``expected``."""
    path = CLIPS / "broken" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    kind = path.suffix[1:]
    entry = Entry(
        f"broken/{name}", "broken", expected, kind, "", 0.0, 0, 0, 0, 0, "", LICENCE, note
    )
    ENTRIES.append(entry)


def encoded(name: str, audio: Audio, rate: int, encoding: str, **options: str) -> bytes:
    """Bytes of a file, to be damaged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write = with_ffmpeg if path.suffix == ".m4a" else with_soundfile
        write(path, audio, rate, encoding, **options)
        return path.read_bytes()


def with_wav_sizes(data: bytes, riff_size: int, data_size: int) -> bytes:
    """WAV bytes with other lengths in its header."""
    at = data.index(b"data") + 4
    sizes = struct.pack("<I", riff_size), struct.pack("<I", data_size)
    return data[:4] + sizes[0] + data[8:at] + sizes[1] + data[at + 4 :]


def without_length(data: bytes) -> bytes:
    """FLAC bytes as a streaming encoder leaves them: number of samples and MD5 unknown."""
    return data[:21] + bytes([data[21] & 0xF0]) + bytes(20) + data[42:]


def without_first_frame(data: bytes) -> bytes:
    """MP3 bytes without the Xing frame: nothing tells the length of a variable rate."""
    header = parse_frame_header(data)
    assert header is not None
    assert b"Xing" in data[: header.num_bytes]
    return data[header.num_bytes :]


# The corpus -------------------------------------------------------------------------------------


def make_english() -> None:
    spoken("english/a short greeting.wav", "greeting", 16_000, "PCM_16", note="spaces in the name")
    spoken("english/weather-report.flac", "weather", 16_000, "PCM_16")
    spoken("english/reading.mp3", "reading", 44_100, "MPEG_LAYER_III")
    spoken("english/phone-call.wav", "phone", 8_000, "ULAW")
    spoken("english/Q&A session.opus", "question", 48_000, "OPUS", note="& in the name")
    spoken("english/seven o'clock.m4a", "clock", 44_100, "aac", note="' in the name")
    story = speak("story", 24_000, words_per_minute=188)
    good("english/lighthouse.opus", story, 24_000, "OPUS", text="story", note="the longest clip")
    spoken("english/steady.wav", "steady", 22_050, "FLOAT")
    sides = [speak(name, 48_000) for name in ("question", "answer")]
    length = min(map(len, sides))
    both = np.concatenate([side[:length] for side in sides], axis=1)
    good("english/two-speakers.flac", both, 48_000, "PCM_16", text="question", note="one a side")
    spoken(
        "english/variable-rate.mp3",
        "weather",
        22_050,
        "MPEG_LAYER_III",
        note="variable bit rate without a Xing header",
        tolerance=3 * MP3_FRAME,
        change=without_first_frame,
        bitrate_mode="VARIABLE",
        compression_level=0.5,
    )


def make_other_languages() -> None:
    spoken("german/Grüße.flac", "greetings_de", 16_000, "PCM_16", note="unicode in the name")
    spoken("german/zug.m4a", "train_de", 48_000, "aac")
    spoken("german/nachricht.mp3", "message_de", 16_000, "MPEG_LAYER_III")
    spoken("french/où est la gare.wav", "station_fr", 22_050, "PCM_16", note="unicode and spaces")
    spoken("french/météo.opus", "weather_fr", 16_000, "OPUS")
    spoken("spanish/niño.ogg", "child_es", 32_000, "VORBIS")
    spoken("mandarin/你好.opus", "hello_cmn", 48_000, "OPUS")
    spoken("russian/привет.m4a", "hello_ru", 22_050, "aac")
    spoken("hindi/नमस्ते.ogg", "hello_hi", 16_000, "VORBIS")
    spoken("swahili/habari.aiff", "morning_sw", 11_025, "PCM_16")
    spoken("swedish/skogen.m4a", "forest_sv", 16_000, "alac")


def make_music_and_noise() -> None:
    good("music/chords.opus", chords(28, 48_000), 48_000, "OPUS", kind="music")
    good("music/arpeggio.m4a", melody(9, 44_100, 1).repeat(2, 1), 44_100, "aac", kind="music")
    good(
        "music/melody.mp3",
        melody(16, 48_000, 2).repeat(2, 1),
        48_000,
        "MPEG_LAYER_III",
        kind="music",
    )
    good("music/drums.wav", drums(6, 11_025), 11_025, "PCM_24", kind="music")
    good("noise/pink.ogg", pink(14, 44_100), 44_100, "VORBIS", kind="noise")
    good("noise/hum.mp3", hum(5, 8_000), 8_000, "MPEG_LAYER_III", kind="noise")
    good("noise/quiet room.flac", 1e-3 * _noise(32_000, 3), 16_000, "PCM_16", kind="noise")
    loud = np.clip(6 * melody(2, 16_000, 4), -1, 32767 / 32768)
    good("noise/overdriven.wav", loud, 16_000, "PCM_16", kind="noise", note="clipped")
    silence = np.zeros((3 * 16_000, 1))
    good("noise/silence.flac", silence, 16_000, "PCM_16", kind="silence")


def make_special() -> None:
    good("short/blip.wav", melody(0.25, 16_000, 8)[:3200], 16_000, "PCM_16", kind="music")
    good("short/blip.m4a", melody(0.25, 48_000, 9)[:9600], 48_000, "aac", kind="music")
    streamed = {"note": "streamed: no length in the header", "kind": "music"}
    change: Callable[[bytes], bytes] = lambda data: with_wav_sizes(data, 0xFFFFFFFF, 0xFFFFFFFF)  # noqa: E731
    good(
        "streamed/all-ones.wav",
        melody(1.5, 16_000, 10),
        16_000,
        "PCM_16",
        change=change,
        **streamed,
    )
    change = lambda data: with_wav_sizes(data, 0, 0)  # noqa: E731
    good("streamed/zeros.wav", melody(1.5, 16_000, 11), 16_000, "PCM_16", change=change, **streamed)
    tune = melody(2, 24_000, 12)
    good("streamed/live.flac", tune, 24_000, "PCM_16", change=without_length, **streamed)
    good(
        "streamed/fragments.m4a",
        melody(3, 44_100, 13),
        44_100,
        "aac",
        kind="music",
        tolerance=2 * AAC_FRAME,
        note="fragmented: encoder delay is not marked",
        movflags="+frag_keyframe+empty_moov",
        frag_duration="1000000",
    )


def make_broken() -> None:
    """The files that no dataset may contain tokens of."""
    tune = melody(2, 16_000, 20)
    wav = encoded("a.wav", tune, 16_000, "PCM_16")
    flac = encoded("a.flac", tune, 16_000, "PCM_16")
    opus = encoded("a.opus", tune, 16_000, "OPUS")
    mp3 = encoded("a.mp3", tune, 16_000, "MPEG_LAYER_III")
    m4a = encoded("a.m4a", tune, 16_000, "aac", movflags="+faststart")
    broken("truncated.wav", wav[: len(wav) // 2], "truncated", "cut in half")
    broken("truncated.flac", flac[: len(flac) // 2], "truncated", "cut in half")
    broken("truncated.opus", opus[: len(opus) // 2], "truncated", "cut in half")
    broken("truncated.mp3", mp3[: len(mp3) // 2], "truncated", "cut in half")
    broken("truncated.m4a", m4a[: len(m4a) // 2], "truncated", "cut in half")
    broken("zero-bytes.wav", b"", "empty", "no bytes")
    broken("no-samples.wav", with_wav_sizes(wav[:44], 36, 0), "empty", "a header alone")
    broken("text.wav", b"This is not audio, whatever its name says.\n", "not_audio", "plain text")
    holes = tune.copy()
    holes[1000:1010] = np.nan
    broken("not-a-number.wav", encoded("a.wav", holes, 16_000, "FLOAT"), "non_finite", "NaN")
    lie = with_wav_sizes(wav, 10 * len(wav), 10 * len(wav))
    broken("lying-header.wav", lie, "truncated", "promises ten times what it holds")
    damaged = bytearray(flac)
    damaged[len(flac) // 2] ^= 0xFF
    broken("bit-rot.flac", bytes(damaged), "undecodable", "one byte flipped")
    broken("chained.opus", opus + opus, "undecodable", "two streams, of which decoders play one")
    many = np.tile(tune[:1600], (1, 10))
    broken("ten-channels.wav", encoded("a.wav", many, 16_000, "PCM_16"), "too_many_channels", "")
    slow = encoded("a.wav", tune[:4000], 4_000, "PCM_16")
    broken("4000-hertz.wav", slow, "unsupported_rate", "")
    script = b"ffconcat version 1.0\nfile '../english/a short greeting.wav'\n"
    broken("concat-script.flac", script, "refused_container", "names another file")
    playlist = b"#EXTM3U\n#EXTINF:3,\n../english/a%20short%20greeting.wav\n#EXT-X-ENDLIST\n"
    broken("playlist.mp3", playlist, "refused_container", "names another file")


def main() -> None:
    shutil.rmtree(CLIPS, ignore_errors=True)
    make_english()
    make_other_languages()
    make_music_and_noise()
    make_special()
    make_broken()
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in ENTRIES]
    text = "[\n" + ",\n".join(lines) + "\n]\n"
    (ROOT / "manifest.json").write_text(text, encoding="utf-8")
    total = sum(os.path.getsize(CLIPS / entry.file) for entry in ENTRIES)
    good_ones = [entry for entry in ENTRIES if entry.expected == "decoded"]
    seconds = sum(entry.seconds for entry in good_ones)
    print(f"{len(good_ones)} good files, {seconds:.1f} s; {len(ENTRIES)} files, {total} bytes")


if __name__ == "__main__":
    main()
