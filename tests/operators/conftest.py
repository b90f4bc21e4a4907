"""A local backend on local files, whose workers run a few lines of Python in place of a codec.

Ends by force, refusals and restarts cannot be had from a healthy worker at will; the workers
themselves are tested with the real command in ``test_pipeline.py``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hcodec_airflow.backends import processes
from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.backends.local import LocalBackend
from hcodec_core.config import StorageConfig
from hcodec_core.storage import Storage, open_storage

# Airflow reads it when it is first imported, and would write into the user's home otherwise.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="hcodec-airflow-"))


class ScriptedBackend(LocalBackend):
    """Runs ``script`` with the worker's index and the plan's local folder as arguments."""

    script = "import time; time.sleep(60)"

    def _command(self, request: JobRequest, folder: Path, index: int) -> list[str]:
        plan_path = request.plan_uri.removeprefix("file://")
        return [sys.executable, "-c", self.script, str(index), plan_path]


@pytest.fixture
def storage() -> Storage:
    return open_storage(StorageConfig())


@pytest.fixture
def request_for_two(tmp_path: Path) -> JobRequest:
    plan_uri = f"file://{tmp_path}/plan"
    return JobRequest(
        name="tokenize-p1",
        job_uri=f"{plan_uri}/job.json",
        plan_uri=plan_uri,
        num_workers=2,
        max_restarts=1,
        lease_seconds=0.5,
    )


@pytest.fixture
def make_backend(
    storage: Storage, tmp_path: Path, request_for_two: JobRequest
) -> Iterator[Callable[..., ScriptedBackend]]:
    made: list[ScriptedBackend] = []

    def make(script: str = ScriptedBackend.script) -> ScriptedBackend:
        backend = ScriptedBackend(storage, tmp_path / "state", tmp_path / "hcodec.toml")
        backend.script = script
        made.append(backend)
        return backend

    yield make
    for backend in made:
        record = backend._read(request_for_two)
        if record is not None:
            processes.stop([worker.group for worker in record.workers], grace_seconds=0)


@pytest.fixture
def wait_until() -> Callable[..., None]:
    def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.05)

    return wait
