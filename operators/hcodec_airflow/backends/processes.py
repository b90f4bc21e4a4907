"""Processes of this host that outlive their parent: in sessions of their own, found again later.

A process is named by host id, process group and start time: the same number on another host, in
another container or after a reboot is another process.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# The shell outlives a polite stop of its group, so that the exit code is written down: nobody else
# can learn it, for the worker's parent (a task of Airflow) ends long before the worker.
_WRAPPER = """
trap : TERM INT
out=$1; shift
"$@"
echo $? > "$out.part" && mv "$out.part" "$out"
"""
_START_TIME_TOLERANCE_SECONDS = 0.5
_KILL_POLL_SECONDS = 0.1
_ASK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class ProcessGroup:
    """A session started here: its leader's pid and the leader's start, seconds since the epoch."""

    pid: int
    started_at: float


def host_id() -> str:
    """Changes with the machine, its boot and the pid namespace: pids mean the same in one id."""
    boot_path = Path("/proc/sys/kernel/random/boot_id")
    if boot_path.exists():
        return f"{boot_path.read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return f"{platform.node()}/{int(psutil.boot_time())}"


def host_name() -> str:
    """Name of this host for people."""
    return platform.node()


def start_group(
    command: Sequence[str], environment: Mapping[str, str], log_path: Path, exit_path: Path
) -> ProcessGroup:
    """Start ``command`` in its own session.

    Output is appended to ``log_path``; the exit code is written to ``exit_path`` when it ended.
    """
    exit_path.unlink(missing_ok=True)
    with log_path.open("ab") as log_file:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WRAPPER, "hcodec-worker", str(exit_path), *command],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    started_at = psutil.Process(process.pid).create_time()
    # It is meant to outlive this object; Python would warn about that.
    process.returncode = 0
    return ProcessGroup(process.pid, started_at)


def is_alive(group: ProcessGroup) -> bool:
    """Whether any process of the group runs."""
    return bool(_members(group))


def stop(groups: Sequence[ProcessGroup], grace_seconds: float) -> None:
    """End the groups: ask politely, and after ``grace_seconds`` by force."""
    deadline = time.monotonic() + grace_seconds
    next_ask = 0.0
    while (now := time.monotonic()) < deadline and any(map(is_alive, groups)):
        if now >= next_ask:
            # Again and again: a group that has just begun may get its next member after this.
            _signal_all(groups, signal.SIGTERM)
            next_ask = now + _ASK_AGAIN_SECONDS
        time.sleep(_KILL_POLL_SECONDS)
    _signal_all(groups, signal.SIGKILL)


def read_exit_code(exit_path: Path) -> int | None:
    """Exit code left by a group, None when it left none (it runs, or was killed by force)."""
    with suppress(FileNotFoundError, ValueError):
        return int(exit_path.read_text())
    return None


def find_group(words: Sequence[str]) -> ProcessGroup | None:
    """A group of this user whose leader's command line ends in ``words``, if there is one.

    This finds workers whose starter died before it could write their pid down.
    """
    for process in psutil.process_iter(["cmdline", "create_time", "status", "uids"]):
        info = process.info
        command = info["cmdline"] or []
        ours = info["uids"] is not None and info["uids"].real == os.getuid()
        if not ours or info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if command[-len(words) :] == list(words) and _group_of(process.pid) == process.pid:
            return ProcessGroup(process.pid, info["create_time"])
    return None


def _signal_all(groups: Sequence[ProcessGroup], number: signal.Signals) -> None:
    for group in groups:
        if is_alive(group):
            with suppress(ProcessLookupError):
                os.killpg(group.pid, number)


def _members(group: ProcessGroup) -> list[int]:
    """Live pids of a group; none when its leader's pid now belongs to somebody else."""
    _reap(group.pid)
    with suppress(psutil.NoSuchProcess):
        started_at = psutil.Process(group.pid).create_time()
        if abs(started_at - group.started_at) > _START_TIME_TOLERANCE_SECONDS:
            return []
    return [pid for pid in psutil.pids() if _group_of(pid) == group.pid and not _is_zombie(pid)]


def _group_of(pid: int) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getpgid(pid)
    return None


def _is_zombie(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


def _reap(pid: int) -> None:
    # Only children can be reaped; for workers of an earlier process init does it.
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
