"""The assets that stand for datasets, for ``schedule=`` of DAGs that use the tokens."""

from __future__ import annotations

from airflow.sdk import Asset


def dataset_asset(dataset: str) -> Asset:
    """Published versions of a dataset: one event per version, its facts in ``extra``."""
    # For schemes other than x-* Airflow loads all providers' URI handlers at parse, and boto3.
    return Asset(name=f"tokens__{dataset}", uri=f"x-hcodec://tokens/{dataset}", group="hcodec")


def drift_asset(dataset: str) -> Asset:
    """Drift of a dataset's tokens: one event per alarm, for DAGs that train the codec anew."""
    return Asset(name=f"hcodec-drift-{dataset}", uri=f"x-hcodec://drift/{dataset}", group="hcodec")


def champion_asset(codec: str) -> Asset:
    """The champion of a codec: one event per promotion or rollback, its facts in ``extra``."""
    return Asset(
        name=f"hcodec-champion-{codec}", uri=f"x-hcodec://champion/{codec}", group="hcodec"
    )
