"""From source objects to clips in the batcher: download ahead, decode in processes, segment.

Files are downloaded in the order of the plan and decoded as they arrive; ``Feed`` gives them back
in the order of the plan again. What is wrong with a file becomes its outcome; only what is wrong
with the machine or the storage is an error.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hcodec_core.audio.decode import DecodedInfo
from hcodec_core.audio.segments import Segment, segments
from hcodec_core.audio.supervisor import DecoderPool
from hcodec_core.dataset.shards import ShardFile
from hcodec_core.errors import (
    AudioError,
    ObjectMissingError,
    PreemptedError,
    QuarantineReason,
    SourceChangedError,
)
from hcodec_core.inference.batching import Batcher, Encoded
from hcodec_core.inference.segmented import token_bounds
from hcodec_core.jobs import (
    DecodeLimits,
    FileOutcome,
    FormatUse,
    Outcome,
    StepUse,
    Timings,
    WorkUse,
)
from hcodec_core.storage import Storage
from hcodec_core.tokens import CodecSpec

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_JOIN_SECONDS = 2.0
_MAX_FILES_AHEAD = 256
_DETAIL_CHARS = 500
_SAMPLED_SECONDS = 60.0  # of each shard, from its first clips: a sixtieth of an hour

Check = Callable[[], None]
"""Called often while waiting; raises when the work is to stop."""


@dataclass(frozen=True)
class ClipPart:
    """One segment on its way through the encoder. Frames: of the segment's tokens, base frames."""

    first_frame: int
    end_frame: int | None  # None: to the end
    encoded: Future[Encoded]


@dataclass(frozen=True)
class FedFile:
    """A file after decoding: its clips and facts, or the outcome that it has instead."""

    file: ShardFile
    parts: Sequence[ClipPart] = ()
    info: DecodedInfo | None = None
    outcome: FileOutcome | None = None


@dataclass
class FeedSeconds:
    """Seconds that threads spent on each step, added up, and what each format needed."""

    download: float = 0.0
    decode: float = 0.0
    formats: dict[str, FormatUse] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add_download(self, seconds: float) -> None:
        """A file was downloaded."""
        with self.lock:
            self.download += seconds

    def add_decode(self, seconds: float) -> None:
        """A file was decoded, or given up."""
        with self.lock:
            self.decode += seconds

    def add_file(self, container: str, use: FormatUse) -> None:
        """A whole file of this container was decoded."""
        with self.lock:
            parts = [WorkUse(formats=self.formats), WorkUse(formats={container: use})]
            self.formats = WorkUse.total(parts).formats


class ScratchBudget:
    """Bytes and files that may lie on the scratch disk at once, shared by all shards of a worker.

    A file larger than the whole budget may come when nothing else is there.
    """

    def __init__(self, max_bytes: int, max_files: int = _MAX_FILES_AHEAD) -> None:
        """Nothing is taken yet."""
        self._max_bytes, self._max_files = max_bytes, max_files
        self._num_bytes = self._num_files = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int, check: Check) -> None:
        """Wait until a file of this size has room. Raises what ``check`` raises."""
        with self._changed:
            while not self._fits(num_bytes):
                self._changed.wait(_POLL_SECONDS)
                check()
            self._num_bytes += num_bytes
            self._num_files += 1

    def give_back(self, num_bytes: int) -> None:
        """The file is gone from the disk."""
        with self._changed:
            self._num_bytes -= num_bytes
            self._num_files -= 1
            self._changed.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        if self._num_files == 0:
            return True
        within = self._num_bytes + num_bytes <= self._max_bytes
        return within and self._num_files < self._max_files


@dataclass(frozen=True)
class FeedParts:
    """What all feeds of a worker share. ``num_decoders``: processes of ``pool``.

    ``num_shards_at_once``: feeds that share the rest.
    """

    storage: Storage
    pool: DecoderPool
    batcher: Batcher
    budget: ScratchBudget
    spec: CodecSpec
    limits: DecodeLimits
    num_decoders: int
    num_downloads: int
    num_shards_at_once: int = 1

    def work(self, seconds: FeedSeconds, timings: Timings, audio_seconds: float) -> WorkUse:
        """Use of each step while one shard was worked on."""
        # Shards that are worked on at once share decoders and encoder; downloads are their own.
        passed = timings.total_seconds
        shared = passed / self.num_shards_at_once
        steps = {
            "network": (timings.download_seconds, passed * self.num_downloads),
            "decode": (timings.decode_seconds, shared * self.num_decoders),
            "encode": (timings.encode_seconds, shared),
            "write": (timings.write_seconds, passed),
        }
        return WorkUse(
            steps={
                name: StepUse(busy_seconds=busy, lane_seconds=lanes)
                for name, (busy, lanes) in steps.items()
            },
            formats=seconds.formats,
            audio_seconds=audio_seconds,
        )


@dataclass
class _Stage:
    """A file on the local disk, waiting to be decoded."""

    file: ShardFile
    path: Path


class Feed:
    """Feeds the files of one shard to the batcher. Use as a context manager; iterate once.

    ``progress`` is called for every step of real work, from any thread.
    """

    def __init__(
        self,
        parts: FeedParts,
        files: Sequence[ShardFile],
        folder_path: Path,
        check: Check,
        progress: Callable[[], None],
    ) -> None:
        """Nothing runs before the block is entered. ``folder_path``: empty, for downloads."""
        self.seconds = FeedSeconds()
        self._parts, self._files, self._folder_path = parts, files, folder_path
        self._outer_check, self._progress = check, progress
        self._to_download = iter(files)
        self._local: queue.SimpleQueue[_Stage | None] = queue.SimpleQueue()
        self._fed: dict[int, FedFile] = {}
        self._changed = threading.Condition()
        self._download_order = threading.Lock()
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._num_open = len(files)
        self._is_feeding = False
        self._num_bytes_seen = 0
        self._num_sampled_samples = 0
        self._threads = [
            *self._make_threads("download", parts.num_downloads, self._download_all),
            *self._make_threads("decode", parts.num_decoders, self._decode_all),
        ]

    def __enter__(self) -> Feed:
        """Start downloading and decoding."""
        self._is_feeding = bool(self._files)
        if self._is_feeding:
            self._parts.batcher.begin()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the threads; what is still on its way is dropped."""
        with self._changed:
            self._is_stopped = True
            dropped = list(self._fed.values())
            self._changed.notify_all()
        for _thread in self._threads:
            self._local.put(None)
        for fed in dropped:
            _cancel(fed.parts)
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._drop_local()
        self._end_feeding()

    def __iter__(self) -> Iterator[FedFile]:
        """Files in the order of the plan, each as soon as it and those before it are decoded.

        Raises what the outer check raises, and ``StorageError`` and the like from the threads.
        """
        for file in self._files:
            yield self._wait_for(file.file_index)

    def _wait_for(self, file_index: int) -> FedFile:
        while True:
            with self._changed:
                if self._failure is not None:
                    raise self._failure
                if file_index in self._fed:
                    return self._fed.pop(file_index)
                self._changed.wait(_POLL_SECONDS)
            self._outer_check()
            self._notice_bytes()

    def _notice_bytes(self) -> None:
        """A download of minutes is progress as long as its file grows."""
        seen = 0
        for path in self._folder_path.iterdir():
            with suppress(FileNotFoundError):
                seen += path.stat().st_size
        if seen > self._num_bytes_seen:
            self._progress()
        self._num_bytes_seen = seen

    def _make_threads(
        self, name: str, count: int, target: Callable[[], None]
    ) -> list[threading.Thread]:
        return [
            threading.Thread(target=self._guarded, args=(target,), name=name, daemon=True)
            for _ in range(min(count, len(self._files)))
        ]

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:  # noqa: BLE001 - raised again where the shard is worked on
            with self._changed:
                if not self._is_stopped and self._failure is None:
                    self._failure = error
                self._changed.notify_all()

    def _check(self) -> None:
        if self._is_stopped or self._failure is not None:
            raise PreemptedError("Feeding was stopped.")

    def _download_all(self) -> None:
        while True:
            with self._download_order:
                self._check()
                file = next(self._to_download, None)
                if file is None:
                    return
                # In the order of the plan: room must never go to a later file first.
                self._parts.budget.take(self._size_on_disk(file), self._check)
            is_here = False
            try:
                is_here = self._download(file)
            finally:
                if not is_here:
                    self._parts.budget.give_back(self._size_on_disk(file))
            if is_here and self._is_stopped:
                self._drop_local()

    def _size_on_disk(self, file: ShardFile) -> int:
        return 0 if file.size > self._parts.limits.max_bytes else file.size

    def _download(self, file: ShardFile) -> bool:
        """Whether the file is on the disk now; otherwise it has its outcome."""
        if file.size > self._parts.limits.max_bytes:
            limit = self._parts.limits.max_bytes
            message = f"The object has {file.size} bytes; {limit} are allowed."
            self._add(FedFile(file, outcome=quarantined(file, QuarantineReason.TOO_LARGE, message)))
            return False
        path = self._folder_path / str(file.file_index)
        started = time.monotonic()
        try:
            self._parts.storage.download(file.uri, path, file.etag)
        except (SourceChangedError, ObjectMissingError) as error:
            is_gone = isinstance(error, ObjectMissingError)
            outcome = Outcome.DELETED if is_gone else Outcome.CHANGED
            path.unlink(missing_ok=True)
            self._add(FedFile(file, outcome=_outcome(file, outcome)))
            return False
        self.seconds.add_download(time.monotonic() - started)
        self._progress()
        self._local.put(_Stage(file, path))
        return True

    def _decode_all(self) -> None:
        while not self._is_stopped and (stage := self._local.get()) is not None:
            try:
                self._check()
                self._add(self._decode(stage))
            finally:
                stage.path.unlink(missing_ok=True)
                self._parts.budget.give_back(self._size_on_disk(stage.file))

    def _decode(self, stage: _Stage) -> FedFile:
        clips: list[ClipPart] = []
        clock = _Clock()
        try:
            info = self._decode_into(stage.path, clips, clock)
        except AudioError as error:
            _cancel(clips)
            outcome = quarantined(stage.file, error.reason, str(error))
            return FedFile(stage.file, outcome=outcome)
        except BaseException:
            _cancel(clips)
            raise
        finally:
            self.seconds.add_decode(clock.seconds)
        self.seconds.add_file(
            info.container.value,
            FormatUse(
                num_bytes=stage.file.size,
                audio_seconds=info.duration_seconds,
                decode_seconds=clock.seconds,
            ),
        )
        return FedFile(stage.file, tuple(clips), info)

    def _decode_into(self, path: Path, clips: list[ClipPart], clock: _Clock) -> DecodedInfo:
        spec = self._parts.spec
        with clock.running(), self._parts.pool.decode(path) as stream:
            cut = segments(
                stream,
                sample_rate=spec.sample_rate,
                hop_length=spec.hop_length,
                segment_seconds=spec.settings.segment_seconds,
                halo_seconds=spec.settings.halo_seconds,
            )
            for segment in cut:
                with clock.standing():
                    self._check()
                    clips.append(self._submit(segment))
                    self._progress()
            return stream.info

    def _submit(self, segment: Segment) -> ClipPart:
        num_samples, shortest = len(segment.samples), self._parts.spec.min_samples
        if num_samples < shortest:
            raise AudioError(
                QuarantineReason.TOO_SHORT,
                f"The file has {num_samples} samples at the codec's rate; it needs {shortest}.",
            )
        first, end = token_bounds(segment)
        cuts: tuple[int, ...] = ()
        if self._parts.spec.manifest.is_variable_rate:
            # No token may hold frames of the halo beside frames that are kept.
            cuts = tuple(frame for frame in (first, end) if frame)
        encoded = self._parts.batcher.submit(
            segment.samples, cuts, is_sampled=self._is_sampled(num_samples)
        )
        encoded.add_done_callback(lambda _: self._progress())
        return ClipPart(first, end, encoded)

    def _is_sampled(self, num_samples: int) -> bool:
        """Whether the next clip is one of those that measure mode fast."""
        spec = self._parts.spec
        if spec.settings.mode == "exact":
            return False
        with self._changed:
            is_wanted = self._num_sampled_samples < _SAMPLED_SECONDS * spec.sample_rate
            self._num_sampled_samples += num_samples * is_wanted
            return is_wanted

    def _add(self, fed: FedFile) -> None:
        with self._changed:
            self._fed[fed.file.file_index] = fed
            self._num_open -= 1
            is_last = self._num_open == 0
            self._changed.notify_all()
        self._progress()
        if is_last:
            self._end_feeding()

    def _end_feeding(self) -> None:
        with self._changed:
            was_feeding, self._is_feeding = self._is_feeding, False
        if was_feeding:
            self._parts.batcher.end()

    def _drop_local(self) -> None:
        """Give back the room of files that nobody will decode any more."""
        with suppress(queue.Empty):
            while True:
                if (stage := self._local.get_nowait()) is not None:
                    self._parts.budget.give_back(self._size_on_disk(stage.file))


class _Clock:
    """Seconds of work on one file, without the waits for the encoder."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started

    @contextmanager
    def standing(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds -= time.monotonic() - started


def _cancel(parts: Sequence[ClipPart]) -> None:
    for part in parts:
        part.encoded.cancel()


def _outcome(file: ShardFile, outcome: Outcome) -> FileOutcome:
    return FileOutcome(uri=file.uri, etag=file.etag, outcome=outcome)


def quarantined(file: ShardFile, reason: QuarantineReason, detail: str) -> FileOutcome:
    """Outcome of a file that cannot be used."""
    return FileOutcome(
        uri=file.uri,
        etag=file.etag,
        outcome=Outcome.QUARANTINED,
        reason=reason,
        detail=detail[:_DETAIL_CHARS],
    )
