"""Backend ``local``: N worker processes on this machine, in their own sessions.

They outlive the task that started them and the triggerer that watches them. Who and where they are
is one small object in storage, ``<plan_uri>/backend/<job name>.json``, so that a retry or another
triggerer finds them and never starts a second set. A lock file of this host orders those who change
it; on another host nobody changes it before the workers' heartbeats stood still for a lease.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_airflow.backends import processes
from hcodec_airflow.backends.base import JobRequest, Observation, Phase, Worker
from hcodec_airflow.backends.processes import ProcessGroup
from hcodec_airflow.logs_page import write_logs_page
from hcodec_airflow.progress import list_folder
from hcodec_airflow.settings import Settings
from hcodec_core.errors import ConfigError, ObjectMissingError, StorageError
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)

KILL_GRACE_SECONDS = 15.0
_WATCH_SECONDS = 2.0
_HOST_EXECUTORS = frozenset({"LocalExecutor", "SequentialExecutor", "DebugExecutor"})
# The metadata database, the Fernet key and the task's own token are none of a worker's business.
_WITHHELD_VARIABLE = re.compile(r"_{0,2}AIRFLOW.*")


class WorkerRecord(BaseModel):
    """One worker process; ``num_starts`` within the present owner."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    pid: int
    started_at: float
    num_starts: int

    @property
    def group(self) -> ProcessGroup:
        """The process group to look for."""
        return ProcessGroup(self.pid, self.started_at)


class JobRecord(BaseModel):
    """The workers of a job: whose they are, on which host, and their files there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    host_id: str
    host_name: str
    folder: str
    owner: str
    is_killed: bool = False
    workers: tuple[WorkerRecord, ...] = ()


def open_backend(settings: Settings, *, is_offline: bool = False) -> LocalBackend:
    """The local backend as this installation configures it; it never asks anybody."""
    return LocalBackend(settings.open_storage(), settings.local_state_path, settings.config_path)


def refuse_remote_executor(executor: str) -> None:
    """Raise ``ConfigError`` unless tasks run on the host that runs the triggerer.

    ``executor`` is a class path or an alias as Airflow's ``[core] executor`` and tasks name it. The
    triggerer itself refuses workers of another host, so a shared executor on split hosts is
    found out there.
    """
    first = executor.split(",")[0].split(";")[0]
    name = re.split(r"[.:=]", first)[-1].strip()
    if name not in _HOST_EXECUTORS:
        raise ConfigError(
            f"Backend local cannot run under {name}: its tasks may run on other hosts than the "
            "triggerer; use LocalExecutor on one host or another backend."
        )


class LocalBackend:
    """See ``Backend``; every method acts on processes of this host only."""

    def __init__(self, storage: Storage, state_path: Path, config_path: Path) -> None:
        """Keep where records, local files and the workers' configuration lie."""
        self._storage = storage
        self._state_path = state_path
        self._config_path = config_path

    def submit_or_adopt(self, request: JobRequest, owner: str) -> Observation:
        """See ``Backend``."""
        self._await_foreign_workers(request)
        with self._locked(request):
            record = self._adopted(request, owner)
            # Written before any start: a starter that dies leaves strays that the next one finds.
            self._write(request, record)
            self._start_missing(request, record)
        return self.observe(request)

    def restart_ended(self, request: JobRequest, owner: str) -> None:
        """See ``Backend``."""
        with self._locked(request):
            record = self._read(request)
            if record is not None and record.owner == owner and not record.is_killed:
                self._check_host(record)
                self._start_missing(request, record)

    def tend(self, request: JobRequest, owner: str) -> None:
        """See ``Backend``: the shards of a worker are freed when it is started again."""

    def observe(self, request: JobRequest) -> Observation:
        """See ``Backend``. Raises ``ConfigError`` when the workers are on another host."""
        record = self._read(request)
        if record is None:
            return Observation(Phase.SCHEDULING, reason="no worker was started yet")
        self._check_host(record)
        workers = tuple(self._look(record, worker) for worker in record.workers)
        if any(worker.is_alive for worker in workers):
            return Observation(Phase.RUNNING, workers)
        return Observation(Phase.KILLED if record.is_killed else Phase.ENDED, workers)

    def kill(self, request: JobRequest, owner: str) -> bool:
        """See ``Backend``."""
        with self._locked(request):
            record = self._read(request)
            if record is None or record.owner != owner or record.host_id != processes.host_id():
                return False
            self._write(request, record.model_copy(update={"is_killed": True}))
            processes.stop([worker.group for worker in record.workers], KILL_GRACE_SECONDS)
        return True

    def logs(self, request: JobRequest, worker: Worker, max_lines: int) -> Sequence[str]:
        """See ``Backend``."""
        record = self._read(request)
        path = Path(record.folder) / f"worker-{worker.index}.log" if record else None
        if path is None or not path.exists():
            return []
        with path.open(errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=max_lines)]

    def conclude(self, request: JobRequest, owner: str) -> Sequence[str]:
        """See ``Backend``. Scratch files go; local logs stay for the next try to append to."""
        self.kill(request, owner)
        uris = self._archive_logs(request)
        write_logs_page(self._storage, request.plan_uri)
        return uris

    @asynccontextmanager
    async def following(self, request: JobRequest) -> AsyncIterator[None]:
        """See ``Backend``: processes of this host are looked at when asked."""
        yield

    def manifest(self, request: JobRequest) -> str:
        """See ``Backend``: the command of each worker."""
        folder = self._state_path / request.name
        words = [self._command(request, folder, index) for index in range(request.num_workers)]
        return "".join(f"- {shlex.join(command)}\n" for command in words)

    def _archive_logs(self, request: JobRequest) -> Sequence[str]:
        record = self._read(request)
        if record is None or record.host_id != processes.host_id():
            return []
        folder = Path(record.folder)
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        uris = []
        for path in sorted(folder.glob("worker-*.log")):
            uri = join_uri(request.plan_uri, "logs", f"{request.name}-{path.name}")
            self._storage.upload(path, uri)
            uris.append(uri)
        return uris

    def _adopted(self, request: JobRequest, owner: str) -> JobRecord:
        """The record as ``owner``'s; a new owner starts counting again."""
        record = self._read(request)
        if record is None or record.host_id != processes.host_id():
            self._free_shards(request, record.workers if record else ())
            return JobRecord(
                host_id=processes.host_id(),
                host_name=processes.host_name(),
                folder=str(self._state_path / request.name),
                owner=owner,
            )
        if record.owner == owner and not record.is_killed:
            return record
        alive = [w for w in record.workers if processes.is_alive(w.group)]
        self._free_shards(request, [w for w in record.workers if w not in alive])
        logger.info("Adopted %d running workers of an earlier try.", len(alive))
        workers = tuple(worker.model_copy(update={"num_starts": 1}) for worker in alive)
        return record.model_copy(update={"owner": owner, "is_killed": False, "workers": workers})

    def _start_missing(self, request: JobRequest, record: JobRecord) -> None:
        for index in range(request.num_workers):
            record = self._with_worker(request, record, index)
            self._write(request, record)

    def _with_worker(self, request: JobRequest, record: JobRecord, index: int) -> JobRecord:
        """The record with worker ``index`` running, unless it must not be started (again)."""
        known = next((w for w in record.workers if w.index == index), None)
        if known is not None and processes.is_alive(known.group):
            return record
        num_starts = known.num_starts + 1 if known else 1
        if num_starts > request.max_restarts + 1:
            return record
        if known is not None:
            self._free_shards(request, [known])
        group = self._start(request, record, index)
        started = WorkerRecord(
            index=index, pid=group.pid, started_at=group.started_at, num_starts=num_starts
        )
        others = tuple(worker for worker in record.workers if worker.index != index)
        workers = sorted((*others, started), key=lambda w: w.index)
        return record.model_copy(update={"workers": tuple(workers)})

    def _start(self, request: JobRequest, record: JobRecord, index: int) -> ProcessGroup:
        folder = Path(record.folder)
        command = self._command(request, folder, index)
        stray = processes.find_group(command)
        if stray is not None:
            logger.info(
                "Adopted worker %d, which runs without a record (pid %d).", index, stray.pid
            )
            return stray
        (folder / "scratch" / str(index)).mkdir(parents=True, exist_ok=True)
        group = processes.start_group(
            command,
            worker_environment(os.environ),
            folder / f"worker-{index}.log",
            folder / f"worker-{index}.exit",
        )
        logger.info("Started worker %d (pid %d).", index, group.pid)
        return group

    def _command(self, request: JobRequest, folder: Path, index: int) -> list[str]:
        resources = request.resources
        options = {
            "--config": self._config_path,
            "--index": index,
            "--identity": _identity(request, index),
            "--device": resources.device,
            "--threads": resources.threads,
            "--decoders": resources.decoders,
            "--scratch": folder / "scratch" / str(index),
        }
        words = [str(word) for option in options.items() for word in option]
        run = ["-m", "hcodec_core.cli", "run", request.job_uri, *words]
        return [sys.executable, *_launcher(request), *run]

    def _free_shards(self, request: JobRequest, ended: Sequence[WorkerRecord]) -> None:
        """Let others take the shards of workers that ended at once, not after a lease."""
        if not ended:
            return
        from hcodec_core.dataset.shards import release_attempts_of
        from hcodec_core.jobs import TokenizeJob, read_any_job

        job = read_any_job(self._storage.read(request.job_uri))
        if not isinstance(job, TokenizeJob):
            return  # jobs of other kinds have no leases
        for worker in ended:
            identity = _identity(request, worker.index)
            freed = release_attempts_of(self._storage, job, identity, "its worker has ended")
            if freed:
                logger.info("Freed %d shards that worker %d held.", len(freed), worker.index)

    def _look(self, record: JobRecord, worker: WorkerRecord) -> Worker:
        alive = processes.is_alive(worker.group)
        exit_path = Path(record.folder) / f"worker-{worker.index}.exit"
        code = None if alive else processes.read_exit_code(exit_path)
        return Worker(worker.index, alive, worker.num_starts, code)

    def _await_foreign_workers(self, request: JobRequest) -> None:
        """Return when workers on another host are known to be gone.

        Their processes cannot be seen from here, their heartbeats can. Raises ``ConfigError`` when
        one of them moves within a lease.
        """
        record = self._read(request)
        if record is None or record.host_id == processes.host_id():
            return
        logger.info("Workers were started on %s: watching their heartbeats.", record.host_name)
        before = self._heartbeats(request)
        deadline = time.monotonic() + request.lease_seconds
        while time.monotonic() < deadline:
            time.sleep(_WATCH_SECONDS)
            if self._heartbeats(request) != before:
                self._check_host(record)

    def _heartbeats(self, request: JobRequest) -> Mapping[str, str]:
        prefix = join_uri(request.plan_uri, "workers") + "/"
        return {info.uri: info.etag for info in list_folder(self._storage, prefix)}

    @staticmethod
    def _check_host(record: JobRecord) -> None:
        if record.host_id != processes.host_id():
            raise ConfigError(
                f"The workers of this job run on {record.host_name}, this is "
                f"{processes.host_name()} (or another container or boot of it): backend local "
                "needs scheduler, tasks and triggerer on one host."
            )

    @staticmethod
    def _record_uri(request: JobRequest) -> str:
        return join_uri(request.plan_uri, "backend", f"{request.name}.json")

    def _read(self, request: JobRequest) -> JobRecord | None:
        uri = self._record_uri(request)
        try:
            return JobRecord.model_validate_json(self._storage.read(uri))
        except ObjectMissingError:
            return None
        except ValidationError as error:
            raise StorageError(f"{uri} is damaged: end its workers and delete it.") from error

    def _write(self, request: JobRequest, record: JobRecord) -> None:
        self._storage.write(self._record_uri(request), record.model_dump_json().encode())

    @contextmanager
    def _locked(self, request: JobRequest) -> Iterator[None]:
        folder = self._state_path / request.name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _launcher(request: JobRequest) -> list[str]:
    """What starts several processes that train together on this host; nothing for a single one."""
    if request.processes_per_node <= 1:
        return []
    processes = f"--nproc-per-node={request.processes_per_node}"
    return ["-m", "hcodec_core.training.launch", "--standalone", processes]


def _identity(request: JobRequest, index: int) -> str:
    """Name that a worker is started with, found again in its leases and reports."""
    return f"{request.name}-{index}"


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables a worker gets: all but Airflow's own."""
    return {k: v for k, v in environment.items() if not _WITHHELD_VARIABLE.fullmatch(k)}
