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
from hcodec_core.jobs import TokenizeJob
from hcodec_core.storage import Storage, file_uri, open_storage
from hcodec_core.tokens import CodecManifest, EncodeSettings, PartDigests, StreamSpec
from tests.dataset.factories import World

# Airflow reads it when it is first imported, and would write into the user's home otherwise.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="hcodec-airflow-"))


class ScriptedBackend(LocalBackend):
    """Runs ``script`` with the worker's index and the plan's local folder as arguments."""

    script = "import time; time.sleep(60)"

    def _command(self, request: JobRequest, folder: Path, index: int) -> list[str]:
        plan_path = request.plan_uri.removeprefix("file://")
        return [sys.executable, "-c", self.script, str(index), plan_path]


def toy_manifest() -> CodecManifest:
    return CodecManifest(
        name="c",
        family="hcodec",
        sample_rate=16000,
        hop_length=320,
        streams=(StreamSpec(name="fused", num_codebooks=1, codebook_size=16),),
        architecture={},
        parts=PartDigests(encoder="e", codebooks="b", decoder="d"),
        weights_sha256="0",
        is_trained=False,
        num_parameters=1,
        weights_licence="none",
    )


@pytest.fixture
def write_job() -> Callable[[Storage, str], TokenizeJob]:
    """Writes the job document of a plan of two shards and four files."""

    def write(storage: Storage, plan_uri: str) -> TokenizeJob:
        job = TokenizeJob(
            plan_id="p1",
            dataset="demo",
            plan_uri=plan_uri,
            data_uri=f"{plan_uri}/data",
            codec_uri="hcodec-nano",
            manifest=toy_manifest(),
            settings=EncodeSettings(compute_class="cpu"),
            encode_id="e",
            num_shards=2,
            num_files=4,
            num_bytes=100,
        )
        storage.write(f"{plan_uri}/job.json", job.model_dump_json().encode())
        return job

    return write


@pytest.fixture
def storage() -> Storage:
    return open_storage(StorageConfig())


@pytest.fixture
def request_for_two(
    tmp_path: Path, storage: Storage, write_job: Callable[[Storage, str], TokenizeJob]
) -> JobRequest:
    plan_uri = f"file://{tmp_path}/plan"
    write_job(storage, plan_uri)
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


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Local storage with a configuration that the tasks find."""
    root = tmp_path / "root"
    (root / "audio").mkdir(parents=True)
    made = World(file_uri(root), tmp_path, open_storage(StorageConfig()))
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", str(made.write_config()))
    return made
