"""Where a run can be watched: MLflow, or nowhere.

What a resumed run logs again is not stored twice: a number is sent only for steps after the last
one that the server has of it, and pictures and sounds replace those of the same step. Only the
first rank tracks.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from hcodec_core.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 10.0
_RETRY_SECONDS = 15.0
_FAREWELL_SECONDS = 60.0
_MAX_HELD = 100_000
_RUN_TAG = "hcodec.run"


class Tracker(Protocol):
    """What the trainer tells about a run. No method waits for a server."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def attach(self, step: int, paths: Mapping[str, bytes]) -> None:
        """Small files of a step, by name."""

    def finish(self, status: str) -> None:
        """The run ended: ``FINISHED``, ``FAILED`` or ``KILLED`` (goes on later)."""


class NoTracker:
    """For runs that nobody watches, and for all ranks but the first."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See ``Tracker``."""

    def attach(self, step: int, paths: Mapping[str, bytes]) -> None:
        """See ``Tracker``."""

    def finish(self, status: str) -> None:
        """See ``Tracker``."""


@dataclass(frozen=True)
class TrackedRun:
    """One run as MLflow shows it.

    ``key``: the same after a restart, so the run is found again. ``artifacts_uri``: where files of
    a new experiment go; None: where the server puts them.
    """

    key: str
    name: str
    experiment: str
    artifacts_uri: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Entry:
    step: int
    numbers: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


class MlflowTracker:
    """Sends what it is told from a thread of its own; what a server misses is sent again."""

    def __init__(self, tracking_uri: str, run: TrackedRun, scratch_path: Path) -> None:
        """Find or make the run. ``scratch_path``: for files on their way.

        Raises ``ConfigError`` when MLflow is not installed, ``StorageError`` when the server does
        not answer.
        """
        self._client = _client(tracking_uri)
        self._scratch_path = scratch_path
        try:
            self._run_id = self._find_or_make(run)
            self._last_steps = self._steps_stored()
        except Exception as error:
            if not _is_mlflow_error(error):
                raise
            raise StorageError(_unreachable(tracking_uri, error)) from error
        self._entries: queue.Queue[_Entry | None] = queue.Queue()
        self._num_dropped = 0
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self._run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        self._put(_Entry(step, numbers=dict(numbers)))

    def attach(self, step: int, paths: Mapping[str, bytes]) -> None:
        """See ``Tracker``."""
        self._put(_Entry(step, files=dict(paths)))

    def finish(self, status: str) -> None:
        """See ``Tracker``; waits a minute at most for what is still to be sent."""
        self._is_ending.set()
        self._entries.put(None)
        self._thread.join(_FAREWELL_SECONDS)
        if self._thread.is_alive() or self._num_dropped:
            logger.warning("MLflow has not got everything: the run's own history is complete.")
            return
        try:
            self._client.set_terminated(self._run_id, status)
        except Exception as error:
            if not _is_mlflow_error(error):
                raise
            logger.warning("The end of the run was not told to MLflow: %s", _first_line(error))

    def _put(self, entry: _Entry) -> None:
        if self._entries.qsize() >= _MAX_HELD:
            self._num_dropped += 1
            return
        self._entries.put(entry)

    def _find_or_make(self, run: TrackedRun) -> str:
        known = self._client.get_experiment_by_name(run.experiment)
        experiment_id = (
            known.experiment_id
            if known is not None
            else self._client.create_experiment(run.experiment, run.artifacts_uri)
        )
        # A kill between making a run and remembering it would leave two: it is found by its tag.
        found = self._client.search_runs(
            [experiment_id], f"tags.`{_RUN_TAG}` = '{run.key}'", max_results=1
        )
        if found:
            run_id = str(found[0].info.run_id)
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        tags = {_RUN_TAG: run.key, **{f"hcodec.{k}": v for k, v in run.facts.items()}}
        made = self._client.create_run(experiment_id, run_name=run.name, tags=tags)
        return str(made.info.run_id)

    def _steps_stored(self) -> dict[str, int]:
        names = self._client.get_run(self._run_id).data.metrics
        histories = {n: self._client.get_metric_history(self._run_id, n) for n in names}
        return {name: max(metric.step for metric in each) for name, each in histories.items()}

    def _send_all(self) -> None:
        while (entry := self._entries.get()) is not None:
            while not self._sent(entry):
                if self._is_ending.wait(_RETRY_SECONDS):
                    self._num_dropped += not self._sent(entry)  # the last try
                    break

    def _sent(self, entry: _Entry) -> bool:
        try:
            self._send(entry)
            return True
        except Exception as error:
            if not _is_mlflow_error(error):
                raise
            logger.warning("MLflow did not take step %d: %s", entry.step, _first_line(error))
            return False

    def _send(self, entry: _Entry) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        fresh = [
            Metric(name, value, now, entry.step)
            for name, value in entry.numbers.items()
            if entry.step > self._last_steps.get(name, -1)
        ]
        if fresh:
            self._client.log_batch(self._run_id, metrics=fresh)
        for name, data in entry.files.items():
            path = self._scratch_path / Path(name).name
            path.write_bytes(data)
            self._client.log_artifact(self._run_id, str(path), f"samples/step-{entry.step:09d}")
            path.unlink()


def _client(tracking_uri: str) -> Any:
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError(
            "Tracking needs MLflow, which is not installed: install this package with the extra "
            "'train', or turn tracking off with --tracking none."
        ) from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
    _probe(tracking_uri)
    return MlflowClient(tracking_uri)


def _probe(tracking_uri: str) -> None:
    """Ask the server for a sign of life: MLflow's own client tries for minutes."""
    if urlsplit(tracking_uri).scheme not in ("http", "https"):
        return
    import urllib.request

    try:
        url = tracking_uri.rstrip("/") + "/health"
        with urllib.request.urlopen(url, timeout=_PROBE_SECONDS):
            return
    except OSError as error:
        raise StorageError(_unreachable(tracking_uri, error)) from error


def _unreachable(tracking_uri: str, error: Exception) -> str:
    place = urlsplit(tracking_uri)
    shown = f"{place.scheme}://{place.hostname or ''}{place.path}"  # without user and password
    return (
        f"MLflow at {shown} does not answer ({_first_line(error)}): start it, correct --tracking, "
        "or turn tracking off with --tracking none."
    )


def _is_mlflow_error(error: Exception) -> bool:
    """Errors of MLflow, its databases and its connections; all others are programmers' mistakes."""
    origin = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or origin in ("mlflow", "requests", "sqlalchemy", "urllib3")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
