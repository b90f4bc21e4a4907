"""DAG ``tokenize_corpus``: turn any folder of audio into a token dataset, from the trigger form."""

from hcodec_airflow.pipelines import corpus_dag

dag = corpus_dag()
