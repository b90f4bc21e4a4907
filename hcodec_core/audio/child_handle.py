"""Handle on one decoder process: start it, ask it, read from it, end it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from concurrent.futures import Executor
from pathlib import Path

from hcodec_core.audio.messages import HEADER_BYTES, Kind, send, unpack_header
from hcodec_core.errors import HCodecError, PreemptedError

_MAX_STARTS = 3
_STARTUP_SECONDS = 60.0
_FAREWELL_SECONDS = 2.0


class ChildDiedError(Exception):
    """The process ended; the text says how."""


class ChildHungError(Exception):
    """The process was silent for too long."""


class ChildHandle:
    """One decoder process, restarted when needed. Used by one stream at a time."""

    def __init__(self, command: list[str], spawner: Executor) -> None:
        """Nothing runs before the first ``ask``; ``spawner`` outlives the process."""
        self._command, self._spawner = command, spawner
        self._process: subprocess.Popen[bytes] | None = None
        self._poll = select.poll()

    @property
    def pid(self) -> int | None:
        """Process id; None when not running."""
        return self._process.pid if self._process else None

    def ask(self, path: Path) -> None:
        """Have ``path`` decoded, in a new process if there is none or it died while idle.

        Raises ``HCodecError`` when processes do not start or end before they take work.
        """
        for _ in range(_MAX_STARTS):
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._hand_over(path)
                return
            except (BrokenPipeError, ChildDiedError, ChildHungError):
                self.kill()
        raise HCodecError(
            "Decoder processes end before they take work: see their last words above."
        )

    def _hand_over(self, path: Path) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        send(self._process.stdin, Kind.DECODE, os.fsencode(path.absolute()))
        self.receive(_STARTUP_SECONDS)

    def receive(self, timeout_seconds: float) -> tuple[Kind, bytearray]:
        """Next message. Raises ``ChildDiedError``, or ``ChildHungError`` after a silence."""
        try:
            kind, num_bytes = unpack_header(self._read(HEADER_BYTES, timeout_seconds))
        except ValueError as error:
            raise ChildDiedError("wrote nonsense") from error
        return kind, self._read(num_bytes, timeout_seconds)

    def kill(self) -> None:
        """End the process at once; the next ``ask`` starts another."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def stop(self) -> None:
        """End an idle process by closing its input, and by force if that does not help."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_FAREWELL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reap()

    def interrupt(self) -> None:
        """Kill the process under a stream of another thread, which then cleans up."""
        if (process := self._process) is not None:
            process.kill()

    def _start(self) -> None:
        if self._process is not None:
            self._reap()
        self._process = self._spawn()
        assert self._process.stdout is not None
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)
        try:
            self.receive(_STARTUP_SECONDS)
        except (ChildDiedError, ChildHungError) as error:
            self.kill()
            raise HCodecError(
                f"A decoder process does not start ({error}): see its last words above."
            ) from error

    def _spawn(self) -> subprocess.Popen[bytes]:
        # The kernel ends a child when the thread that started it ends, so one thread that lives
        # as long as the pool starts them all.
        pipe = subprocess.PIPE
        try:
            return self._spawner.submit(
                subprocess.Popen, self._command, stdin=pipe, stdout=pipe, bufsize=0
            ).result()
        except RuntimeError as error:
            raise PreemptedError("The decoders are closed: no process can be started.") from error

    def _read(self, num_bytes: int, timeout_seconds: float) -> bytearray:
        assert self._process is not None
        assert self._process.stdout is not None
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            if not self._poll.poll(timeout_seconds * 1000):
                raise ChildHungError(f"silent for {timeout_seconds:g} s")
            count = os.readv(self._process.stdout.fileno(), [view])
            if count == 0:
                raise ChildDiedError(self._cause_of_death())
            view = view[count:]
        return data

    def _cause_of_death(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(_FAREWELL_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _reap(self) -> None:
        assert self._process is not None
        process, self._process = self._process, None
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
