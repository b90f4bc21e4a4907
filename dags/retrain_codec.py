"""DAG ``retrain_codec``: train a codec anew and promote it, from the trigger form."""

from hcodec_airflow.retrain_pipeline import codec_dag

dag = codec_dag()
