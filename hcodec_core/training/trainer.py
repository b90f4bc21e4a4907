"""The loop: steps, and what happens between them.

Everything that a step depends on is in the checkpoint or follows from (recipe, data, step, rank);
so a run that is killed anywhere and resumed gives the same bits, for the same number of ranks,
threads and build, on a CPU.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from hcodec_core.errors import BudgetExceededError, HCodecError, PreemptedError
from hcodec_core.jobs import WorkerProgress
from hcodec_core.storage import Storage, join_uri
from hcodec_core.training.batches import BadFile, Batch, BatchSource
from hcodec_core.training.checkpoints import CheckpointFacts, Checkpoints
from hcodec_core.training.held_out import HeldOutClip, rebuilt, validate
from hcodec_core.training.history import History
from hcodec_core.training.learner import Learner
from hcodec_core.training.run_lock import RunLock
from hcodec_core.training.samples import picture_bytes, wav_bytes
from hcodec_core.training.tracking import NoTracker, Tracker

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.json"
_HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class TrainProgress:
    """How far a run is. ``eta_seconds``: at the pace since this process began."""

    step: int
    num_steps: int
    steps_per_second: float
    eta_seconds: float
    data_wait_share: float
    loss: float


def _ignore(_: TrainProgress) -> None:
    pass


@dataclass(frozen=True)
class Surroundings:
    """What is around the learner.

    ``identity``: digests of recipe and data, library versions. ``lock``: the first rank's hold on
    the run's folder, None where nobody else can know of it.
    """

    storage: Storage
    run_uri: str
    identity: CheckpointFacts
    checkpoints: Checkpoints
    num_files: int
    stop: threading.Event = field(default_factory=threading.Event)
    tracker: Tracker = field(default_factory=NoTracker)
    report: Callable[[TrainProgress], None] = _ignore
    worker_id: str = "trainer"
    lock: RunLock | None = None


class Trainer:
    """One rank's loop over the steps of a run."""

    def __init__(
        self,
        learner: Learner,
        source: BatchSource,
        held_out: Sequence[HeldOutClip],
        around: Surroundings,
    ) -> None:
        """Nothing runs before ``run``."""
        self._learner, self._source, self._held_out = learner, source, held_out
        self._around, self._recipe, self._ranks = around, learner.recipe, learner.ranks
        self._history = History(around.storage, around.run_uri)
        self._bad: dict[str, BadFile] = {}
        self._pace = _Pace()
        self._last_heartbeat = 0.0

    def run(self) -> dict[str, float]:
        """Train from the newest checkpoint, or from the start, to the last step.

        Returns the numbers of the last validation.

        Raises:
            PreemptedError: ``stop`` was set on some rank; a checkpoint was made first.
            DivergedError: A loss is not finite.
            BudgetExceededError: Too many files are bad.
            StorageError: A checkpoint cannot be written, or data cannot be read.
            LeaseLostError: Another process took the run over.
        """
        start = self._resume()
        scores: dict[str, float] = {}
        if start >= self._recipe.steps:
            return validate(self._learner, self._held_out, self._ranks)
        batches = self._source.batches(start, self._recipe.steps)
        self._pace.begin(start)
        for step in range(start, self._recipe.steps):
            scores = self._advance(step, self._pace.wait_for(batches)) or scores
        return scores

    def _resume(self) -> int:
        learner, around = self._learner, self._around
        facts = around.checkpoints.load_latest(
            learner.tensors(), around.identity.recipe_digest, around.identity.data_digest
        )
        if facts is None:
            if learner.learns_codebooks and not around.identity.build.get("base"):
                num_batches = self._recipe.quantizer.start_batches
                learner.start_codebooks(self._source.batches(0, num_batches))
            return 0
        before = facts.build | {"ranks": str(facts.num_ranks)}
        now = around.identity.build | {"ranks": str(self._ranks.size)}
        changed = [
            f"{key} {before.get(key)} -> {now[key]}" for key in now if now[key] != before.get(key)
        ]
        if changed:
            logger.warning(
                "The run goes on in other surroundings (%s): results are as good, but not the same "
                "bits.",
                ", ".join(changed),
            )
        logger.info("Going on after step %d.", facts.step)
        return facts.step

    def _advance(self, step: int, batch: Batch) -> dict[str, float]:
        """One step, and what is due after it; the scores when it was validated."""
        self._note_bad(batch)
        result = self._learner.step(step, batch, self._around.stop.is_set())
        done = step + 1
        cadence, is_last = self._recipe.cadence, done == self._recipe.steps
        numbers = dict(result.numbers)
        scores: dict[str, float] = {}
        if done % cadence.validate_every == 0 or is_last:
            scores = validate(self._learner, self._held_out, self._ranks)
        if done % cadence.log_every == 0 or scores:
            self._log(step, numbers | scores)
        if self._ranks.is_first:
            self._tell(done, numbers["loss/total"])
        if cadence.num_samples and (done % cadence.samples_every == 0 or is_last):
            self._show(done)
        if done % cadence.checkpoint_every == 0 or is_last or result.should_stop:
            self._save(done, scores.get("validation/mel"))
        if result.should_stop and not is_last:
            raise PreemptedError(f"Training was asked to stop after step {done}: it was saved.")
        return scores

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        if not self._ranks.is_first:
            return
        numbers = numbers | self._learner.rates(step) | self._learner.codebook_use()
        self._history.add(step + 1, numbers)
        times = {
            "time/steps_per_second": self._pace.steps_per_second,
            "time/data_wait_share": self._pace.wait_share,
        }
        self._around.tracker.log(step + 1, numbers | times)

    def _tell(self, done: int, loss: float) -> None:
        self._pace.count(done)
        pace = self._pace.steps_per_second
        left = self._recipe.steps - done
        progress = TrainProgress(
            step=done,
            num_steps=self._recipe.steps,
            steps_per_second=pace,
            eta_seconds=left / pace if pace else 0.0,
            data_wait_share=self._pace.wait_share,
            loss=loss,
        )
        self._around.report(progress)
        if time.monotonic() - self._last_heartbeat >= _HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            self._write_heartbeat(progress)

    def _write_heartbeat(self, progress: TrainProgress) -> None:
        around, recipe = self._around, self._recipe
        heartbeat = WorkerProgress(
            worker_id=around.worker_id,
            plan_id=around.identity.recipe_digest,
            sequence=progress.step,
            phase=f"step {progress.step} of {recipe.steps}, loss {progress.loss:.4g}",
            audio_seconds=progress.step * recipe.batch_size * recipe.crop_seconds,
            busy_seconds=self._pace.seconds,
        )
        uri = join_uri(around.run_uri, "workers", f"{around.worker_id}.json")
        try:
            around.storage.write(uri, heartbeat.model_dump_json().encode())
        except HCodecError as error:
            logger.warning("Progress was not written: %s", error)

    def _show(self, done: int) -> None:
        """Store what some held-out clips sound and look like."""
        if not self._ranks.is_first:
            return
        rate = self._learner.objective.codec.sample_rate
        files: dict[str, bytes] = {}
        for index, clip in enumerate(self._held_out[: self._recipe.cadence.num_samples]):
            decoded = rebuilt(self._learner, clip)
            files[f"{index}-original.wav"] = wav_bytes(clip.audio, rate)
            files[f"{index}-decoded.wav"] = wav_bytes(decoded, rate)
            if picture := picture_bytes(clip.audio, decoded, rate, f"step {done}"):
                files[f"{index}.png"] = picture
        folder_uri = join_uri(self._around.run_uri, "samples", f"step-{done:09d}")
        for name, data in files.items():
            self._around.storage.write(join_uri(folder_uri, name), data)
        self._around.tracker.attach(done, files)

    def _save(self, done: int, score: float | None) -> None:
        self._check_lock()
        self._check_bad()
        if self._ranks.is_first:
            self._history.write()
        facts = self._around.identity.model_copy(update={"step": done, "score": score})
        self._check_alike(done)
        self._around.checkpoints.save(facts, self._learner.tensors())

    def _check_lock(self) -> None:
        """Nothing is written into a run that is another process's by now."""
        failure: HCodecError | None = None
        if self._around.lock is not None:
            try:
                self._around.lock.require()
            except HCodecError as error:
                failure = error
        failure = self._ranks.from_first(failure)
        if failure is not None:
            raise failure

    def _check_alike(self, done: int) -> None:
        """All ranks must hold the same weights, else the checkpoint is of none of them."""
        sums = [value.double().sum().item() for value in self._learner.tensors().values()]
        if any(other != sums for other in self._ranks.gather(sums)):
            raise HCodecError(
                f"After step {done} the ranks hold different weights: they run different builds "
                "or hardware; give all the same."
            )

    def _note_bad(self, batch: Batch) -> None:
        for bad in batch.bad:
            if bad.uri not in self._bad:
                logger.warning("%s is left out: %s", bad.uri, bad.detail)
                self._bad[bad.uri] = bad
                if len(self._bad) > self._num_allowed():
                    raise self._too_many()

    def _check_bad(self) -> None:
        """Write down the files left out by any rank, with those of earlier processes."""
        found = {uri: bad for part in self._ranks.gather(self._bad) for uri, bad in part.items()}
        uri = join_uri(self._around.run_uri, QUARANTINE_FILE)
        if self._ranks.is_first and found:
            if self._around.storage.head(uri) is not None:
                known = json.loads(self._around.storage.read(uri))
                found = {entry["uri"]: BadFile(**entry) for entry in known} | found
            text = json.dumps([asdict(found[name]) for name in sorted(found)], indent=1)
            self._around.storage.write(uri, text.encode())
        if self._ranks.from_first(len(found)) > self._num_allowed():
            raise self._too_many()

    def _num_allowed(self) -> int:
        return max(1, round(self._recipe.data.max_bad_share * self._around.num_files))

    def _too_many(self) -> BudgetExceededError:
        last = next(reversed(self._bad.values()), None)
        example = "" if last is None else f" (one: {last.uri}: {last.detail})"
        return BudgetExceededError(
            f"More than {self._num_allowed()} of {self._around.num_files} training files are bad"
            f"{example}: check the sources or raise data.max_bad_share."
        )


class _Pace:
    """How fast steps go, and which share of the time was spent waiting for data."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._start = self._done = 0
        self._waited = 0.0

    def begin(self, start: int) -> None:
        self._begun, self._start, self._done = time.monotonic(), start, start

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        begun = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - begun
        return batch

    def count(self, done: int) -> None:
        self._done = done

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    @property
    def steps_per_second(self) -> float:
        return (self._done - self._start) / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        return self._waited / max(self.seconds, 1e-9)
