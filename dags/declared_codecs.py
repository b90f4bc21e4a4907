"""DAGs ``retrain__<name>``: the codecs declared in ``codecs.toml``, trained anew when it is time.

Declarations that cannot be used are shown as import errors of ``declared_codecs_errors.py``.
"""

from pathlib import Path

from airflow.sdk import DAG

from hcodec_airflow.retrain_pipeline import declared_codec_dags

DAGS: dict[str, DAG] = declared_codec_dags(Path(__file__).with_name("codecs.toml"))
globals().update(DAGS)
