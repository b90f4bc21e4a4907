"""A three-hour file needs no more memory than a one-minute file and 1 GiB: encoded and decoded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from hcodec_core.inference.files import TokenFile

RATE = 16000
GIB = 1024**3


@dataclass(frozen=True)
class Run:
    """Peak of the resident memory of a command and all processes it started, and its seconds."""

    peak_bytes: int
    seconds: float
    output: str


def write_audio(path: Path, seconds: int) -> None:
    """Noise whose loudness and colour wander, minute by minute; never held as a whole."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", RATE, 1, subtype="PCM_16") as file:
        for start in range(0, seconds, 60):
            size = min(60, seconds - start) * RATE
            time_axis = np.arange(size) / RATE
            tone = np.sin(2 * np.pi * rng.uniform(80, 2000) * time_axis)
            sound = rng.uniform(0.1, 0.4) * tone + 0.1 * rng.standard_normal(size)
            file.write(np.clip(sound, -1, 1))


def run(*arguments: object) -> Run:
    started = time.monotonic()
    command = [sys.executable, "-m", "hcodec_core.cli", *map(str, arguments), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        root, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, memory_of(root))
            time.sleep(0.1)
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0, output
    return Run(peak, time.monotonic() - started, output)


def memory_of(root: psutil.Process) -> int:
    """Memory of its own (not shared with others) of a process tree."""
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().uss
    except psutil.NoSuchProcess:
        return 0
    return total


@pytest.mark.slow
def test_three_hours_cost_no_more_memory_than_a_minute_and_a_gibibyte(tmp_path: Path) -> None:
    results: dict[int, dict[str, Run]] = {}
    for seconds in (60, 3 * 3600 + 7):
        audio, tokens = tmp_path / f"{seconds}.wav", tmp_path / f"{seconds}.parquet"
        write_audio(audio, seconds)
        encoded = run("encode", audio, "--out", tokens)
        (row,) = TokenFile(tokens).rows()
        num_frames = -(-seconds * RATE // 640)
        assert row.tokens.num_samples == seconds * RATE
        assert {codes.shape for codes in row.tokens.codes.values()} == {(4, num_frames)}
        decoded = run("decode", tokens, "--out", tmp_path / "wavs")
        (written,) = json.loads(decoded.output)
        assert written["num_samples"] == soundfile.info(written["wav"]).frames == seconds * RATE
        Path(written["wav"]).unlink()
        audio.unlink()
        results[seconds] = {"encode": encoded, "decode": decoded}
    short, long = results.values()
    for step in ("encode", "decode"):
        print(
            f"{step}: a minute {short[step].peak_bytes / GIB:.2f} GiB, three hours "
            f"{long[step].peak_bytes / GIB:.2f} GiB in {long[step].seconds:.0f} s"
        )
        assert long[step].peak_bytes <= short[step].peak_bytes + GIB
