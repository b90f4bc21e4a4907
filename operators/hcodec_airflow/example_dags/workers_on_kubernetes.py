"""Runs the workers of an existing plan on Kubernetes: the operator alone, without the pipeline.

Give the URI of a plan's ``job.json``. The profile ``gpu`` is one of the installation's own.
"""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG, Param

from hcodec_airflow.job_operator import CodecJobOperator

with DAG(
    "example_workers_on_kubernetes",
    description="The workers of one plan as an Indexed Job",
    schedule=None,
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    params={
        "job_uri": Param("s3://tokens/work/plans/demo/job.json", type="string", title="Job"),
        "workers": Param(8, type="integer", minimum=1, title="Workers"),
    },
    default_args={"retries": 2},
    tags=["hcodec", "example"],
) as dag:
    CodecJobOperator(
        task_id="tokenize",
        backend="kubernetes",
        profile="gpu",
        job="{{ params.job_uri }}",
        workers="{{ params.workers }}",
        # Anything of a pod that the profile does not say; merged in by strategic merge.
        pod_template={"spec": {"tolerations": [{"key": "spot", "operator": "Exists"}]}},
        startup_seconds=1800,
    )
