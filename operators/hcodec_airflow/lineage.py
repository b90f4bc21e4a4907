"""OpenLineage: which audio and which codec a published version of tokens was made from.

Only Airflow's OpenLineage provider calls this, and only where it is installed and switched on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import InputDataset, OutputDataset

    from hcodec_core.dataset.plan_documents import Plan
    from hcodec_core.jobs import TokenizeJob

CODEC_NAMESPACE = "hcodec-codecs"


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
    from openlineage.client.facet_v2 import dataset_type_dataset, dataset_version_dataset

    return InputDataset(
        CODEC_NAMESPACE,
        job.manifest.name,
        facets={
            "version": dataset_version_dataset.DatasetVersionDatasetFacet(
                datasetVersion=job.manifest.digest
            ),
            "datasetType": dataset_type_dataset.DatasetTypeDatasetFacet(datasetType="MODEL"),
        },
    )


def _tokens(table_uri: str, version: Mapping[str, Any], job: TokenizeJob) -> OutputDataset:
    from openlineage.client.event_v2 import OutputDataset
    from openlineage.client.facet_v2 import (
        dataset_version_dataset,
        output_statistics_output_dataset,
        schema_dataset,
        symlinks_dataset,
    )

    from hcodec_core.dataset.schema import columns_of

    namespace, name = _named(table_uri)
    fields = [
        schema_dataset.SchemaDatasetFacetFields(column.name, column.kind, column.doc)
        for column in columns_of(job.manifest)
    ]
    table = symlinks_dataset.Identifier(namespace, str(version["table"]), "TABLE")
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
        rowCount=version["num_rows"]
    )
    return OutputDataset(
        namespace,
        name,
        outputFacets={"outputStatistics": statistics},
        facets={
            "schema": schema_dataset.SchemaDatasetFacet(fields=fields),
            "symlinks": symlinks_dataset.SymlinksDatasetFacet(identifiers=[table]),
            "version": dataset_version_dataset.DatasetVersionDatasetFacet(
                datasetVersion=f"{version['version']} (snapshot {version['snapshot_id']})"
            ),
        },
    )
