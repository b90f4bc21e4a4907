"""The command line as a user meets it: results, error sentences, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hcodec_core.cli import main

GOLDEN = Path(__file__).parent.parent / "golden"
CLIPS = Path(__file__).parent.parent / "corpus" / "clips"

CONFIG = """\
format_version = 1
[access]
source_prefixes = ["file://{root}/audio/"]
destination_prefixes = ["file://{root}/out/"]
[catalog]
uri = "sqlite:///{root}/catalog.db"
warehouse_uri = "file://{root}/out/warehouse"
[work]
work_uri = "file://{root}/out/work"
"""


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    done = capsys.readouterr()
    return code, done.out, done.err


def run_json(capsys, *arguments: object):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def place(tmp_path, capsys):
    audio = tmp_path / "audio"
    audio.mkdir()
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 0.5), ("b", 1.3), ("c", 2.0)):
        samples = rng.uniform(-0.5, 0.5, int(seconds * 16000)).astype(np.float32)
        soundfile.write(audio / f"{name}.wav", samples, 16000)
    (tmp_path / "hcodec.toml").write_text(CONFIG.format(root=tmp_path))
    return tmp_path


def test_every_command_has_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for command in ("plan", "run", "encode", "decode", "versions", "inspect", "convert", "parity"):
        assert f"\n    {command} " in text


def test_codecs_lists_weights_and_support(capsys):
    rows = {row["codec"]: row for row in run_json(capsys, "codecs")}
    nano = rows["hcodec-nano"]
    assert (nano["bits_per_second"], nano["frames_per_second"]) == (2000, 25)
    assert nano["is_shipped"]
    assert "random" in nano["support"]
    assert rows["mimi"]["weights"] == "hf kyutai/mimi"
    assert rows["dac-16khz"]["batching"] == "equal-length"
    assert not [name for name in rows if "tiny" in name]
    everything = run_json(capsys, "codecs", "--all")
    assert "ucodec-tiny-strided" in {row["codec"] for row in everything}
    code, out, _ = run(capsys, "codecs")
    assert code == 0
    assert "length-aware" in out
    assert "CC-BY-4.0" in out


def test_parity_agrees_with_golden_data(capsys):
    rows = run_json(capsys, "parity", GOLDEN / "hcodec-1.0-tiny")
    assert [row["agrees"] for row in rows] == ["yes"] * 3


def test_parity_passes_over_files_among_the_folders(capsys):
    origin = GOLDEN / "hcodec-1.0-tiny" / "ORIGIN.md"
    code, _, err = run(capsys, "parity", GOLDEN / "hcodec-1.0-tiny", origin)
    assert code == 0
    assert str(origin) in err


def test_parity_over_files_only_is_no_success(capsys):
    assert run(capsys, "parity", GOLDEN / "hcodec-1.0-tiny" / "ORIGIN.md")[0] == 1


def test_parity_fails_when_codes_differ(capsys, tmp_path):
    folder = tmp_path / "wrong"
    shutil.copytree(GOLDEN / "hcodec-1.0-tiny", folder)
    arrays = dict(np.load(folder / "expected.npz"))
    arrays["acoustic_0"] = arrays["acoustic_0"] ^ 1
    np.savez(folder / "expected.npz", **arrays)
    code, out, _ = run(capsys, "parity", folder)
    assert code == 1
    assert "NO" in out


def test_parity_refuses_a_folder_that_is_not_golden(capsys, tmp_path):
    code, _, err = run(capsys, "parity", tmp_path)
    assert code == 43
    assert str(tmp_path) in err


def test_encode_and_decode_keep_lengths(capsys, place):
    tokens = place / "tokens.parquet"
    report = run_json(capsys, "encode", place / "audio", "--out", tokens)
    assert report["files_with_tokens"] == 3
    assert report["tokens"] == 8 * (13 + 33 + 50)
    written = run_json(capsys, "decode", tokens, "--out", place / "wavs")
    lengths = {Path(item["wav"]).name: item["num_samples"] for item in written}
    assert lengths == {"a.wav.wav": 8000, "b.wav.wav": 20800, "c.wav.wav": 32000}
    assert soundfile.info(place / "wavs" / "b.wav.wav").frames == 20800


def test_encode_gives_the_same_codes_alone_and_in_company(capsys, place):
    run_json(capsys, "encode", place / "audio", "--out", place / "all.parquet")
    run_json(capsys, "encode", place / "audio" / "b.wav", "--out", place / "one.parquet")
    import pyarrow.parquet as pq

    columns = ["uri", "semantic", "acoustic"]
    together = pq.read_table(place / "all.parquet", columns=columns).to_pylist()
    (alone,) = pq.read_table(place / "one.parquet", columns=columns).to_pylist()
    assert alone in together


def test_encode_in_mode_fast_tells_and_stores_its_agreement(capsys, place):
    out = place / "fast.parquet"
    report = run_json(capsys, "encode", place / "audio", "--mode", "fast", "--out", out)
    assert report["agreement"]["num_clips"] == 3
    import pyarrow.parquet as pq

    stored = json.loads(pq.read_schema(out).metadata[b"hcodec"])
    assert stored["agreement"] == report["agreement"]
    code, text, _ = run(capsys, "encode", place / "audio", "--mode", "fast", "--out", out)
    assert code == 0
    assert "against mode exact" in text


def test_encode_lists_files_without_tokens(capsys, place):
    (place / "audio" / "d.wav").write_text("no audio")
    report = run_json(capsys, "encode", place / "audio", "--out", place / "t.parquet")
    (bad,) = report["without_tokens"]
    assert bad["reason"] == "not_audio"
    assert bad["uri"].endswith("/d.wav")


def test_decode_refuses_tokens_of_another_codec(capsys, place):
    from hcodec_core.models.hcodec.config import hcodec_nano
    from hcodec_core.models.loading import CodecCard, save_codec
    from tests.models.hcodec.standardised import random_codec

    codec = random_codec(hcodec_nano(), seed=5, num_clips=8)
    save_codec(codec, CodecCard("other", False, "none"), place / "other")
    run_json(capsys, "encode", place / "audio", "--out", place / "t.parquet")
    code, _, err = run(
        capsys, "decode", place / "t.parquet", "--out", place / "w", "--codec", place / "other"
    )
    assert code == 43
    assert "codebooks" in err


def test_the_pipeline_by_hand(capsys, place):
    config = ("--config", place / "hcodec.toml")
    plan = run_json(
        capsys, "plan", f"file://{place}/audio/", "--dataset", "try", "--shards", 2, *config
    )
    assert plan["num_files"] == 3
    assert run(capsys, "run", f"{plan['plan_uri']}/job.json", *config)[0] == 0
    record = run_json(capsys, "publish", plan["plan_uri"], *config)
    assert record["version"] == "v1"
    again = run_json(capsys, "publish", plan["plan_uri"], *config)
    assert again["version"] == "v1"
    (version,) = run_json(capsys, "versions", "list", "try", *config)
    assert version["files"] == 3
    assert run_json(capsys, "inspect", "try", *config)["codec_name"] == "hcodec-nano"
    code, out, _ = run(capsys, "plan", f"file://{place}/audio/", "--dataset", "try", *config)
    assert code == 0
    assert "Nothing new" in out


def test_a_dataset_is_kept_in_order_by_hand(capsys, place):
    config = ("--config", place / "hcodec.toml")
    plan = run_json(
        capsys, "plan", f"file://{place}/audio/", "--dataset", "try", "--shards", 3, *config
    )
    assert run(capsys, "run", f"{plan['plan_uri']}/job.json", *config)[0] == 0
    run_json(capsys, "publish", plan["plan_uri"], *config)
    code, out, _ = run(capsys, "maintain", "try", *config)
    assert code == 0
    assert "3 small files -> 1" in out
    assert "Dry run" in out
    report = run_json(capsys, "maintain", "try", "--apply", *config)
    assert report["compaction"]["snapshot_id"] is not None
    assert run_json(capsys, "maintain", "try", *config)["compaction"]["num_files_before"] == 0
    for command in (("maintain", "nope"), ("versions", "list", "nope")):
        code, _, err = run(capsys, *command, *config)
        assert code == 43
        assert "There is no dataset 'nope'" in err
        assert "datasets: try" in err
    assert run_json(capsys, "versions", "pin", "try", "v1", *config)["is_pinned"]
    assert run_json(capsys, "versions", "list", "try", *config)[0]["pinned"]
    assert not run_json(capsys, "versions", "unpin", "try", "v1", *config)["is_pinned"]
    gone = f"file://{place}/audio/b.wav"
    code, _, err = run(capsys, "purge", "try", gone, *config)
    assert (code, "--yes" in err) == (43, True)
    code, out, _ = run(capsys, "purge", "try", gone, "--dry-run", *config)
    assert "2 in 2 data files" in out
    assert len(run_json(capsys, "versions", "list", "try", *config)) == 1
    code, out, _ = run(capsys, "purge", "try", gone, "--yes", *config)
    assert code == 0
    assert ": 0 mentions" in out
    assert "v1 -1" in out
    (version,) = run_json(capsys, "versions", "list", "try", *config)
    assert version["files"] == 2
    code, out, _ = run(capsys, "purge", "try", gone, "--readmit", *config)
    assert "1 entries lifted" in out
    plan = run_json(capsys, "plan", f"file://{place}/audio/", "--dataset", "try", *config)
    assert plan["num_files"] == 1


def test_a_dry_run_writes_no_plan(capsys, place):
    config = ("--config", place / "hcodec.toml")
    source = f"file://{place}/audio/"
    code, out, _ = run(capsys, "plan", source, "--dataset", "try", "--dry-run", *config)
    assert code == 0
    assert "dry run" in out
    assert not list((place / "out").rglob("job.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "file:///etc/", "--dataset", "try"), ["file:///etc/", "source_prefixes"]),
        (("plan", "{source}", "--dataset", "Bad Name"), ["dataset"]),
        (
            ("plan", "{source}", "--dataset", "try", "--codec", "no-such"),
            ["no-such", "hcodec-nano"],
        ),
        (("plan", "ftp://x/", "--dataset", "try"), ["ftp://x/", "s3://"]),
        (("plan", "{source}missing/", "--dataset", "try"), ["missing"]),
        (("run", "file:///nowhere/job.json"), ["file:///nowhere/job.json"]),
        (("versions", "list", "nope"), ["nope"]),
        (("inspect", "/no/such.parquet"), ["/no/such.parquet"]),
    ],
)
def test_errors_are_one_sentence(capsys, place, arguments, words):
    source = f"file://{place}/audio/"
    filled = [argument.replace("{source}", source) for argument in arguments]
    code, _, err = run(capsys, *filled, "--config", place / "hcodec.toml")
    assert code in {1, 43}
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def test_a_missing_configuration_is_named(capsys, tmp_path):
    code, _, err = run(capsys, "versions", "list", "x", "--config", tmp_path / "none.toml")
    assert code == 43
    assert "none.toml" in err


def test_env_names_the_compute_class(capsys):
    assert run_json(capsys, "env")["compute_class"].startswith("cpu-")


def test_invariance_holds_for_nano_in_batches_of_several_rows(capsys):
    tables = run_json(capsys, "invariance", "--batches", 3, "--clips", 5, "--rows", 4)
    (rows,) = tables.values()
    assert {row["equal"] for row in rows} == {"100.0000 %"}


def test_a_version_of_mode_fast_says_how_far_it_agrees_with_mode_exact(capsys, place):
    config = ("--config", place / "hcodec.toml")
    source = f"file://{place}/audio/"
    plan = run_json(capsys, "plan", source, "--dataset", "try", "--mode", "fast", *config)
    assert run(capsys, "run", f"{plan['plan_uri']}/job.json", *config)[0] == 0
    record = run_json(capsys, "publish", plan["plan_uri"], *config)
    page = Path(record["report_uri"].removeprefix("file://")).read_text()
    assert "Agreement with mode exact" in page
    assert "3 clips" in page
    agreement = record["agreement"]
    assert agreement["num_clips"] == 3
    assert [depth["num_frames"] for depth in agreement["depths"]] == [96] * 8
