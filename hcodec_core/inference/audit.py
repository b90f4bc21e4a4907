"""The round-trip audit on a worker: sampled rows against their sources.

Each source is decoded and encoded again, by the plain path of ``encode_in_segments`` and not by a
worker's pipeline of threads: in mode exact its codes must be the row's, bit for bit. The row's
tokens are decoded and the audio is compared with the source.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from hcodec_core.audio.measures import log_spectral_distance, si_sdr
from hcodec_core.audio.supervisor import DecoderPool
from hcodec_core.dataset.audit import AuditResult, FileAudit, audit_result_uri
from hcodec_core.dataset.schema import audio_id_of, codes_column, unflatten_codes
from hcodec_core.errors import (
    EXIT_OK,
    EXIT_PREEMPTED,
    AudioError,
    ConfigError,
    ObjectMissingError,
    SourceChangedError,
)
from hcodec_core.inference.clips import Clip, ClipTokens
from hcodec_core.inference.engine import Engine
from hcodec_core.inference.segmented import encode_in_segments
from hcodec_core.inference.worker import WorkerOptions, load_engine, open_pool
from hcodec_core.jobs import AuditJob, SampledFile
from hcodec_core.storage import Storage
from hcodec_core.tokens import Codes

logger = logging.getLogger(__name__)


def run_audit(
    job: AuditJob, storage: Storage, options: WorkerOptions, stop: threading.Event
) -> int:
    """Audit the files of a job and create its result; returns the exit code (0 or 143).

    A result that is there already is kept. Raises ``ConfigError`` when codec, device or compute
    class are not the plan's (exit code 43), ``StorageError``.
    """
    uri = audit_result_uri(job.plan_uri)
    if storage.head(uri) is not None:
        logger.info("The audit of plan %s has its result.", job.plan_id)
        return EXIT_OK
    engine = load_engine(job.tokenize, storage, options)
    found = []
    with open_pool(job.tokenize, options) as pool:
        for file in job.files:
            if stop.is_set():
                return EXIT_PREEMPTED
            found.append(_audit(file, storage, engine, pool, options.scratch_path))
            logger.info("audited", extra={"fields": found[-1].model_dump(exclude={"uri"})})
    settings = job.tokenize.settings
    result = AuditResult(
        plan_id=job.plan_id,
        encode_id=job.tokenize.encode_id,
        mode=settings.mode,
        compute_class=settings.compute_class,
        files=found,
    )
    storage.create(uri, result.model_dump_json(indent=1).encode())
    return EXIT_OK


def _audit(
    file: SampledFile, storage: Storage, engine: Engine, pool: DecoderPool, scratch_path: Path
) -> FileAudit:
    path = scratch_path / "source"
    try:
        storage.download(file.uri, path, file.etag)
    except SourceChangedError:
        return FileAudit(uri=file.uri, outcome="changed")
    except ObjectMissingError:
        return FileAudit(uri=file.uri, outcome="deleted")
    try:
        with pool.decode(path) as blocks:
            source = np.concatenate([np.zeros(0, np.float32), *blocks])
        again = encode_in_segments(engine, source)
    except AudioError:
        # What was encoded before cannot be read now: none of its codes came out the same.
        source, again = np.zeros(0, np.float32), None
    finally:
        path.unlink(missing_ok=True)
    row = _row_of(file, storage, engine, scratch_path)
    return _compare(file.uri, row, again, source, engine)


def _row_of(file: SampledFile, storage: Storage, engine: Engine, scratch_path: Path) -> ClipTokens:
    """Tokens of the row as the data file has them. Raises ``ConfigError`` when there is none."""
    path = scratch_path / "rows.parquet"
    storage.download(file.data_uri, path)
    try:
        wanted = [("audio_id", "=", audio_id_of(file.uri, file.etag))]
        rows = pq.read_table(path, filters=wanted).to_pylist()
    finally:
        path.unlink(missing_ok=True)
    if len(rows) != 1:
        raise ConfigError(f"{file.data_uri} has {len(rows)} rows of {file.uri}, not one.")
    return _tokens_of(rows[0], engine)


def _tokens_of(row: Mapping[str, Any], engine: Engine) -> ClipTokens:
    codes: dict[str, Codes] = {}
    for stream in engine.codec.spec.streams:
        name = codes_column(stream.name)
        flat = np.asarray(row[name], np.int32)
        codes[stream.name] = unflatten_codes(flat, row[f"{name}_num_codebooks"])
    spans = row.get("frame_spans")
    return ClipTokens(
        codes=codes,
        num_frames=row["num_frames"],
        num_samples=row["num_samples"],
        frame_spans=None if spans is None else np.asarray(spans, np.int32),
    )


def _compare(
    uri: str, row: ClipTokens, again: ClipTokens | None, source: Clip, engine: Engine
) -> FileAudit:
    num_codes = sum(codes.size for codes in row.codes.values())
    if row.frame_spans is not None:
        num_codes += row.frame_spans.size
    (audio,) = engine.decode_clips([row])
    rate = engine.codec.sample_rate
    is_finite = bool(np.isfinite(audio).all())
    sdr = spectral = float("nan")
    if is_finite and len(audio) == len(source):
        sdr, spectral = si_sdr(source, audio), log_spectral_distance(source, audio, rate)
    return FileAudit(
        uri=uri,
        outcome="compared",
        num_codes=num_codes,
        num_equal_codes=0 if again is None else _num_equal(row, again),
        num_samples=len(source),
        num_decoded_samples=len(audio),
        is_finite=is_finite,
        si_sdr_db=_number(sdr),
        spectral_db=_number(spectral),
    )


def _number(value: float) -> float | None:
    """A silent source has no ratio to be told: JSON knows no NaN."""
    return round(value, 3) if np.isfinite(value) else None


def _num_equal(row: ClipTokens, again: ClipTokens) -> int:
    """Codes, and spans of an adaptive rate, that are the same; 0 where their number differs."""
    pairs = [(codes, again.codes[name]) for name, codes in row.codes.items()]
    if row.frame_spans is not None and again.frame_spans is not None:
        pairs.append((row.frame_spans, again.frame_spans))
    if any(first.shape != second.shape for first, second in pairs):
        return 0
    return int(sum(np.count_nonzero(first == second) for first, second in pairs))
