"""The whole pipeline in a real Airflow: S3 server, real workers, shipped weights, real table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hcodec_airflow import steps
from hcodec_airflow.requests import read_request
from hcodec_core.config import load_config
from hcodec_core.dataset.audit import read_audit
from hcodec_core.dataset.lock import lock_holder, lock_uri
from hcodec_core.dataset.schema import WRITER_OPTIONS
from hcodec_core.jobs import ShardResult
from hcodec_core.storage import Storage, open_storage, sha256_of_file

pytestmark = pytest.mark.airflow

ROOT = Path(__file__).parents[2]
CLIPS = ROOT / "tests" / "corpus" / "clips"
RUNNER = Path(__file__).with_name("run_dag.py")
CONFIG = """
[storage]
endpoint_url = "{endpoint}"
[access]
source_prefixes = ["{bucket}/audio/"]
destination_prefixes = ["{bucket}/tokens/"]
[catalog]
uri = "sqlite:///{folder}/catalog.db"
warehouse_uri = "{bucket}/tokens/warehouse"
[work]
work_uri = "{bucket}/tokens/work"
[cost]
worker_hour = 1.0
"""
GOOD = ["english/weather-report.flac", "english/a short greeting.wav", "english/reading.mp3"]
BAD = ["broken/truncated.flac"]


class Installation:
    """A migrated Airflow with this provider, and storage with some clips."""

    def __init__(self, folder: Path, endpoint: str, bucket: str) -> None:
        self.folder = folder
        self.bucket = bucket
        self.config_path = folder / "hcodec.toml"
        self.config_path.write_text(CONFIG.format(endpoint=endpoint, bucket=bucket, folder=folder))
        self.storage = open_storage(load_config(self.config_path).storage)
        self.environment = {
            **os.environ,
            "AIRFLOW_HOME": str(folder / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
            "AIRFLOW__HCODEC__CONFIG_FILE": str(self.config_path),
            "AIRFLOW__HCODEC__REPORT_BASE_URL": endpoint,
            "OMP_NUM_THREADS": "1",
        }
        self._python("-m", "airflow", "db", "migrate")

    def put(self, name: str, prefix: str) -> None:
        uri = f"{self.bucket}/audio/{prefix}/{Path(name).name}"
        self.storage.write(uri, (CLIPS / name).read_bytes())

    def run(self, *forms: dict[str, object]) -> list[dict]:
        """Facts of runs of the manual DAG; their log is kept in ``log``."""
        text = self._python(str(RUNNER), str(ROOT / "dags"), json.dumps(forms))
        self.log, _, facts = text.partition("FACTS")
        return json.loads(facts)

    def work(self, form: dict[str, object]) -> str:
        """Do a form's work without Airflow, up to the commit; the plan's URI."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            request = read_request(form)
            plan = steps.plan(request, steps.inventory(request, "by hand")["inventory_uri"])
        config = ("--config", str(self.config_path))
        self._python("-m", "hcodec_core.cli", "run", plan["job_uri"], *config)
        return str(plan["plan_uri"])

    def _python(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout


@pytest.fixture(scope="module")
def installation(tmp_path_factory, s3_endpoint):
    import boto3

    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="pipeline")
    made = Installation(tmp_path_factory.mktemp("pipeline"), s3_endpoint, "s3://pipeline")
    for name in GOOD:
        made.put(name, "good")
        made.put(name, "mixed")
    for name in BAD:
        made.put(name, "mixed")
    return made


def tamper(storage: Storage, plan_uri: str, folder: Path) -> str:
    """Change one code of a plan's results so that sizes and checksums still hold; its source."""
    results = [
        (info.uri, ShardResult.model_validate_json(storage.read(info.uri)))
        for info in storage.list_objects(f"{plan_uri}/results/")
    ]
    uri, result = next(pair for pair in results if pair[1].data_file is not None)
    path = folder / "tampered.parquet"
    storage.download(result.data_file.uri, path)
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["acoustic"][0] ^= 1
    with pq.ParquetWriter(path, table.schema, **WRITER_OPTIONS) as writer:
        writer.write_table(pa.Table.from_pylist(rows, table.schema))
    info = storage.upload(path, result.data_file.uri)
    facts = {"size": info.size, "etag": info.etag, "sha256": sha256_of_file(path)}
    changed = result.data_file.model_copy(update=facts)
    text = result.model_copy(update={"data_file": changed}).model_dump_json()
    storage.write(uri, text.encode())
    return str(rows[0]["uri"])


@pytest.fixture(scope="module")
def tampered(installation):
    """The form of a dataset whose results were changed between work and commit, and the source."""
    form = {"source": "s3://pipeline/audio/good/", "dataset": "tampered"}
    plan_uri = installation.work(form)
    return form, tamper(installation.storage, plan_uri, installation.folder)


@pytest.fixture(scope="module")
def runs(installation, tampered):
    """One run after the other, in one process: starting Airflow takes its time."""
    good = {"source": "s3://pipeline/audio/good/", "dataset": "good"}
    mixed = {"source": "s3://pipeline/audio/mixed/", "dataset": "mixed"}
    forms = {
        "dry": {**good, "dry_run": True},
        "first": good,
        "second": good,
        "over budget": {**mixed, "max_bad_share": 0.0},
        "within budget": {**mixed, "max_bad_share": 0.5},
        "tampered": tampered[0],
        "no codec": {**good, "dataset": "other", "codec": "no-such-codec"},
    }
    return dict(zip(forms, installation.run(*forms.values()), strict=True))


def test_dry_run_only_plans(runs, installation):
    run = runs["dry"]
    assert run["state"] == "success"
    assert run["tasks"]["plan"] == "success"
    skipped = {"tokenize", "commit", "audit", "validate", "publish"}
    assert {task for task, state in run["tasks"].items() if state == "skipped"} == skipped
    assert run["xcoms"]["plan.return_value"]["outcome"] == "dry run"
    assert "Dry run: nothing is encoded." in installation.log
    assert run["events"] == []


def test_first_run_publishes_version_one(runs, installation):
    run = runs["first"]
    assert run["state"] == "success"
    assert set(run["tasks"].values()) == {"success"}
    version = run["xcoms"]["publish.return_value"]
    assert (version["dataset"], version["version"], version["num_rows"]) == ("good", "v1", 3)
    ((event),) = run["events"]
    assert event["uri"] == "x-hcodec://tokens/good"
    assert event["extra"]["version"] == "v1"
    assert event["extra"]["num_files"] == 3
    assert "Job tokenize-" in installation.log
    assert "running 2/2 workers" in installation.log


def test_report_is_linked_and_there(runs, installation):
    xcoms = runs["first"]["xcoms"]
    url = xcoms["validate._link_ValidationReportLink"]
    assert url == xcoms["validate.report_url"]
    assert url.startswith("http://127.0.0.1:")
    uri = xcoms["validate.return_value"]
    assert url.endswith(uri.removeprefix("s3:/"))
    assert b"<html" in installation.storage.read(uri)


def test_card_is_linked_and_there(runs, installation):
    xcoms = runs["first"]["xcoms"]
    url = xcoms["publish._link_DatasetCardLink"]
    assert url == xcoms["publish.card_url"]
    assert url.startswith("http://127.0.0.1:")
    ((event),) = runs["first"]["events"]
    uri = event["extra"]["card_uri"]
    assert url.endswith(uri.removeprefix("s3:/"))
    assert b"hcodec-nano tokens of" in installation.storage.read(uri)
    card = json.loads(installation.storage.read(uri.replace("index.html", "card.json")))
    assert (card["version"], card["num_files"]) == ("v1", 3)


def test_xcoms_are_small(runs):
    for run in runs.values():
        for name, value in run["xcoms"].items():
            assert len(json.dumps(value)) < 4096, name


def test_second_run_finds_nothing_new(runs, installation):
    run = runs["second"]
    assert run["state"] == "success"
    assert run["tasks"]["plan"] == "success"
    assert run["tasks"]["tokenize"] == run["tasks"]["publish"] == "skipped"
    assert run["tasks"]["release"] == "success"
    assert run["xcoms"]["plan.return_value"]["outcome"] == "nothing new"
    assert "Nothing new: dataset good is up to date." in installation.log


def test_failed_validation_fails_the_run_before_publish(runs, installation):
    run = runs["over budget"]
    assert run["state"] == "failed"
    assert run["tasks"]["validate"] == "failed"
    assert run["tasks"]["publish"] == "upstream_failed"
    assert run["tasks"]["release"] == "success"
    assert run["events"] == []
    assert "truncated.flac (truncated); nothing is published" in installation.log
    assert run["xcoms"]["validate._link_ValidationReportLink"].startswith("http://")


def test_larger_budget_lets_the_next_run_publish(runs):
    run = runs["within budget"]
    assert run["state"] == "success"
    version = run["xcoms"]["publish.return_value"]
    assert version["version"] == "v1"
    assert version["outcomes"]["quarantined"] == 1
    assert version["num_rows"] == 3


def test_the_audit_of_a_plan_is_done_by_a_worker(runs, installation):
    plan_uri = runs["first"]["xcoms"]["plan.return_value"]["plan_uri"]
    audit = read_audit(installation.storage, plan_uri)
    assert audit is not None
    assert len(audit.compared) == 3
    assert audit.with_other_codes == []
    assert runs["first"]["xcoms"]["audit.return_value"]["job_uri"] == f"{plan_uri}/audit/job.json"
    assert "Job audit-" in installation.log


def test_the_audit_catches_codes_that_were_changed(runs, installation, tampered):
    """A worker's file whose size, checksum and statistics hold: only the audit can tell."""
    run = runs["tampered"]
    assert run["tasks"]["audit"] == "success"
    assert run["tasks"]["validate"] == "failed"
    assert run["tasks"]["publish"] == "upstream_failed"
    audit = read_audit(installation.storage, run["xcoms"]["plan.return_value"]["plan_uri"])
    ((file),) = audit.with_other_codes
    assert file.uri == tampered[1]
    assert file.num_equal_codes == file.num_codes - 1
    assert f"{file.uri} (" in installation.log
    assert run["events"] == []


def test_wrong_input_fails_at_once_with_a_sentence(runs, installation):
    run = runs["no codec"]
    assert run["state"] == "failed"
    assert run["tasks"]["plan"] == "failed"
    assert run["tasks"]["tokenize"] == "upstream_failed"
    assert "There is no codec named 'no-such-codec'" in installation.log


def test_every_run_gives_the_lock_back(runs, installation):
    config = load_config(installation.config_path)
    for dataset in ("good", "mixed", "tampered", "other"):
        assert lock_holder(installation.storage, lock_uri(config, dataset), dataset) is None
    assert all(run["tasks"]["release"] == "success" for run in runs.values())
