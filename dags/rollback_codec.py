"""DAG ``rollback_codec``: go back to the champion before this one, from the trigger form."""

from hcodec_airflow.retrain_pipeline import rollback_dag

dag = rollback_dag()
