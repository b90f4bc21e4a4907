"""The assets that stand for datasets, for ``schedule=`` of DAGs that use the tokens."""

from __future__ import annotations

from airflow.sdk import Asset


def dataset_asset(dataset: str) -> Asset:
    """Published versions of a dataset: one event per version, its facts in ``extra``."""
    # For schemes other than x-* Airflow loads all providers' URI handlers at parse, and boto3.
    return Asset(name=f"tokens__{dataset}", uri=f"x-hcodec://tokens/{dataset}", group="hcodec")
