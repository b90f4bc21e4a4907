"""Processes of the demo: each in its own group, found again by a record and a mark, all ended.

The mark is an environment variable that every descendant inherits; a process that renames itself
(Airflow's API server does) loses it from view, so what was started is also recorded by pid and
start time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "HCODEC_DEMO_STATE"
_RECORD = "processes.jsonl"
_STOP_SECONDS = 10.0
AIRFLOW = (str(Path(sys.executable).with_name("airflow")),)


class DemoError(Exception):
    """The demo cannot go on; the message says what to look at."""


@dataclass
class Services:
    """Started processes. ``state_path`` is the demo's folder; its path marks every descendant."""

    state_path: Path
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        """Start a process in its own group, output to ``logs/<name>.log``."""
        with self.log_path(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, MARK: str(self.state_path)},
                start_new_session=True,
            )
        self._record(self._processes[name].pid)

    def _record(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended at once: nothing to end later
            line = json.dumps([pid, psutil.Process(pid).create_time()])
            with (self.state_path / _RECORD).open("a") as record:
                record.write(line + "\n")

    def log_path(self, name: str) -> Path:
        """Where the output of a process goes."""
        folder = self.state_path / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def check(self) -> None:
        """Raise ``DemoError`` when a started process has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise DemoError(
                    f"{name} ended with exit code {process.returncode}: see {self.log_path(name)}."
                )

    def wait_for(self, name: str, seconds: float) -> None:
        """Wait until a process that ends by itself has ended well."""
        process = self._processes.pop(name)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            self._processes[name] = process
            raise DemoError(
                f"{name} took over {seconds:.0f} s: see {self.log_path(name)}."
            ) from error
        if code != 0:
            raise DemoError(f"{name} failed (exit code {code}): see {self.log_path(name)}.")

    def stop(self) -> None:
        """End every process that was started, and what they started in turn."""
        for name in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._processes[name].pid, signal.SIGTERM)
        end_marked_processes(self.state_path)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()


def end_marked_processes(state_path: Path) -> int:
    """End all processes of a demo in ``state_path``, also of one that was killed; how many."""
    marked = list({*_recorded_processes(state_path), *_marked_processes(state_path)})
    for process in marked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(marked, timeout=_STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_SECONDS)
    (state_path / _RECORD).unlink(missing_ok=True)
    return len(marked)


def _recorded_processes(state_path: Path) -> Iterator[psutil.Process]:
    """Processes that a demo in ``state_path`` started, while they live, and what they started."""
    record = state_path / _RECORD
    for line in record.read_text().splitlines() if record.exists() else []:
        pid, created = json.loads(line)
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == created:
                yield from process.children(recursive=True)
                yield process


def _marked_processes(state_path: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(state_path):
                yield process


def free_port(preferred: int) -> int:
    """``preferred`` when it is free on 127.0.0.1, else any free port."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise DemoError("No port is free on 127.0.0.1.")


def wait_until_answers(url: str, services: Services, seconds: float) -> None:
    """Wait until ``url`` answers anything below 500. Raises ``DemoError`` when it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        services.check()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass  # not listening yet
        time.sleep(0.5)
    raise DemoError(f"{url} did not answer within {seconds:.0f} s: see {services.state_path}/logs.")


def airflow_environment(
    state_path: Path, dags_path: Path, config_path: Path, port: int
) -> dict[str, str]:
    """Environment of a small real Airflow: sqlite, LocalExecutor, all on 127.0.0.1."""
    home = state_path / "airflow"
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    secret = _kept_secret(home / "secrets.json")
    settings = {
        "CORE__DAGS_FOLDER": str(dags_path),
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": "4",
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "CORE__FERNET_KEY": "",
        "API__HOST": "127.0.0.1",
        "API__PORT": str(port),
        "API__BASE_URL": url,
        "API__WORKERS": "1",
        "API__SECRET_KEY": secret,
        "API_AUTH__JWT_SECRET": secret,
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "HCODEC__CONFIG_FILE": str(config_path),
    }
    prefixed = {f"AIRFLOW__{name}": value for name, value in settings.items()}
    return {"AIRFLOW_HOME": str(home), **prefixed}


def start_airflow(services: Services, environment: Mapping[str, str]) -> None:
    """Start API server, scheduler, DAG processor and triggerer (the database must be there).

    ``airflow standalone`` is not used: its log servers listen on all addresses and it leaves
    children behind.
    """
    commands = {
        "airflow-api-server": ["api-server"],
        "airflow-scheduler": ["scheduler", "--skip-serve-logs"],
        "airflow-dag-processor": ["dag-processor"],
        "airflow-triggerer": ["triggerer", "--skip-serve-logs"],
    }
    for name, arguments in commands.items():
        services.start(name, [*AIRFLOW, *arguments], environment)


def _kept_secret(path: Path) -> str:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(json.dumps({"secret": secrets.token_hex(32)}))
    return str(json.loads(path.read_text())["secret"])
