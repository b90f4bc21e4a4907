"""Committing a plan: its shards' files go to a branch of their own, exactly once.

The branch, the snapshot and the ledger entry appear in one Iceberg commit that requires the branch
not to exist. Whoever comes second finds the ledger entry; this holds after compaction and expiry,
for committers that race, and for one that died without learning that it had won.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from hcodec_core.config import Config
from hcodec_core.dataset.accounts import Accounts, read_accounts
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import (
    CommitCounts,
    PlanEntry,
    PlanState,
    plan_entry,
    plan_property,
)
from hcodec_core.dataset.plan_documents import TOMBSTONES_FILE, Plan, read_plan
from hcodec_core.dataset.swap import Removal, Swap, Swapper, iceberg_file
from hcodec_core.dataset.table import (
    SnapshotChange,
    data_files,
    ensure_table,
    load_table,
    main_snapshot_id,
    refs_of,
    root_snapshot_id,
)
from hcodec_core.dataset.tabular import read_table
from hcodec_core.errors import CommitConflictError, StorageError
from hcodec_core.jobs import JOB_FILE, DataFile, TokenizeJob, read_job
from hcodec_core.storage import Storage, join_uri

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile as IcebergFile
    from pyiceberg.table import Table

logger = logging.getLogger(__name__)

_TRIES = 20
_STORAGE_TRIES = 3


class CommitInfo(BaseModel):
    """A committed plan: snapshot ``snapshot_id`` on ``branch``, waiting to be validated.

    ``version`` is set when the plan was published already: then there is nothing left to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan_id: str
    plan_uri: str
    dataset: str
    encode_id: str
    snapshot_id: int
    base_snapshot_id: int
    branch: str
    attempt: int
    counts: CommitCounts
    version: str = ""


@dataclass(frozen=True)
class _Content:
    """What a plan brings, whatever it is committed on."""

    plan: Plan
    job: TokenizeJob
    accounts: Accounts
    removal: Removal


def commit_plan(config: Config, storage: Storage, plan_uri: str) -> CommitInfo:
    """Commit the shards of a plan to a branch that starts at what ``main`` shows now.

    Called again, it returns what was committed. When ``main`` moved since, it commits once more,
    on a new branch; when the commit was rejected, likewise.

    Raises ``PlanIncompleteError`` when not every file of the plan is accounted for,
    ``CommitConflictError`` when other writers are always first, ``StorageError``.
    """
    job = read_job(storage.read(join_uri(plan_uri, JOB_FILE)))
    plan = read_plan(storage, plan_uri)
    layout = DatasetLayout(config, job.dataset, job.encode_id)
    known = _find_commit(ensure_table(layout, job), plan)
    if known is not None:
        return known
    accounts = read_accounts(storage, job)
    tombstones = read_table(storage, join_uri(plan_uri, TOMBSTONES_FILE))
    content = _Content(plan, job, accounts, Removal.of(accounts, tombstones))
    num_failures = 0
    for _ in range(_TRIES):
        table = load_table(layout)
        known = _find_commit(table, plan)
        if known is not None:
            return known
        try:
            _commit_once(storage, table, content)
        except CommitConflictError as error:
            logger.info("plan %s: %s", plan.plan_id, error)
        except StorageError as error:
            # It may have happened nevertheless: the ledger tells.
            num_failures += 1
            if num_failures == _STORAGE_TRIES:
                raise
            logger.warning("plan %s: %s", plan.plan_id, error)
        time.sleep(random.uniform(0.0, 0.2))
    raise CommitConflictError(
        f"Plan {plan.plan_id} could not be committed: other writers of {layout.table_name} were "
        f"first {_TRIES} times; try again."
    )


def _find_commit(table: Table, plan: Plan) -> CommitInfo | None:
    """The plan's commit, if it can still be published or was."""
    entry = plan_entry(table, plan.plan_id)
    if entry is None or entry.state is PlanState.REJECTED:
        return None
    is_current = entry.base_snapshot_id == main_snapshot_id(table)
    # Without its branch the snapshot may expire any time.
    is_kept = entry.branch in refs_of(table)
    if entry.state is PlanState.COMMITTED and not (is_current and is_kept):
        return None
    return CommitInfo(
        plan_id=plan.plan_id,
        plan_uri=plan.plan_uri,
        dataset=plan.dataset,
        encode_id=plan.encode_id,
        snapshot_id=entry.snapshot_id,
        base_snapshot_id=entry.base_snapshot_id,
        branch=entry.branch,
        attempt=entry.attempt,
        counts=entry.counts,
        version=entry.version,
    )


def _commit_once(storage: Storage, table: Table, content: _Content) -> None:
    plan_id = content.plan.plan_id
    base_id = main_snapshot_id(table)
    assert base_id is not None, "load_table returns tables with a main branch only"
    swapper = Swapper(storage, content.job.manifest, content.job.data_uri)
    base_files = data_files(table, base_id)
    known_uris = {file.file_path for file in base_files}
    added = [file for file in content.accounts.data_files if file.uri not in known_uris]
    own_uris = {file.uri for file in content.accounts.data_files}
    swaps: list[Swap] = []
    if _may_remove_rows(table, content.plan, base_id):
        others = [file for file in base_files if file.file_path not in own_uris]
        swaps = swapper.swap(table, others, content.removal)
    added += [swap.new for swap in swaps if swap.new is not None]
    branch, attempt = _free_branch(table, plan_id)
    change = SnapshotChange(table, branch, base_id)
    snapshot_id = change.stage(
        added=[iceberg_file(table, file) for file in added],
        removed=[swap.old for swap in swaps],
        summary={"hcodec.plan-id": plan_id, "hcodec.dataset": content.plan.dataset},
    )
    previous = plan_entry(table, plan_id)
    if previous is not None and previous.branch in table.refs():
        change.remove_branch(previous.branch)
    entry = PlanEntry(
        state=PlanState.COMMITTED,
        snapshot_id=snapshot_id,
        base_snapshot_id=base_id,
        branch=branch,
        attempt=attempt,
        counts=_counts(content.accounts, swaps, _num_rows(base_files, swaps, added)),
    )
    try:
        change.commit(plan_property(plan_id, entry))
    except CommitConflictError:
        swapper.discard()
        raise
    logger.info("plan %s: snapshot %d on branch %s", plan_id, snapshot_id, branch)


def _may_remove_rows(table: Table, plan: Plan, base_id: int) -> bool:
    """Whether any row of the base may leave; false spares reading the base."""
    expected_id = plan.base_snapshot_id or root_snapshot_id(table)
    return base_id != expected_id or plan.num_changed_files > 0 or plan.num_tombstones > 0


def _free_branch(table: Table, plan_id: str) -> tuple[str, int]:
    previous = plan_entry(table, plan_id)
    attempt = 1 if previous is None else previous.attempt + 1
    while True:
        branch = f"audit_{plan_id}" if attempt == 1 else f"audit_{plan_id}_{attempt}"
        if branch not in refs_of(table):
            return branch, attempt
        attempt += 1


def _num_rows(base: list[IcebergFile], swaps: list[Swap], added: list[DataFile]) -> int:
    kept = sum(file.record_count for file in base) - sum(s.old.record_count for s in swaps)
    return kept + sum(file.stats.num_rows for file in added)


def _counts(accounts: Accounts, swaps: list[Swap], num_total_rows: int) -> CommitCounts:
    return CommitCounts(
        num_files=len(accounts.data_files),
        num_rows=sum(file.stats.num_rows for file in accounts.data_files),
        num_rows_removed=sum(swap.num_rows_removed for swap in swaps),
        num_rewritten_files=len(swaps),
        num_total_rows=num_total_rows,
        outcomes=accounts.counts,
        audio_seconds=accounts.audio_seconds,
        num_tokens=accounts.num_tokens,
    )
