"""The contract between whoever schedules work and the workers: versioned JSON documents.

A plan's folder in object storage (``TokenizeJob.plan_uri``) holds

    job.json                            this document; written last, so a plan is whole or absent
    files.parquet                       one row per file: shard_index, shard_id, file_index, uri,
                                        etag, size, metadata (map of text, or null);
                                        sorted by shard_index, file_index
    leases/<shard_id>/<k>               attempt k of a shard (see dataset.leases)
    results/<shard_id>.json             ``ShardResult``; the truth about a shard
    workers/<worker_id>.json            ``WorkerProgress``; replaced every few seconds
    logs/<worker_id>.log
    backend/                            of whoever runs workers (see ``dataset.batch_choice``)

Readers accept every format version up to their own and refuse later ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hcodec_core.config import describe
from hcodec_core.errors import ConfigError, QuarantineReason
from hcodec_core.tokens import CodecManifest, EncodeSettings

JOB_FILE = "job.json"
FILES_FILE = "files.parquet"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Parsed = TypeVar("Parsed", bound=_Document)


class DecodeLimits(_Document):
    """Caps on what one source file may cost."""

    max_seconds: float = Field(default=6 * 3600.0, gt=0)
    max_bytes: int = Field(default=8 * 1024**3, gt=0)
    timeout_seconds: float = Field(default=120.0, gt=0)
    memory_bytes: int = Field(default=4 * 1024**3, gt=0)


class BatchClass(_Document):
    """How much a worker holds in memory at once; never the shape of a batch, so never a token.

    ``held_batches``: of decoded audio. ``decoders``, ``parallel_shards``: at most so many; None: as
    the worker is started.
    """

    held_batches: int = Field(default=8, ge=1)
    downloads: int = Field(default=8, ge=1)
    decoders: int | None = Field(default=None, ge=1)
    parallel_shards: int | None = Field(default=None, ge=1)

    @property
    def for_people(self) -> str:
        """Its entries in a few words."""
        limits = self.model_dump(exclude_none=True)
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in limits.items())


BATCH_CLASSES = (
    BatchClass(),
    BatchClass(held_batches=3, downloads=4, decoders=2, parallel_shards=1),
    BatchClass(held_batches=1, downloads=1, decoders=1, parallel_shards=1),
)


class TokenizeJob(_Document):
    """Encode the files of one plan into Parquet, shard by shard.

    ``codec_uri`` is resolved: its content must have ``manifest.digest``. ``data_uri`` is the folder
    of the plan's Parquet files. ``lease_seconds``: a lease whose heartbeat stood still for so long
    may be taken over. ``max_attempts``: counted attempts before a shard is marked failed.
    ``batch_classes``: the next one follows when a worker was ended for want of memory.
    """

    kind: Literal["tokenize"] = "tokenize"
    format_version: Literal[1] = 1
    plan_id: str
    dataset: str
    plan_uri: str
    data_uri: str
    codec_uri: str
    manifest: CodecManifest
    settings: EncodeSettings
    encode_id: str
    num_shards: int = Field(ge=0)
    num_files: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    limits: DecodeLimits = DecodeLimits()
    lease_seconds: float = Field(default=60.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    batch_classes: tuple[BatchClass, ...] = Field(default=BATCH_CLASSES, min_length=1)


class Outcome(StrEnum):
    """What became of one file of a plan. Every file of a plan has exactly one."""

    TOKENS = "tokens"
    QUARANTINED = "quarantined"
    CHANGED = "changed"  # another etag than listed: the next inventory takes it up
    DELETED = "deleted"  # gone since it was listed


class FileOutcome(_Document):
    """Account of one file. ``reason`` and ``detail`` only when quarantined."""

    uri: str
    etag: str
    outcome: Outcome
    reason: QuarantineReason | None = None
    detail: str = ""
    audio_seconds: float = 0.0


class DataFileStats(_Document):
    """What an Iceberg commit needs to know of a Parquet file without reading its footer.

    Keys are Iceberg field ids. ``lower_bounds`` / ``upper_bounds`` are hex of Iceberg's binary
    single-value form.
    """

    num_rows: int
    column_sizes: dict[int, int] = {}
    value_counts: dict[int, int] = {}
    null_value_counts: dict[int, int] = {}
    lower_bounds: dict[int, str] = {}
    upper_bounds: dict[int, str] = {}
    split_offsets: list[int] = []


class DataFile(_Document):
    """One Parquet file of tokens. ``sha256`` of its content; ``size`` in bytes."""

    uri: str
    size: int
    etag: str
    sha256: str
    stats: DataFileStats


class Timings(_Document):
    """Seconds a shard spent waiting for or doing each part of the work."""

    download_seconds: float = 0.0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    total_seconds: float = 0.0


class StepUse(_Document):
    """How busy one step of a worker was.

    ``lane_seconds``: time that passed, times how many may do the step at once (downloads, decoder
    processes; encoding and writing: one).
    """

    busy_seconds: float = 0.0
    lane_seconds: float = 0.0

    @property
    def share(self) -> float:
        """Use of the step, 0..1."""
        return min(1.0, self.busy_seconds / self.lane_seconds) if self.lane_seconds else 0.0


class FormatUse(_Document):
    """What files of one container needed. ``decode_seconds``: of decoder processes."""

    num_bytes: int = 0
    audio_seconds: float = 0.0
    decode_seconds: float = 0.0

    def needs(self, rate: float) -> tuple[float, float]:
        """Cores that decode, and MB/s, that feed an encoder of ``rate`` times real time."""
        if not self.audio_seconds:
            return 0.0, 0.0
        per_second = rate / self.audio_seconds
        return self.decode_seconds * per_second, self.num_bytes / 1e6 * per_second


class WorkUse(_Document):
    """Where a worker's time went: how busy each step was, by name, and what each format needed."""

    steps: dict[str, StepUse] = {}
    formats: dict[str, FormatUse] = {}
    audio_seconds: float = 0.0

    @property
    def bottleneck(self) -> str:
        """The busiest step."""
        return max(self.steps, key=lambda name: self.steps[name].share)

    @property
    def encode_rate(self) -> float:
        """Seconds of audio per second of encoding, 0 when nothing was encoded."""
        busy = self.steps["encode"].busy_seconds if "encode" in self.steps else 0.0
        return self.audio_seconds / busy if busy else 0.0

    @property
    def for_people(self) -> str:
        """One line: the bottleneck, the other steps, and what an encoder of this rate needs."""
        if not self.steps:
            return "bottleneck: not known, no shard was finished"
        shares = {name: f"{name} {100 * step.share:.0f} %" for name, step in self.steps.items()}
        first = shares.pop(self.bottleneck)
        needs = [
            f"{short(cores)} cores and {short(rate)} MB/s for {name}"
            for name, use in sorted(self.formats.items())
            for cores, rate in (use.needs(self.encode_rate),)
        ]
        line = f"bottleneck: {first}; {', '.join(shares.values())}"
        if not needs:
            return line
        return f"{line}; an encoder of {self.encode_rate:.0f} x real time needs {', '.join(needs)}"

    @staticmethod
    def total(parts: Iterable[WorkUse]) -> WorkUse:
        """The sum over shards or workers."""
        steps: dict[str, StepUse] = {}
        formats: dict[str, FormatUse] = {}
        audio_seconds = 0.0
        for part in parts:
            audio_seconds += part.audio_seconds
            for name, step in part.steps.items():
                steps[name] = _sum(steps.get(name, StepUse()), step)
            for name, use in part.formats.items():
                formats[name] = _sum(formats.get(name, FormatUse()), use)
        return WorkUse(steps=steps, formats=formats, audio_seconds=audio_seconds)


def short(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


Summed = TypeVar("Summed", StepUse, FormatUse)


def _sum(first: Summed, second: Summed) -> Summed:
    fields = type(first).model_fields
    return type(first)(**{name: getattr(first, name) + getattr(second, name) for name in fields})


class DepthAgreement(_Document):
    """How the codes of one codebook agree with those of mode exact, over base frames.

    ``num_frames``: frames compared; ``num_equal``: equal codes. ``num_reached``: frames in which
    all codebooks before this one agree; ``num_diverged``: of these, frames in which this one is the
    first that does not. Deeper codes of a frame that diverged say nothing: they quantise another
    residual.
    """

    stream: str
    codebook: int
    num_frames: int
    num_equal: int
    num_reached: int
    num_diverged: int

    @property
    def equal_share(self) -> float | None:
        """Share of equal codes; None when nothing was compared."""
        return self.num_equal / self.num_frames if self.num_frames else None

    @property
    def holding_share(self) -> float | None:
        """Share of the frames reached in which this codebook agrees too; None when none was."""
        return 1 - self.num_diverged / self.num_reached if self.num_reached else None


class ModeAgreement(_Document):
    """Codes of mode fast against those of mode exact, over a sample of clips.

    ``num_starts``, ``num_exact_starts``, ``num_common_starts``: tokens in mode fast, in mode exact,
    and of these such as begin at the same base frame; all equal where the rate is fixed.
    """

    num_clips: int
    audio_seconds: float
    num_starts: int
    num_exact_starts: int
    num_common_starts: int
    depths: list[DepthAgreement]

    @property
    def boundary_f1(self) -> float:
        """Harmonic mean of precision and recall of the frames at which tokens begin."""
        total = self.num_starts + self.num_exact_starts
        return 2 * self.num_common_starts / total if total else 1.0

    @classmethod
    def total(cls, parts: Iterable[ModeAgreement]) -> ModeAgreement | None:
        """Counts of several measurements of one codec added up; None when there is none."""
        parts = list(parts)
        if not parts:
            return None
        sums = {
            name: sum(getattr(part, name) for part in parts)
            for name in cls.model_fields
            if name != "depths"
        }
        columns = zip(*(part.depths for part in parts), strict=True)
        return cls(**sums, depths=[_total_of(column) for column in columns])


def _total_of(depths: Sequence[DepthAgreement]) -> DepthAgreement:
    counts = ("num_frames", "num_equal", "num_reached", "num_diverged")
    sums = {name: sum(getattr(depth, name) for depth in depths) for name in counts}
    return depths[0].model_copy(update=sums)


class ShardResult(_Document):
    """The outcome of a shard; created once (If-None-Match: *), never changed.

    ``done``: ``data_file`` holds all rows (None when no file of the shard gave tokens). ``failed``:
    every counted attempt ended in an error; terminal within its plan only. ``agreement``: only for
    mode fast, measured on the shard's first minute of audio. ``work``: where the time went.
    """

    format_version: Literal[1] = 1
    plan_id: str
    shard_id: str
    shard_index: int
    attempt: int
    worker_id: str
    status: Literal["done", "failed"]
    error: str = ""
    data_file: DataFile | None = None
    outcomes: list[FileOutcome] = []
    audio_seconds: float = 0.0
    num_tokens: int = 0
    timings: Timings = Timings()
    build: dict[str, str] = {}
    agreement: ModeAgreement | None = None
    work: WorkUse | None = None


class WorkerProgress(_Document):
    """How far one worker is; ``sequence`` advances with progress only.

    ``held_shards``: attempt number by id of the shards that it works on. ``work``: of the shards
    that it finished. ``start_seconds``: from the start of the process to the first token, by part.
    """

    format_version: Literal[1] = 1
    worker_id: str
    plan_id: str
    sequence: int
    phase: str
    num_shards_done: int = 0
    num_files: int = 0
    audio_seconds: float = 0.0
    num_tokens: int = 0
    busy_seconds: float = 0.0
    held_shards: dict[str, int] = {}
    work: WorkUse | None = None
    start_seconds: dict[str, float] = {}


class HeldOutFile(_Document):
    """One file of a held-out set, pinned. ``name``: its path below the set's folder."""

    name: str
    uri: str
    etag: str


class CodecPin(_Document):
    """A codec that a job must find unchanged. ``digest``: ``CodecManifest.digest``.

    ``version``: where a registry named it (``models:/NAME/3``), else "". ``threshold``: only for
    codecs of variable rate. A ``baseline:`` codec is part of the evaluation: its digest is "".
    """

    uri: str
    digest: str
    version: str = ""
    threshold: float | None = None


class EvaluateJob(_Document):
    """Score a codec on a held-out set, beside another codec and baselines where named.

    One process does it; ``plan_id`` and ``plan_uri`` name the evaluation and its folder, which
    holds ``job.json``, ``workers/``, ``reports/<attempt>/`` and, written last and once,
    ``results/evaluation.json``. ``max_seconds``: of each file. ``gate``: ``config.GateConfig`` as
    values. ``local_models``: folder URIs by use (``asr``, ``speaker``, ``mos``).
    """

    kind: Literal["evaluate"] = "evaluate"
    format_version: Literal[1] = 1
    plan_id: str
    plan_uri: str
    held_out_uri: str
    files: list[HeldOutFile] = Field(min_length=1)
    codec: CodecPin
    against: CodecPin | None = None
    baselines: list[str] = []
    max_seconds: float = Field(default=30.0, gt=0)
    metrics: list[str] = []
    gate: dict[str, Any] = {}
    local_models: dict[str, str] = {}
    num_samples_to_hear: int = Field(default=4, ge=0)
    num_shards: Literal[1] = 1
    num_files: int = Field(ge=1)
    lease_seconds: float = Field(default=60.0, gt=0)


class TrainJob(_Document):
    """Train a codec to the end of a recipe; started again, it goes on where it stopped.

    All ranks run the same job. ``plan_uri`` is the run's folder (see ``training.run``), which holds
    ``job.json`` too and, written last, ``results/training.json``. ``recipe``: ``training.recipe``
    as values. ``data_uris``: folders, manifests, inventories or ``dataset:NAME@VERSION``. ``base``:
    codec to go on from. ``teacher``: folder of the SSL model, where one is needed from scratch.
    ``sample_rate``: in Hz, of the data where that is known; the codec's must be the same.
    """

    kind: Literal["train"] = "train"
    format_version: Literal[1] = 1
    plan_id: str
    plan_uri: str
    recipe: dict[str, Any]
    data_uris: list[str] = Field(min_length=1)
    base: CodecPin | None = None
    teacher: str | None = None
    sample_rate: int | None = None
    is_tracked: bool = True
    experiment: str = "hcodec"
    weights_licence: str = "unknown"
    num_shards: Literal[1] = 1
    num_files: int = Field(default=0, ge=0)
    lease_seconds: float = Field(default=60.0, gt=0)


class SampledFile(_Document):
    """A file whose row is audited. ``data_uri``: Parquet file that holds the row."""

    uri: str
    etag: str
    data_uri: str


class AuditJob(_Document):
    """Decode and encode again a sample of a plan's rows, on a machine of the plan's compute class.

    One process does it. ``plan_id`` is the plan's; ``plan_uri`` is the audit's folder, which holds
    ``job.json`` and, written last and once, ``results/audit.json`` (see ``dataset.audit``).
    """

    kind: Literal["audit"] = "audit"
    format_version: Literal[1] = 1
    plan_id: str
    plan_uri: str
    tokenize: TokenizeJob
    files: list[SampledFile] = Field(min_length=1)
    num_shards: Literal[1] = 1
    num_files: int = Field(ge=1)
    lease_seconds: float = Field(default=60.0, gt=0)


Job = TokenizeJob | EvaluateJob | TrainJob | AuditJob
_JOBS: dict[str, type[Job]] = {
    "tokenize": TokenizeJob,
    "evaluate": EvaluateJob,
    "train": TrainJob,
    "audit": AuditJob,
}


def read_any_job(text: bytes | str) -> Job:
    """Parse a job document of any kind. Raises ``ConfigError`` naming each wrong entry."""
    kind = job_kind(text)
    if kind not in _JOBS:
        raise ConfigError(
            f"Jobs of kind {kind!r} are unknown to this version: it runs {', '.join(_JOBS)}."
        )
    return _parse(text, _JOBS[kind])


def job_kind(text: bytes | str) -> str:
    """The kind that a job document says it is. Raises ``ConfigError`` when it says none."""
    try:
        kind = json.loads(text)["kind"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "The job document is no JSON object with a kind: name the job.json of a plan."
        ) from error
    return str(kind)


def read_job(text: bytes | str) -> TokenizeJob:
    """Parse a tokenise job. Raises ``ConfigError`` naming each wrong entry."""
    return _parse(text, TokenizeJob)


def _parse(text: bytes | str, model: type[Parsed]) -> Parsed:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"The job document cannot be used by this version: {describe(error)}."
        ) from error
