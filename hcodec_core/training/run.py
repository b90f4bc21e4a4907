"""A whole training run: sources pinned, codec made, trained, exported.

The run's folder holds

    run.json                    recipe, base and list of sources; written once
    files.parquet               the pinned list of files, with their etags
    lock/                       see ``run_lock``
    checkpoints/  history/      see ``checkpoints`` and ``history``
    samples/step-.../           held-out clips, as they were and decoded, with spectrograms
    quarantine.json             files that could not be used, and why
    workers/<id>.json           ``WorkerProgress``
    codec/                      the codec, once training is over
    results/training.json       ``TrainingResult``; written last
    exports/step-.../           codecs of checkpoints that somebody asked for
"""

from __future__ import annotations

import json
import logging
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from hcodec_core import __version__
from hcodec_core.codecs import load_manifest
from hcodec_core.config import Config, StorageConfig
from hcodec_core.errors import ConfigError, HCodecError, ObjectMissingError
from hcodec_core.models.base import Codec
from hcodec_core.models.loading import CodecCard, load_codec, save_codec
from hcodec_core.models.registry import build_codec, family_of, presets
from hcodec_core.nn.initial import keep_variance
from hcodec_core.storage import Storage, file_uri, join_uri, open_storage
from hcodec_core.tokens import MANIFEST_FILE, WEIGHTS_FILE, CodecManifest, EncodeSettings, digest_of
from hcodec_core.training.batches import BatchSource, Place, SampleDataset, SamplePlan, Share
from hcodec_core.training.checkpoints import CheckpointFacts, CheckpointPlace, Checkpoints
from hcodec_core.training.held_out import HeldOutClip, read_held_out
from hcodec_core.training.job import (
    FILES_FILE,
    RESULT_FILE,
    RUN_FILE,
    RunFacts,
    TrainingResult,
    check_ranks,
    pin_files,
)
from hcodec_core.training.keys import seed_of
from hcodec_core.training.learner import Learner
from hcodec_core.training.objective import freeze, objective_for
from hcodec_core.training.ranks import Ranks
from hcodec_core.training.recipe import Recipe, recipe_of
from hcodec_core.training.run_lock import RunLock, take_run
from hcodec_core.training.sources import (
    SourceFile,
    Sources,
    list_sources,
    read_sources,
    split_sources,
)
from hcodec_core.training.teacher import take_teacher
from hcodec_core.training.tracking import MlflowTracker, NoTracker, TrackedRun, Tracker
from hcodec_core.training.trainer import Surroundings, Trainer, TrainProgress

logger = logging.getLogger(__name__)

CODEC_FOLDER, EXPORTS_FOLDER = "codec", "exports"
_BASE_SETTINGS = EncodeSettings(compute_class="training")


def _ignore(_: TrainProgress) -> None:
    pass


@dataclass(frozen=True)
class TrainRequest:
    """What is trained, on what, into which folder.

    ``base_uri``: codec that training goes on from, with ``base_digest`` when it is given; None:
    from scratch. ``teacher``: folder or hub
    id of the SSL model (transformers), for training from scratch a codec that has one.
    ``resumes``: go on where an earlier run into ``out_uri`` stopped. ``tracking_uri``: MLflow;
    None: not tracked. ``sample_rate``: in Hz, of the data where that is known; the codec's must be
    the same.
    """

    recipe: Recipe
    data_uris: tuple[str, ...]
    out_uri: str
    base_uri: str | None = None
    base_digest: str | None = None
    teacher: str | None = None
    resumes: bool = False
    tracking_uri: str | None = None
    experiment: str = "hcodec"
    licence: str = "unknown"
    sample_rate: int | None = None


@dataclass(frozen=True)
class TrainOptions:
    """How one process runs; decides no results but through threads and device.

    ``scratch_path``: an existing folder for decoded audio (``cache_bytes`` at most) and one
    checkpoint. ``num_workers``: data processes of each rank.
    """

    scratch_path: Path
    device: str = "cpu"
    num_threads: int = 1
    num_workers: int = 0
    cache_bytes: int = 8 << 30
    worker_id: str = "trainer"


@dataclass(frozen=True)
class TrainContext:
    """What surrounds a run. ``config``: allow-lists and datasets, where there is one."""

    ranks: Ranks = field(default_factory=Ranks)
    storage: StorageConfig = field(default_factory=StorageConfig)
    config: Config | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    report: Callable[[TrainProgress], None] = _ignore


@dataclass(frozen=True)
class ExportedCodec:
    """A codec made of a checkpoint after ``step`` steps; ``score`` is its validation's, if any."""

    codec_uri: str
    codec_digest: str
    step: int
    score: float | None


def train(request: TrainRequest, options: TrainOptions, context: TrainContext) -> TrainingResult:
    """Train a codec to the end of its recipe and export it; called by every rank.

    Raises:
        ConfigError: Recipe, data or codec cannot be used, or the folder holds another run.
        DivergedError: A loss is not finite; names the batch.
        PreemptedError: ``context.stop`` was set; a checkpoint was made.
        StorageError: Storage or the tracking server stays away, or a disk is full.
        BudgetExceededError: Too many files are bad.
        LeaseLostError: Another process trains in the folder, or took it over meanwhile.
    """
    run = _Run(request, options, context)
    return run.go()


def export_checkpoint(
    request: TrainRequest, choice: str, codec_uri: str, options: TrainOptions, context: TrainContext
) -> ExportedCodec:
    """Write the codec that training would export at a checkpoint; the run itself may go on.

    Args:
        request: The run's, see ``read_request``.
        choice: ``last``, ``best`` (of the validation) or a step.
        codec_uri: Where to; empty: below ``exports`` in the run's folder.
        options: Scratch folder and threads.
        context: One process; storage and allow-lists.

    Raises:
        ConfigError: There is no such checkpoint; names those there are.
        CheckpointError: The checkpoint is damaged.
    """
    return _Run(request, options, context).export(choice, codec_uri)


def read_request(storage: Storage, run_uri: str, licence: str | None = None) -> TrainRequest:
    """What a run's folder says of itself. ``licence``: of the weights, in place of the run's.

    Raises ``ConfigError`` when the folder holds no training run.
    """
    uri = join_uri(run_uri, RUN_FILE)
    try:
        facts = json.loads(storage.read(uri))
        recipe, data_uris = facts["recipe"], tuple(facts["data"])
    except (ObjectMissingError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{run_uri} holds no training run ({RUN_FILE} is missing or damaged): name the folder "
            "that training was given with --out."
        ) from error
    return TrainRequest(
        recipe=recipe_of(recipe, uri),
        data_uris=data_uris,
        out_uri=run_uri,
        base_uri=facts.get("base"),
        teacher=facts.get("teacher"),
        licence=licence or facts.get("licence", "unknown"),
    )


class _Run:
    def __init__(self, request: TrainRequest, options: TrainOptions, context: TrainContext) -> None:
        self.request, self.options, self.context = request, options, context
        self.recipe, self.ranks = request.recipe, context.ranks
        self.storage: Storage = open_storage(context.storage)
        _check(request, context)

    def go(self) -> TrainingResult:
        torch.set_num_threads(self.options.num_threads)
        torch.backends.cudnn.benchmark = False
        codec = self._codec()
        with self._held() as lock:
            return self._go(codec, lock)

    def _go(self, codec: Codec, lock: RunLock | None) -> TrainingResult:
        sources, identity = self._pin(codec)
        logger.info(
            "Training on %d files, %d held out.", len(sources.training), len(sources.held_out)
        )
        learner = self._learner(codec)
        if self.request.base_uri is not None:
            self._keep_codebooks(learner)
        scores = self._train(learner, sources, identity, lock)
        return self._export(learner, sources, identity, scores)

    def export(self, choice: str, codec_uri: str) -> ExportedCodec:
        """See ``export_checkpoint``."""
        learner = self._learner(self._codec())
        checkpoints = Checkpoints(self._place(), self.ranks)
        facts = checkpoints.choose(choice)
        checkpoints.load(facts, learner.tensors(), self._recipe_digest())
        name = f"step-{facts.step:09d}"
        codec_uri = codec_uri or join_uri(self.request.out_uri, EXPORTS_FOLDER, name)
        if self.context.config is not None:
            self.context.config.check_destination(codec_uri)
        with learner.as_exported():
            manifest = self._write_codec(learner.objective.codec, codec_uri, facts)
        return ExportedCodec(codec_uri, manifest.digest, facts.step, facts.score)

    def _learner(self, codec: Codec) -> Learner:
        device = torch.device(self.options.device)
        codec.to(device)
        freeze(codec, self.recipe)
        objective = objective_for(codec, self.recipe, self.request.teacher)
        return Learner(objective, self.recipe, self.ranks, device)

    @contextmanager
    def _held(self) -> Iterator[RunLock | None]:
        """Within: no other start trains in this folder. The lock is the first rank's."""
        lock: RunLock | None = None
        failure: HCodecError | None = None
        if self.ranks.is_first:
            try:
                lock = take_run(self.storage, self.request.out_uri, self.options.worker_id)
            except HCodecError as error:
                failure = error
        failure = self.ranks.from_first(failure)
        if failure is not None:
            raise failure
        with nullcontext() if lock is None else lock:
            yield lock

    def _train(
        self,
        learner: Learner,
        sources: Sources,
        identity: CheckpointFacts,
        lock: RunLock | None,
    ) -> dict[str, float]:
        dataset = self._dataset(learner.objective.codec, sources)
        tracker: Tracker = NoTracker()
        status = "FAILED"
        try:
            clips = self._held_out(dataset, sources, learner.objective.codec)
            tracker = self._tracker(identity)
            around = self._surroundings(identity, len(sources.training), tracker, lock)
            share = Share(self.recipe.batch_size, self.ranks.rank, self.ranks.size)
            source = BatchSource(
                dataset, share, self.options.num_workers, learner.device.type == "cuda"
            )
            scores = Trainer(learner, source, clips, around).run()
            status = "FINISHED"
            return scores
        finally:
            tracker.finish("KILLED" if self.context.stop.is_set() else status)
            dataset.close()

    def _codec(self) -> Codec:
        """The codec to be trained, the same on every rank."""
        request = self.request
        if request.base_uri is not None:
            return load_codec(
                request.base_uri,
                _BASE_SETTINGS,
                expected_digest=request.base_digest,
                fetch=self.storage.read,
            )
        family = family_of(self.recipe.codec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.recipe.seed, "weights"))
            codec = build_codec(family, presets(family)[self.recipe.codec]().architecture())
            if self.recipe.initial == "keep-variance":
                _keep_variance(codec)
        take_teacher(codec, request.teacher, self.recipe.codec)
        return codec

    def _keep_codebooks(self, learner: Learner) -> None:
        hop = learner.objective.codec.hop_length
        frames = self.recipe.batch_size * _crop_samples(self.recipe, learner.objective.codec) // hop
        for trainer in learner.objective.quantizers.values():
            trainer.go_on_from(frames)

    def _pin(self, codec: Codec) -> tuple[Sources, CheckpointFacts]:
        """The list of files, made by the first rank once, and what the run is known by."""
        if self.request.sample_rate not in {None, codec.sample_rate}:
            raise ConfigError(
                f"The data version was made at {self.request.sample_rate} Hz; the codec to be "
                f"trained works at {codec.sample_rate} Hz: train on its source folders, or another "
                "codec."
            )
        files = self._files(codec)
        sources = split_sources(files, self.recipe.data)
        build = {
            "hcodec": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": self.options.device.partition(":")[0],
            "threads": str(self.options.num_threads),
        }
        base = self._base_digest()
        identity = CheckpointFacts(
            step=0,
            recipe_digest=self._recipe_digest(),
            data_digest=sources.digest,
            num_ranks=self.ranks.size,
            build=build | ({"base": base} if base else {}),
        )
        return sources, identity

    def _recipe_digest(self) -> str:
        return digest_of([self.recipe.digest, self._base_digest()])

    def _base_digest(self) -> str:
        if self.request.base_uri is None:
            return ""
        return load_manifest(self.request.base_uri, fetch=self.storage.read).digest

    def _files(self, codec: Codec) -> list[SourceFile]:
        uri = join_uri(self.request.out_uri, FILES_FILE)
        files: list[SourceFile] = []
        failure: HCodecError | None = None
        if self.ranks.is_first:
            try:
                files = self._first_files(codec, uri)
            except HCodecError as error:
                failure = error
        files, failure = self.ranks.from_first((files, failure))
        if failure is not None:
            raise failure
        return files

    def _first_files(self, codec: Codec, uri: str) -> list[SourceFile]:
        request = self.request
        if self.storage.head(uri) is not None:
            if not request.resumes:
                raise ConfigError(
                    f"{request.out_uri} holds a training run already: go on with --resume, or name "
                    "another folder."
                )
            return read_sources(self.storage, uri)
        files = list_sources(
            self.storage, request.data_uris, codec.sample_rate, self.context.config
        )
        split_sources(files, self.recipe.data)  # what cannot be split is not pinned
        facts = RunFacts(
            recipe=self.recipe,
            data=request.data_uris,
            base=request.base_uri,
            teacher=request.teacher,
            licence=request.licence,
        )
        pin_files(self.storage, request.out_uri, files, facts)
        return files

    def _dataset(self, codec: Codec, sources: Sources) -> SampleDataset:
        plan = SamplePlan(
            seed=self.recipe.seed,
            sample_rate=codec.sample_rate,
            crop_samples=_crop_samples(self.recipe, codec),
            data=self.recipe.data,
            augment=self.recipe.augment,
        )
        options = self.options
        place = Place(self.context.storage, options.scratch_path, options.cache_bytes)
        return SampleDataset(sources.training, plan, place)

    def _held_out(
        self, dataset: SampleDataset, sources: Sources, codec: Codec
    ) -> list[HeldOutClip]:
        recipe = self.recipe.data
        max_samples = int(recipe.held_out_seconds * codec.sample_rate)
        files = sources.held_out[: recipe.max_held_out_files]
        return read_held_out(dataset, files, max_samples, codec.hop_length, self.ranks)

    def _tracker(self, identity: CheckpointFacts) -> Tracker:
        request = self.request
        if request.tracking_uri is None or not self.ranks.is_first:
            return NoTracker()
        run = TrackedRun(
            key=digest_of([request.out_uri, identity.recipe_digest, identity.data_digest]),
            name=f"{self.recipe.name}-{identity.recipe_digest[:8]}",
            experiment=request.experiment,
            artifacts_uri=_artifacts_uri(request.tracking_uri),
            facts={
                "recipe": self.recipe.name,
                "recipe_digest": identity.recipe_digest,
                "data_digest": identity.data_digest,
                "run_uri": request.out_uri,
                **identity.build,
            },
        )
        return MlflowTracker(request.tracking_uri, run, self.options.scratch_path)

    def _surroundings(
        self, identity: CheckpointFacts, num_files: int, tracker: Tracker, lock: RunLock | None
    ) -> Surroundings:
        return Surroundings(
            storage=self.storage,
            run_uri=self.request.out_uri,
            identity=identity,
            checkpoints=Checkpoints(self._place(), self.ranks),
            num_files=num_files,
            stop=self.context.stop,
            tracker=tracker,
            report=self.context.report,
            worker_id=self.options.worker_id,
            lock=lock,
        )

    def _place(self) -> CheckpointPlace:
        return CheckpointPlace(
            self.storage,
            self.request.out_uri,
            self.options.scratch_path,
            self.recipe.cadence.keep_last,
        )

    def _export(
        self,
        learner: Learner,
        sources: Sources,
        identity: CheckpointFacts,
        scores: dict[str, float],
    ) -> TrainingResult:
        codec_uri = join_uri(self.request.out_uri, CODEC_FOLDER)
        digest = ""
        if self.ranks.is_first:
            with learner.as_exported():
                facts = identity.model_copy(update={"step": self.recipe.steps})
                manifest = self._write_codec(learner.objective.codec, codec_uri, facts)
            digest = manifest.digest
        result = TrainingResult(
            codec_uri=codec_uri,
            codec_digest=self.ranks.from_first(digest),
            recipe_digest=identity.recipe_digest,
            data_digest=identity.data_digest,
            steps=self.recipe.steps,
            num_training_files=len(sources.training),
            num_held_out_files=len(sources.held_out),
            scores=scores,
        )
        if self.ranks.is_first:
            text = json.dumps(asdict(result), indent=1)
            self.storage.write(join_uri(self.request.out_uri, RESULT_FILE), text.encode())
        return result

    def _write_codec(self, codec: Codec, codec_uri: str, facts: CheckpointFacts) -> CodecManifest:
        recipe = self.recipe
        card = CodecCard(
            name=recipe.codec if self.request.base_uri is None else codec.spec.manifest.name,
            is_trained=True,
            weights_licence=self.request.licence,
            source=(
                f"recipe {recipe.name} ({facts.recipe_digest[:12]}), {facts.step} steps, seed "
                f"{recipe.seed}, data {facts.data_digest[:12]}"
            ),
        )
        path = self.options.scratch_path / CODEC_FOLDER
        manifest = save_codec(codec, card, path)
        for name in (WEIGHTS_FILE, MANIFEST_FILE):  # a codec without a manifest is none
            self.storage.upload(path / name, join_uri(codec_uri, name))
            (path / name).unlink()
        return manifest


def _check(request: TrainRequest, context: TrainContext) -> None:
    check_ranks(request.recipe, context.ranks.size)
    if context.config is not None:
        context.config.check_destination(request.out_uri)


def _artifacts_uri(tracking_uri: str) -> str | None:
    """Beside a database file; MLflow would put them into the current folder."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return file_uri(Path(tracking_uri.removeprefix("sqlite:///")).absolute().parent / "artifacts")


def _crop_samples(recipe: Recipe, codec: Codec) -> int:
    """Samples of a crop: whole hops, at least one."""
    hops = round(recipe.crop_seconds * codec.sample_rate / codec.hop_length)
    return max(1, hops) * codec.hop_length


def _keep_variance(codec: Codec) -> None:
    for name, child in codec.named_children():
        if name != "ssl":
            assert isinstance(child, nn.Module)
            keep_variance(child)
