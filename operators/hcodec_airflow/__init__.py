"""The Airflow provider: operators, triggers and DAG factories. It never imports torch."""
