"""Evaluate jobs: pinned files and codecs, run by ``hcodec run``, one result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hcodec_core.cli import main
from hcodec_core.config import load_config
from hcodec_core.errors import AccessError, CheckpointError, ConfigError
from hcodec_core.evaluation.job import (
    EvaluateRequest,
    finished,
    load_result,
    make_evaluate_job,
    pin,
    result_uri,
)
from hcodec_core.jobs import EvaluateJob, WorkerProgress, read_any_job
from hcodec_core.models.random_weights import write_random_codec
from hcodec_core.storage import join_uri, open_storage

CLIPS = Path(__file__).parent.parent / "corpus" / "clips"
QUICK = ("mel_distance_db", "stoi")


class Stage:
    """A configuration, a held-out folder and two codecs in local storage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "held").mkdir()
        for name in ("english/weather-report.flac", "german/nachricht.mp3", "broken/text.wav"):
            shutil.copy(CLIPS / name, folder / "held")
        for seed, name in enumerate(("old", "new")):
            write_random_codec("hcodec-tiny", folder / name, seed=seed)
        self.config_path = folder / "hcodec.toml"
        self.config_path.write_text(
            f"""
[access]
source_prefixes = ["file://{folder}/held"]
destination_prefixes = ["file://{folder}/"]
[catalog]
uri = "sqlite:///{folder}/catalog.db"
warehouse_uri = "file://{folder}/warehouse"
[work]
work_uri = "file://{folder}/work"
"""
        )
        self.config = load_config(self.config_path)
        self.storage = open_storage(self.config.storage)

    def request(self, **values) -> EvaluateRequest:
        usual = {
            "codec": pin(f"file://{self.folder}/new", self.storage),
            "against": pin(f"file://{self.folder}/old", self.storage),
            "baselines": ("opus6",),
            "held_out_uri": f"file://{self.folder}/held",
            "max_seconds": 2.0,
            "metrics": QUICK,
            "num_samples_to_hear": 1,
        }
        return EvaluateRequest(**(usual | values))

    def make(self, **values) -> EvaluateJob:
        return make_evaluate_job(self.config, self.storage, self.request(**values))

    def run(self, job: EvaluateJob) -> int:
        uri = join_uri(job.plan_uri, "job.json")
        return main(["run", uri, "--config", str(self.config_path)])


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


def test_a_job_is_run_once_and_leaves_result_report_and_progress(stage):
    job = stage.make()
    assert read_any_job(stage.storage.read(join_uri(job.plan_uri, "job.json"))) == job
    assert finished(job, stage.storage) is None
    assert stage.run(job) == 0
    result = load_result(stage.storage, result_uri(job.plan_uri))
    assert [file.name for file in result.held_out.unreadable] == ["text.wav"]
    assert set(result.sides) == {"codec", "against", "opus6"}
    assert result.sides["codec"].facts.digest == job.codec.digest
    assert result.verdict.status == "not enough files"
    page = stage.storage.read(result.report_uri)
    assert page.startswith(b"<!DOCTYPE html>")
    before = stage.storage.head(result_uri(job.plan_uri))
    assert stage.run(job) == 0
    assert stage.storage.head(result_uri(job.plan_uri)) == before
    workers = list(stage.storage.list_objects(join_uri(job.plan_uri, "workers") + "/"))
    progress = WorkerProgress.model_validate_json(stage.storage.read(workers[0].uri))
    assert (progress.phase, progress.num_files, progress.num_shards_done) == ("done", 3, 1)
    assert len(workers) == 1  # the second run did nothing


def test_the_same_request_makes_the_same_job_and_another_another(stage):
    first = stage.make()
    assert stage.make() == first
    assert stage.make(max_seconds=3.0).plan_id != first.plan_id
    (stage.folder / "held" / "more.wav").write_bytes(b"RIFF")
    assert stage.make().plan_id != first.plan_id


def test_a_file_that_changed_since_fails_the_job(stage, capsys):
    job = stage.make()
    shutil.copy(CLIPS / "english" / "steady.wav", stage.folder / "held" / "nachricht.mp3")
    assert stage.run(job) == 1
    assert "changed since it was listed" in capsys.readouterr().err
    assert finished(job, stage.storage) is None


def test_a_codec_that_changed_since_fails_the_job(stage, capsys):
    job = stage.make()
    shutil.rmtree(stage.folder / "new")
    write_random_codec("hcodec-tiny", stage.folder / "new", seed=7)
    assert stage.run(job) == 43
    assert "it was replaced" in capsys.readouterr().err


def test_sets_and_codecs_that_are_not_there_are_refused(stage):
    (stage.folder / "held" / "nothing").mkdir()
    with pytest.raises(ConfigError, match="is empty: put audio files there"):
        stage.make(held_out_uri=f"file://{stage.folder}/held/nothing")
    with pytest.raises(AccessError, match="outside the allowed prefixes"):
        stage.make(held_out_uri=f"file://{stage.folder}/elsewhere")
    with pytest.raises(CheckpointError, match=r"no readable codec\.json"):
        pin(f"file://{stage.folder}/nobody", stage.storage)
    with pytest.raises(ConfigError, match="no metric 'beauty'"):
        stage.make(metrics=("beauty",))
    with pytest.raises(ConfigError, match="cannot be part of a job"):
        stage.make(baselines=("trivial2",))


def test_a_stopped_job_writes_no_result(stage, monkeypatch):
    import threading

    from hcodec_core.cli import evaluation, make_parser

    job = stage.make()
    options = make_parser().parse_args(["run", "x", "--config", str(stage.config_path)])
    stop = threading.Event()
    stop.set()
    from hcodec_core.errors import PreemptedError

    with pytest.raises(PreemptedError):
        evaluation.run_job(job, stage.storage, options, stage.folder, stop)
    assert finished(job, stage.storage) is None


def test_documents_of_a_later_version_are_refused(stage):
    values = json.loads(stage.make().model_dump_json())
    for change, sentence in (
        ({"format_version": 2}, "format_version"),
        ({"kind": "dream"}, "Jobs of kind 'dream' are unknown"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            read_any_job(json.dumps(values | change))
    with pytest.raises(ConfigError, match="no JSON object with a kind"):
        read_any_job(b"[]")


def test_a_result_document_of_the_first_version_stays_readable():
    # As this version writes it: later versions must still read it.
    text = (Path(__file__).parent / "evaluation-v1.json").read_bytes()
    from hcodec_core.evaluation.documents import read_result

    result = read_result(text)
    assert result.format_version == 1
    assert result.verdict is not None
    with pytest.raises(ConfigError, match="format_version"):
        read_result(text.replace(b'"format_version": 1', b'"format_version": 9', 1))
