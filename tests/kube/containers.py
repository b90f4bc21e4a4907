"""One container of a pod: waiting, running or terminated, and how often it was restarted."""

from __future__ import annotations

import time
from pathlib import Path

from tests.kube.clock import Clock
from tests.kube.errors import Object
from tests.kube.processes import Process

_MESSAGE_BYTES = 2048
_MESSAGE_LINES = 80


class Container:
    """State and process; ``status`` is its ``ContainerStatus``."""

    def __init__(self, spec: Object, folder: Path) -> None:
        self.spec = spec
        self.name = spec["name"]
        self.process: Process | None = None
        self.log_paths: list[Path] = []
        self._folder = folder
        self._state: Object = {"waiting": {"reason": "ContainerCreating"}}
        self._last_state: Object = {}
        self._num_starts = 0
        self._ended = 0.0

    @property
    def is_running(self) -> bool:
        return "running" in self._state

    @property
    def is_done_well(self) -> bool:
        return self._exit_code == 0

    @property
    def waiting_for(self) -> str:
        return str((self._state.get("waiting") or {}).get("reason", ""))

    @property
    def _exit_code(self) -> int | None:
        ended = self._state.get("terminated")
        return int(ended["exitCode"]) if ended else None

    def has_failed_for_good(self, policy: str) -> bool:
        return policy == "Never" and self._exit_code not in (None, 0)

    def outcome(self, policy: str) -> str:
        """waiting, running, succeeded or failed; a restart to come is running."""
        if self._exit_code is None:
            return "running" if self.is_running or self._num_starts else "waiting"
        if self._exit_code == 0:
            return "running" if policy == "Always" else "succeeded"
        return "failed" if policy == "Never" else "running"

    def may_start(self, policy: str, restart_seconds: float) -> bool:
        if self.is_running:
            return False
        if self._num_starts == 0:
            return True
        if policy == "Never" or (policy == "OnFailure" and self.is_done_well):
            return False
        if "terminated" in self._state:
            self._last_state = self._state
            message = f"back-off {restart_seconds}s restarting failed container={self.name}"
            self._state = {"waiting": {"reason": "CrashLoopBackOff", "message": message}}
        delay = restart_seconds * 2 ** min(self._num_starts - 1, 6)
        return time.monotonic() >= self._ended + delay

    def start(
        self, command: list[str], variables: dict[str, str], folder: Path, clock: Clock
    ) -> None:
        """Run the command. Raises ``StartError``."""
        log_path = self._folder / f"{self.name}-{self._num_starts}.log"
        log_path.touch()
        self.log_paths.append(log_path)
        self._num_starts += 1
        self.process = Process(command, variables, folder, log_path, clock.micro_timestamp)
        self._state = {"running": {"startedAt": clock.timestamp()}}

    def wait_for(self, reason: str, message: str) -> None:
        self._state = {"waiting": {"reason": reason, "message": message}}

    def fail_to_start(self, message: str, clock: Clock) -> None:
        """containerd gives exit code 128 and StartError for a command that is not there."""
        self._end(128, "StartError", clock.timestamp(), clock, message)

    def poll(self, clock: Clock) -> None:
        """See whether it ended."""
        if not self.is_running or self.process is None:
            return
        code = self.process.exit_code()
        if code is None:
            return
        reason = "Completed" if code == 0 else "Error"
        if self.process.is_out_of_memory:
            code, reason = 137, "OOMKilled"
        started = self._state["running"]["startedAt"]
        self._end(code, reason, started, clock, self._message(code))

    def _end(self, code: int, reason: str, started: str, clock: Clock, message: str) -> None:
        self._ended = time.monotonic()
        self._state = {
            "terminated": {
                "exitCode": code,
                "reason": reason,
                "startedAt": started,
                "finishedAt": clock.timestamp(),
                "containerID": self._id,
            }
        }
        if message:
            self._state["terminated"]["message"] = message

    def _message(self, code: int) -> str:
        """The end of the log, where the container asked for it."""
        if code == 0 or self.spec.get("terminationMessagePolicy") != "FallbackToLogsOnError":
            return ""
        lines = self.log_paths[-1].read_bytes().splitlines()[-_MESSAGE_LINES:]
        text = b"\n".join(line.partition(b" ")[2] for line in lines)
        return text[-_MESSAGE_BYTES:].decode(errors="replace")

    @property
    def _id(self) -> str:
        return f"containerd://{self._folder.name}-{self.name}-{self._num_starts}"

    def status(self) -> Object:
        status = {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": "",
            "ready": self.is_running,
            "started": self.is_running,
            "restartCount": max(0, self._num_starts - 1),
            "state": self._state,
            "lastState": self._last_state,
        }
        if self._num_starts:
            status["containerID"] = self._id
        return status

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.signal(number)

    def kill(self) -> None:
        if self.process is not None and self.is_running:
            self.process.kill()

    def kill_for_memory(self) -> None:
        if self.process is not None:
            self.process.is_out_of_memory = True
            self.process.kill()

    def pause(self) -> None:
        if self.process is not None and self.is_running:
            self.process.pause()

    def wake(self) -> None:
        if self.process is not None and self.is_running:
            self.process.wake()
