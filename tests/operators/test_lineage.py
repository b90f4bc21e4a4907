"""Lineage events of a real publish, as OpenLineage's own file transport writes them."""

from __future__ import annotations

import json

import pytest

from hcodec_airflow.dataset_operators import PublishOperator
from hcodec_core.config import StorageConfig
from hcodec_core.storage import file_uri, open_storage
from tests.dataset.factories import World

pytest.importorskip("airflow.providers.openlineage", reason="OpenLineage's provider is missing")


@pytest.fixture
def world(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "audio").mkdir(parents=True)
    made = World(file_uri(root), tmp_path, open_storage(StorageConfig()))
    config = made.config
    path = tmp_path / "hcodec.toml"
    path.write_text(
        f"[access]\nsource_prefixes = {json.dumps(config.access.source_prefixes)}\n"
        f"destination_prefixes = {json.dumps(config.access.destination_prefixes)}\n"
        f'[catalog]\nuri = "{config.catalog.uri}"\n'
        f'warehouse_uri = "{config.catalog.warehouse_uri}"\n'
        f'[work]\nwork_uri = "{config.work.work_uri}"\n'
    )
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", str(path))
    return made


def published(world: World) -> PublishOperator:
    world.put("a b.wav", "c.wav")
    plan = world.plan()
    world.work(plan)
    committed = world.commit(plan).model_dump(mode="json")
    operator = PublishOperator(task_id="publish", committed=committed, report_uri="")
    assert operator.step({"outlet_events": {}})["version"] == "v1"
    return operator


def event_of(operator: PublishOperator, path) -> dict:
    """The event that the provider emits when the task is done, read back from the file."""
    from airflow.providers.openlineage.extractors.base import DefaultExtractor
    from airflow.providers.openlineage.plugins.adapter import OpenLineageAdapter
    from openlineage.client import OpenLineageClient
    from openlineage.client.transport.file import FileConfig, FileTransport

    lineage = DefaultExtractor(operator).extract_on_complete(None)
    transport = FileTransport(FileConfig(log_file_path=str(path), append=True))
    OpenLineageAdapter(OpenLineageClient(transport=transport)).complete_task(
        run_id="01941f29-7c00-7087-8906-40e512c257bd",
        job_name="tokenize.publish",
        end_time="2026-01-01T00:00:00Z",
        task=lineage,
        nominal_start_time=None,
        nominal_end_time=None,
        owners=[],
        tags=[],
        job_description=None,
    )
    (line,) = path.read_text().splitlines()
    return json.loads(line)


def test_a_version_is_traced_to_its_audio_and_codec(world, tmp_path):
    event = event_of(published(world), tmp_path / "events.jsonl")
    audio, codec = event["inputs"]
    assert event["eventType"] == "COMPLETE"
    assert (audio["namespace"], audio["name"]) == ("file", f"{tmp_path}/root/audio")
    assert audio["inputFacets"]["inputStatistics"]["fileCount"] == 2
    assert (codec["namespace"], codec["name"]) == ("hcodec-codecs", "toy")
    assert codec["facets"]["version"]["datasetVersion"] == world.manifest.digest
    (tokens,) = event["outputs"]
    assert tokens["name"].endswith(f"/hcodec/{world.layout.table_name}")
    assert tokens["facets"]["version"]["datasetVersion"].startswith("v1 (snapshot ")
    assert tokens["outputFacets"]["outputStatistics"]["rowCount"] == 2
    assert "acoustic" in {field["name"] for field in tokens["facets"]["schema"]["fields"]}
    (symlink,) = tokens["facets"]["symlinks"]["identifiers"]
    assert symlink["name"] == f"hcodec.{world.layout.table_name}"


def test_a_publish_that_did_not_happen_has_no_lineage():
    operator = PublishOperator(task_id="publish", committed={}, report_uri="")
    assert operator.get_openlineage_facets_on_complete(None) is None
