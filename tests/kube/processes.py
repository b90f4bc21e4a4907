"""A container as a local process: its own session, its log, its end.

Every process carries a mark of its server in its environment, which its descendants inherit, also
those that left the session: what is left of a pod or of the server is found by it and killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

MARK = "KUBE_TEST_POD"


class StartError(Exception):
    """The runtime could not start the command, as for a path that is not in the image."""


class Process:
    """One run of a container's command, with its output written line by line with times."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        log_path: Path,
        now: Callable[[], str],
    ) -> None:
        self._log_path = log_path
        self._now = now
        self.is_out_of_memory = False
        self._is_settled = False
        executable = shutil.which(command[0], path=environment.get("PATH", os.defpath))
        if executable is None:
            raise StartError(f'exec: "{command[0]}": executable file not found in $PATH: unknown')
        self._mark = environment.get(MARK, "")
        self._process = subprocess.Popen(
            [executable, *command[1:]],
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._pump = threading.Thread(target=self._copy_output, daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _copy_output(self) -> None:
        output = self._process.stdout
        with self._log_path.open("ab", buffering=0) as log:
            for line in iter(output.readline, b""):  # type: ignore[union-attr]
                log.write(self._now().encode() + b" " + line.rstrip(b"\n") + b"\n")

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n after signal n. Ends what its first process left behind."""
        code = self._process.poll()
        if code is None:
            return None
        if not self._is_settled:
            # The first process of a container takes its whole process namespace with it.
            self._signal_group(signal.SIGKILL)
            if self._mark:
                kill_marked(self._mark)
            self._pump.join(timeout=1.0)
            self._is_settled = True
        return 128 - code if code < 0 else code

    def signal(self, number: int) -> None:
        """To the first process only, as a runtime does."""
        if self._process.poll() is None:
            os.kill(self.pid, number)

    def pause(self) -> None:
        self._signal_group(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal_group(signal.SIGCONT)

    def kill(self) -> None:
        self._signal_group(signal.SIGKILL)

    def wait(self, timeout_seconds: float) -> None:
        """Reap it. A process that survives SIGKILL this long is left to the system."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return
        self._pump.join(timeout=1.0)
        if self._process.stdout and not self._pump.is_alive():
            self._process.stdout.close()

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left in it


# Waits for the end of its input, which is the end of the test run, however that came.
_GUARD = """
read nothing
for path in $(grep -lsz "^$1=$2" /proc/[0-9]*/environ); do
  process="${path#/proc/}"
  kill -9 "${process%/environ}"
done
"""


class Guard:
    """A process that kills what carries a server's mark when the server is no more.

    It holds the other end of a pipe, so a test run that is killed is noticed too.
    """

    def __init__(self, mark_part: str) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", MARK, mark_part],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """It is not needed any more: somebody else has looked."""
        self._process.kill()
        self._process.wait(timeout=30)
        self._process.stdin.close()  # type: ignore[union-attr]


def kill_marked(mark_part: str, timeout_seconds: float = 5.0) -> None:
    """Kill whatever carries a mark that begins with ``mark_part``, and see it gone."""
    deadline = time.monotonic() + timeout_seconds
    while found := marked(mark_part):
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {found} of pods outlive SIGKILL")
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def marked(mark_part: str) -> list[int]:
    """Processes whose mark begins so."""
    wanted = f"{MARK}={mark_part}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone, or not ours to read
        if any(variable.startswith(wanted) for variable in variables):
            found.append(int(entry.name))
    return [pid for pid in found if is_alive(pid)]
