"""``hcodec compare``: codes, lengths, audio and a picture of two codecs or modes."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hcodec_core.cli import main
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.models.registry import build_codec, presets

RATE = 16000


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    folder = tmp_path / "audio"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 0.7), ("b", 2.1)):
        time = np.arange(int(seconds * RATE)) / RATE
        tone = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(folder / f"{name}.wav", tone.astype(np.float32), RATE)
    return folder


def save(folder: Path, family: str, preset: str) -> Path:
    torch.manual_seed(0)
    codec = build_codec(family, presets(family)[preset]().architecture())
    save_codec(codec, CodecCard(preset, False, "none"), folder)
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["compare", *(str(argument) for argument in arguments)])
    done = capsys.readouterr()
    return code, done.out, done.err


def run_json(capsys, *arguments: object):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_two_modes_of_one_codec(capsys, audio, tmp_path):
    (audio / "broken.wav").write_text("no audio")
    picture = tmp_path / "pictures" / "p.png"
    found = run_json(capsys, audio, "--mode", "fast", "--picture", picture)
    assert found["first"].startswith("hcodec-nano exact")
    assert found["second"].startswith("hcodec-nano fast")
    assert "random weights" in found["second"]
    agreement = found["agreement"]
    assert agreement["num_clips"] == 2
    assert len(agreement["depths"]) == 8
    assert {depth["num_frames"] for depth in agreement["depths"]} == {18 + 53}
    files = {Path(file["path"]).name: file for file in found["files"]}
    assert files.keys() == {"a.wav", "b.wav"}
    assert (
        files["b.wav"]["first"]["num_samples"] == files["b.wav"]["second"]["num_samples"] == 33600
    )
    assert files["b.wav"]["first"]["num_codes"] == 8 * 53
    assert files["b.wav"]["between"]["spectral_db"] >= 0
    (refused,) = found["not_compared"]
    assert refused["path"].endswith("broken.wav")
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert min(width, height) >= 1000


def test_codecs_of_other_codebooks_and_rates_are_compared_by_their_audio(capsys, audio, tmp_path):
    other = save(tmp_path / "other", "hhcodec", "hhcodec-tiny")
    found = run_json(capsys, audio, "--codec", other, "--against-codec", "hcodec-nano")
    assert found["agreement"] is None
    file = found["files"][1]
    assert file["first"]["num_samples"] == 33600
    assert file["second"]["num_samples"] == 50400
    assert file["between"]["si_sdr_db"] is not None
    code, out, err = run(capsys, audio, "--codec", other, "--against-codec", "hcodec-nano")
    assert code == 0
    assert "other codebooks" in err
    assert "a.wav" in out


def test_thresholds_of_an_adaptive_rate_are_compared_on_the_base_grid(capsys, audio, tmp_path):
    codec = save(tmp_path / "adaptive", "hcodec", "hcodec-1.5-tiny")
    thresholds = ("--threshold", "0.99", "--against-threshold", "0.5")
    agreement = run_json(capsys, audio, "--codec", codec, *thresholds)["agreement"]
    assert agreement["num_starts"] > agreement["num_exact_starts"]
    assert {depth["num_frames"] for depth in agreement["depths"]} == {18 + 53}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{audio}",), "Both sides are the same"),
        (("{audio}/none.wav", "--mode", "fast"), "none.wav does not exist"),
        (("{audio}/text", "--mode", "fast"), "No file could be compared"),
    ],
)
def test_what_cannot_be_compared_is_said(capsys, audio, arguments, words):
    (audio / "text").mkdir()
    (audio / "text" / "x.wav").write_text("no audio")
    code, _, err = run(capsys, *(argument.format(audio=audio) for argument in arguments))
    assert code == 43
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_without_matplotlib_the_picture_is_refused_with_what_to_do(capsys, audio, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, audio, "--mode", "fast", "--picture", audio / "p.png")
    assert code == 43
    assert "matplotlib" in err
    assert "'train'" in err


def test_a_picture_that_cannot_be_written_is_refused(capsys, audio):
    (audio / "file").write_text("")
    code, _, err = run(capsys, audio / "a.wav", "--mode", "fast", "--picture", audio / "file/p.png")
    assert code == 43
    assert "cannot be written" in err
