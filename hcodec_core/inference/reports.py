"""What a worker tells about itself while it works: ``workers/<worker_id>.json``, and its build."""

from __future__ import annotations

import logging
import platform
import threading
from dataclasses import dataclass

import torch

from hcodec_core import __version__
from hcodec_core.errors import HCodecError
from hcodec_core.inference.engine import Engine
from hcodec_core.jobs import TokenizeJob, WorkerProgress
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


class ProgressBoard:
    """Collects progress from all threads and writes it out every few seconds, if it changed."""

    def __init__(
        self, storage: Storage, job: TokenizeJob, worker_id: str, interval_seconds: float
    ) -> None:
        """Start the thread that writes."""
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
                }
            )

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


def build_of(engine: Engine) -> dict[str, str]:
    """What made the tokens: versions of code, libraries and compute class; nothing of the host."""
    return {
        "hcodec": __version__,
        "compute_class": engine.codec.spec.settings.compute_class,
        "arithmetic": str(engine.narrow_type or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
