"""The whole way by hand: register, evaluate, gate, promote, look, roll back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hcodec_core.cli import main
from hcodec_core.codecs import load_manifest
from hcodec_core.storage import file_uri

NAME = "hcodec-tiny"
CLIPS = Path(__file__).parent.parent / "corpus" / "clips"


@pytest.fixture
def hcodec(bench, tmp_path, capsys):
    """Runs a command with a configuration file; returns exit code, JSON document and notes."""
    path = tmp_path / "hcodec.toml"
    path.write_text(
        f"""
[access]
source_prefixes = ["file://{tmp_path}/"]
destination_prefixes = ["file://{tmp_path}/"]
[catalog]
uri = "sqlite:///{tmp_path}/catalog.db"
warehouse_uri = "file://{tmp_path}/warehouse"
[work]
work_uri = "file://{tmp_path}/work"
[gate]
min_files = 2
[gate.metrics.mel_distance_db]
margin = 1000
"""
    )

    def run(*arguments: object) -> tuple[int, object, str]:
        capsys.readouterr()
        code = main([*map(str, arguments), "--config", str(path), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return run


@pytest.fixture
def held_out(tmp_path) -> Path:
    (tmp_path / "held").mkdir()
    for name in ("english/weather-report.flac", "german/nachricht.mp3"):
        shutil.copy(CLIPS / name, tmp_path / "held")
    return tmp_path / "held"


def evaluated(hcodec, held_out, out: Path, *sides: str) -> str:
    quick = ["--metrics", "mel_distance_db", "--seconds", "1", "--samples", "0"]
    code, _, error = hcodec("evaluate", "--audio", held_out, "--out", out, *sides, *quick)
    assert code == 0, error
    return file_uri(out / "evaluation.json")


def test_from_a_folder_to_the_champion_and_back(bench, hcodec, held_out, tmp_path):
    code, first, _ = hcodec("registry", "register", NAME, bench.codecs["one"])
    assert (code, first["version"]) == (0, 1)
    uri = evaluated(hcodec, held_out, tmp_path / "e1", "--codec", f"models:/{NAME}@challenger")
    code, decision, _ = hcodec("gate", f"models:/{NAME}@challenger", uri)
    assert (code, decision["verdict"]["status"]) == (0, "pass")
    code, step, _ = hcodec("promote", NAME, decision["decision_id"], "--by", "ann")
    assert (code, step["to"]["version"], step["by"]) == (0, 1, "ann")

    hcodec("registry", "register", NAME, bench.codecs["two"], "--data-version", "v7")
    sides = ["--codec", f"models:/{NAME}@challenger", "--against", f"models:/{NAME}@champion"]
    uri = evaluated(hcodec, held_out, tmp_path / "e2", *sides)
    facts = json.loads((tmp_path / "e2" / "evaluation.json").read_text())["sides"]
    assert facts["codec"]["facts"]["version"] == f"models:/{NAME}/2"
    _, decision, _ = hcodec("gate", f"models:/{NAME}@challenger", uri)
    code, step, _ = hcodec("promote", NAME, decision["decision_id"])
    assert (code, step["from_version"], step["to"]["version"]) == (0, 1, 2)

    _, listed, _ = hcodec("registry", "list")
    assert listed == [{"codec": NAME, "versions": 2, "champion": 2, "challenger": ""}]
    _, shown, _ = hcodec("registry", "show", NAME)
    assert shown["aliases"] == {"champion": 2}
    assert shown["versions"][1]["data_version"] == "v7"
    assert [entry["kind"] for entry in shown["history"]] == ["promotion", "promotion"]

    code, step, _ = hcodec("rollback-codec", NAME, "--from-version", 2, "--reason", "hiss")
    assert (code, step["kind"], step["to"]["version"]) == (0, "rollback", 1)
    _, shown, _ = hcodec("registry", "show", NAME)
    assert shown["aliases"] == {"champion": 1}


def test_a_plan_by_name_holds_place_and_digest(bench, hcodec, tmp_path):
    hcodec("registry", "register", NAME, bench.codecs["one"])
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.wav").write_bytes(bytes(1000))
    code, plan, error = hcodec(
        "plan", f"file://{tmp_path}/audio", "--dataset", "speech",
        "--codec", f"models:/{NAME}@challenger",
    )  # fmt: skip
    assert code == 0, error
    job = bench.storage.read(plan["plan_uri"] + "/job.json").decode()
    assert "models:" not in job
    digest = load_manifest(str(bench.codecs["one"])).digest
    assert plan["codec_digest"] == digest
    assert json.loads(job)["codec_uri"] == f"file://{bench.codecs['one']}"


def test_the_gate_says_no_with_exit_code_1_and_nothing_is_promoted(
    bench, hcodec, held_out, tmp_path
):
    hcodec("registry", "register", NAME, bench.codecs["one"])
    uri = evaluated(hcodec, held_out, tmp_path / "e", "--codec", f"models:/{NAME}@challenger")
    strict = tmp_path / "strict.toml"
    strict.write_text("min_files = 2\n[metrics.mel_distance_db]\nworst = 0.001\n")
    code, decision, _ = hcodec("gate", f"models:/{NAME}@challenger", uri, "--margins", strict)
    assert (code, decision["verdict"]["status"]) == (1, "fail")
    code, _, error = hcodec("promote", NAME, decision["decision_id"])
    assert code == 1
    assert json.loads(error.splitlines()[-1])["error"] == "PromotionRefusedError"
    assert bench.champion is None


def test_a_name_that_is_not_registered_is_one_sentence(hcodec):
    code, _, error = hcodec("registry", "show", "nobody")
    assert code == 43
    assert "models:/nobody is not in the registry" in json.loads(error)["message"]
