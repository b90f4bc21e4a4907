"""The whole pipeline on Kubernetes: a real Airflow, S3, the test API server, workers in pods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hcodec_core.config import load_config
from hcodec_core.inference.engine import compute_class
from hcodec_core.storage import open_storage
from tests.kube.server import KubeServer

pytestmark = pytest.mark.airflow

ROOT = Path(__file__).parents[2]
CLIPS = ROOT / "tests" / "corpus" / "clips"
RUNNER = ROOT / "tests" / "operators" / "run_dag.py"
NAMES = ["english/weather-report.flac", "english/a short greeting.wav", "english/reading.mp3"]
CONFIG = """
[storage]
endpoint_url = "{endpoint}"
[access]
source_prefixes = ["s3://kube/audio/"]
destination_prefixes = ["s3://kube/tokens/"]
[catalog]
uri = "sqlite:///{folder}/catalog.db"
warehouse_uri = "s3://kube/tokens/warehouse"
[work]
work_uri = "s3://kube/tokens/work"
"""
PROFILES = """
namespace = "default"
[profiles.cpu]
image = "hcodec-worker:test"
compute_class = "{compute_class}"
env = {{ OMP_NUM_THREADS = "1" }}
env_from_secrets = ["hcodec-storage"]
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory, s3_endpoint):
    """One run of the DAG from its form, with two workers in pods."""
    import boto3

    folder = tmp_path_factory.mktemp("kube-run")
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="kube")
    config_path = folder / "hcodec.toml"
    config_path.write_text(CONFIG.format(endpoint=s3_endpoint, folder=folder))
    profiles_path = folder / "kubernetes.toml"
    profiles_path.write_text(PROFILES.format(compute_class=compute_class("cpu")))
    storage = open_storage(load_config(config_path).storage)
    for name in NAMES:
        storage.write(f"s3://kube/audio/a/{Path(name).name}", (CLIPS / name).read_bytes())
    with KubeServer() as kube:
        kube.enforce_pod_security()
        _prepare(kube, config_path)
        kubeconfig = kube.write_kubeconfig(folder / "kubeconfig")
        connection = {
            "conn_type": "hcodec_kubernetes",
            "extra": {"kube_config_path": str(kubeconfig)},
        }
        environment = {
            **os.environ,
            "AIRFLOW_HOME": str(folder / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
            "AIRFLOW__HCODEC__CONFIG_FILE": str(config_path),
            "AIRFLOW__HCODEC__KUBERNETES_FILE": str(profiles_path),
            "AIRFLOW__HCODEC__BACKEND": "kubernetes",
            "AIRFLOW__HCODEC__REPORT_BASE_URL": s3_endpoint,
            "AIRFLOW_CONN_HCODEC_KUBERNETES": json.dumps(connection),
            "OMP_NUM_THREADS": "1",
        }
        _python(environment, folder, "-m", "airflow", "db", "migrate")
        form = {"source": "s3://kube/audio/a/", "dataset": "speech", "shards": 3}
        text = _python(environment, folder, str(RUNNER), str(ROOT / "dags"), json.dumps([form]))
        log, _, found = text.partition("FACTS")
        ((facts,), pods) = json.loads(found), kube.pods()
    return {**facts, "log": log, "pods": pods, "storage": storage}


def _prepare(kube, config_path):
    for kind, name, data in (
        ("ConfigMap", "hcodec-config", {"hcodec.toml": config_path.read_text()}),
        ("Secret", "hcodec-storage", _credentials()),
    ):
        content = {"data" if kind == "ConfigMap" else "stringData": data}
        kube.create({"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **content})


def _credentials():
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED")
    return {name: os.environ[name] for name in names}


def _python(environment, folder, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_the_dataset_is_published(facts):
    assert facts["state"] == "success", facts["log"][-5000:]
    version = facts["xcoms"]["publish.return_value"]
    assert (version["version"], version["num_rows"]) == ("v1", len(NAMES))


def test_the_task_log_tells_the_states(facts):
    assert "submitted to backend kubernetes" in facts["log"]
    assert "Created Job hcodec-tokenize-" in facts["log"]
    assert ": done" in facts["log"]


def test_no_worker_is_left_and_all_logs_are_kept(facts):
    assert {pod["status"]["phase"] for pod in facts["pods"]} <= {"Succeeded"}
    plan_uri = facts["xcoms"]["plan.return_value"]["plan_uri"]
    logs = [info.uri for info in facts["storage"].list_objects(f"{plan_uri}/logs/")]
    assert len([uri for uri in logs if uri.endswith(".log")]) == 2


def test_buttons_lead_to_logs_and_manifest(facts):
    xcoms, storage = facts["xcoms"], facts["storage"]
    plan_uri = xcoms["plan.return_value"]["plan_uri"]
    page = storage.read(f"{plan_uri}/logs/index.html").decode()
    assert page.count(".log</a>") == 2
    assert xcoms["tokenize.logs_url"].endswith("/logs/index.html")
    manifest_uri = "s3://" + xcoms["tokenize.manifest_url"].partition("//")[2].partition("/")[2]
    assert storage.read(manifest_uri).startswith(b"apiVersion: batch/v1")
    assert len(json.dumps(xcoms["tokenize.return_value"])) < 1000
