"""No DAG: says as an import error which tables of ``datasets.toml`` cannot be used, and why.

It is apart from ``declared_datasets.py`` because Airflow stops scheduling every DAG of a file that
has an import error.
"""

from pathlib import Path

from hcodec_airflow.pipelines import refuse_wrong_declarations

refuse_wrong_declarations(Path(__file__).with_name("datasets.toml"))
