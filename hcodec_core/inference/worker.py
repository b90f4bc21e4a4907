"""A worker: leases shards of a plan and tokenises them until every shard is accounted for.

Any number of workers may run on one plan; they meet only in object storage (see
``dataset.leases``). A worker that finds nothing free watches the leases of the others and takes
over what stands still, so the last of them leaves only when all results are there.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hcodec_core.audio.decode import DecodeSettings
from hcodec_core.audio.supervisor import DecoderPool
from hcodec_core.dataset.batch_choice import read_batch_choice
from hcodec_core.dataset.leases import LeaseTable, LeaseTerms, worker_identity
from hcodec_core.dataset.shards import (
    PlanFiles,
    ShardRef,
    fetch_plan_files,
    lease_uri,
    pending_shards,
)
from hcodec_core.errors import (
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_PREEMPTED,
    ConfigError,
    HCodecError,
    StorageError,
)
from hcodec_core.inference.attempts import Attempt, Workshop
from hcodec_core.inference.batching import Batcher, BatchShape
from hcodec_core.inference.engine import Engine
from hcodec_core.inference.feed import FeedParts, ScratchBudget
from hcodec_core.inference.reports import Gain, ProgressBoard, StartClock, build_of
from hcodec_core.jobs import DecodeLimits, TokenizeJob, read_job
from hcodec_core.models.loading import load_codec
from hcodec_core.storage import Storage, probe_conditional_writes

if TYPE_CHECKING:
    from hcodec_core.models.base import Codec

logger = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_FAREWELL_SECONDS = 3.0
_MISSES_BEFORE_LISTING = 16
_WATCHED_AT_ONCE = 16
_MAX_FAILED_SHARDS = 3
_HEAD_START_SECONDS = 15.0
_MAX_STORAGE_FAULTS = 5


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker runs.

    index: where to start among the shards. identity: unique name of this process (pod UID); host
    and process start stand for it otherwise. device: torch device. num_threads: CPU threads of the
    encoder. num_decoders: audio decoding processes. scratch_path: an existing folder, for downloads
    of up to ``scratch_bytes`` and one Parquet file per shard. num_downloads: at once, per shard.
    num_parallel_shards: how many shards to work on at once, so that the encoder does not wait while
    one begins or ends; None: 2 on a GPU, else 1. num_held_batches: of decoded audio, at most.
    heartbeat_seconds, progress_seconds: how often
    leases and progress are written, at most.
    """

    scratch_path: Path
    index: int = 0
    identity: str | None = None
    device: str = "cpu"
    num_threads: int = 1
    num_decoders: int = 1
    num_downloads: int = 8
    num_parallel_shards: int | None = None
    num_held_batches: int = 8
    scratch_bytes: int = 8 * 1024**3
    heartbeat_seconds: float = 5.0
    progress_seconds: float = 2.0

    @property
    def num_shards_at_once(self) -> int:
        """Shards to work on at once."""
        return self.num_parallel_shards or (2 if self.device.startswith("cuda") else 1)


def run_worker(
    job_uri: str, storage: Storage, options: WorkerOptions, stop: threading.Event
) -> int:
    """Work on a plan until all its shards have results; returns the exit code.

    0: every shard is accounted for. 143: ``stop`` was set; leases are released. 1: this machine
    failed several shards in a row, or its device is broken: another one should go on.

    Raises:
        ConfigError: Job, codec, device or storage cannot be used (exit code 43).
        StorageError: Storage stayed away (exit code 1).
    """
    clock = StartClock()
    job = read_job(storage.read(job_uri))
    plan = fetch_plan_files(storage, job, options.scratch_path / "files.parquet")
    pending = pending_shards(storage, job, plan.shards())
    if not pending:
        logger.info("All %d shards of plan %s have results.", job.num_shards, job.plan_id)
        return EXIT_OK
    if stop.is_set():
        return EXIT_PREEMPTED
    options = _in_batch_class(job, storage, options)
    probe_conditional_writes(storage, job.plan_uri)
    worker_id = worker_identity(options.identity)
    clock.lap("plan")
    board = ProgressBoard(storage, job, worker_id, options.progress_seconds, clock)
    phase = "stopped"
    try:
        board.set_phase("loading codec")
        engine = load_engine(job, storage, options, clock)
        with ExitStack() as stack:
            workshop = _open_workshop(stack, job, storage, options, plan, board, worker_id, engine)
            code = _Foreman(workshop, options, pending, stop).run()
        phase = "done" if code == EXIT_OK else phase
        logger.info("Where the time went: %s.", board.work.for_people)
        return code
    finally:
        board.close(phase)


def _in_batch_class(job: TokenizeJob, storage: Storage, options: WorkerOptions) -> WorkerOptions:
    """The options within the batch class that stands for workers that start now."""
    index = min(read_batch_choice(storage, job.plan_uri).index, len(job.batch_classes) - 1)
    chosen = job.batch_classes[index]
    if index:
        logger.warning("Batch class %d: %s.", index, chosen.for_people)
    return replace(
        options,
        num_held_batches=min(options.num_held_batches, chosen.held_batches),
        num_downloads=min(options.num_downloads, chosen.downloads),
        num_decoders=min(options.num_decoders, chosen.decoders or options.num_decoders),
        num_parallel_shards=chosen.parallel_shards or options.num_parallel_shards,
    )


def load_engine(
    job: TokenizeJob, storage: Storage, options: WorkerOptions, clock: StartClock | None = None
) -> Engine:
    """Load the codec that the job pins. Raises ``ConfigError`` when anything differs."""
    clock = clock or StartClock()
    codec = load_codec(
        job.codec_uri,
        job.settings,
        options.device,
        expected_digest=job.manifest.digest,
        fetch=storage.read,
    )
    if codec.spec.encode_id != job.encode_id:
        raise ConfigError(
            f"The job is for encode id {job.encode_id[:12]}, its codec and settings make "
            f"{codec.spec.encode_id[:12]}: make the plan again with this version."
        )
    engine = Engine(codec, options.num_threads)
    clock.lap("weights")
    # What a first batch costs (compilation, libraries), and what is broken, comes before any lease.
    engine.encode_clips([np.zeros(codec.spec.sample_rate, np.float32)])
    clock.lap("first batch")
    return engine


def _open_workshop(
    stack: ExitStack,
    job: TokenizeJob,
    storage: Storage,
    options: WorkerOptions,
    plan: PlanFiles,
    board: ProgressBoard,
    worker_id: str,
    engine: Engine,
) -> Workshop:
    spec = engine.codec.spec
    held_seconds = options.num_held_batches * spec.settings.shapes.batch_seconds
    pool = stack.enter_context(open_pool(job, options))
    batcher = stack.enter_context(
        Batcher(
            engine,
            batch_shapes(engine.codec),
            max_held_samples=int(held_seconds * spec.sample_rate),
            reference=None if engine.mode == "exact" else engine.in_mode("exact"),
        )
    )
    return Workshop(
        job=job,
        worker_id=worker_id,
        plan=plan,
        feed=FeedParts(
            storage=storage,
            pool=pool,
            batcher=batcher,
            budget=ScratchBudget(options.scratch_bytes),
            spec=spec,
            limits=job.limits,
            num_decoders=options.num_decoders,
            num_downloads=options.num_downloads,
            num_shards_at_once=options.num_shards_at_once,
        ),
        board=board,
        build=build_of(engine),
        scratch_path=options.scratch_path,
        settle_seconds=_terms(job, options).interval_seconds,
    )


def _terms(job: TokenizeJob, options: WorkerOptions) -> LeaseTerms:
    return LeaseTerms(job.lease_seconds, options.heartbeat_seconds)


def open_pool(job: TokenizeJob, options: WorkerOptions) -> DecoderPool:
    """Decoder processes within the job's limits, for its sample rate, channel rule and gain."""
    limits: DecodeLimits = job.limits
    settings = DecodeSettings(
        sample_rate=job.manifest.sample_rate,
        channel=job.settings.channel,
        gain=job.settings.gain,
        max_seconds=limits.max_seconds,
        max_bytes=limits.max_bytes,
        timeout_seconds=limits.timeout_seconds,
    )
    return DecoderPool(options.num_decoders, settings, address_space_bytes=limits.memory_bytes)


def batch_shapes(codec: Codec) -> Callable[[int], BatchShape]:
    """Which batch a clip of so many samples goes to: the engine's own rule, so batches are full."""
    spec = codec.spec
    shapes, rate = spec.settings.shapes, spec.frame_rate
    is_exact = spec.settings.mode == "exact"

    def by_bucket(num_samples: int) -> BatchShape:
        bound = shapes.bucket_frames(spec.num_frames(num_samples))
        return BatchShape(bound, shapes.bucket_rows(bound, rate))

    def by_length(num_samples: int) -> BatchShape:
        rows = 1 if is_exact else by_bucket(num_samples).num_rows
        return BatchShape(num_samples, rows)

    return by_length if codec.batching == "equal-length" else by_bucket


@dataclass
class _Shards:
    """Shards without a known result: those never asked for, and those that others hold."""

    fresh: deque[ShardRef]
    held: deque[ShardRef] = field(default_factory=deque)
    not_before: dict[ShardRef, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.fresh) + len(self.held)

    def keep(self, pending: Sequence[ShardRef]) -> None:
        """Forget all but ``pending``."""
        known = set(pending)
        self.fresh = deque(shard for shard in self.fresh if shard in known)
        self.held = deque(shard for shard in self.held if shard in known)


class _Foreman:
    """Decides which shard is next, and when all is done. Runs in the main thread."""

    def __init__(
        self,
        workshop: Workshop,
        options: WorkerOptions,
        pending: Sequence[ShardRef],
        stop: threading.Event,
    ) -> None:
        job = workshop.job
        self._workshop, self._options, self._stop = workshop, options, stop
        self._job, self._storage = job, workshop.feed.storage
        self._table = LeaseTable(self._storage, workshop.worker_id, _terms(job, options))
        self._poll_seconds = min(5.0, job.lease_seconds / 12)
        self._next_watch = 0.0
        self._num_misses = 0
        self._num_storage_faults = 0
        self._failed_in_a_row: set[str] = set()
        self._last_error: BaseException | None = None
        self._active: list[Attempt] = []
        # Each index has an order of its own, so that workers seldom ask for the same shard.
        order = list(pending)
        random.Random(f"{job.plan_id}:{options.index}").shuffle(order)
        self._shards = _Shards(deque(order))
        self._num_parallel = options.num_shards_at_once

    def run(self) -> int:
        """Work until all shards are accounted for; returns the exit code."""
        try:
            while self._shards or self._active:
                if self._stop.is_set():
                    return EXIT_PREEMPTED
                self._reap()
                if self._is_hopeless():
                    return self._failure_code()
                if len(self._active) < self._num_parallel and self._start_next():
                    continue
                self._wait()
            return EXIT_OK
        finally:
            self._release_all()

    def _wait(self) -> None:
        self._workshop.board.set_phase("encoding" if self._active else "waiting for other workers")
        self._stop.wait(_TICK_SECONDS)

    def _start_next(self) -> bool:
        """Begin an attempt if one can be had; whether it is worth asking again at once."""
        try:
            if self._shards.fresh:
                self._try_fresh()
                found = True
            else:
                found = self._watch_held()
        except StorageError as error:
            self._num_storage_faults += 1
            if self._num_storage_faults >= _MAX_STORAGE_FAULTS:
                raise
            logger.warning("Leases cannot be read now: %s", error)
            self._stop.wait(self._poll_seconds)
            return True
        self._num_storage_faults = 0
        return found

    def _try_fresh(self) -> None:
        shard = self._shards.fresh.popleft()
        self._shards.held.append(shard)
        if self._try(shard):
            self._num_misses = 0
            return
        self._num_misses += 1
        if self._num_misses >= _MISSES_BEFORE_LISTING:
            self._num_misses = 0
            self._refresh()

    def _watch_held(self) -> bool:
        """Look at some leases of others, not too often; true when an attempt began."""
        now = time.monotonic()
        if now < self._next_watch or not self._shards.held:
            return False
        self._next_watch = now + self._poll_seconds
        self._refresh()
        for _ in range(min(_WATCHED_AT_ONCE, len(self._shards.held))):
            shard = self._shards.held[0]
            self._shards.held.rotate(-1)
            if self._may_try(shard, now) and self._try(shard):
                self._next_watch = now
                return True
        return False

    def _may_try(self, shard: ShardRef, now: float) -> bool:
        is_mine = any(attempt.shard == shard for attempt in self._active)
        return not is_mine and now >= self._shards.not_before.get(shard, 0.0)

    def _try(self, shard: ShardRef) -> bool:
        prefix = lease_uri(self._job, shard.shard_id)
        lease = self._table.try_claim(prefix, self._job.max_attempts)
        if lease is None:
            return False
        self._workshop.board.hold(shard.shard_id, lease.attempt)
        attempt = Attempt(self._workshop, shard, lease)
        attempt.start()
        self._active.append(attempt)
        return True

    def _refresh(self) -> None:
        """Forget shards that have results by now."""
        known = [*self._shards.fresh, *self._shards.held]
        mine = {attempt.shard for attempt in self._active}
        pending = set(pending_shards(self._storage, self._job, known))
        self._shards.keep([shard for shard in known if shard in pending or shard in mine])

    def _reap(self) -> None:
        for attempt in [attempt for attempt in self._active if not attempt.is_alive()]:
            self._active.remove(attempt)
            self._workshop.board.drop(attempt.shard.shard_id)
            if attempt.result is not None:
                self._shards.held.remove(attempt.shard)
                self._failed_in_a_row.clear()
                self._workshop.board.advance(Gain(num_shards=1, work=attempt.result.work))
            elif attempt.error is not None:
                self._after_failure(attempt)

    def _after_failure(self, attempt: Attempt) -> None:
        self._failed_in_a_row.add(attempt.shard.shard_id)
        self._last_error = attempt.error
        # The next attempt had better be made elsewhere: give the others a head start.
        delay = min(_HEAD_START_SECONDS, self._job.lease_seconds / 4)
        self._shards.not_before[attempt.shard] = time.monotonic() + delay

    def _is_hopeless(self) -> bool:
        """Whether this machine rather than a shard is at fault."""
        if self._last_error is None:
            return False
        if len(self._failed_in_a_row) >= _MAX_FAILED_SHARDS:
            logger.error("%d shards in a row failed here.", len(self._failed_in_a_row))
            return True
        return not isinstance(self._last_error, HCodecError) and not self._device_works()

    def _device_works(self) -> bool:
        if not self._options.device.startswith("cuda"):
            return True
        try:
            torch.cuda.synchronize(self._options.device)
        except RuntimeError as error:
            logger.error("The device does not work any more: %s", error)
            return False
        return True

    def _failure_code(self) -> int:
        error = self._last_error
        return error.exit_code if isinstance(error, HCodecError) else EXIT_FAILURE

    def _release_all(self) -> None:
        """Give all shards back at once; their threads end in their own time."""
        for attempt in self._active:
            attempt.stop()
        for attempt in self._active:
            try:
                attempt.lease.release("the worker stopped")
            except HCodecError as error:
                logger.warning("%s was not released: %s", attempt.lease.prefix_uri, error)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        for attempt in self._active:
            attempt.join(max(0.0, deadline - time.monotonic()))
