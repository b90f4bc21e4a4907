"""The books of a plan: every file of it has exactly one outcome, every row a file that is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from hcodec_core.dataset.results import read_results
from hcodec_core.dataset.tabular import each, keys_of, read_table
from hcodec_core.errors import PlanIncompleteError
from hcodec_core.jobs import FILES_FILE, DataFile, FileOutcome, Outcome, ShardResult, TokenizeJob
from hcodec_core.storage import Storage, join_uri

_OUTCOMES = pa.schema(
    [("shard_id", pa.string()), ("uri", pa.string()), ("etag", pa.string()), ("what", pa.string())]
)
_NUM_NAMED = 5


@dataclass(frozen=True)
class _Shard:
    """What is kept of one shard's result."""

    shard_id: str
    error: str | None
    data_file: DataFile | None
    outcomes: pa.Table
    quarantined: tuple[FileOutcome, ...]
    audio_seconds: float
    num_tokens: int


@dataclass(frozen=True)
class Accounts:
    """All shards of a plan that is done. ``outcomes``: columns shard_id, uri, etag, what."""

    data_files: tuple[DataFile, ...]
    outcomes: pa.Table
    quarantined: tuple[FileOutcome, ...]
    audio_seconds: float
    num_tokens: int

    @property
    def counts(self) -> dict[str, int]:
        """Number of files by outcome."""
        found = Counter(self.outcomes["what"].to_pylist())
        return {str(outcome): found.get(str(outcome), 0) for outcome in Outcome}

    def with_outcome(self, outcome: Outcome) -> pa.Table:
        """Rows of ``outcomes`` with one outcome."""
        return self.outcomes.filter(pc.equal(self.outcomes["what"], str(outcome)))


def read_accounts(storage: Storage, job: TokenizeJob) -> Accounts:
    """Read all results of a plan and make sure that they add up.

    Raises ``PlanIncompleteError`` naming the shards that have no result or failed, the first file
    that is missing from the results or in them twice, or the first data file that is not there as
    its worker left it.
    """
    files = read_table(storage, join_uri(job.plan_uri, FILES_FILE), ["shard_id", "uri", "etag"])
    shards = read_results(storage, job.plan_uri, _condense)
    _check_shards(job, set(pc.unique(files["shard_id"]).to_pylist()), shards)
    outcomes = pa.concat_tables([_OUTCOMES.empty_table(), *(s.outcomes for s in shards)])
    _check_files(job, files, outcomes)
    data_files = tuple(shard.data_file for shard in shards if shard.data_file is not None)
    each(lambda file: _check_data_file(storage, file), data_files)
    return Accounts(
        data_files=data_files,
        outcomes=outcomes,
        quarantined=tuple(outcome for shard in shards for outcome in shard.quarantined),
        audio_seconds=sum(shard.audio_seconds for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
    )


def _condense(result: ShardResult) -> _Shard:
    outcomes = {
        "shard_id": [result.shard_id] * len(result.outcomes),
        "uri": [outcome.uri for outcome in result.outcomes],
        "etag": [outcome.etag for outcome in result.outcomes],
        "what": [str(outcome.outcome) for outcome in result.outcomes],
    }
    return _Shard(
        shard_id=result.shard_id,
        error=_error_of(result),
        data_file=result.data_file,
        outcomes=pa.table(outcomes, schema=_OUTCOMES),
        quarantined=tuple(o for o in result.outcomes if o.outcome is Outcome.QUARANTINED),
        audio_seconds=result.audio_seconds,
        num_tokens=result.num_tokens,
    )


def _error_of(result: ShardResult) -> str | None:
    if result.status == "failed":
        return result.error or "failed"
    num_tokens = sum(outcome.outcome is Outcome.TOKENS for outcome in result.outcomes)
    num_rows = 0 if result.data_file is None else result.data_file.stats.num_rows
    if num_tokens != num_rows:
        return f"{num_tokens} files with tokens, but {num_rows} rows"
    return None


def _check_shards(job: TokenizeJob, planned: set[str], shards: list[_Shard]) -> None:
    missing = sorted(planned - {shard.shard_id for shard in shards})
    if missing:
        raise PlanIncompleteError(
            f"{len(missing)} of {len(planned)} shards of plan {job.plan_id} have no result yet "
            f"({', '.join(missing[:_NUM_NAMED])}): run the job {job.plan_uri} to its end first."
        )
    bad = [shard for shard in shards if shard.error is not None]
    if bad:
        named = "; ".join(f"{shard.shard_id}: {shard.error}" for shard in bad[:_NUM_NAMED])
        raise PlanIncompleteError(
            f"{len(bad)} of {len(planned)} shards of plan {job.plan_id} failed ({named}): plan "
            "again, which keeps the finished shards and retries these."
        )


def _check_files(job: TokenizeJob, files: pa.Table, outcomes: pa.Table) -> None:
    planned = Counter(keys_of(files, "shard_id", "uri", "etag").to_pylist())
    accounted = Counter(keys_of(outcomes, "shard_id", "uri", "etag").to_pylist())
    if planned == accounted:
        return
    missing, surplus = planned - accounted, accounted - planned
    what = "is missing from" if missing else "is in excess in"
    shard_id, uri, _ = min(missing or surplus).split("\n", 2)
    raise PlanIncompleteError(
        f"File {uri} {what} the result of shard {shard_id} of plan {job.plan_id} "
        f"({sum(missing.values())} missing, {sum(surplus.values())} in excess)."
    )


def _check_data_file(storage: Storage, file: DataFile) -> None:
    # An Iceberg commit believes what it is told: a missing file would show only when it is read.
    info = storage.head(file.uri)
    if info is None:
        raise PlanIncompleteError(f"Data file {file.uri} is gone since its shard was done.")
    if (info.size, info.etag) != (file.size, file.etag):
        raise PlanIncompleteError(
            f"Data file {file.uri} is not what its worker wrote: {info.size} bytes with etag "
            f"{info.etag}, not {file.size} bytes with etag {file.etag}."
        )
