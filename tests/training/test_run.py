"""Whole runs in this process: what they leave behind, and how bad input ends them."""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from runs import RATE, write_clips, write_teacher

from hcodec_core.cli import main
from hcodec_core.config import StorageConfig
from hcodec_core.errors import (
    BudgetExceededError,
    CheckpointError,
    ConfigError,
    DivergedError,
    StorageError,
)
from hcodec_core.models.base import Codec
from hcodec_core.models.loading import load_codec
from hcodec_core.models.random_weights import write_random_codec
from hcodec_core.storage import Storage, open_storage
from hcodec_core.tokens import EncodeSettings
from hcodec_core.training.history import read_history
from hcodec_core.training.job import finished
from hcodec_core.training.ranks import Ranks
from hcodec_core.training.recipe import load_recipe
from hcodec_core.training.run import TrainContext, TrainOptions, TrainRequest, train

SETTINGS = EncodeSettings(compute_class="test")
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_clips(path / "clips", 8)
    write_teacher(path / "teacher")
    (path / "scratch").mkdir()
    return path


def request_of(place: Path, out_path: Path, changes: dict[str, object], **more: object):
    recipe = load_recipe("tiny", {"steps": 8, **changes})
    options = {"teacher": str(place / "teacher"), **more}
    data = options.pop("data", f"file://{place}/clips")
    return TrainRequest(recipe, (data,), f"file://{out_path}", **options)


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Train:
    """Trains into a folder below ``tmp_path``; returns the folder."""

    def call(name: str = "run", changes: dict[str, object] | None = None, **more: object) -> Path:
        request = request_of(place, tmp_path / name, changes or {}, **more)
        train(request, TrainOptions(place / "scratch"), TrainContext())
        return tmp_path / name

    return call


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A finished run of all parts."""
    request = request_of(place, place / "trained", {"steps": 10, "seed": 5})
    train(request, TrainOptions(place / "scratch"), TrainContext())
    return place / "trained"


def codec_of(run_path: Path, name: str = "codec") -> Codec:
    return load_codec(str(run_path / name), SETTINGS)


def clip(place: Path) -> torch.Tensor:
    audio, _ = soundfile.read(place / "clips" / "000-a.wav", dtype="float32")
    return torch.from_numpy(audio)[None, None]


def test_a_run_leaves_a_codec_that_loads(trained: Path, place: Path):
    codec = codec_of(trained)
    assert codec.spec.manifest.is_trained
    assert "tiny" in codec.spec.manifest.source
    audio = clip(place)
    tokens = codec.encode(audio, torch.tensor([audio.shape[2]]))
    assert codec.decode(tokens).shape == audio.shape
    result = finished(open_storage(StorageConfig()), f"file://{trained}")
    assert result.codec_digest == codec.spec.manifest.digest
    assert result.scores["validation/mel"] > 0


def test_a_run_logs_every_loss_and_codebook(trained: Path):
    steps = read_history(open_storage(StorageConfig()), f"file://{trained}")
    assert list(steps) == list(range(1, 11))
    assert "loss/adversarial" not in steps[6]
    last = {"mel", "commitment", "semantic", "adversarial", "feature_matching", "judge", "total"}
    assert last <= {name.removeprefix("loss/") for name in steps[10]}
    for name in ("gradient_norm/generator", "gradient_norm/judge", "learning_rate/generator"):
        assert steps[10][name] > 0
    assert 1 <= steps[10]["codebook_perplexity/acoustic_0"] <= 32
    assert "validation/mel" in steps[5]


def test_a_run_leaves_samples_and_a_heartbeat(trained: Path):
    names = {path.name for path in (trained / "samples" / "step-000000010").iterdir()}
    assert {"0-original.wav", "0-decoded.wav"} <= names
    heartbeat = json.loads((trained / "workers" / "trainer.json").read_text())
    assert heartbeat["sequence"] >= 1
    assert heartbeat["phase"].startswith("step ")


def test_only_the_last_checkpoints_and_the_best_stay(trained: Path):
    markers = sorted(trained.glob("checkpoints/*/complete.json"))
    assert 1 <= len(markers) <= 3
    assert markers[-1].parent.name == "step-000000010"


def test_learning_lowers_the_loss(run: Train):
    path = run(
        changes={
            "steps": 40,
            "losses.adversarial": 0,
            "losses.feature_matching": 0,
            "quantizer.dropout_share": 0,
            "optimizer.learning_rate": 3e-3,
            "cadence.validate_every": 40,
            "cadence.checkpoint_every": 40,
            "cadence.num_samples": 0,
        }
    )
    steps = read_history(open_storage(StorageConfig()), f"file://{path}")
    first, last = (
        np.mean([steps[step]["loss/mel"] for step in some]) for some in ((1, 2, 3), range(31, 41))
    )
    assert last < 0.9 * first


def test_decoder_only_training_keeps_every_token(run: Train, trained: Path, place: Path):
    base = str(trained / "codec")
    tuned = codec_of(
        run(changes={"train": "decoder", "losses.adversarial_from": 2}, base_uri=base, teacher=None)
    )
    before = codec_of(trained)
    assert tuned.spec.encode_id == before.spec.encode_id
    assert tuned.spec.codebook_id == before.spec.codebook_id
    assert tuned.spec.decode_id != before.spec.decode_id
    audio = clip(place)
    length = torch.tensor([audio.shape[2]])
    tokens, same = before.encode(audio, length), tuned.encode(audio, length)
    assert all(np.array_equal(tokens.codes[name], same.codes[name]) for name in tokens.codes)
    assert not torch.equal(before.decode(tokens), tuned.decode(tokens))


def test_going_on_from_a_codec_changes_all_parts_but_the_teacher(run: Train, trained: Path):
    tuned = codec_of(run(base_uri=str(trained / "codec"), teacher=None))
    assert tuned.spec.manifest.name == codec_of(trained).spec.manifest.name
    before, after = codec_of(trained).spec.manifest.parts, tuned.spec.manifest.parts
    assert before.ssl == after.ssl
    assert before.encoder != after.encoder
    assert before.codebooks != after.codebooks
    assert before.decoder != after.decoder


@pytest.mark.parametrize("codec", ["ucodec-tiny", "xcodec-tiny"])
def test_other_families_go_on_from_a_codec(run: Train, place: Path, tmp_path: Path, codec: str):
    before = write_random_codec(codec, tmp_path / "base")
    changes: dict[str, object] = {"codec": codec, "steps": 3, "cadence.num_samples": 0}
    changes |= {"quantizer.dead_below": 0, "losses.adversarial_from": 1}
    after = codec_of(run(changes=changes, base_uri=str(tmp_path / "base"), teacher=None))
    parts = after.spec.manifest.parts
    assert parts.ssl == before.parts.ssl
    assert parts.encoder != before.parts.encoder
    assert parts.codebooks != before.parts.codebooks
    assert parts.decoder != before.parts.decoder
    audio = clip(place)
    tokens = after.encode(audio, torch.tensor([audio.shape[2]]))
    assert after.decode(tokens).shape == audio.shape


def test_a_finished_run_resumes_to_the_same(run: Train):
    path = run()
    weights = (path / "codec" / "model.safetensors").read_bytes()
    run(resumes=True)
    assert (path / "codec" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ConfigError, match="holds a training run already"):
        run()
    with pytest.raises(ConfigError, match="another recipe"):
        run(changes={"seed": 9}, resumes=True)


def test_divergence_stops_names_the_batch_and_keeps_the_checkpoint(run: Train, tmp_path: Path):
    changes = {"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0, "steps": 9}
    changes |= {"cadence.validate_every": 1, "cadence.checkpoint_every": 1}
    with pytest.raises(
        DivergedError, match=r"Step \d gave .*on the batch of .* from sample"
    ) as hit:
        run(changes=changes)
    assert hit.value.exit_code == 43
    step = int(str(hit.value).split()[1])
    markers = sorted((tmp_path / "run").glob("checkpoints/*/complete.json"))
    assert markers[-1].parent.name == f"step-{step - 1:09d}"
    assert not (tmp_path / "run" / "codec").exists()


def test_a_diverged_run_goes_on_from_its_last_checkpoint_with_a_lower_rate(
    run: Train, tmp_path: Path
):
    """Judges that explode in step 6; what training had learned until step 5 is not lost."""
    changes: dict[str, object] = {"steps": 9, "losses.adversarial_from": 5}
    changes |= {"cadence.num_samples": 0, "optimizer.warmup_steps": 0}
    with pytest.raises(DivergedError, match="hcodec export-codec") as hit:
        run(changes=changes | {"optimizer.discriminator_learning_rate": 1e30})
    assert int(str(hit.value).split()[1]) > 5
    none = ["--config", str(tmp_path / "none.toml")]
    export = ["export-codec", str(tmp_path / "run"), "--checkpoint", "last"]
    assert main([*export, "--to", str(tmp_path / "good"), *none]) == 0
    known = codec_of(tmp_path / "run", "../good")
    path = run("on", changes, base_uri=str(tmp_path / "good"), teacher=None)
    result = finished(open_storage(StorageConfig()), f"file://{path}")
    assert np.isfinite(list(result.scores.values())).all()
    before, after = known.spec.manifest.parts, codec_of(path).spec.manifest.parts
    assert before.ssl == after.ssl
    assert before.encoder != after.encoder


def test_held_out_files_that_cannot_be_read_are_refused(run: Train, tmp_path: Path):
    (tmp_path / "junk").mkdir()
    for number in range(12):
        (tmp_path / "junk" / f"{number}.wav").write_bytes(b"no audio")
    with pytest.raises(ConfigError, match=r"held-out files can be used.* would be empty"):
        run(data=f"file://{tmp_path}/junk")


def test_data_of_another_rate_is_refused(run: Train, tmp_path: Path):
    data = write_clips(tmp_path / "slow", 6, rate=8000)
    with pytest.raises(ConfigError, match=r"another sample rate than the codec: .*8000 Hz"):
        run(data=data, changes={"data.allows_lower_rates": False})


def test_too_many_bad_files_stop_the_run(run: Train, tmp_path: Path):
    data = write_clips(tmp_path / "mixed", 8)
    for number in range(8):
        (tmp_path / "mixed" / f"bad-{number}.wav").write_bytes(b"no audio")
    with pytest.raises(BudgetExceededError, match="training files are bad"):
        run(data=data, changes={"data.max_bad_share": 0.01})


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"data.held_out_share": 1e-6}, {}, "would be held out"),
        ({}, {"data": "file:///no/such/folder"}, "does not exist"),
        ({}, {"teacher": None}, "name its folder with --teacher"),
        ({"codec": "dac-tiny"}, {}, "cannot be trained here"),
        ({"codec": "xcodec-tiny"}, {}, "can only be fine-tuned"),
        ({"codec": "nothing"}, {}, "no preset 'nothing'"),
        ({}, {"data": "dataset:demo"}, "needs the configuration file"),
    ],
)
def test_bad_input_is_refused(
    run: Train, changes: dict[str, object], more: dict[str, object], message: str
):
    with pytest.raises(ConfigError, match=message):
        run(changes=changes, **more)


def test_a_batch_must_be_shared_evenly(place: Path, tmp_path: Path):
    request = request_of(place, tmp_path / "run", {})
    with pytest.raises(ConfigError, match="3 processes cannot share a batch of 4"):
        train(request, TrainOptions(place / "scratch"), TrainContext(ranks=Ranks(0, 3)))


def test_a_wrong_base_is_refused(place: Path, trained: Path, tmp_path: Path):
    request = request_of(place, tmp_path / "run", {}, base_uri=str(trained / "codec"))
    with pytest.raises(CheckpointError):
        train(
            replace(request, base_digest="0" * 32),
            TrainOptions(place / "scratch"),
            TrainContext(),
        )


FULL_DISK = """
import resource, signal, sys
from hcodec_core.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_ends_with_a_clear_error_and_the_checkpoint_stays(
    run: Train, place: Path, tmp_path: Path
):
    """Files that cannot grow any more stand for a full disk."""
    assert resource.RLIMIT_FSIZE
    assert signal.SIGXFSZ
    run(changes={"steps": 5})
    marker = tmp_path / "run" / "checkpoints" / "step-000000005" / "complete.json"
    (tmp_path / "run" / "results" / "training.json").unlink()
    before = marker.read_bytes()
    command = [sys.executable, "-c", FULL_DISK, "train", "--recipe", "tiny"]
    command += ["--data", str(place / "clips"), "--out", str(tmp_path / "full")]
    command += ["--teacher", str(place / "teacher"), "--tracking", "none", "--set", "steps=5"]
    command += ["--config", str(tmp_path / "none.toml"), "--set", "cadence.num_samples=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "The checkpoint could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "full").glob("checkpoints/*/complete.json"))
    assert marker.read_bytes() == before


def test_mlflow_holds_each_step_once(place: Path, tmp_path: Path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    request = request_of(place, tmp_path / "run", {"steps": 10}, tracking_uri=uri)
    options = TrainOptions(place / "scratch")
    train(request, options, TrainContext())
    # As if the second half had been killed before its checkpoint was complete.
    (tmp_path / "run" / "checkpoints" / "step-000000010" / "complete.json").unlink()
    train(replace(request, resumes=True), options, TrainContext())
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'hcodec'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["hcodec.recipe"] == "tiny"
    for name in ("loss/mel", "time/data_wait_share", "codebook_used/semantic_0"):
        history = client.get_metric_history(found.info.run_id, name)
        assert sorted(metric.step for metric in history) == list(range(1, 11)), name
    pictures = client.list_artifacts(found.info.run_id, "samples/step-000000010")
    assert any(file.path.endswith(".wav") for file in pictures)


def test_data_and_run_may_lie_in_object_storage(
    s3_endpoint: str, bucket_uri: str, s3_storage: Storage, place: Path, tmp_path: Path
):
    for path in (place / "clips").iterdir():
        s3_storage.upload(path, f"{bucket_uri}/audio/{path.name}")
    recipe = load_recipe("tiny", {"steps": 5, "cadence.num_samples": 0})
    request = TrainRequest(
        recipe,
        (f"{bucket_uri}/audio/",),
        f"{bucket_uri}/run",
        teacher=str(place / "teacher"),
    )
    context = TrainContext(storage=StorageConfig(endpoint_url=s3_endpoint))
    result = train(request, TrainOptions(tmp_path), context)
    codec = load_codec(result.codec_uri, SETTINGS, fetch=s3_storage.read)
    assert codec.spec.manifest.digest == result.codec_digest
    names = [
        info.uri.removeprefix(bucket_uri) for info in s3_storage.list_objects(bucket_uri + "/run")
    ]
    assert "/run/checkpoints/step-000000005/complete.json" in names
    again = train(replace(request, resumes=True), TrainOptions(tmp_path), context)
    assert again.codec_digest == result.codec_digest


def test_an_mlflow_that_does_not_answer_is_an_error_at_the_start(place: Path, tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{probe.getsockname()[1]}"
        request = request_of(place, tmp_path / "run", {}, tracking_uri=uri)
        with pytest.raises(StorageError, match="does not answer") as hit:
            train(request, TrainOptions(place / "scratch"), TrainContext())
    assert "secret" not in str(hit.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_hcodec_run_takes_train_jobs(place: Path, tmp_path: Path):
    config = tmp_path / "hcodec.toml"
    config.write_text(
        f"""
        [access]
        source_prefixes = ["file://{place}/clips/"]
        destination_prefixes = ["file://{tmp_path}/"]
        [catalog]
        uri = "sqlite:///{tmp_path}/catalog.db"
        warehouse_uri = "file://{tmp_path}/warehouse"
        [work]
        work_uri = "file://{tmp_path}/work"
        """
    )
    job = {
        "kind": "train",
        "plan_id": "p1",
        "plan_uri": f"file://{tmp_path}/run",
        "recipe": load_recipe("tiny", {"steps": 5}).model_dump(mode="json"),
        "data_uris": [f"file://{place}/clips"],
        "teacher": str(place / "teacher"),
        "is_tracked": False,
    }
    path = tmp_path / "run" / "job.json"
    path.parent.mkdir()
    path.write_text(json.dumps(job))
    command = ["run", f"file://{path}", "--config", str(config), "--scratch", str(tmp_path)]
    assert main(command) == 0
    assert load_codec(str(tmp_path / "run" / "codec"), SETTINGS).spec.manifest.is_trained
    before = (tmp_path / "run" / "results" / "training.json").stat().st_mtime_ns
    assert main(command) == 0  # done already: nothing is done again
    assert (tmp_path / "run" / "results" / "training.json").stat().st_mtime_ns == before
    path.write_text(json.dumps(job | {"data_uris": ["file:///elsewhere"], "plan_id": "p2"}))
    (tmp_path / "run" / "results" / "training.json").unlink()
    assert RATE == 16_000
