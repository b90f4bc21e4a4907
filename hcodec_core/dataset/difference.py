"""The difference between what an inventory lists and what a dataset holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hcodec_core.dataset.exclusions import read_exclusions
from hcodec_core.dataset.inventory import InventoryInfo
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import rollback_entries, version_of
from hcodec_core.dataset.plan_documents import PlanRequest
from hcodec_core.dataset.quarantine import read_quarantine
from hcodec_core.dataset.sharding import Seconds, estimate_seconds
from hcodec_core.dataset.table import find_table, held_objects, main_snapshot_id, root_snapshot_id
from hcodec_core.dataset.tabular import is_in, keys_of
from hcodec_core.storage import Storage

logger = logging.getLogger(__name__)

KEY_SCHEMA = pa.schema([("uri", pa.string()), ("etag", pa.string())])


@dataclass(frozen=True)
class Base:
    """What readers see of the dataset now. ``num_rollbacks`` keeps plans before and after apart."""

    snapshot_id: int | None
    version: str | None
    num_rollbacks: int
    held: pa.Table


@dataclass(frozen=True)
class Work:
    """Files to encode (columns uri, etag, size, metadata, is_changed) and rows to remove.

    ``num_excluded``: listed files that were erased from the dataset and stay out of it.
    """

    files: pa.Table
    seconds: Seconds
    tombstones: pa.Table
    num_unchanged: int
    num_quarantined: int
    withheld: tuple[int, str] = (0, "")
    num_remaining: int = 0
    remaining_seconds: float = 0.0
    num_excluded: int = 0


def read_base(layout: DatasetLayout) -> Base:
    """What the dataset's readers see now."""
    table = find_table(layout)
    if table is None:
        return Base(None, None, 0, KEY_SCHEMA.empty_table())
    snapshot_id = main_snapshot_id(table)
    num_rollbacks = len(rollback_entries(table))
    # A table whose first plan is not published yet is no different from none.
    if snapshot_id is None or snapshot_id == root_snapshot_id(table):
        return Base(None, None, num_rollbacks, KEY_SCHEMA.empty_table())
    held = held_objects(table, snapshot_id).cast(KEY_SCHEMA)
    return Base(snapshot_id, version_of(table, snapshot_id), num_rollbacks, held)


def find_work(
    storage: Storage,
    layout: DatasetLayout,
    request: PlanRequest,
    info: InventoryInfo,
    listed: pa.Table,
    base: Base,
) -> Work:
    """Files to encode, changed ones first, and rows to remove.

    Files that were erased from the dataset (see ``exclusions``) are left out.
    A file is held when ``main`` has its uri with its etag; a changed one has another etag there.
    """
    keys = keys_of(listed, "uri", "etag")
    is_held = is_in(keys, keys_of(base.held, "uri", "etag"))
    exclusions = read_exclusions(storage, layout.config, layout.dataset)
    is_out = pa.repeat(False, len(listed))
    if exclusions is not None:
        is_out = exclusions.flags(listed["uri"])
    is_bad = pa.array(np.zeros(len(listed), dtype=bool))
    if not request.retry_quarantined:
        is_bad = is_in(keys, keys_of(read_quarantine(storage, layout), "uri", "etag"))
        is_bad = pc.and_(is_bad, pc.invert(is_held))
    files = listed.append_column(
        "is_changed", is_in(keys_of(listed, "uri"), keys_of(base.held, "uri"))
    ).filter(pc.invert(pc.or_(is_out, pc.or_(is_held, is_bad))))
    files = files.take(pc.sort_indices(files, [("is_changed", "descending"), ("uri", "ascending")]))
    tombstones, withheld = _tombstones(request, info, listed, base.held)
    return Work(
        files=files,
        seconds=estimate_seconds(files, request.bytes_per_second),
        tombstones=tombstones,
        num_unchanged=count_true(is_held),
        num_quarantined=count_true(is_bad),
        withheld=withheld,
        num_excluded=count_true(is_out),
    )


def count_true(flags: pa.Array) -> int:
    """Number of true values."""
    return int(pc.sum(flags).as_py() or 0)


def _tombstones(
    request: PlanRequest, info: InventoryInfo, listed: pa.Table, held: pa.Table
) -> tuple[pa.Table, tuple[int, str]]:
    """Held rows whose objects are gone, and how many of such rows are kept for which reason."""
    nothing = KEY_SCHEMA.empty_table()
    inside = held.filter(_lies_below(held["uri"], info.listed_prefixes))
    gone = inside.filter(pc.invert(is_in(keys_of(inside, "uri"), keys_of(listed, "uri"))))
    if not len(gone):
        return nothing, (0, "")
    if not info.is_complete:
        return nothing, (len(gone), "the inventory is not complete")
    share = len(gone) / len(inside)
    if share > request.max_delete_share and not request.allow_many_deletes:
        reason = (
            f"{share:.0%} of the rows below the sources would go, more than the "
            f"{request.max_delete_share:.0%} of max_delete_share: set allow_many_deletes if the "
            "objects were really deleted"
        )
        logger.warning("%d tombstones withheld: %s", len(gone), reason)
        return nothing, (len(gone), reason)
    return gone.sort_by("uri"), (0, "")


def _lies_below(uris: pa.ChunkedArray, prefixes: tuple[str, ...]) -> pa.Array:
    below = pa.array(np.zeros(len(uris), dtype=bool))
    for prefix in prefixes:
        below = pc.or_(below, pc.starts_with(uris.combine_chunks(), pattern=prefix))
    return below


def first_wave(work: Work, max_hours: float | None) -> Work:
    """Bound the work to the first hours of it, and at least one file."""
    if max_hours is None or not len(work.files):
        return work
    reached = np.cumsum(work.seconds) - work.seconds
    num_files = int(np.searchsorted(reached, max_hours * 3600, side="left"))
    return replace(
        work,
        files=work.files.slice(0, num_files),
        seconds=work.seconds[:num_files],
        num_remaining=len(work.files) - num_files,
        remaining_seconds=float(work.seconds[num_files:].sum()),
    )
