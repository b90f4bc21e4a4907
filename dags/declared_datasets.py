"""DAGs ``tokenize__<name>``: the datasets declared in ``datasets.toml``, kept up to date.

Declarations that cannot be used are shown as import errors of ``declared_datasets_errors.py``.
"""

from pathlib import Path

from airflow.sdk import DAG

from hcodec_airflow.pipelines import declared_dags

DAGS: dict[str, DAG] = declared_dags(Path(__file__).with_name("datasets.toml"))
globals().update(DAGS)
