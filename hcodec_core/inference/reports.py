"""What a worker tells about itself while it works: ``workers/<worker_id>.json``, and its build."""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hcodec_core import __version__
from hcodec_core.errors import HCodecError
from hcodec_core.inference.engine import Engine
from hcodec_core.jobs import TokenizeJob, WorkerProgress, WorkUse
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 2.0


@dataclass(frozen=True)
class Gain:
    """What was achieved since the last report."""

    num_shards: int = 0
    num_files: int = 0
    audio_seconds: float = 0.0
    num_tokens: int = 0
    busy_seconds: float = 0.0
    work: WorkUse | None = None


class StartClock:
    """Seconds from the start of this process to its first tokens, by part."""

    def __init__(self) -> None:
        """Up to here Python was importing modules."""
        self.seconds = {"import": _process_age()}
        self._last = time.monotonic()
        self._is_over = False

    def lap(self, part: str) -> None:
        """What was done since the last part ends here; nothing counts after ``finish``."""
        now = time.monotonic()
        if not self._is_over:
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def finish(self) -> None:
        """The first tokens are there."""
        self.lap("first tokens")
        self._is_over = True

    @property
    def for_people(self) -> str:
        """The sum, then its parts."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"


def _process_age() -> float:
    """Seconds since this process started; 0 where the system does not say."""
    try:
        # Field 22 counts from after the command name, which may itself hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_seconds = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return 0.0
    return max(0.0, up_seconds - ticks / os.sysconf("SC_CLK_TCK"))


class ProgressBoard:
    """Collects progress from all threads and writes it out every few seconds, if it changed."""

    def __init__(
        self,
        storage: Storage,
        job: TokenizeJob,
        worker_id: str,
        interval_seconds: float,
        start: StartClock | None = None,
    ) -> None:
        """Start the thread that writes. ``start``: runs until the first tokens are counted."""
        self._start = start
        self._storage = storage
        self._uri = join_uri(job.plan_uri, "workers", f"{worker_id}.json")
        self._lock = threading.Lock()
        self._current = WorkerProgress(
            worker_id=worker_id, plan_id=job.plan_id, sequence=0, phase="starting"
        )
        self._written: WorkerProgress | None = None
        self._interval_seconds = interval_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def set_phase(self, phase: str) -> None:
        """Say what the worker is doing; this is no progress."""
        with self._lock:
            self._current = self._current.model_copy(update={"phase": phase})

    def advance(self, gain: Gain) -> None:
        """Count progress."""
        if gain.num_tokens:
            self._end_start()
        with self._lock:
            now = self._current
            self._current = now.model_copy(
                update={
                    "sequence": now.sequence + 1,
                    "num_shards_done": now.num_shards_done + gain.num_shards,
                    "num_files": now.num_files + gain.num_files,
                    "audio_seconds": now.audio_seconds + gain.audio_seconds,
                    "num_tokens": now.num_tokens + gain.num_tokens,
                    "busy_seconds": now.busy_seconds + gain.busy_seconds,
                    "work": _total(now.work, gain.work),
                }
            )

    @property
    def work(self) -> WorkUse:
        """Where the time went in the shards that were finished."""
        return self._current.work or WorkUse()

    def _end_start(self) -> None:
        with self._lock:
            clock, self._start = self._start, None
            if clock is None:
                return
            clock.finish()
            values = {part: round(seconds, 3) for part, seconds in clock.seconds.items()}
            self._current = self._current.model_copy(update={"start_seconds": values})
        logger.info("From the start to the first tokens %s.", clock.for_people)

    def hold(self, shard_id: str, attempt: int) -> None:
        """Say which attempt this worker makes, at once: others may have to end it for us."""
        with self._lock:
            held = self._current.held_shards | {shard_id: attempt}
            self._current = self._current.model_copy(update={"held_shards": held})
        self.write()

    def drop(self, shard_id: str) -> None:
        """Say that a shard is no longer worked on."""
        with self._lock:
            held = {key: k for key, k in self._current.held_shards.items() if key != shard_id}
            self._current = self._current.model_copy(update={"held_shards": held})

    def write(self) -> None:
        """Write the report if it changed; a failure is only logged."""
        with self._lock:
            current = self._current
        if current == self._written:
            return
        try:
            self._storage.write(self._uri, current.model_dump_json().encode())
            self._written = current
        except HCodecError as error:
            logger.warning("Progress was not written: %s", error)

    def close(self, phase: str) -> None:
        """Write a last report and stop."""
        self._stopped.set()
        self._thread.join(_JOIN_SECONDS)
        self.set_phase(phase)
        self.write()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            self.write()


def _total(first: WorkUse | None, second: WorkUse | None) -> WorkUse | None:
    parts = [part for part in (first, second) if part is not None]
    return WorkUse.total(parts) if parts else None


def build_of(engine: Engine) -> dict[str, str]:
    """What made the tokens: versions of code, libraries and compute class; nothing of the host."""
    return {
        "hcodec": __version__,
        "compute_class": engine.codec.spec.settings.compute_class,
        "arithmetic": str(engine.narrow_type or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
