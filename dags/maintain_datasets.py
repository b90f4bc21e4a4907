"""DAG ``maintain_datasets``: small files, old snapshots and orphans, weekly; by hand a dry run."""

from pathlib import Path

from hcodec_airflow.upkeep_pipeline import maintain_dag

dag = maintain_dag(Path(__file__).with_name("datasets.toml"))
