"""What feeds an encoder: how fast audio files of each format are decoded, and a worker end to end.

Decoding is measured in processor time of one core, as a worker decodes (sniff, decode, channel
rule, resample); end to end a real worker reads the files from disk and writes Parquet.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from hcodec_core.audio.decode import DecodeSettings, decode_all
from hcodec_core.inference.engine import compute_class
from hcodec_core.inference.files import LocalEncoding
from hcodec_core.inference.invariance import synthetic_clips
from hcodec_core.inference.worker import WorkerOptions
from hcodec_core.jobs import FormatUse, WorkUse
from hcodec_core.tokens import EncodeSettings

_SECONDS_PER_FILE = 15.0
_ROUNDS = 3


@dataclass(frozen=True)
class _Format:
    suffix: str
    sample_rate: int
    num_channels: int
    kind: str
    subtype: str


_FORMATS: Mapping[str, _Format] = {
    "wav 16 kHz": _Format("wav", 16_000, 1, "WAV", "PCM_16"),
    "flac 16 kHz": _Format("flac", 16_000, 1, "FLAC", "PCM_16"),
    "flac 44.1 kHz stereo": _Format("flac", 44_100, 2, "FLAC", "PCM_16"),
    "opus": _Format("opus", 48_000, 1, "OGG", "OPUS"),
    "mp3 44.1 kHz stereo": _Format("mp3", 44_100, 2, "MP3", "MPEG_LAYER_III"),
}


@dataclass(frozen=True)
class FeedRow:
    """One format: what its files needed, and a worker's way from files to Parquet.

    decode: processor time of decoding. worker_x_realtime: seconds of audio per second while the
    worker had shards. work: where its time went.
    """

    name: str
    decode: FormatUse
    worker_x_realtime: float
    work: WorkUse


def measure_feed(codec_uri: str, num_files: int) -> list[FeedRow]:
    """Every format: decode alone, then a worker on ``num_files`` files of it, on the CPU."""
    return [_measure(name, form, codec_uri, num_files) for name, form in _FORMATS.items()]


def _measure(name: str, form: _Format, codec_uri: str, num_files: int) -> FeedRow:
    with tempfile.TemporaryDirectory(prefix="hcodec-") as scratch:
        audio_path = Path(scratch) / "audio"
        audio_path.mkdir()
        paths = [_write(audio_path, form, seed) for seed in range(num_files)]
        decode = _decode(paths)
        work = _work(audio_path, codec_uri, Path(scratch))
    passed = work.steps["encode"].lane_seconds
    return FeedRow(name, decode, round(work.audio_seconds / passed, 2), work)


def _write(folder_path: Path, form: _Format, seed: int) -> Path:
    size = int(_SECONDS_PER_FILE * form.sample_rate)
    clip = np.resize(np.concatenate(synthetic_clips(form.sample_rate, 3, seed)), size)
    path = folder_path / f"{seed:04d}.{form.suffix}"
    channels = np.stack([clip] * form.num_channels, axis=1)
    soundfile.write(path, channels, form.sample_rate, format=form.kind, subtype=form.subtype)
    return path


def _decode(paths: list[Path]) -> FormatUse:
    settings = DecodeSettings(sample_rate=16_000)
    seconds = []
    for _ in range(_ROUNDS):
        started = time.process_time()
        for path in paths:
            decode_all(path, settings)
        seconds.append(time.process_time() - started)
    return FormatUse(
        num_bytes=sum(path.stat().st_size for path in paths),
        audio_seconds=len(paths) * _SECONDS_PER_FILE,
        decode_seconds=min(seconds),
    )


def _work(audio_path: Path, codec_uri: str, scratch_path: Path) -> WorkUse:
    settings = EncodeSettings(compute_class=compute_class("cpu"))
    encoding = LocalEncoding([audio_path], codec_uri, settings, scratch_path)
    worker = WorkerOptions(scratch_path=scratch_path)
    report = encoding.run(worker, scratch_path / "tokens.parquet", threading.Event())
    return report.work
