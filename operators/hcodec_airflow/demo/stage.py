"""Setting the stage: storage with the corpus in it, configuration, and a healthy Airflow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hcodec_airflow.demo.airflow_api import AirflowApi
from hcodec_airflow.demo.corpus import slug_of, sync_folder
from hcodec_airflow.demo.services import (
    AIRFLOW,
    Services,
    airflow_environment,
    free_port,
    start_airflow,
    wait_until_answers,
)
from hcodec_core.config import Config, load_config
from hcodec_core.storage import Storage, open_storage

SOURCE_BUCKET = "demo-corpus"
TOKEN_BUCKET = "demo-tokens"
# The embedded endpoint checks no credentials, but clients insist on having some.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",
    "AWS_EC2_METADATA_DISABLED": "true",
}

CONFIG_TEMPLATE = """\
# Written by the demo; the ports stay the same from run to run.
format_version = 1

[storage]
endpoint_url = "{endpoint}"

[access]
source_prefixes = ["s3://{source}/"]
destination_prefixes = ["s3://{tokens}/"]

[catalog]
uri = "sqlite:///{state}/catalog.db"
warehouse_uri = "s3://{tokens}/warehouse"

[work]
work_uri = "s3://{tokens}/work"

[cost]
worker_hour = 0.10
"""


@dataclass(frozen=True)
class Stage:
    """All that the demo's run needs to know."""

    state_path: Path
    config_path: Path
    config: Config
    storage: Storage
    api: AirflowApi
    storage_url: str
    airflow_url: str
    source_uri: str
    dataset: str


def prepare(corpus_path: Path, dags_path: Path, services: Services) -> Stage:
    """Start storage and Airflow and put the corpus into the bucket."""
    state_path = services.state_path
    ports = _kept_ports(state_path)
    storage_url = f"http://127.0.0.1:{ports['storage']}"
    airflow_url = f"http://127.0.0.1:{ports['airflow']}"
    config_path = _write_config(state_path, storage_url)
    # Clients read credentials from the environment, in this process as in its children.
    os.environ.update(CREDENTIALS)
    start_storage(services, ports["storage"])
    environment = _airflow_environment(state_path, dags_path, config_path, ports)
    services.start("airflow-db", [*AIRFLOW, "db", "migrate"], environment)
    config = load_config(config_path)
    storage = open_storage(config.storage)
    wait_until_answers(storage_url, services, 60)
    slug = slug_of(corpus_path)
    dataset = "demo" if slug == "corpus_clips" else f"demo_{slug}"
    source_uri = f"s3://{SOURCE_BUCKET}/{slug}"
    _put_corpus(corpus_path, source_uri, storage, storage_url)
    services.wait_for("airflow-db", 180)
    start_airflow(services, environment)
    wait_until_answers(f"{airflow_url}/api/v2/version", services, 240)
    api = AirflowApi(airflow_url)
    api.login()
    api.wait_for_dag("tokenize_corpus", services, 180)
    return Stage(
        state_path=state_path,
        config_path=config_path,
        config=config,
        storage=storage,
        api=api,
        storage_url=storage_url,
        airflow_url=airflow_url,
        source_uri=source_uri,
        dataset=dataset,
    )


def start_storage(services: Services, port: int) -> None:
    """Start the embedded S3 endpoint on what it kept in the demo's folder."""
    module = "hcodec_airflow.demo.s3_server"
    folder = str(services.state_path / "s3")
    command = [sys.executable, "-m", module, "--port", str(port), "--folder", folder]
    services.start("storage", command, {**os.environ})


def _put_corpus(corpus_path: Path, source_uri: str, storage: Storage, storage_url: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=storage_url, region_name="us-east-1")
    existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in {SOURCE_BUCKET, TOKEN_BUCKET} - existing:
        client.create_bucket(Bucket=bucket)
    report = sync_folder(corpus_path, source_uri, storage)
    sys.stdout.write(
        f"  corpus   {corpus_path}: {report.num_files} files "
        f"({len(report.added)} new, {len(report.changed)} changed, {len(report.deleted)} deleted)\n"
        f"  storage  {storage_url} holds them in {source_uri}\n"
    )
    sys.stdout.flush()


def _airflow_environment(
    state_path: Path, dags_path: Path, config_path: Path, ports: Mapping[str, int]
) -> dict[str, str]:
    return {
        **os.environ,
        **CREDENTIALS,
        **airflow_environment(state_path, dags_path.resolve(), config_path, ports["airflow"]),
        "AIRFLOW__HCODEC__REPORT_BASE_URL": f"http://127.0.0.1:{ports['storage']}",
        # Workers and Airflow share few cores here.
        "OMP_NUM_THREADS": "1",
    }


def _write_config(state_path: Path, storage_url: str) -> Path:
    path = state_path / "hcodec.toml"
    text = CONFIG_TEMPLATE.format(
        endpoint=storage_url, source=SOURCE_BUCKET, tokens=TOKEN_BUCKET, state=state_path
    )
    path.write_text(text)
    return path


def _kept_ports(state_path: Path) -> dict[str, int]:
    """The ports of the last run while they are free: links and configuration stay valid."""
    path = state_path / "ports.json"
    wanted = json.loads(path.read_text()) if path.exists() else {"storage": 9000, "airflow": 8080}
    ports = {name: free_port(port) for name, port in wanted.items()}
    path.write_text(json.dumps(ports))
    return ports
