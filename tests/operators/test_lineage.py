"""Lineage events of a real publish, as OpenLineage's own file transport writes them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from hcodec_airflow import lineage
from hcodec_airflow.dataset_operators import PublishOperator
from tests.dataset.factories import World

pytest.importorskip("airflow.providers.openlineage", reason="OpenLineage's provider is missing")


def published(world: World) -> PublishOperator:
    world.put("a b.wav", "c.wav")
    plan = world.plan()
    world.work(plan)
    committed = world.commit(plan).model_dump(mode="json")
    operator = PublishOperator(task_id="publish", committed=committed, report_uri="")
    context = {"outlet_events": {}, "ti": SimpleNamespace(xcom_push=lambda **values: None)}
    assert operator.step(context)["version"] == "v1"
    return operator


def event_of(lineage, path, job="tokenize.publish") -> dict:
    """The event that the provider emits when the task is done, read back from the file."""
    from airflow.providers.openlineage.plugins.adapter import OpenLineageAdapter
    from openlineage.client import OpenLineageClient
    from openlineage.client.transport.file import FileConfig, FileTransport

    transport = FileTransport(FileConfig(log_file_path=str(path), append=True))
    OpenLineageAdapter(OpenLineageClient(transport=transport)).complete_task(
        run_id="01941f29-7c00-7087-8906-40e512c257bd",
        job_name=job,
        end_time="2026-01-01T00:00:00Z",
        task=lineage,
        nominal_start_time=None,
        nominal_end_time=None,
        owners=[],
        tags=[],
        job_description=None,
    )
    return json.loads(path.read_text().splitlines()[-1])


def of_publish(operator: PublishOperator):
    from airflow.providers.openlineage.extractors.base import DefaultExtractor

    return DefaultExtractor(operator).extract_on_complete(None)


def test_a_version_is_traced_to_its_audio_and_codec(world, tmp_path):
    event = event_of(of_publish(published(world)), tmp_path / "events.jsonl")
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


def sources_of(events: list[dict], name: tuple[str, str, str]) -> set[tuple[str, str]]:
    """What a consumer of events finds: all that something was made from, by names and versions."""

    def key(dataset: dict) -> tuple[str, str, str]:
        version = dataset["facets"].get("version", {}).get("datasetVersion", "")
        return dataset["namespace"], dataset["name"], version

    made_by = {key(output): event for event in events for output in event["outputs"]}
    found: set[tuple[str, str]] = set()
    for dataset in made_by[name]["inputs"] if name in made_by else []:
        found |= {key(dataset)[:2]} | sources_of(events, key(dataset))
    return found


def test_a_model_is_traced_through_tokens_to_audio(world, tmp_path):
    """Two events, of tokenising and of training, joined by a consumer that knows only names."""
    path = tmp_path / "events.jsonl"
    operator = published(world)
    event_of(of_publish(operator), path)
    version = operator._published
    tokens = lineage.token_dataset(
        world.layout.table_uri, version["version"], version["snapshot_id"]
    )
    start = lineage.codec_dataset("toy", world.manifest.digest)
    model = lineage.codec_dataset("toy-tuned", "d" * 32)
    event_of(lineage.lineage_of_training([tokens], model, start), path, "retrain.export")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(events) == 2
    found = sources_of(events, (model.namespace, model.name, model.version))
    assert found == {
        ("file", f"{tmp_path}/root/audio"),
        ("file", f"{tmp_path}/root/out/warehouse/hcodec/{world.layout.table_name}"),
        ("hcodec-codecs", "toy"),
    }
    (output,) = events[1]["outputs"]
    assert output["facets"]["datasetType"]["datasetType"] == "MODEL"
    # Tokens of another version were made by another run: no audio is claimed for them.
    other = lineage.token_dataset(world.layout.table_uri, "v2", 7)
    assert sources_of(events, (other.namespace, other.name, other.version)) == set()


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        ("s3://bucket/audio/x/", ("s3://bucket", "audio/x")),
        ("s3://bucket", ("s3://bucket", "/")),
        ("file:///data/a%20b/", ("file", "/data/a b")),
    ],
)
def test_places_are_named_by_the_rules_of_openlineage(uri, named):
    dataset = lineage.token_dataset(uri, "v1", 5)
    assert (dataset.namespace, dataset.name) == named
    assert dataset.version == "v1 (snapshot 5)"


def test_a_publish_that_did_not_happen_has_no_lineage():
    operator = PublishOperator(task_id="publish", committed={}, report_uri="")
    assert operator.get_openlineage_facets_on_complete(None) is None
