"""OpenLineage: audio and codec -> a version of tokens -> the model that was trained on it.

Events join by names: whatever reads tokens or codecs names them with ``token_dataset`` and
``codec_dataset``, as whatever writes them does. Only Airflow's OpenLineage provider calls this, and
only where it is installed and switched on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import InputDataset, OutputDataset

    from hcodec_core.dataset.plan_documents import Plan
    from hcodec_core.jobs import TokenizeJob

CODEC_NAMESPACE = "hcodec-codecs"


@dataclass(frozen=True)
class NamedDataset:
    """How OpenLineage knows something: ``version`` tells two states of it apart."""

    namespace: str
    name: str
    version: str


def token_dataset(table_uri: str, version: str, snapshot_id: int) -> NamedDataset:
    """A version of tokens, by the folder of its table (``DatasetLayout.table_uri``)."""
    return NamedDataset(*_named(table_uri), f"{version} (snapshot {snapshot_id})")


def audio_source(uri: str) -> NamedDataset:
    """A folder or manifest of audio; object storage moves on, so it has no version."""
    return NamedDataset(*_named(uri), "")


def codec_dataset(name: str, digest: str) -> NamedDataset:
    """A codec, by its manifest's name; its version is the manifest's digest."""
    return NamedDataset(CODEC_NAMESPACE, name, digest)


def lineage_of_training(
    trained_on: Sequence[NamedDataset],
    model: NamedDataset,
    started_from: NamedDataset | None = None,
) -> OperatorLineage[Any, Any]:
    """Versions of tokens or audio, and the base where there is one, in; the trained codec out."""
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import InputDataset, OutputDataset

    bases = [] if started_from is None else [started_from]
    inputs = [
        *(InputDataset(d.namespace, d.name, facets=_version(d)) for d in trained_on),
        *(InputDataset(d.namespace, d.name, facets=_of_model(d)) for d in bases),
    ]
    output = OutputDataset(model.namespace, model.name, facets=_of_model(model))
    return OperatorLineage(inputs=inputs, outputs=[output])


def _version(dataset: NamedDataset) -> dict[str, Any]:
    if not dataset.version:
        return {}
    from openlineage.client.facet_v2 import dataset_version_dataset

    facet = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=dataset.version)
    return {"version": facet}


def _of_model(dataset: NamedDataset) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_type_dataset

    kind = dataset_type_dataset.DatasetTypeDatasetFacet(datasetType="MODEL")
    return {**_version(dataset), "datasetType": kind}


def lineage_of_export(
    pinned: Mapping[str, Any], exported: Mapping[str, Any]
) -> OperatorLineage[Any, Any]:
    """What ``retrain_steps.pin`` and ``retrain_steps.export`` told, as one training."""
    from hcodec_airflow.settings import read_settings
    from hcodec_core.codecs import load_manifest

    versions = [
        token_dataset(entry["table_uri"], entry["version"], entry["snapshot_id"])
        for entry in pinned["versions"]
    ]
    audio = [audio_source(uri) for uri in pinned["data"] if not uri.startswith("dataset:")]
    base = None
    if pinned["base"] is not None:
        uri, digest = pinned["base"]["uri"], pinned["base"]["digest"]
        manifest = load_manifest(uri, fetch=read_settings().open_storage().read)
        base = codec_dataset(manifest.name, digest)
    trained = codec_dataset(exported["manifest_name"], exported["digest"])
    return lineage_of_training([*versions, *audio], trained, base)


def lineage_of_publish(plan_uri: str, version: Mapping[str, Any]) -> OperatorLineage[Any, Any]:
    """Sources and codec of a plan as inputs, the version that ``steps.publish`` told as output."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    from hcodec_airflow.settings import read_settings
    from hcodec_core.dataset.layout import DatasetLayout
    from hcodec_core.dataset.plan_documents import read_plan
    from hcodec_core.jobs import JOB_FILE, read_job
    from hcodec_core.storage import join_uri

    settings = read_settings()
    storage = settings.open_storage()
    plan = read_plan(storage, plan_uri)
    job = read_job(storage.read(join_uri(plan_uri, JOB_FILE)))
    layout = DatasetLayout(settings.load_config(), plan.dataset, plan.encode_id)
    return OperatorLineage(
        inputs=[*(_source(uri, plan) for uri in plan.sources), _codec(job)],
        outputs=[_tokens(layout.table_uri, version, job)],
    )


def lineage_of_job(job_uri: str) -> OperatorLineage[Any, Any]:
    """The codec of a tokenise job as input; what came of it is told when it is published."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    from hcodec_airflow.settings import read_settings
    from hcodec_core.jobs import TokenizeJob, read_any_job

    job = read_any_job(read_settings().open_storage().read(job_uri))
    return OperatorLineage(inputs=[_codec(job)] if isinstance(job, TokenizeJob) else [])


def _named(uri: str) -> tuple[str, str]:
    """Namespace and name of an object, by OpenLineage's rules for S3 and local files."""
    from urllib.parse import unquote

    from hcodec_core.storage import split_uri

    scheme, bucket, key = split_uri(uri)
    if scheme == "file":
        return "file", unquote(key).rstrip("/") or "/"
    return f"{scheme}://{bucket}", key.strip("/") or "/"


def _source(uri: str, plan: Plan) -> InputDataset:
    from openlineage.client.event_v2 import InputDataset
    from openlineage.client.facet_v2 import documentation_dataset, input_statistics_input_dataset

    namespace, name = _named(uri)
    statistics = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
        fileCount=plan.num_files, size=plan.num_bytes
    )
    text = f"Audio objects; {plan.num_files} of all sources were encoded by plan {plan.plan_id}."
    return InputDataset(
        namespace,
        name,
        # Counted over all sources of the plan: with several, no number belongs to one of them.
        inputFacets={"inputStatistics": statistics} if len(plan.sources) == 1 else {},
        facets={"documentation": documentation_dataset.DocumentationDatasetFacet(description=text)},
    )


def _codec(job: TokenizeJob) -> InputDataset:
    from openlineage.client.event_v2 import InputDataset

    codec = codec_dataset(job.manifest.name, job.manifest.digest)
    return InputDataset(codec.namespace, codec.name, facets=_of_model(codec))


def _tokens(table_uri: str, version: Mapping[str, Any], job: TokenizeJob) -> OutputDataset:
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import (
        output_statistics_output_dataset,
        schema_dataset,
        symlinks_dataset,
    )

    from hcodec_core.dataset.schema import columns_of

    tokens = token_dataset(table_uri, version["version"], version["snapshot_id"])
    fields = [
        schema_dataset.SchemaDatasetFacetFields(column.name, column.kind, column.doc)
        for column in columns_of(job.manifest)
    ]
    table = symlinks_dataset.Identifier(tokens.namespace, str(version["table"]), "TABLE")
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=version["num_rows"]
    )
    return OutputDataset(
        tokens.namespace,
        tokens.name,
        outputFacets={"outputStatistics": statistics},
        facets={
            **_version(tokens),
            "schema": schema_dataset.SchemaDatasetFacet(fields=fields),
            "symlinks": symlinks_dataset.SymlinksDatasetFacet(identifiers=[table]),
        },
    )
