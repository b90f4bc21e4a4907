"""Following a run: one line per task that moves, and a bar while the workers encode."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hcodec_airflow.demo.airflow_api import FINISHED
from hcodec_airflow.demo.services import Services
from hcodec_airflow.demo.stage import Stage
from hcodec_airflow.progress import ProgressReader, clock
from hcodec_core.errors import HCodecError
from hcodec_core.jobs import TokenizeJob, read_job

_POLL_SECONDS = 1.0
_LINE_SECONDS = 5.0
_QUIET = {"none", "scheduled", "queued", "restarting"}


def follow_run(stage: Stage, services: Services, dag_id: str, run_id: str) -> str:
    """Show a run until it has finished; its final state."""
    follower = _Follower(stage, dag_id, run_id)
    with follower.bar:
        while True:
            services.check()
            state = stage.api.run_state(dag_id, run_id)
            follower.show_tasks()
            if state in FINISHED:
                return state
            follower.show_workers()
            time.sleep(_POLL_SECONDS)


class _Follower:
    """Remembers what was shown."""

    def __init__(self, stage: Stage, dag_id: str, run_id: str) -> None:
        self._stage, self._dag_id, self._run_id = stage, dag_id, run_id
        self._began = time.monotonic()
        self._shown: dict[str, str] = {}
        self._job: TokenizeJob | None = None
        self._reader: ProgressReader | None = None
        self._last_line = 0.0
        self.bar = Progress(
            TextColumn("          {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} files"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stdout),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._bar_id = self.bar.add_task("encoding", total=1, visible=False)

    def show_tasks(self) -> None:
        """A line for every task whose state changed."""
        states = self._stage.api.task_states(self._dag_id, self._run_id)
        for task_id, state in states.items():
            if state not in _QUIET and self._shown.get(task_id) != state:
                self._shown[task_id] = state
                self._say(f"{task_id:<10} {state}")

    def show_workers(self) -> None:
        """The bar (or a line now and then) while the workers encode."""
        if self._shown.get("tokenize") not in {"running", "deferred"}:
            self.bar.update(self._bar_id, visible=False)
            return
        with suppress(HCodecError):  # the next look will do
            self._show_workers()

    def _show_workers(self) -> None:
        if self._job is None or self._reader is None:
            planned = self._stage.api.xcom(self._dag_id, self._run_id, "plan") or {}
            if not planned.get("job_uri"):
                return
            self._job = read_job(self._stage.storage.read(planned["job_uri"]))
            self._reader = ProgressReader(self._stage.storage, self._job.plan_uri)
        progress = self._reader.read()
        self.bar.update(
            self._bar_id,
            visible=True,
            total=self._job.num_files,
            completed=min(progress.num_files, self._job.num_files),
            description=f"encoding, {progress.audio_seconds / 60:.1f} min of audio",
        )
        if self.bar.disable and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._say(
                f"           {progress.num_files}/{self._job.num_files} files, "
                f"{progress.num_shards_done}/{self._job.num_shards} shards, "
                f"{progress.audio_seconds / 60:.1f} min of audio"
            )

    def _say(self, text: str) -> None:
        at = clock(time.monotonic() - self._began)
        self.bar.console.print(f"  [{at:>5}] {text}", markup=False, highlight=False)
