"""Clips of many files, and of several shards at once, encoded together by one thread.

Which clips share a batch never changes their codes in mode exact (see ``engine``); it only decides
how full the batches are. A batch runs when it is full; a part-filled one only when there is
nothing better to do: too much audio is held, a clip has waited long, or no more clips will come.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from hcodec_core.errors import AudioError, PreemptedError
from hcodec_core.inference.engine import Clip, ClipTokens, Cuts

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.1
_FAREWELL_SECONDS = 5.0


class ClipEncoder(Protocol):
    """What clips are encoded with; ``Engine`` is one."""

    def encode_clips(self, clips: list[Clip], cuts: list[Cuts] | None = None) -> list[ClipTokens]:
        """Tokens of each clip, in order; ``cuts`` are left out when no clip has any."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of one clip, and its share of the seconds that its batch took.

    reference: what the batcher's ``reference`` made of the clip, when it was asked to.
    """

    tokens: ClipTokens
    seconds: float
    reference: ClipTokens | None = None


@dataclass(frozen=True)
class BatchShape:
    """Clips of equal ``key`` can share a batch of up to ``num_rows``."""

    key: int
    num_rows: int


@dataclass(frozen=True)
class _Waiting:
    clip: Clip
    cuts: Cuts
    future: Future[Encoded]
    arrived: float
    is_sampled: bool


class Batcher:
    """Owns the thread that encodes. Use as a context manager, or call ``close``.

    shape_of: from samples of a clip to the batch that it belongs to. max_held_samples: how much
    audio may wait before part-filled batches run and ``submit`` blocks. max_wait_seconds: how long
    a clip waits for company while others still feed. reference: encodes clips that are sampled once
    more, each alone.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        shape_of: Callable[[int], BatchShape],
        *,
        max_held_samples: int,
        max_wait_seconds: float = 5.0,
        reference: ClipEncoder | None = None,
    ) -> None:
        """Start the thread."""
        self._encoder = encoder
        self._reference = reference
        self._shape_of = shape_of
        self._max_held_samples = max_held_samples
        self._max_wait_seconds = max_wait_seconds
        self._buckets: dict[BatchShape, deque[_Waiting]] = {}
        self._held_samples = 0
        self._num_feeding = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self.busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Announce clips: while anyone feeds, part-filled batches wait for company."""
        with self._changed:
            self._num_feeding += 1

    def end(self) -> None:
        """Take one ``begin`` back: no more clips come from there."""
        with self._changed:
            self._num_feeding -= 1
            self._changed.notify_all()

    def submit(self, clip: Clip, cuts: Cuts = (), *, is_sampled: bool = False) -> Future[Encoded]:
        """Hand over a clip, float32 [N]; blocks while too much audio is held.

        ``cuts``: base frames at which a token of a variable rate has to begin. ``is_sampled``: also
        encode it with the reference, if there is one. The future raises what encoding raised.
        Raises ``PreemptedError`` when closed.
        """
        waiting = _Waiting(clip, cuts, Future(), time.monotonic(), is_sampled)
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._held_samples < self._max_held_samples
            )
            if self._is_closed:
                raise PreemptedError("The encoder is closed: no more clips can be encoded.")
            self._buckets.setdefault(self._shape_of(len(clip)), deque()).append(waiting)
            self._held_samples += len(clip)
            self._changed.notify_all()
        return waiting.future

    def close(self) -> None:
        """Drop what waits, and let the batch under way end if that is soon."""
        with self._changed:
            self._is_closed = True
            dropped = [waiting for bucket in self._buckets.values() for waiting in bucket]
            self._buckets.clear()
            self._changed.notify_all()
        for waiting in dropped:
            waiting.future.cancel()
        self._thread.join(_FAREWELL_SECONDS)

    def __enter__(self) -> Batcher:
        """This batcher."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                batch = self._next_batch()
                while not batch and not self._is_closed:
                    self._changed.wait(_IDLE_SECONDS)
                    batch = self._next_batch()
                if self._is_closed:
                    for waiting in batch:
                        waiting.future.cancel()
                    return
            live = [w for w in batch if w.future.set_running_or_notify_cancel()]
            if live:
                self._encode(live)
            with self._changed:
                self._held_samples -= sum(len(waiting.clip) for waiting in batch)
                self._changed.notify_all()

    def _next_batch(self) -> list[_Waiting]:
        """Clips to run now, taken out of their bucket; none when it is better to wait."""
        shape = self._choose()
        if shape is None:
            return []
        bucket = self._buckets[shape]
        taken = [bucket.popleft() for _ in range(min(shape.num_rows, len(bucket)))]
        if not bucket:
            del self._buckets[shape]
        return taken

    def _choose(self) -> BatchShape | None:
        if not self._buckets:
            return None
        fullest = max(self._buckets, key=lambda shape: len(self._buckets[shape]) / shape.num_rows)
        is_full = len(self._buckets[fullest]) >= fullest.num_rows
        if is_full or self._num_feeding == 0 or self._held_samples >= self._max_held_samples:
            return fullest
        oldest = min(self._buckets, key=lambda shape: self._buckets[shape][0].arrived)
        age = time.monotonic() - self._buckets[oldest][0].arrived
        return oldest if age >= self._max_wait_seconds else None

    def _encode(self, batch: list[_Waiting]) -> None:
        started = time.monotonic()
        try:
            tokens = self._tokens_of(self._encoder, batch)
            seconds = time.monotonic() - started
            references = [self._reference_of(waiting) for waiting in batch]
        except AudioError as error:
            self._encode_singly(batch, error)
            return
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait for the clips
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        self.busy_seconds += seconds
        num_samples = sum(len(waiting.clip) for waiting in batch)
        for waiting, clip_tokens, reference in zip(batch, tokens, references, strict=True):
            share = seconds * len(waiting.clip) / num_samples
            waiting.future.set_result(Encoded(clip_tokens, share, reference))

    def _reference_of(self, waiting: _Waiting) -> ClipTokens | None:
        if self._reference is None or not waiting.is_sampled:
            return None
        return self._tokens_of(self._reference, [waiting])[0]

    def _tokens_of(self, encoder: ClipEncoder, batch: list[_Waiting]) -> list[ClipTokens]:
        clips = [waiting.clip for waiting in batch]
        if any(waiting.cuts for waiting in batch):
            return encoder.encode_clips(clips, [waiting.cuts for waiting in batch])
        return encoder.encode_clips(clips)

    def _encode_singly(self, batch: list[_Waiting], error: AudioError) -> None:
        """One clip spoils a batch: find it, so that the others do not suffer."""
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for waiting in batch:
            self._encode([waiting])
