"""Files and folders on this machine to tokens and back, without Airflow, catalog or bucket.

Encoding is an ordinary plan in a scratch folder, worked on by an ordinary worker, so that a file
here gets the codes that it would get in a dataset. The result is one Parquet file with the columns
of the token table; its metadata names codec and settings.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hcodec_core.codecs import load_manifest
from hcodec_core.config import AccessConfig, CatalogConfig, Config, WorkConfig
from hcodec_core.dataset.inventory import take_inventory
from hcodec_core.dataset.plan import make_plan
from hcodec_core.dataset.plan_documents import PlanRequest
from hcodec_core.dataset.schema import WRITER_OPTIONS, arrow_schema, codes_column, unflatten_codes
from hcodec_core.dataset.shards import results_by_shard
from hcodec_core.errors import EXIT_OK, ConfigError, PreemptedError, StorageError
from hcodec_core.inference.engine import Clip, ClipTokens, Engine
from hcodec_core.inference.worker import WorkerOptions, run_worker
from hcodec_core.jobs import JOB_FILE, FileOutcome, ModeAgreement, TokenizeJob, WorkUse, read_job
from hcodec_core.storage import Storage, file_uri, join_uri, open_storage
from hcodec_core.tokens import CodecManifest, CodecSpec, Codes, EncodeSettings

_METADATA_KEY = b"hcodec"
_NAME = "files"
_ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class EncodeReport:
    """What ``LocalEncoding`` did: counts, the outcome of every file, agreement of mode fast.

    ``work``: where the worker's time went.
    """

    num_files: int
    audio_seconds: float
    num_tokens: int
    outcomes: Sequence[FileOutcome]
    agreement: ModeAgreement | None = None
    work: WorkUse = field(default_factory=WorkUse)


class LocalEncoding:
    """One encoding of local files in a scratch folder; ``job`` shows where progress is written."""

    def __init__(
        self, paths: Sequence[Path], codec_uri: str, settings: EncodeSettings, scratch_path: Path
    ) -> None:
        """Plan the work.

        Raises:
            ConfigError: A path does not exist, or nothing is there to encode.
        """
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise ConfigError(f"{missing[0]} does not exist: name audio files or folders of them.")
        self.scratch_path = scratch_path
        config = _scratch_config(scratch_path)
        self.storage: Storage = open_storage(config.storage)
        inventory_uri = join_uri(config.work.work_uri, "inventory")
        manifest_uri = _write_manifest(scratch_path, paths)
        take_inventory(config, self.storage, [manifest_uri], inventory_uri)
        request = PlanRequest(
            dataset=_NAME,
            inventory_uri=inventory_uri,
            codec_uri=codec_uri,
            manifest=load_manifest(codec_uri),
            settings=settings,
            num_shards=1,
        )
        plan = make_plan(config, self.storage, request)
        self.job_uri = join_uri(plan.plan_uri, JOB_FILE)
        self.job: TokenizeJob = read_job(self.storage.read(self.job_uri))

    def run(self, options: WorkerOptions, out_path: Path, stop: threading.Event) -> EncodeReport:
        """Encode everything into the Parquet file ``out_path``.

        Raises:
            PreemptedError: ``stop`` was set.
            StorageError: The worker gave up; its log says why.
        """
        code = run_worker(self.job_uri, self.storage, options, stop)
        if stop.is_set():
            raise PreemptedError(f"Encoding was stopped; {out_path} was not written.")
        if code != EXIT_OK:
            raise StorageError("Encoding gave up after several failures: see the log (--verbose).")
        results = list(results_by_shard(self.storage, self.job).values())
        failed = [result.error for result in results if result.status == "failed"]
        if failed:
            raise StorageError(f"Encoding failed: {failed[0]}")
        files = [result.data_file.uri for result in results if result.data_file is not None]
        agreement = ModeAgreement.total(r.agreement for r in results if r.agreement is not None)
        paths = [Path(uri.removeprefix("file://")) for uri in files]
        _join_parquet(self.job, agreement, paths, out_path)
        return EncodeReport(
            num_files=self.job.num_files,
            audio_seconds=sum(result.audio_seconds for result in results),
            num_tokens=sum(result.num_tokens for result in results),
            outcomes=[outcome for result in results for outcome in result.outcomes],
            agreement=agreement,
            work=WorkUse.total(result.work for result in results if result.work is not None),
        )


@dataclass(frozen=True)
class StoredTokens:
    """One row of a token file: the source's URI and its tokens."""

    uri: str
    tokens: ClipTokens


class TokenFile:
    """A Parquet file of tokens made by ``LocalEncoding``.

    Raises ``ConfigError`` when it cannot be read or does not name its codec.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file says of itself; rows are read when asked for."""
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{path} is no readable Parquet file of tokens.") from error
        text = (self._file.schema_arrow.metadata or {}).get(_METADATA_KEY)
        if text is None:
            raise ConfigError(f"{path} does not say which codec made it: encode with hcodec.")
        stored = json.loads(text)
        self.codec_uri: str = stored["codec_uri"]
        self.manifest = CodecManifest.model_validate(stored["manifest"])
        self.settings = EncodeSettings.model_validate(stored["settings"])
        self.num_rows: int = self._file.metadata.num_rows

    @property
    def spec(self) -> CodecSpec:
        """The codec as it was run."""
        return CodecSpec(self.manifest, self.settings)

    def uris(self) -> list[str]:
        """Sources of all rows, in the order of the file."""
        uris: list[str] = self._file.read(columns=["uri"])["uri"].to_pylist()
        return uris

    def rows(self) -> Iterator[StoredTokens]:
        """Rows in the order of the file, few at a time: one may hold the tokens of hours."""
        for batch in self._file.iter_batches(batch_size=_ROWS_AT_ONCE):
            for index in range(batch.num_rows):
                yield self._row({name: batch[name][index] for name in batch.schema.names})

    def _row(self, row: dict[str, Any]) -> StoredTokens:
        codes: dict[str, Codes] = {}
        for stream in self.manifest.streams:
            name = codes_column(stream.name)
            num_codebooks = row[f"{name}_num_codebooks"].as_py()
            codes[stream.name] = unflatten_codes(_integers(row[name]), num_codebooks)
        spans = row["frame_spans"]
        tokens = ClipTokens(
            codes=codes,
            num_frames=row["num_frames"].as_py(),
            num_samples=row["num_samples"].as_py(),
            frame_spans=_integers(spans) if spans.is_valid else None,
        )
        return StoredTokens(row["uri"].as_py(), tokens)


def decode_rows(
    file: TokenFile, engine: Engine, num_codebooks: int | None = None
) -> Iterator[tuple[str, Iterator[Clip]]]:
    """Source URI and audio of every row of a token file, the audio in pieces (float32 [n]).

    Iterating over the pieces raises ``ForeignTokensError`` when ``engine``'s codec has other
    codebooks.
    """
    codebook_id = file.spec.codebook_id
    for row in file.rows():
        yield row.uri, engine.decode_stream(row.tokens, num_codebooks, codebook_id)


def _integers(values: Any) -> npt.NDArray[np.int32]:
    """Content of one cell of a list column."""
    array: npt.NDArray[np.int32] = values.values.to_numpy(zero_copy_only=False)
    return array.astype(np.int32)


def _scratch_config(scratch_path: Path) -> Config:
    root = file_uri(scratch_path.resolve())
    return Config(
        access=AccessConfig(source_prefixes=("file:///",), destination_prefixes=(root,)),
        catalog=CatalogConfig(
            uri=f"sqlite:///{scratch_path.resolve()}/catalog.db", warehouse_uri=f"{root}/warehouse"
        ),
        work=WorkConfig(work_uri=f"{root}/work"),
    )


def _write_manifest(scratch_path: Path, paths: Sequence[Path]) -> str:
    """A source manifest of all files named and all files in the folders named; its URI."""
    found = [path.rglob("*") if path.is_dir() else [path] for path in paths]
    files = sorted({file.resolve() for group in found for file in group if file.is_file()})
    if not files:
        raise ConfigError(f"There are no files in {', '.join(map(str, paths))}.")
    manifest_path = scratch_path.resolve() / "sources.jsonl"
    manifest_path.write_text("".join(json.dumps({"uri": file_uri(file)}) + "\n" for file in files))
    return file_uri(manifest_path)


def _join_parquet(
    job: TokenizeJob, agreement: ModeAgreement | None, paths: Sequence[Path], out_path: Path
) -> None:
    described = {
        "format_version": 1,
        "codec_uri": job.codec_uri,
        "manifest": job.manifest.model_dump(mode="json"),
        "settings": job.settings.model_dump(mode="json"),
        "encode_id": job.encode_id,
        "agreement": None if agreement is None else agreement.model_dump(mode="json"),
    }
    schema = arrow_schema(job.manifest).with_metadata({_METADATA_KEY: json.dumps(described)})
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(out_path, schema, **WRITER_OPTIONS) as writer:
        for path in paths:
            source = pq.ParquetFile(path)
            for group in range(source.metadata.num_row_groups):
                writer.write_table(source.read_row_group(group).cast(schema))
