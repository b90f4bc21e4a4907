"""A training run as a job: its data pinned where there is no torch, run by ``hcodec run``.

The folder of a run is described in ``run``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

from hcodec_core.codecs import load_manifest
from hcodec_core.config import Config
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import JOB_FILE, CodecPin, TrainJob
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import digest_of
from hcodec_core.training.recipe import Recipe
from hcodec_core.training.sources import (
    DataVersion,
    SourceFile,
    Sources,
    list_sources,
    pin_versions,
    split_sources,
    write_sources,
)

RUN_FILE, FILES_FILE, RESULT_FILE = "run.json", "files.parquet", "results/training.json"


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run made. ``scores``: of the last validation."""

    codec_uri: str
    codec_digest: str
    recipe_digest: str
    data_digest: str
    steps: int
    num_training_files: int
    num_held_out_files: int
    scores: dict[str, float]


@dataclass(frozen=True)
class RunFacts:
    """What ``run.json`` tells of a run. ``base``: URI of the codec that it started from."""

    recipe: Recipe
    data: tuple[str, ...]
    base: str | None
    teacher: str | None
    licence: str

    def as_values(self) -> dict[str, object]:
        """As JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "recipe": self.recipe.model_dump(mode="json")}


@dataclass(frozen=True)
class TrainJobRequest:
    """What to train on what.

    ``data_uris``: see ``sources.list_sources``. ``kept_back_uri``: folder whose files, and copies
    of them, are never trained on. ``num_ranks``: processes that share each batch.
    """

    recipe: Recipe
    data_uris: tuple[str, ...]
    base: CodecPin | None = None
    teacher: str | None = None
    kept_back_uri: str | None = None
    num_ranks: int = 1
    experiment: str = "hcodec"
    weights_licence: str = "unknown"


@dataclass(frozen=True)
class PinnedTraining:
    """A job and what it was made from. ``num_kept_back``: files left out for the evaluation."""

    job: TrainJob
    sources: Sources
    versions: tuple[DataVersion, ...]
    num_kept_back: int
    num_bytes: int


def make_train_job(
    config: Config, storage: Storage, request: TrainJobRequest, *, dry_run: bool = False
) -> PinnedTraining:
    """List the data, pin every file of it, and write the job; the same job for the same inputs.

    A dry run writes nothing.

    Raises:
        ConfigError: The data cannot be used, nothing is left of it, processes cannot share a batch,
            or versions of different sample rates are mixed.
        AccessError: A file lies outside the allowed sources.
    """
    check_ranks(request.recipe, request.num_ranks)
    uris, versions = pin_versions(config, request.data_uris)
    rate = _sample_rate(storage, request.base, versions)
    listed = list_sources(storage, uris, rate, config)
    files = _without(listed, _kept_back(config, storage, request.kept_back_uri))
    if not files:
        raise ConfigError(
            f"All {len(listed)} files of {', '.join(uris)} are kept back for the evaluation "
            f"({request.kept_back_uri}): name other data."
        )
    sources = split_sources(files, request.recipe.data)
    job = _job_of(config, request, sources, uris, rate)
    if not dry_run:
        facts = RunFacts(
            recipe=request.recipe,
            data=uris,
            base=None if request.base is None else request.base.uri,
            teacher=request.teacher,
            licence=request.weights_licence,
        )
        pin_files(storage, job.plan_uri, files, facts)
        storage.write(join_uri(job.plan_uri, JOB_FILE), job.model_dump_json(indent=1).encode())
    num_bytes = sum(file.size or 0 for file in files)
    return PinnedTraining(job, sources, versions, len(listed) - len(files), num_bytes)


def check_ranks(recipe: Recipe, num_ranks: int) -> None:
    """Raise ``ConfigError`` when so many processes cannot share a batch evenly."""
    if recipe.batch_size % num_ranks:
        raise ConfigError(
            f"{num_ranks} processes cannot share a batch of {recipe.batch_size} clips evenly: "
            "choose a number of processes that divides batch_size, or another batch_size."
        )


def pin_files(storage: Storage, run_uri: str, files: Sequence[SourceFile], facts: RunFacts) -> None:
    """Write a run's list of files, and before it what the run is."""
    text = json.dumps(facts.as_values(), indent=1)
    storage.write(join_uri(run_uri, RUN_FILE), text.encode())
    write_sources(storage, join_uri(run_uri, FILES_FILE), files)


def finished(storage: Storage, run_uri: str) -> TrainingResult | None:
    """What a finished run made; None while it is not finished."""
    uri = join_uri(run_uri, RESULT_FILE)
    if storage.head(uri) is None:
        return None
    return TrainingResult(**json.loads(storage.read(uri)))


def _job_of(
    config: Config,
    request: TrainJobRequest,
    sources: Sources,
    uris: Sequence[str],
    rate: int | None,
) -> TrainJob:
    values = {
        "recipe": request.recipe.model_dump(mode="json"),
        "base": request.base.model_dump() if request.base else None,
        "teacher": request.teacher,
        "sample_rate": rate,
        "weights_licence": request.weights_licence,
    }
    # Not by where the files were found: the same files make the same codec. A run of other ranks
    # could not go on from its checkpoints.
    plan_id = digest_of([values, sources.digest, request.num_ranks])[:24]
    return TrainJob.model_validate(
        {
            **values,
            "plan_id": plan_id,
            "plan_uri": join_uri(config.work.work_uri, "trainings", plan_id),
            "data_uris": list(uris),
            "experiment": request.experiment,
            "num_files": len(sources.training),
        }
    )


def _sample_rate(
    storage: Storage, base: CodecPin | None, versions: Sequence[DataVersion]
) -> int | None:
    """Rate in Hz that data versions must have; None when nothing says so before training."""
    if base is not None:
        manifest = load_manifest(base.uri, expected_digest=base.digest, fetch=storage.read)
        return manifest.sample_rate
    rates = {version.sample_rate for version in versions}
    if len(rates) > 1:
        shown = ", ".join(f"{v.uri} {v.sample_rate} Hz" for v in versions)
        raise ConfigError(f"Data versions of different sample rates cannot be mixed: {shown}.")
    return next(iter(rates), None)


def _kept_back(config: Config, storage: Storage, uri: str | None) -> list[SourceFile]:
    if uri is None:
        return []
    config.check_source(uri.rstrip("/") + "/")
    objects = storage.list_objects(uri.rstrip("/") + "/")
    found = [SourceFile(o.uri, o.etag, o.size) for o in objects if not o.uri.endswith("/")]
    if not found:
        raise ConfigError(f"The held-out set {uri} is empty: put audio files there.")
    return found


def _without(files: Sequence[SourceFile], kept_back: Sequence[SourceFile]) -> list[SourceFile]:
    """``files`` without those kept back, by place or, for a copy elsewhere, by content."""
    places = {file.uri for file in kept_back}
    # An etag of object storage says what is in an object, one of a local file only how old it is.
    contents = {file.etag for file in kept_back if file.uri.startswith("s3://")}
    return [file for file in files if file.uri not in places and file.etag not in contents]
