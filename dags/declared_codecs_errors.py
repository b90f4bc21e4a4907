"""No DAG: says as an import error which tables of ``codecs.toml`` cannot be used, and why.

It is apart from ``declared_codecs.py`` because Airflow stops scheduling every DAG of a file that
has an import error.
"""

from pathlib import Path

from hcodec_airflow.retrain_pipeline import refuse_wrong_codecs

refuse_wrong_codecs(Path(__file__).with_name("codecs.toml"))
