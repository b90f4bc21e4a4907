"""The round-trip audit on a real codec: good rows pass, tampered ones are found."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hcodec_core.cli import main
from hcodec_core.dataset.audit import (
    AuditResult,
    audit_result_uri,
    audit_uri,
    make_audit_job,
    read_audit,
)
from hcodec_core.dataset.shards import results_by_shard
from hcodec_core.errors import ConfigError
from hcodec_core.inference.audit import run_audit
from hcodec_core.inference.worker import WorkerOptions, run_worker
from hcodec_core.jobs import AuditJob, TokenizeJob, read_any_job
from hcodec_core.storage import Storage, file_uri, open_storage
from tests.inference.plans import job_uri, wav, write_plan

FILES = {f"clip {i}.wav": wav(length, i) for i, length in enumerate((0.4, 1.2, 9.3))}


@pytest.fixture
def storage() -> Storage:
    from hcodec_core.config import StorageConfig

    return open_storage(StorageConfig())


@pytest.fixture
def options(tmp_path: Path) -> WorkerOptions:
    (tmp_path / "scratch").mkdir()
    return WorkerOptions(scratch_path=tmp_path / "scratch", heartbeat_seconds=0.3)


@pytest.fixture
def job(tmp_path: Path, storage: Storage, options: WorkerOptions) -> TokenizeJob:
    """A plan that is done; its longest file is cut into segments."""
    job = write_plan(storage, file_uri(tmp_path / "root"), FILES, num_shards=2)
    assert run_worker(job_uri(job), storage, options, threading.Event()) == 0
    return job


def audited(storage: Storage, job: TokenizeJob, options: WorkerOptions) -> AuditResult:
    uri = make_audit_job(storage, job.plan_uri)
    assert uri is not None
    audit = read_any_job(storage.read(uri))
    assert isinstance(audit, AuditJob)
    assert run_audit(audit, storage, options, threading.Event()) == 0
    result = read_audit(storage, job.plan_uri)
    assert result is not None
    return result


def tamper(storage: Storage, job: TokenizeJob, name: str) -> None:
    """Change one code of one file's row, in its data file."""
    for result in results_by_shard(storage, job).values():
        assert result.data_file is not None
        table = pq.read_table(pa.BufferReader(storage.read(result.data_file.uri)))
        rows = table.to_pylist()
        for row in rows:
            if row["uri"].endswith(name):
                row["semantic"][7] = (row["semantic"][7] + 1) % 1024
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, table.schema), sink)
        storage.write(result.data_file.uri, sink.getvalue())


def test_rows_of_a_worker_come_out_the_same_bit_for_bit(storage, job, options) -> None:
    result = audited(storage, job, options)
    assert len(result.compared) == 3
    assert result.with_other_codes == result.with_wrong_length == result.not_finite == []
    for file in result.files:
        seconds = {"clip 0.wav": 0.4, "clip 1.wav": 1.2, "clip 2.wav": 9.3}[file.uri[-10:]]
        assert file.num_samples == file.num_decoded_samples == round(seconds * 16000)
        assert file.num_codes == file.num_equal_codes > 0
        assert file.si_sdr_db is not None
        assert file.spectral_db is not None
        assert np.isfinite([file.si_sdr_db, file.spectral_db]).all()
    # The list of files is the worker's of before.
    assert [path.name for path in options.scratch_path.iterdir()] == ["files.parquet"]


def test_one_wrong_code_is_found(storage, job, options) -> None:
    tamper(storage, job, "clip 2.wav")
    result = audited(storage, job, options)
    (file,) = result.with_other_codes
    assert file.uri.endswith("clip 2.wav")
    assert file.num_equal_codes == file.num_codes - 1
    assert result.with_wrong_length == []


def test_sources_that_moved_are_no_fault(storage, job, options, tmp_path) -> None:
    audio = tmp_path / "root" / "audio"
    (audio / "clip 0.wav").unlink()
    (audio / "clip 1.wav").write_bytes(wav(2.0, seed=9))
    result = audited(storage, job, options)
    outcomes = {file.uri[-len("0.wav") :]: file.outcome for file in result.files}
    assert outcomes == {"0.wav": "deleted", "1.wav": "changed", "2.wav": "compared"}
    assert result.with_other_codes == []


def test_the_command_of_workers_runs_it_once(storage, job, tmp_path, capfd) -> None:
    config = tmp_path / "hcodec.toml"
    root = file_uri(tmp_path / "root")
    config.write_text(
        f'[access]\nsource_prefixes = ["{root}/"]\ndestination_prefixes = ["{root}/"]\n'
        f'[catalog]\nuri = "sqlite:///{tmp_path}/c.db"\nwarehouse_uri = "{root}/w"\n'
        f'[work]\nwork_uri = "{root}/work"\n'
    )
    choose = ["audit", job.plan_uri + "/", "--files", "1", "--config", str(config), "--json"]
    assert main(choose) == 0
    uri = json.loads(capfd.readouterr().out)["job_uri"]
    assert make_audit_job(storage, job.plan_uri, num_files=1) == uri
    command = ["run", str(uri), "--config", str(config)]
    assert main(command) == 0
    written = storage.read(audit_result_uri(audit_uri(job.plan_uri)))
    assert len(json.loads(written)["files"]) == 1
    assert main(command) == 0
    assert storage.read(audit_result_uri(audit_uri(job.plan_uri))) == written
    # On a machine of another compute class nothing can be said: the job is refused.
    other = job.model_copy(
        update={"settings": job.settings.model_copy(update={"compute_class": "cpu-other"})}
    )
    audit = read_any_job(storage.read(str(uri)))
    assert isinstance(audit, AuditJob)
    storage.delete([audit_result_uri(audit_uri(job.plan_uri))])
    scratch = WorkerOptions(scratch_path=tmp_path)
    with pytest.raises(ConfigError, match=r"encode id|this is"):
        run_audit(audit.model_copy(update={"tokenize": other}), storage, scratch, threading.Event())
    stop = threading.Event()
    stop.set()
    assert run_audit(audit, storage, scratch, stop) == 143
