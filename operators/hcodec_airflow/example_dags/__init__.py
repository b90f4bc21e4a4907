"""Example DAGs: copy one into the DAG folder and change it."""
