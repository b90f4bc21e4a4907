"""The round-trip audit of a plan: a sample of its rows, encoded again and decoded, by a worker.

The sample is chosen and the verdict is read where there is no torch; ``inference.audit`` does the
work. The folder ``audit`` of a plan holds the job and ``results/audit.json``.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import describe
from hcodec_core.dataset.results import read_results
from hcodec_core.errors import ConfigError, ObjectMissingError
from hcodec_core.jobs import (
    JOB_FILE,
    AuditJob,
    Outcome,
    SampledFile,
    ShardResult,
    TokenizeJob,
    read_job,
)
from hcodec_core.storage import Storage, join_uri

DEFAULT_FILES = 8
DEFAULT_SECONDS = 300.0


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileAudit(_Document):
    """What became of one sampled row.

    ``outcome``: ``compared``, or that the source changed or went away since. Codes: of the row,
    and how many of them came out the same; 0 where their number differs. Samples: of the source,
    and of what was decoded from the row. ``si_sdr_db``, ``spectral_db``: decoded audio against the
    source; None where it has another length or the number is not finite (a silent source).
    """

    uri: str
    outcome: Literal["compared", "changed", "deleted"]
    num_codes: int = 0
    num_equal_codes: int = 0
    num_samples: int = 0
    num_decoded_samples: int = 0
    is_finite: bool = True
    si_sdr_db: float | None = None
    spectral_db: float | None = None


class AuditResult(_Document):
    """The outcome of an audit; created once."""

    format_version: Literal[1] = 1
    plan_id: str
    encode_id: str
    mode: Literal["exact", "fast"]
    compute_class: str
    files: list[FileAudit]

    @property
    def compared(self) -> list[FileAudit]:
        """Files whose source was still there."""
        return [file for file in self.files if file.outcome == "compared"]

    @property
    def with_other_codes(self) -> list[FileAudit]:
        """Files that gave other codes than their rows hold."""
        return [file for file in self.compared if file.num_equal_codes != file.num_codes]

    @property
    def with_wrong_length(self) -> list[FileAudit]:
        """Files whose decoded audio is not as long as what was encoded."""
        return [file for file in self.compared if file.num_decoded_samples != file.num_samples]

    @property
    def not_finite(self) -> list[FileAudit]:
        """Files whose decoded audio holds what is no number."""
        return [file for file in self.compared if not file.is_finite]


def audit_uri(plan_uri: str) -> str:
    """Folder of a plan's audit."""
    return join_uri(plan_uri, "audit")


def audit_result_uri(audit_folder_uri: str) -> str:
    """Where the result lies, once it is there."""
    return join_uri(audit_folder_uri, "results", "audit.json")


def make_audit_job(
    storage: Storage,
    plan_uri: str,
    num_files: int = DEFAULT_FILES,
    max_seconds: float = DEFAULT_SECONDS,
) -> str | None:
    """Choose rows of a plan that is done and write the audit's job; returns the job's URI.

    The same plan gives the same job. At most ``max_seconds`` of audio are taken, but at least one
    file; None when the plan has no row. Raises ``ObjectMissingError`` when there is no such plan.
    """
    job = read_job(storage.read(join_uri(plan_uri, JOB_FILE)))
    files = _sample(storage, job, num_files, max_seconds)
    if not files:
        return None
    audit = AuditJob(
        plan_id=job.plan_id,
        plan_uri=audit_uri(plan_uri),
        tokenize=job,
        files=files,
        num_files=len(files),
    )
    uri = join_uri(audit.plan_uri, JOB_FILE)
    storage.write(uri, audit.model_dump_json(indent=1).encode())
    return uri


def read_audit(storage: Storage, plan_uri: str) -> AuditResult | None:
    """The audit of a plan, None when there is none."""
    uri = audit_result_uri(audit_uri(plan_uri))
    try:
        return AuditResult.model_validate_json(storage.read(uri))
    except ObjectMissingError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{uri} is no audit of ours: {describe(error)}.") from error


def _sample(
    storage: Storage, job: TokenizeJob, num_files: int, max_seconds: float
) -> list[SampledFile]:
    """Files with the smallest digests: which ones, nobody can foresee or choose."""

    def of_shard(result: ShardResult) -> list[tuple[str, float, SampledFile]]:
        return heapq.nsmallest(num_files, _candidates(job, result), key=lambda item: item[0])

    found = [item for items in read_results(storage, job.plan_uri, of_shard) for item in items]
    chosen: list[SampledFile] = []
    seconds = 0.0
    for _, length, file in heapq.nsmallest(num_files, found, key=lambda item: item[0]):
        seconds += length
        if chosen and seconds > max_seconds:
            break
        chosen.append(file)
    return chosen


def _candidates(job: TokenizeJob, result: ShardResult) -> Iterator[tuple[str, float, SampledFile]]:
    if result.data_file is None:
        return
    for outcome in result.outcomes:
        if outcome.outcome is Outcome.TOKENS:
            name = f"{job.plan_id}\n{outcome.uri}\n{outcome.etag}"
            file = SampledFile(uri=outcome.uri, etag=outcome.etag, data_uri=result.data_file.uri)
            yield hashlib.sha256(name.encode()).hexdigest(), outcome.audio_seconds, file
