"""The plan, its results and the rows of a snapshot, gathered in one place for asking.

Everything that grows with the number of files lies in Parquet files of a work folder that DuckDB
reads, so memory stays bounded whatever the size of the plan or the table; inserting the same into
tables takes ten times as long. Codes are counted as they stream by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hcodec_core.dataset.audit import AuditResult, read_audit
from hcodec_core.dataset.plan_documents import TOMBSTONES_FILE
from hcodec_core.dataset.results import OUTCOMES_SCHEMA, read_result_table, result_uri
from hcodec_core.dataset.rowfacts import (
    CodeCounter,
    flag_columns,
    needed_columns,
    row_facts,
    slices,
)
from hcodec_core.dataset.scratch import (
    DEFAULT_MEMORY_BYTES,
    ScratchTable,
    add_view,
    open_scratch,
)
from hcodec_core.errors import ConfigError, ObjectMissingError
from hcodec_core.jobs import FILES_FILE, ModeAgreement, ShardResult, TokenizeJob, WorkUse
from hcodec_core.storage import Storage, join_uri

# Batches of rows of a snapshot: (columns, URIs of data files, or None for all of the snapshot's).
RowReader = Callable[[Sequence[str], Collection[str] | None], Iterable[pa.RecordBatch]]

_RESULT_THREADS = 16
_RESULTS_PER_CHUNK = 32  # bounds the outcomes that are held as objects

_TEXT = pa.string()
_SCHEMAS = {
    "results": pa.schema(
        [
            ("shard_id", _TEXT),
            ("status", _TEXT),
            ("error", _TEXT),
            ("worker_seconds", pa.float64()),
            ("data_uri", _TEXT),
        ]
    ),
    "outcomes": pa.schema(
        [
            *((name, _TEXT) for name in ("shard_id", "uri", "etag", "outcome", "reason", "detail")),
            ("audio_seconds", pa.float64()),
        ]
    ),
    "new_rows": pa.schema(
        [
            *((name, _TEXT) for name in ("audio_id", "uri", "etag", "shard_id", "content_sha256")),
            ("num_samples", pa.int64()),
            ("sample_rate", pa.int32()),
            ("num_frames", pa.int32()),
            ("duration_seconds", pa.float64()),
            *((name, pa.float32()) for name in ("peak", "loudness_db", "clipped_share")),
        ]
    ),
    "keys": pa.schema([("audio_id", _TEXT), ("uri", _TEXT)]),
}
_FAULTS = "check_name VARCHAR, shard_id VARCHAR, uri VARCHAR, note VARCHAR"

# Each query gives (shard_id, uri, note), one row per fault.
_FAULT_QUERIES = {
    "plan_lists_file_once": """
        SELECT min(shard_id), uri, 'listed ' || count(*) || ' times'
        FROM plan GROUP BY uri HAVING count(*) > 1""",
    "shard_done": """
        SELECT s.shard_id, NULL, coalesce(nullif(r.error, ''), r.status, 'no result')
        FROM (SELECT DISTINCT shard_id FROM plan) s LEFT JOIN results r USING (shard_id)
        WHERE r.status IS DISTINCT FROM 'done'""",
    "file_accounted_once": """
        SELECT p.shard_id, p.uri, count(o.uri) || ' outcomes'
        FROM (SELECT DISTINCT shard_id, uri FROM plan) p LEFT JOIN outcomes o USING (uri)
        GROUP BY ALL HAVING count(o.uri) <> 1""",
    "outcome_in_plan": """
        SELECT shard_id, uri, outcome || ', but not listed in this shard' FROM outcomes o
        WHERE NOT EXISTS (FROM plan p WHERE p.uri = o.uri AND p.shard_id = o.shard_id)""",
    "tokens_have_one_row": """
        SELECT o.shard_id, o.uri, count(r.uri) || ' rows'
        FROM (SELECT DISTINCT shard_id, uri FROM outcomes WHERE outcome = 'tokens') o
        LEFT JOIN new_rows r USING (uri) GROUP BY ALL HAVING count(r.uri) <> 1""",
    "row_has_tokens_outcome": """
        SELECT shard_id, uri, 'a row, but not the outcome tokens' FROM new_rows r
        WHERE NOT EXISTS (FROM outcomes o WHERE o.uri = r.uri AND o.outcome = 'tokens')""",
    "row_in_plan": """
        SELECT shard_id, uri, 'uri and etag are not in the plan' FROM new_rows r
        WHERE NOT EXISTS (FROM plan p WHERE p.uri = r.uri AND p.etag = r.etag)""",
    "audio_id_matches": """
        SELECT shard_id, uri, 'audio_id ' || coalesce(audio_id, 'is null') FROM new_rows
        WHERE audio_id IS DISTINCT FROM sha256(uri || chr(10) || etag)[:32]""",
    "duration_agrees": """
        SELECT r.shard_id, r.uri, format('{:.3f} s of samples, {:.3f} s decoded, {:.3f} s reported',
               r.num_samples / r.sample_rate, r.duration_seconds, coalesce(o.audio_seconds, 0))
        FROM new_rows r LEFT JOIN outcomes o ON o.uri = r.uri AND o.outcome = 'tokens'
        WHERE abs(r.num_samples / r.sample_rate - r.duration_seconds) > $tolerance
           OR abs(o.audio_seconds - r.duration_seconds) > $tolerance""",
    "audio_id_unique": """
        SELECT NULL, min(uri), 'its audio_id has ' || count(*) || ' rows'
        FROM keys GROUP BY audio_id HAVING count(*) > 1""",
    "uri_unique": """
        SELECT NULL, uri, count(*) || ' rows' FROM keys GROUP BY uri HAVING count(*) > 1""",
    "outdated_rows_gone": """
        SELECT NULL, uri, 'its object is gone' FROM tombstones t
        WHERE EXISTS (FROM keys k WHERE k.audio_id = sha256(t.uri || chr(10) || t.etag)[:32])
        UNION ALL
        SELECT o.shard_id, o.uri, 'tokens of an older content'
        FROM outcomes o JOIN keys k USING (uri)
        WHERE o.outcome = 'quarantined'
          AND k.audio_id <> sha256(o.uri || chr(10) || o.etag)[:32]""",
}
_FAULT_NAME = "coalesce(uri, 'shard ' || shard_id, 'a row without a name')"


def fault_names(job: TokenizeJob) -> list[str]:
    """Names of all checks whose faults are counted file by file."""
    return [*_FAULT_QUERIES, *flag_columns(job.manifest)]


@dataclass(frozen=True)
class Faults:
    """The first faults in the order of their names, each with a note, and how many there are."""

    examples: list[tuple[str, str]]
    count: int


class SnapshotFacts:
    """A context manager around a DuckDB database; ``gather`` fills it, then it can be asked.

    ``work_path``: folder for its files and scratch; the caller removes it. Tables:
    ``plan``, ``tombstones``, ``results``, ``outcomes``, ``new_rows`` (of the plan's data files),
    ``keys`` (of all rows), ``faults``.
    """

    def __init__(
        self, job: TokenizeJob, work_path: Path, memory_bytes: int = DEFAULT_MEMORY_BYTES
    ) -> None:
        """Open an empty database that may hold ``memory_bytes`` before it spills to disk."""
        self.job = job
        self.counters = [CodeCounter(stream) for stream in job.manifest.streams]
        self.builds: set[str] = set()
        self.agreement: ModeAgreement | None = None
        self.work = WorkUse()
        self.audit: AuditResult | None = None
        self._work_path = work_path
        self._db: Any = open_scratch(work_path, "facts", memory_bytes)

    def __enter__(self) -> SnapshotFacts:
        """Nothing more to open."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the database."""
        self._db.close()

    def ask(self, query: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that a query gives."""
        answer: list[tuple[Any, ...]] = self._db.execute(query, list(arguments)).fetchall()
        return answer

    def gather(self, storage: Storage, rows: RowReader) -> None:
        """Read plan, results and rows, and look for faults."""
        self._db.execute(f"CREATE TABLE faults ({_FAULTS})")
        self._load_plan(storage)
        self._load_results(storage)
        self._load_rows(rows)
        self.audit = read_audit(storage, self.job.plan_uri)
        self._find_faults()

    def _load_plan(self, storage: Storage) -> None:
        for table, name in (("plan", FILES_FILE), ("tombstones", TOMBSTONES_FILE)):
            path = self._work_path / name
            storage.download(join_uri(self.job.plan_uri, name), path)
            add_view(self._db, table, path)

    def _table(self, name: str) -> ScratchTable:
        schema = _SCHEMAS[name]
        if name == "new_rows":
            for flag in flag_columns(self.job.manifest):
                schema = schema.append(pa.field(flag, pa.bool_()))
        return ScratchTable(self._db, name, self._work_path, schema)

    def _load_results(self, storage: Storage) -> None:
        shard_ids = [row[0] for row in self.ask("SELECT DISTINCT shard_id FROM plan ORDER BY ALL")]
        with self._table("results") as shards, self._table("outcomes") as outcomes:
            for start in range(0, len(shard_ids), _RESULTS_PER_CHUNK):
                chunk = shard_ids[start : start + _RESULTS_PER_CHUNK]
                results = list(read_results(storage, self.job, chunk))
                self._add_results([result for result, _ in results], shards)
                for result, rows in results:
                    shard = pa.repeat(pa.scalar(result.shard_id, _TEXT), len(rows))
                    outcomes.add(rows.append_column("shard_id", shard))

    def _add_results(self, results: Sequence[ShardResult], table: ScratchTable) -> None:
        shards = {
            "shard_id": [result.shard_id for result in results],
            "status": [result.status for result in results],
            "error": [result.error for result in results],
            "worker_seconds": [result.timings.total_seconds for result in results],
            "data_uri": [result.data_file.uri if result.data_file else None for result in results],
        }
        table.add(pa.table(shards, schema=_SCHEMAS["results"]))
        self.builds.update(_build_text(result.build) for result in results if result.build)
        self.work = WorkUse.total([self.work, *(r.work for r in results if r.work is not None)])
        parts = [self.agreement, *(result.agreement for result in results)]
        self.agreement = ModeAgreement.total(part for part in parts if part is not None)

    def _load_rows(self, rows: RowReader) -> None:
        manifest = self.job.manifest
        # Not by plan id: a plan takes over shards that an earlier generation of it finished.
        data_uris = {uri for (uri,) in self.ask("SELECT data_uri FROM results") if uri}
        with self._table("new_rows") as new_rows:
            for piece in slices(rows(needed_columns(manifest), data_uris), manifest):
                new_rows.add(row_facts(piece, manifest, self.counters))
        with self._table("keys") as keys:
            for batch in rows(["audio_id", "uri"], None):
                keys.add(pa.Table.from_batches([batch]))

    def _find_faults(self) -> None:
        manifest = self.job.manifest
        tolerance = {"tolerance": manifest.hop_length / manifest.sample_rate}
        for name, query in _FAULT_QUERIES.items():
            arguments = tolerance if "$tolerance" in query else {}
            self._db.execute(f"INSERT INTO faults SELECT '{name}', * FROM ({query})", arguments)
        for name in flag_columns(manifest):
            self._db.execute(
                f"INSERT INTO faults SELECT '{name}', shard_id, uri, '' FROM new_rows WHERE {name}"
            )

    def faults_by_shard(self) -> pa.Table:
        """One row per shard: ``shard_id`` and, per check, how many faults it has (int64).

        Faults that no shard is to blame for lie in the row of shard "".
        """
        counts = ", ".join(
            f"count(*) FILTER (check_name = '{name}') AS {name}" for name in fault_names(self.job)
        )
        answer: pa.Table = self._db.sql(
            f"SELECT coalesce(shard_id, '') AS shard_id, {counts} FROM"
            " (FROM faults UNION ALL SELECT DISTINCT '', shard_id, '', '' FROM plan)"
            " GROUP BY ALL ORDER BY ALL"
        ).to_arrow_table()
        return answer

    def faulty(self, check_name: str, limit: int) -> Faults:
        """What fails a check, as (file or shard, what is wrong with it)."""
        return self._faults(
            f"SELECT {_FAULT_NAME}, coalesce(note, ''), count(*) OVER () FROM faults"
            " WHERE check_name = ? ORDER BY ALL LIMIT ?",
            [check_name, limit],
        )

    def faulty_files(self, limit: int) -> Faults:
        """What fails any check, as (file or shard, names of the checks)."""
        return self._faults(
            f"SELECT {_FAULT_NAME} AS name, string_agg(DISTINCT check_name, ', '), count(*) OVER ()"
            " FROM faults GROUP BY name ORDER BY name LIMIT ?",
            [limit],
        )

    def _faults(self, query: str, arguments: Sequence[Any]) -> Faults:
        found = self.ask(query, arguments)
        return Faults([(name, note) for name, note, _ in found], found[0][2] if found else 0)

    def without_tokens(self, outcomes: Sequence[str], limit: int) -> list[tuple[str, str, str]]:
        """Files of the given outcomes in the order of their names: (uri, reason, detail)."""
        found = self.ask(
            "SELECT uri, coalesce(reason, outcome), detail FROM outcomes"
            " WHERE list_contains(?, outcome) ORDER BY ALL LIMIT ?",
            [list(outcomes), limit],
        )
        return [(uri, reason, detail) for uri, reason, detail in found]

    def write_files_without_tokens(self, path: Path) -> None:
        """Write every file that gave no tokens as one JSON object a line."""
        names = ("uri", "etag", "outcome", "reason", "detail")
        self._db.execute(
            f"SELECT {', '.join(names)} FROM outcomes WHERE outcome <> 'tokens' ORDER BY uri"
        )
        with path.open("w") as file:
            while page := self._db.fetchmany(10_000):
                lines = (json.dumps(dict(zip(names, row, strict=True))) for row in page)
                file.writelines(line + "\n" for line in lines)


def read_results(
    storage: Storage, job: TokenizeJob, shard_ids: Sequence[str]
) -> Iterator[tuple[ShardResult, pa.Table]]:
    """Results of the given shards and their outcomes, leaving out shards that have none yet.

    A result that cannot be read, or is of another plan, comes as a failed one that says so.
    """

    def read(shard_id: str) -> tuple[ShardResult, pa.Table] | None:
        try:
            result, rows = read_result_table(storage, result_uri(job.plan_uri, shard_id))
        except ObjectMissingError:
            return None
        except ConfigError as error:
            return _unusable(job, shard_id, str(error)), OUTCOMES_SCHEMA.empty_table()
        if (result.plan_id, result.shard_id) == (job.plan_id, shard_id):
            return result, rows
        other = f"shard {result.shard_id} of plan {result.plan_id}"
        fault = _unusable(job, shard_id, f"The result is one of {other}.")
        return fault, OUTCOMES_SCHEMA.empty_table()

    with ThreadPoolExecutor(_RESULT_THREADS) as pool:
        yield from (result for result in pool.map(read, shard_ids) if result is not None)


def _unusable(job: TokenizeJob, shard_id: str, error: str) -> ShardResult:
    return ShardResult(
        plan_id=job.plan_id,
        shard_id=shard_id,
        shard_index=-1,
        attempt=-1,
        worker_id="",
        status="failed",
        error=error,
    )


def _build_text(build: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(build.items()))
