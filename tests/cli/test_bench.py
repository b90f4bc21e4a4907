"""``hcodec bench``: rows of the agreed form, written and merged by codec, mode and device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hcodec_core.cli import main

KEYS = {
    "codec",
    "mode",
    "device",
    "x_realtime",
    "loop_x_realtime",
    "codes_equal",
    "peak_bytes",
    "bottleneck",
}


def bench(capsys, out: Path, *arguments: str):
    capsys.readouterr()
    options = ("--device", "cpu", "--budget", "0.1", "--out", str(out), "--json")
    assert main(["bench", *options, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_are_measured_written_and_merged(capsys, tmp_path: Path) -> None:
    rows = bench(capsys, tmp_path, "--preset", "ucodec-tiny", "--workers", "1")
    assert [row["mode"] for row in rows] == ["exact", "fast"]
    for row in rows:
        assert row.keys() == KEYS
        assert (row["codec"], row["device"]) == ("ucodec-tiny", "cpu")
        assert row["x_realtime"] > 0
        assert row["loop_x_realtime"] > 0
        assert 100e6 < row["peak_bytes"] < 20e9
        assert row["bottleneck"].endswith("%")
    assert rows[0]["codes_equal"] == 1.0
    (path,) = tmp_path.glob("*.json")
    assert "cores" in path.name
    assert json.loads(path.read_text()) == rows
    others = [row | {"codec": "another"} for row in rows]
    path.write_text(json.dumps([*others, *(row | {"x_realtime": 0.0} for row in rows)]))
    again = bench(capsys, tmp_path, "--preset", "ucodec-tiny", "--workers", "1")
    assert json.loads(path.read_text()) == [*others, *again]
    page = path.with_suffix(".md").read_text()
    assert "Weights are random" in page
    assert "ucodec-tiny" in page


@pytest.mark.slow
def test_two_workers_share_the_clips_and_their_codes_come_back_in_order(capsys, tmp_path) -> None:
    rows = bench(capsys, tmp_path, "--preset", "hcodec-tiny", "--workers", "2", "--budget", "0.5")
    assert rows[0]["codes_equal"] == 1.0
    (page,) = tmp_path.glob("*.md")
    line = next(line for line in page.read_text().splitlines() if "| hcodec-tiny" in line)
    assert line.split(" | ")[7] == "2"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_passes_for_a_measurement(capsys, tmp_path: Path) -> None:
    assert main(["bench", "--device", "cuda", "--out", str(tmp_path)]) == 43
    assert "There is no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_feeding_is_measured_by_format(capsys, tmp_path: Path) -> None:
    bench(capsys, tmp_path, "--preset", "hcodec-tiny", "--workers", "1", "--feed")
    (path,) = tmp_path.glob("*-feed.json")
    rows = json.loads(path.read_text())
    assert {row["format"].split()[0] for row in rows} == {"wav", "flac", "opus", "mp3"}
    for row in rows:
        assert row["decode"]["decode_seconds"] > 0
        assert row["worker_x_realtime"] > 0
        assert set(row["work"]["steps"]) == {"network", "decode", "encode", "write"}
    assert "bottleneck: " in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("arguments", [("--preset", "nothing"), ("--budget", "0")])
def test_what_cannot_be_measured_is_said(capsys, arguments: tuple[str, str]) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 43
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
