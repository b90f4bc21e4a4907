"""How far a job is, by what workers left in storage: results for truth, heartbeats for pace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from pydantic import ValidationError

from hcodec_core.errors import FolderMissingError, ObjectMissingError
from hcodec_core.jobs import WorkerProgress
from hcodec_core.storage import ObjectInfo, Storage, join_uri

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class JobSize:
    """Totals of a plan, from its job document."""

    num_shards: int
    num_files: int


@dataclass(frozen=True)
class Progress:
    """Sums over the workers of a job; ``num_shards_done`` counts result objects.

    ``phases``: what the workers say they do, most frequent first.
    """

    num_shards_done: int = 0
    num_files: int = 0
    audio_seconds: float = 0.0
    num_tokens: int = 0
    phases: tuple[str, ...] = ()


class ProgressReader:
    """Reads progress of one job; an object that did not change is not read again."""

    def __init__(self, storage: Storage, plan_uri: str) -> None:
        """Keep where to look; nothing is read yet."""
        self._storage = storage
        self._results_uri = join_uri(plan_uri, "results") + "/"
        self._workers_uri = join_uri(plan_uri, "workers") + "/"
        self._known: dict[str, tuple[str, WorkerProgress]] = {}

    def read(self) -> Progress:
        """Present progress. Raises what the storage raises."""
        num_results = sum(1 for _ in list_folder(self._storage, self._results_uri))
        for info in list_folder(self._storage, self._workers_uri):
            self._refresh(info)
        reports = [report for _, report in self._known.values()]
        names = [report.phase for report in reports if report.phase]
        return Progress(
            num_shards_done=num_results,
            num_files=sum(report.num_files for report in reports),
            audio_seconds=sum(report.audio_seconds for report in reports),
            num_tokens=sum(report.num_tokens for report in reports),
            phases=tuple(sorted(set(names), key=names.count, reverse=True)),
        )

    def _refresh(self, info: ObjectInfo) -> None:
        known = self._known.get(info.uri)
        if known is not None and known[0] == info.etag:
            return
        try:
            report = WorkerProgress.model_validate_json(self._storage.read(info.uri))
        except (ObjectMissingError, ValidationError):
            return  # a heartbeat is news, not truth: the next one will do
        self._known[info.uri] = (info.etag, report)


class ProgressMeter:
    """Turns successive progress into log lines with pace and time to go."""

    def __init__(self, size: JobSize) -> None:
        """Begin; the first progress seen is the one that pace is counted from."""
        self._size = size
        self._first: tuple[float, Progress] | None = None

    def line(self, progress: Progress, now_seconds: float, num_alive: int, num_workers: int) -> str:
        """One line for people; ``now_seconds`` on any monotonic clock."""
        if self._first is None:
            self._first = (now_seconds, progress)
        elapsed = now_seconds - self._first[0]
        files = min(progress.num_files, self._size.num_files)
        parts = [
            f"running {num_alive}/{num_workers} workers",
            f"shards {progress.num_shards_done}/{self._size.num_shards}",
            f"files {files}/{self._size.num_files}",
            f"{progress.audio_seconds / _SECONDS_PER_HOUR:.2f} h audio",
        ]
        if elapsed > 0:
            audio = progress.audio_seconds - self._first[1].audio_seconds
            parts.append(f"{audio / elapsed:.{0 if audio >= 10 * elapsed else 1}f} x real time")
            parts.append(f"ETA {self._eta(progress, files, elapsed)}")
        if not progress.num_files and progress.phases:
            parts.append(f"now {', '.join(progress.phases)}")
        return ", ".join(parts)

    def _eta(self, progress: Progress, files: int, elapsed: float) -> str:
        assert self._first is not None
        gained = progress.num_files - self._first[1].num_files
        if gained <= 0:
            return "unknown"
        return clock((self._size.num_files - files) * elapsed / gained)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def list_folder(storage: Storage, folder_uri: str) -> Iterator[ObjectInfo]:
    """Objects in a folder of a plan, none when a local folder was not made yet."""
    with suppress(FolderMissingError):
        yield from storage.list_objects(folder_uri)


def add_totals(progress: Progress, size: JobSize) -> Progress:
    """Progress of a job whose shards are all accounted for, whatever heartbeats were lost."""
    return replace(progress, num_shards_done=size.num_shards, num_files=size.num_files)
