"""``hcodec evaluate`` on the small corpus, with real codecs, page and all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hcodec_core.cli import main
from hcodec_core.evaluation.documents import EvaluationResult, read_result
from hcodec_core.models.random_weights import write_random_codec

CLIPS = Path(__file__).parent.parent / "corpus" / "clips"
QUICK = ["--metrics", "mel_distance_db", "stft_distance", "si_sdr_db", "stoi", "pesq_wb", "pesq_nb"]
SHORT = ["--seconds", "3"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Four usable files, two that are none, and names that a page must escape."""
    folder = tmp_path_factory.mktemp("held out")
    (folder / "a").mkdir()
    shutil.copy(CLIPS / "english" / "weather-report.flac", folder / "a")
    shutil.copy(CLIPS / "english" / "steady.wav", folder / "a" / "<img src=x onerror=alert(1)>.wav")
    shutil.copy(CLIPS / "german" / "nachricht.mp3", folder)
    soundfile.write(folder / "silence.wav", np.zeros(16_000, np.float32), 16_000)
    shutil.copy(CLIPS / "broken" / "truncated.flac", folder)
    shutil.copy(CLIPS / "broken" / "text.wav", folder)
    return folder


@pytest.fixture(scope="module")
def codecs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codecs")
    write_random_codec("hcodec-tiny", folder / "old", seed=1)
    write_random_codec("hcodec-tiny", folder / "new", seed=2)
    write_random_codec("hcodec-2.0-tiny", folder / "wide", seed=1)
    return folder


def run(*arguments: str | Path) -> int:
    return main(["evaluate", *map(str, arguments), *SHORT, *QUICK])


def result_in(folder: Path) -> EvaluationResult:
    return read_result((folder / "evaluation.json").read_bytes())


@pytest.fixture(scope="module")
def compared(held_out, codecs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    codec, against = codecs / "new", codecs / "old"
    sides = ["--codec", codec, "--against", against, "--baseline", "opus6"]
    assert run(*sides, "--audio", held_out, "--out", out) == 0
    return out


def test_every_file_is_scored_or_named(compared):
    result = result_in(compared)
    assert result.held_out.num_files == 6
    assert {file.name for file in result.held_out.unreadable} == {"truncated.flac", "text.wav"}
    assert all(file.reason for file in result.held_out.unreadable)
    assert [scores.name for scores in result.files] == [
        "a/<img src=x onerror=alert(1)>.wav",
        "a/weather-report.flac",
        "nachricht.mp3",
        "silence.wav",
    ]
    silent = result.files[-1]
    assert "stoi" not in silent.scores["codec"]
    assert "silent" in silent.unmeasured["codec"]["stoi"]
    assert silent.scores["codec"]["mel_distance_db"] > 0


def test_scores_rates_and_codebooks_make_sense(compared):
    result = result_in(compared)
    opus, codec = result.sides["opus6"], result.sides["codec"]
    assert opus.metrics["stoi"].mean > codec.metrics["stoi"].mean  # its weights are random
    assert 1000 < opus.measured_bits_per_second < 7000
    assert 0 < codec.entropy_bits_per_second <= codec.facts.nominal_bits_per_second
    assert sum(book.num_codes for book in codec.codebooks) == sum(
        sum(book.bars) for book in codec.codebooks
    )
    assert all(0 <= book.perplexity <= book.size for book in codec.codebooks)
    assert result.timings["codec"].encode_realtime_factor > 0
    assert codec.facts.digest != result.sides["against"].facts.digest


def test_a_verdict_of_four_files_is_that_they_are_not_enough(compared):
    result = result_in(compared)
    assert result.verdict.status == "not enough files"
    assert result.verdict.num_pairs == 4
    assert (
        "no local model was given" in result.not_run.get("wer", "")
        or "not asked" in (result.not_run["wer"])
    )


def test_the_page_escapes_names_and_loads_nothing(compared):
    page = (compared / "index.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "default-src 'none'; style-src 'unsafe-inline'; media-src data:" in page
    assert page.count('src="data:audio/flac;base64,') == 4 * (1 + 3)
    assert 'src="http' not in page
    assert "weights of hcodec-tiny are random" in page
    assert "Not enough files" in page


def test_the_same_again_gives_the_same(compared, held_out, codecs, tmp_path):
    sides = ["--codec", codecs / "new", "--against", codecs / "old", "--baseline", "opus6"]
    assert run(*sides, "--audio", held_out, "--out", tmp_path) == 0
    first, again = result_in(compared), result_in(tmp_path)
    assert first.content() == again.content()
    assert first.content_digest == again.content_digest


def test_codecs_of_different_rates_are_compared_each_at_its_own(codecs, held_out, capsys):
    narrow, wide = codecs / "new", codecs / "wide"
    sides = ["--codec", wide, "--against", narrow, "--max-files", "2", "--json"]
    assert run(*sides, "--audio", held_out) == 0
    result = read_result(capsys.readouterr().out)
    assert result.sides["codec"].facts.sample_rate == 48_000
    assert result.sides["against"].facts.sample_rate == 16_000
    assert any("sample rates differ" in note for note in result.notes)
    assert "pesq_wb" in result.sides["codec"].metrics


def test_narrow_band_audio_gets_narrow_band_pesq(held_out, capsys):
    from hcodec_core.evaluation.held_out import first_seconds
    from hcodec_core.evaluation.opus import Opus
    from hcodec_core.evaluation.scoring import Pair, open_tools, score

    clip = first_seconds(held_out / "a" / "weather-report.flac", 8_000, 3.0)
    done = Opus(8_000, 12).transcode(clip)
    values, _ = score(Pair(8_000, clip, done.audio), open_tools(("pesq_wb", "pesq_nb"), {}))
    assert values.keys() == {"pesq_nb"}
    assert 1.0 < values["pesq_nb"] < 4.6


def test_margins_from_a_file_decide(codecs, held_out, tmp_path, capsys):
    margins = tmp_path / "margins.toml"
    margins.write_text(
        "[gate]\nmin_files = 3\n[gate.metrics.mel_distance_db]\nmargin = 1000\nis_required = true\n"
    )
    sides = ["--codec", codecs / "new", "--against", codecs / "old", "--margins", margins]
    assert run(*sides, "--audio", held_out, "--json") == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["status"] == "pass"
    assert verdict["metrics"][0]["sentence"].startswith("Mel distance is ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--codec", "hcodec-nano", "--audio", "{empty}"], "is empty: put audio files there"),
        (["--codec", "hcodec-nano", "--audio", "{broken}"], "None of the 2 files"),
        (["--codec", "hcodec-nano", "--audio", "/no/such"], "does not exist: name a folder"),
        (["--codec", "./no-such-codec", "--audio", "{good}"], "has no readable codec.json"),
        (["--codec", "hcodec-nono", "--audio", "{good}"], "There is no codec named 'hcodec-nono'"),
        (["--codec", "hcodec-nano", "--audio", "{good}", "--baseline", "mp3"], "no baseline 'mp3'"),
        (["--codec", "hcodec-nano", "--audio", "{good}", "--asr", "/no/such"], "is no folder"),
        (["--codec", "hcodec-nano", "--audio", "{good}", "--max-files", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_43(
    arguments, sentence, held_out, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("truncated.flac", "text.wav"):
        shutil.copy(held_out / name, tmp_path / "broken")
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken", "good": held_out}
    filled = [argument.format(**places) for argument in arguments]
    assert run(*filled) == 43
    assert sentence in capsys.readouterr().err


def test_an_unknown_metric_is_refused(held_out, capsys):
    code = main(
        ["evaluate", "--codec", "hcodec-nano", "--audio", str(held_out), "--metrics", "beauty"]
    )
    assert code == 43
    assert "There is no metric 'beauty'" in capsys.readouterr().err
