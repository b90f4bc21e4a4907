"""The demo: an embedded S3 endpoint, a real Airflow and the sample corpus on one machine.

It is a client of what is shipped: it starts processes, speaks S3 and Airflow's REST API, and
reads the dataset back. It never imports Airflow.
"""
