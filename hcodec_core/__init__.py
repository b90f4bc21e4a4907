"""The product without Airflow: audio in object storage to versioned token datasets."""

__version__ = "0.1.0"
