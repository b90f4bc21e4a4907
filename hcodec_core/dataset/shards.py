"""Shards as workers see them: which files they hold, and how their rows get into the dataset.

An attempt writes a Parquet file under a name of its own, uploads it, and last creates the shard's
result, which names the file. Whoever creates the result has done the shard; a loser deletes the
file that nobody names. Rows lie in the order of the plan, so equal codes give equal files, whoever
wrote them.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hcodec_core.dataset.leases import Ending, EndingKind, end_attempt, is_worker_of
from hcodec_core.dataset.results import read_results, result_uri, results_uri
from hcodec_core.dataset.schema import (
    ROW_GROUP_BYTES,
    WRITER_OPTIONS,
    arrow_schema,
    audio_id_of,
    codes_column,
    flatten_codes,
    stats_of_parquet,
)
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.errors import ConfigError, HCodecError
from hcodec_core.jobs import FILES_FILE, DataFile, ShardResult, TokenizeJob, WorkerProgress
from hcodec_core.storage import Storage, join_uri, local_write_failed, sha256_of_file
from hcodec_core.tokens import Codes

__all__ = [
    "AudioFacts",
    "PlanFiles",
    "ShardFile",
    "ShardRef",
    "ShardWriter",
    "TokenRow",
    "data_file_uri",
    "discard_file",
    "fetch_plan_files",
    "lease_uri",
    "pending_shards",
    "perplexity",
    "publish_result",
    "release_attempts_of",
    "results_by_shard",
    "upload_shard",
]

logger = logging.getLogger(__name__)

_SCAN_ROWS = 1 << 16


@dataclass(frozen=True, order=True)
class ShardRef:
    """Place and name of a shard within its plan."""

    index: int
    shard_id: str


@dataclass(frozen=True)
class ShardFile:
    """One source object of a shard. ``size`` in bytes; ``metadata`` from the source's manifest."""

    file_index: int
    uri: str
    etag: str
    size: int
    metadata: Mapping[str, str | None] | None = None


class PlanFiles:
    """A local copy of a plan's ``files.parquet``."""

    def __init__(self, path: Path) -> None:
        """Keep the path; the file is read when asked."""
        self._path = path

    def shards(self) -> list[ShardRef]:
        """All shards of the plan, by index."""
        found: set[tuple[int, str]] = set()
        columns = ["shard_index", "shard_id"]
        with pq.ParquetFile(self._path) as file:
            for batch in file.iter_batches(_SCAN_ROWS, columns=columns):
                table = pa.Table.from_batches([batch]).group_by(columns).aggregate([])
                found.update(zip(*(table[name].to_pylist() for name in columns), strict=True))
        return sorted(ShardRef(index, shard_id) for index, shard_id in found)

    def files(self, shard: ShardRef) -> list[ShardFile]:
        """Files of one shard, by index."""
        table = pq.read_table(self._path, filters=[("shard_index", "==", shard.index)])
        rows = [
            ShardFile(
                file_index=row["file_index"],
                uri=row["uri"],
                etag=row["etag"],
                size=row["size"],
                metadata=None if row.get("metadata") is None else dict(row["metadata"]),
            )
            for row in table.to_pylist()
        ]
        return sorted(rows, key=lambda row: row.file_index)


def fetch_plan_files(storage: Storage, job: TokenizeJob, path: Path) -> PlanFiles:
    """Copy a plan's file list to ``path`` and compare it with the job.

    Raises ``ConfigError`` when they do not speak of the same plan, and what storage raises.
    """
    uri = join_uri(job.plan_uri, FILES_FILE)
    storage.download(uri, path)
    try:
        num_files = pq.read_metadata(path).num_rows
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{uri} is not readable as Parquet: make the plan again.") from error
    plan = PlanFiles(path)
    num_shards = len(plan.shards())
    if (num_files, num_shards) != (job.num_files, job.num_shards):
        raise ConfigError(
            f"{uri} has {num_files} files in {num_shards} shards, the job {job.num_files} in "
            f"{job.num_shards}: make the plan again."
        )
    return plan


def lease_uri(job: TokenizeJob, shard_id: str) -> str:
    """Prefix of a shard's lease (see ``leases``)."""
    return join_uri(job.plan_uri, "leases", shard_id)


def pending_shards(
    storage: Storage, job: TokenizeJob, shards: Iterable[ShardRef]
) -> list[ShardRef]:
    """Those of ``shards`` that have no result yet, from one listing."""
    folder = results_uri(job.plan_uri) + "/"
    names = {info.uri.removeprefix(folder) for info in list_folder(storage, folder)}
    return [shard for shard in shards if f"{shard.shard_id}.json" not in names]


def results_by_shard(storage: Storage, job: TokenizeJob) -> dict[str, ShardResult]:
    """All results that are there, by shard id: for small plans, tools and tests.

    Raises ``ConfigError`` for one that is not readable.
    """
    found = read_results(storage, job.plan_uri, lambda result: result)
    return {result.shard_id: result for result in found}


def release_attempts_of(
    storage: Storage, job: TokenizeJob, identity: str, detail: str
) -> list[str]:
    """Release what a worker held that was ended from outside; returns the ids of those shards.

    For operators that see a pod evicted or its node lost: its attempts then do not count, and
    others go on at once. ``identity``: what the worker was started with (the pod's UID).
    """
    released = []
    for info in list_folder(storage, join_uri(job.plan_uri, "workers")):
        report = WorkerProgress.model_validate_json(storage.read(info.uri))
        if not is_worker_of(report.worker_id, identity):
            continue
        for shard_id, attempt in report.held_shards.items():
            ending = Ending(kind=EndingKind.RELEASED, detail=detail, worker_id=report.worker_id)
            end_attempt(storage, lease_uri(job, shard_id), attempt, ending)
            released.append(shard_id)
    return released


@dataclass(frozen=True)
class AudioFacts:
    """What was decoded: digest and level of the PCM, and what the object held.

    num_samples: at the codec's rate. duration_seconds: of the object. loudness_db: None if silent.
    """

    content_sha256: str
    num_samples: int
    duration_seconds: float
    peak: float
    loudness_db: float | None
    clipped_share: float
    container: str
    native_sample_rate: int
    native_channels: int


@dataclass(frozen=True)
class TokenRow:
    """Tokens of one object: codes per stream int32 [Q, T]; frame_spans int32 [T] or None."""

    file: ShardFile
    facts: AudioFacts
    codes: Mapping[str, Codes]
    frame_spans: npt.NDArray[np.int32] | None = None

    @property
    def num_frames(self) -> int:
        """Token frames."""
        return int(next(iter(self.codes.values())).shape[1])

    @property
    def num_codes(self) -> int:
        """Codes of all streams."""
        return sum(codes.size for codes in self.codes.values())


class ShardWriter:
    """Writes rows to a local Parquet file, one row group at a time; use as a context manager.

    ``row_group_bytes`` bounds what is held in memory: the size of a row group's columns as Arrow
    holds them, and so what a reader of one row group needs.
    """

    def __init__(
        self,
        path: Path,
        job: TokenizeJob,
        shard: ShardRef,
        worker_build: str,
        row_group_bytes: int = ROW_GROUP_BYTES,
    ) -> None:
        """Open ``path``. ``worker_build``: JSON of device and library versions.

        Raises ``StorageError`` when the scratch disk cannot be written.
        """
        self.path = path
        self.num_rows = 0
        self._manifest = job.manifest
        self._same = {
            "plan_id": job.plan_id,
            "shard_id": shard.shard_id,
            "worker_build": worker_build,
        }
        self._row_group_bytes = row_group_bytes
        self._schema = arrow_schema(job.manifest)
        self._rows: list[TokenRow] = []
        self._held_bytes = 0
        self._metadata: list[Any] = []
        self._writer = self._on_disk(
            lambda: pq.ParquetWriter(
                path, self._schema, metadata_collector=self._metadata, **WRITER_OPTIONS
            )
        )

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file, or drop what is held when something went wrong."""
        if error is None:
            self.close()
        else:
            self._rows.clear()
            # The error under way is the one to report, not that of a file nobody wants.
            try:
                self._writer.close()
            except (OSError, pa.ArrowException) as second:
                logger.debug("Closing %s: %s", self.path, second)

    def add(self, row: TokenRow) -> None:
        """Append a row. Raises ``StorageError`` when the scratch disk cannot be written."""
        self._rows.append(row)
        self.num_rows += 1
        self._held_bytes += 4 * row.num_codes + 512
        if self._held_bytes >= self._row_group_bytes:
            self._flush()

    def close(self) -> None:
        """Write what is held and the footer."""
        self._flush()
        self._on_disk(self._writer.close)

    def metadata(self) -> Any:
        """The footer, as the writer kept it (``pyarrow.parquet.FileMetaData``); after closing."""
        (metadata,) = self._metadata
        return metadata

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = {**self._row_columns(), **self._code_columns()}
        arrays = [columns[name] for name in self._schema.names]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._on_disk(lambda: self._writer.write_table(table, row_group_size=table.num_rows))
        self._rows.clear()
        self._held_bytes = 0

    def _row_columns(self) -> dict[str, pa.Array]:
        values = [self._row_values(row) for row in self._rows]
        return {
            name: pa.array([value[name] for value in values], self._schema.field(name).type)
            for name in values[0]
        }

    def _row_values(self, row: TokenRow) -> dict[str, Any]:
        file, facts = row.file, row.facts
        values: dict[str, Any] = {
            **self._same,
            **{name: getattr(facts, name) for name in AudioFacts.__dataclass_fields__},
            "audio_id": audio_id_of(file.uri, file.etag),
            "uri": file.uri,
            "etag": file.etag,
            "start_sample": 0,
            "sample_rate": self._manifest.sample_rate,
            "num_frames": row.num_frames,
            "metadata": None if file.metadata is None else list(file.metadata.items()),
        }
        for name, codes in row.codes.items():
            column = codes_column(name)
            values[f"{column}_num_codebooks"] = len(codes)
            values[f"{column}_perplexity"] = perplexity(codes[0])
        return values

    def _code_columns(self) -> dict[str, pa.Array]:
        columns = {
            codes_column(stream.name): self._lists(
                codes_column(stream.name),
                [flatten_codes(row.codes[stream.name]) for row in self._rows],
            )
            for stream in self._manifest.streams
        }
        spans = [row.frame_spans for row in self._rows]
        columns["frame_spans"] = self._lists("frame_spans", spans)
        return columns

    def _lists(self, name: str, values: Sequence[npt.NDArray[np.int32] | None]) -> pa.Array:
        kept = [value for value in values if value is not None]
        flat = np.concatenate(kept) if kept else np.zeros(0, np.int32)
        lengths = np.array([0 if value is None else len(value) for value in values])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(
            pa.array(offsets),
            pa.array(flat, pa.int32()),
            type=self._schema.field(name).type,
            mask=pa.array([value is None for value in values]),
        )

    def _on_disk(self, call: Any) -> Any:
        try:
            return call()
        except OSError as error:
            raise local_write_failed(error, self.path) from error


def perplexity(codes: npt.NDArray[np.int32]) -> float:
    """Perplexity of codes [T] of one codebook: how many entries they use, as it were; 1 or more."""
    counts = np.unique(codes, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def data_file_uri(job: TokenizeJob, shard_id: str, attempt: int) -> str:
    """A new name for the Parquet file of one attempt; never used before."""
    return join_uri(job.data_uri, f"{shard_id}-{attempt}-{uuid.uuid4().hex[:12]}.parquet")


def upload_shard(storage: Storage, writer: ShardWriter, uri: str, job: TokenizeJob) -> DataFile:
    """Upload a closed writer's file; returns all that a commit needs to know of it."""
    info = storage.upload(writer.path, uri)
    return DataFile(
        uri=uri,
        size=info.size,
        etag=info.etag,
        sha256=sha256_of_file(writer.path),
        stats=stats_of_parquet(writer.metadata(), job.manifest),
    )


def publish_result(storage: Storage, job: TokenizeJob, result: ShardResult) -> bool:
    """Create a shard's result; true when it is the one that stands.

    When another result stands, or surely none of ours does, the data file of ``result`` is deleted.
    Raises what storage raises; it is then unknown whether the result stands, so its file is kept.
    """
    uri = result_uri(job.plan_uri, result.shard_id)
    is_ours = storage.create(uri, result.model_dump_json(indent=1).encode())
    if not is_ours and result.data_file is not None:
        discard_file(storage, result.data_file.uri)
    return is_ours


def discard_file(storage: Storage, uri: str) -> None:
    """Delete a data file that no result names; what cannot be deleted is left to the sweep."""
    try:
        storage.delete([uri])
    except HCodecError as error:
        logger.warning("%s is named by no result and was not deleted: %s", uri, error)
