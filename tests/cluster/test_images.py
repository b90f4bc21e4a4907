"""The images, built by our Dockerfiles, run as pods of ours would: read-only, without rights."""

from __future__ import annotations

import json
import re

import pytest

from hcodec_core.codecs import load_manifest
from tests.cluster.house import CLIPS
from tests.cluster.images import AIRFLOW, WORKER, ImageStore

pytestmark = pytest.mark.cluster


def shell(store: ImageStore, image: str, script: str) -> str:
    done = store.run(image, ["-c", script], ["--entrypoint", "/bin/sh"])
    return done.stdout + done.stderr


def test_worker_says_its_version(images):
    done = images.run(WORKER, ["--version"])
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"hcodec \d+\.\d+\.\d+\n", done.stdout)


def test_worker_tokenises_a_file_without_network_and_with_a_read_only_root(images):
    clip = CLIPS / "weather-report.flac"
    arguments = ["encode", "/in.flac", "--out", "/tmp/out.parquet", "--json"]
    done = images.run(WORKER, arguments, ["--volume", f"{clip}:/in.flac:ro"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["files_with_tokens"] == 1
    assert report["tokens"] > 100


def test_worker_has_the_weights_that_were_baked_in_by_digest(images):
    codec = f"/weights/{load_manifest('hcodec-nano').digest}"
    arguments = ["encode", "/in.flac", "--out", "/tmp/out.parquet", "--codec", codec, "--json"]
    clip = CLIPS / "weather-report.flac"
    done = images.run(WORKER, arguments, ["--volume", f"{clip}:/in.flac:ro"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["codec"] == codec


def test_worker_is_nobody_and_can_write_nowhere(images):
    said = shell(
        images, WORKER, "id -u; id -g; touch /x; touch /opt/hcodec/x; touch /tmp/x && echo ok"
    )
    assert said.splitlines()[:3] == ["10001", "10001", "ok"]
    assert said.count("Read-only file system") == 2


def test_worker_has_no_airflow_and_asks_no_hub(images):
    said = shell(images, WORKER, "python -c 'import airflow'; env")
    assert "No module named 'airflow'" in said
    assert "HF_HUB_OFFLINE=1" in said


def test_worker_as_process_one_ends_with_code_43_on_a_bad_job(images):
    done = images.run(WORKER, ["run", "s3://nowhere/job.json", "--config", "/none.toml"])
    assert done.returncode == 43
    assert "/none.toml does not exist" in done.stderr


def test_airflow_has_the_provider_and_no_torch(images):
    said = shell(
        images,
        AIRFLOW,
        "export HOME=/tmp AIRFLOW_HOME=/tmp/airflow; id -u; python -c 'import torch';"
        "airflow providers list --output plain | grep hcodec; ls dags",
    )
    assert said.splitlines()[0] == "50000"
    assert "No module named 'torch'" in said
    assert "hcodec-pipelines" in said
    assert "tokenize_corpus.py" in said


def test_images_hold_no_configuration_of_pip(images):
    for image in (WORKER, AIRFLOW):
        said = shell(
            images, image, "cat /etc/pip.conf /root/.config/pip/pip.conf; ls /etc/pip.conf"
        )
        assert "index" not in said
