"""The books of a plan: every file of it has exactly one outcome, every row a file that is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from hcodec_core.dataset.results import results_uri, try_read_results
from hcodec_core.dataset.tabular import each, is_in, keys_of, list_folder, read_table
from hcodec_core.errors import PlanIncompleteError
from hcodec_core.jobs import FILES_FILE, DataFile, FileOutcome, Outcome, ShardResult, TokenizeJob
from hcodec_core.storage import Storage, join_uri

_OUTCOMES = pa.schema(
    [("shard_id", pa.string()), ("uri", pa.string()), ("etag", pa.string()), ("what", pa.string())]
)
_FILE_COLUMNS = ["shard_id", "uri", "etag"]
_NUM_NAMED = 5
_LISTED_AT_ONCE = 20  # data files in one folder from which a listing is cheaper than requests


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

    Raises ``PlanIncompleteError`` naming the shards that have no result yet, or those whose results
    cannot be used and why (see ``find_faults``).
    """
    files = read_table(storage, join_uri(job.plan_uri, FILES_FILE), _FILE_COLUMNS)
    shards, faults = _read_shards(storage, job.plan_uri, files)
    planned = set(pc.unique(files["shard_id"]).to_pylist())
    _check_complete(job, planned, {shard.shard_id for shard in shards} | faults.keys())
    _check_sound(job, len(planned), faults)
    return Accounts(
        data_files=tuple(shard.data_file for shard in shards if shard.data_file is not None),
        outcomes=pa.concat_tables([_OUTCOMES.empty_table(), *(s.outcomes for s in shards)]),
        quarantined=tuple(outcome for shard in shards for outcome in shard.quarantined),
        audio_seconds=sum(shard.audio_seconds for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
    )


def find_faults(storage: Storage, plan_uri: str) -> dict[str, str]:
    """What is wrong with results of a plan, by shard id; shards without a result are left out.

    A shard failed; its result cannot be read, does not add up, or names a data file that is gone or
    is not what its worker wrote. Such a shard is done again by the plan's next generation.
    """
    if not list_folder(storage, results_uri(plan_uri)):
        return {}
    files = read_table(storage, join_uri(plan_uri, FILES_FILE), _FILE_COLUMNS)
    return _read_shards(storage, plan_uri, files)[1]


def _read_shards(
    storage: Storage, plan_uri: str, files: pa.Table
) -> tuple[list[_Shard], dict[str, str]]:
    """Shards that have a readable result, and what is wrong with shards."""
    shards, faults = try_read_results(storage, plan_uri, _condense)
    lost = _lost_files(storage, [s.data_file for s in shards if s.data_file is not None])
    # The first that is found of a shard is what is said of it.
    for found in (
        {shard.shard_id: shard.error for shard in shards if shard.error is not None},
        _misaccounted(files, shards),
        {
            s.shard_id: lost[s.data_file.uri]
            for s in shards
            if s.data_file and s.data_file.uri in lost
        },
    ):
        faults = found | faults
    return shards, faults


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


def _check_complete(job: TokenizeJob, planned: set[str], known: set[str]) -> None:
    missing = sorted(planned - known)
    if missing:
        raise PlanIncompleteError(
            f"{len(missing)} of {len(planned)} shards of plan {job.plan_id} have no result yet "
            f"({', '.join(missing[:_NUM_NAMED])}): run the job {job.plan_uri} to its end first."
        )


def _check_sound(job: TokenizeJob, num_shards: int, faults: Mapping[str, str]) -> None:
    if faults:
        first = sorted(faults.items())[:_NUM_NAMED]
        named = "; ".join(f"{shard_id}: {reason.rstrip('.')}" for shard_id, reason in first)
        raise PlanIncompleteError(
            f"{len(faults)} of {num_shards} shards of plan {job.plan_id} failed or cannot be used "
            f"({named}): plan again (the next run does), which keeps the other shards' work and "
            "does these once more."
        )


def _misaccounted(files: pa.Table, shards: list[_Shard]) -> dict[str, str]:
    """Shards whose outcomes are not those of their files, and the first such file."""
    done = pa.array([s.shard_id for s in shards if s.error is None], pa.string())
    files = files.filter(is_in(files["shard_id"], done))
    parts = [shard.outcomes for shard in shards if shard.error is None]
    outcomes = pa.concat_tables([_OUTCOMES.empty_table(), *parts])
    names = ("shard_id", "uri", "etag")
    if _same_keys(files, outcomes, names):
        return {}
    planned = Counter(keys_of(files, *names).to_pylist())
    accounted = Counter(keys_of(outcomes, *names).to_pylist())
    faults: dict[str, str] = {}
    for found, what in (
        (planned - accounted, "missing from"),
        (accounted - planned, "too much in"),
    ):
        for key in sorted(found):
            shard_id, uri, _ = key.split("\n", 2)
            faults.setdefault(shard_id, f"file {uri} is {what} its result")
    return faults


def _same_keys(first: pa.Table, second: pa.Table, names: Sequence[str]) -> bool:
    """Whether both hold the same keys, each as often."""
    if len(first) != len(second):
        return False
    keys = (keys_of(table, *names) for table in (first, second))
    ordered = [key.take(pc.sort_indices(key)) for key in keys]
    return bool(ordered[0].equals(ordered[1]))


def _lost_files(storage: Storage, files: Sequence[DataFile]) -> dict[str, str]:
    """Data files that are not there as their workers left them, and what is there instead.

    An Iceberg commit believes what it is told: a missing file would show only when it is read. Of
    many files in one folder one listing tells what a request for each would.
    """
    folders: dict[str, list[DataFile]] = {}
    for file in files:
        folders.setdefault(file.uri.rpartition("/")[0], []).append(file)
    doubtful: list[DataFile] = []
    for folder_uri, group in folders.items():
        listed = list_folder(storage, folder_uri) if len(group) >= _LISTED_AT_ONCE else []
        known = {(info.uri, info.size, info.etag) for info in listed}
        doubtful += [file for file in group if (file.uri, file.size, file.etag) not in known]
    reasons = each(lambda file: _what_is_wrong(storage, file), doubtful)
    return {f.uri: reason for f, reason in zip(doubtful, reasons, strict=True) if reason}


def _what_is_wrong(storage: Storage, file: DataFile) -> str:
    info = storage.head(file.uri)
    if info is None:
        return f"data file {file.uri} is gone since the shard was done"
    if (info.size, info.etag) != (file.size, file.etag):
        return (
            f"data file {file.uri} is not what its worker wrote: {info.size} bytes with etag "
            f"{info.etag}, not {file.size} bytes with etag {file.etag}"
        )
    return ""
