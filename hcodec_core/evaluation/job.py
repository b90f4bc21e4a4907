"""An evaluation as a job: made where there is no torch, run by ``hcodec run``, its result once."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hcodec_core.codecs import load_manifest
from hcodec_core.config import Config, GateConfig
from hcodec_core.errors import ConfigError, HCodecError, ObjectMissingError, PreemptedError
from hcodec_core.evaluation.documents import (
    AGAINST,
    CODEC,
    RESULT_FILE,
    EvaluationResult,
    read_result,
)
from hcodec_core.evaluation.held_out import opener, spread
from hcodec_core.evaluation.listening import make_examples
from hcodec_core.evaluation.measuring import Task, evaluate
from hcodec_core.evaluation.metrics import check_names
from hcodec_core.evaluation.report import upload_report, write_report
from hcodec_core.evaluation.scoring import Tools
from hcodec_core.evaluation.sides import CodecUnderTest
from hcodec_core.jobs import JOB_FILE, CodecPin, EvaluateJob, HeldOutFile, WorkerProgress
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import digest_of

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 2.0
OpenSide = Callable[[CodecPin], CodecUnderTest]


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate. Codecs are resolved: ``version`` names what a registry called them.

    ``held_out_uri``: folder in storage. ``max_files``: a spread choice. ``metrics``: none means
    all. ``gate``: None takes the configuration's. ``local_models``: folder on the worker by use.
    """

    codec: CodecPin
    held_out_uri: str
    against: CodecPin | None = None
    baselines: tuple[str, ...] = ()
    max_files: int | None = None
    max_seconds: float = 30.0
    metrics: tuple[str, ...] = ()
    gate: GateConfig | None = None
    local_models: Mapping[str, str] = field(default_factory=dict)
    num_samples_to_hear: int = 4


def pin(uri: str, storage: Storage, version: str = "", threshold: float | None = None) -> CodecPin:
    """The codec at a resolved URI as it is now. Raises what ``load_manifest`` raises."""
    digest = load_manifest(uri, fetch=storage.read).digest
    return CodecPin(uri=uri, digest=digest, version=version, threshold=threshold)


def make_evaluate_job(config: Config, storage: Storage, request: EvaluateRequest) -> EvaluateJob:
    """List the held-out set, pin every file, and write the job; the same job for the same inputs.

    Raises ``ConfigError`` for an empty set or an unknown metric, ``AccessError`` when the set lies
    outside the allowed sources.
    """
    check_names(list(request.metrics))
    _check_baselines(request.baselines)
    gate = request.gate or config.gate
    check_names(list(gate.metrics))
    files = spread(_list_files(config, storage, request.held_out_uri), request.max_files)
    values = {
        "held_out_uri": request.held_out_uri,
        "files": [file.model_dump() for file in files],
        "codec": request.codec.model_dump(),
        "against": request.against.model_dump() if request.against else None,
        "baselines": list(request.baselines),
        "max_seconds": request.max_seconds,
        "metrics": list(request.metrics),
        "gate": gate.model_dump(mode="json"),
        "local_models": dict(request.local_models),
        "num_samples_to_hear": request.num_samples_to_hear,
    }
    plan_id = digest_of(values)[:24]
    plan_uri = join_uri(config.work.work_uri, "evaluations", plan_id)
    job = EvaluateJob.model_validate(
        values | {"plan_id": plan_id, "plan_uri": plan_uri, "num_files": len(files)}
    )
    storage.write(join_uri(plan_uri, JOB_FILE), job.model_dump_json(indent=1).encode())
    return job


def result_uri(plan_uri: str) -> str:
    """Where an evaluation's result lies, once it is there."""
    return join_uri(plan_uri, "results", RESULT_FILE)


def load_result(storage: Storage, uri: str) -> EvaluationResult:
    """A stored result. Raises ``ObjectMissingError`` and ``ConfigError``."""
    return read_result(storage.read(uri))


def run_evaluate_job(
    job: EvaluateJob,
    storage: Storage,
    sides: Mapping[str, CodecUnderTest],
    tools: tuple[Tools, Mapping[str, str], Mapping[str, str]],
    scratch_path: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult:
    """Evaluate, upload the report, then create the result; one that is there already is kept.

    Args:
        job: The document.
        storage: Where the set lies and the result goes.
        sides: The codecs that the job pins, loaded, by label.
        tools: What to measure with, digests of local models, and versions for the record.
        scratch_path: An existing folder for one file of the set at a time, and the report.
        should_stop: Asked between files.

    Raises:
        PreemptedError: ``should_stop`` said so; nothing was written.
        ConfigError: None of the set's files is usable.
    """
    attempt = uuid.uuid4().hex[:12]
    board = _Board(storage, job, attempt)
    measuring, digests, build = tools
    task = Task(
        sides=sides,
        files=job.files,
        held_out_uri=job.held_out_uri,
        open_file=opener(storage, scratch_path),
        tools=measuring,
        max_seconds=job.max_seconds,
        gate=GateConfig.model_validate(job.gate),
        build=build,
        local_models=digests,
    )

    def progress(num_files: int, seconds: float) -> None:
        board.tell("evaluating", num_files, seconds)
        if should_stop():
            raise PreemptedError("The evaluation was asked to stop: it begins again elsewhere.")

    result = evaluate(task, progress)
    report_uri = join_uri(job.plan_uri, "reports", attempt)
    result = result.model_copy(update={"report_uri": join_uri(report_uri, "index.html")})
    examples = make_examples(task, result, job.num_samples_to_hear)
    write_report(scratch_path / "report", result, examples)
    upload_report(storage, scratch_path / "report", report_uri)
    board.tell("done", len(job.files), result.held_out.audio_seconds, is_last=True)
    return _keep_first(storage, job, result)


def finished(job: EvaluateJob, storage: Storage) -> EvaluationResult | None:
    """The result of a job that is done."""
    try:
        return load_result(storage, result_uri(job.plan_uri))
    except ObjectMissingError:
        return None


def _keep_first(storage: Storage, job: EvaluateJob, result: EvaluationResult) -> EvaluationResult:
    data = result.model_dump_json(indent=1).encode()
    if storage.create(result_uri(job.plan_uri), data):
        return result
    first = load_result(storage, result_uri(job.plan_uri))
    logger.info("Evaluation %s has a result already: that one stays.", job.plan_id)
    return first


def _check_baselines(names: Sequence[str]) -> None:
    for name in names:
        if not name.startswith("opus"):
            raise ConfigError(
                f"Baseline {name!r} cannot be part of a job: jobs compare with opus6 to opus64; "
                "hcodec evaluate has the others."
            )


def _list_files(config: Config, storage: Storage, folder_uri: str) -> Sequence[HeldOutFile]:
    prefix = folder_uri.rstrip("/") + "/"
    config.check_source(prefix)
    files = [
        HeldOutFile(name=info.uri.removeprefix(prefix), uri=info.uri, etag=info.etag)
        for info in storage.list_objects(prefix)
    ]
    if not files:
        raise ConfigError(f"The held-out set {folder_uri} is empty: put audio files there.")
    return files


class _Board:
    """Tells how far the evaluation is, every few seconds, as all workers do."""

    def __init__(self, storage: Storage, job: EvaluateJob, worker_id: str) -> None:
        self._storage, self._job, self._worker_id = storage, job, worker_id
        self._sequence = 0
        self._next = 0.0
        self._begun = time.monotonic()

    def tell(self, phase: str, num_files: int, audio_seconds: float, is_last: bool = False) -> None:
        """Write progress, unless that was done just now."""
        now = time.monotonic()
        if now < self._next and not is_last:
            return
        self._next = now + _PROGRESS_SECONDS
        self._sequence += 1
        report = WorkerProgress(
            worker_id=self._worker_id,
            plan_id=self._job.plan_id,
            sequence=self._sequence,
            phase=phase,
            num_shards_done=int(is_last),
            num_files=num_files,
            audio_seconds=audio_seconds,
            busy_seconds=now - self._begun,
        )
        uri = join_uri(self._job.plan_uri, "workers", f"{self._worker_id}.json")
        try:
            self._storage.write(uri, report.model_dump_json().encode())
        except HCodecError as error:
            logger.warning("Progress was not written: %s", error)


__all__ = [
    "AGAINST",
    "CODEC",
    "EvaluateRequest",
    "finished",
    "load_result",
    "make_evaluate_job",
    "pin",
    "result_uri",
    "run_evaluate_job",
]
