"""Quarantine: files of published plans that have no tokens, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.tabular import each, list_folder, read_table, write_table
from hcodec_core.jobs import FileOutcome
from hcodec_core.storage import Storage, join_uri

QUARANTINE_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("plan_id", pa.string()),
        ("version", pa.string()),
    ]
)


def read_quarantine(storage: Storage, layout: DatasetLayout) -> pa.Table:
    """All quarantined files, columns as in ``QUARANTINE_SCHEMA``; empty when there are none."""
    objects = list_folder(storage, layout.quarantine_uri)
    uris = [info.uri for info in objects if info.uri.endswith(".parquet")]
    parts = each(lambda uri: read_table(storage, uri).cast(QUARANTINE_SCHEMA), uris)
    return pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *parts])


def write_quarantine(
    storage: Storage,
    layout: DatasetLayout,
    plan_id: str,
    version: str,
    outcomes: Iterable[FileOutcome],
) -> str:
    """Write the quarantined files of one plan, sorted by URI; returns where ("" for none)."""
    rows = sorted(
        (
            {
                "uri": outcome.uri,
                "etag": outcome.etag,
                "reason": str(outcome.reason or ""),
                "detail": outcome.detail,
                "plan_id": plan_id,
                "version": version,
            }
            for outcome in outcomes
        ),
        key=lambda row: row["uri"],
    )
    if not rows:
        return ""
    uri = join_uri(layout.quarantine_uri, f"{plan_id}.parquet")
    write_table(storage, uri, pa.Table.from_pylist(rows, QUARANTINE_SCHEMA))
    return uri
