"""DAG ``monitor_tokens``: do new tokens look like the reference version's? After each version."""

from pathlib import Path

from hcodec_airflow.monitor_pipeline import monitor_dag

dag = monitor_dag(Path(__file__).with_name("datasets.toml"))
