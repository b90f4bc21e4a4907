"""What the processes of the test bed run: the worker's own command, and the steps after it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hcodec_core.cli import main
from hcodec_core.config import Config, load_config
from hcodec_core.dataset.checks import rows_of_snapshot
from hcodec_core.dataset.commit import CommitInfo, commit_plan
from hcodec_core.dataset.compaction import compact
from hcodec_core.dataset.facts import SnapshotFacts
from hcodec_core.dataset.inventory import take_inventory
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.plan import PlanRequest, make_plan
from hcodec_core.dataset.table import find_layout, load_table
from hcodec_core.dataset.versions import VersionRecord, publish
from hcodec_core.errors import EXIT_FAILURE, CommitConflictError, HCodecError, ValidationFailedError
from hcodec_core.jobs import JOB_FILE, read_job
from hcodec_core.storage import Storage, join_uri, open_storage


@contextlib.contextmanager
def as_process(log_path: Path, max_file_bytes: int | None) -> Iterator[None]:
    """Output goes to a file (to nowhere when files are limited); errors are exit codes."""
    where = str(log_path) if max_file_bytes is None else os.devnull
    log = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if max_file_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        yield
    except HCodecError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(error.exit_code or EXIT_FAILURE)


def work(
    config_path: Path, log_path: Path, job_uri: str, index: int, max_file_bytes: int | None
) -> None:
    """``hcodec run``."""
    with as_process(log_path, max_file_bytes):
        words = ["run", job_uri, "--config", str(config_path), "--index", str(index)]
        code = main(words)
    sys.exit(code)


def plan_step(config_path: Path, log_path: Path, request: PlanRequest, source: str) -> None:
    """Inventory and plan."""
    with as_process(log_path, None):
        config = load_config(config_path)
        storage = open_storage(config.storage)
        take_inventory(config, storage, [source], request.inventory_uri)
        make_plan(config, storage, request)


def publish_step(config_path: Path, log_path: Path, plan_uri: str) -> None:
    """Commit, validate and publish."""
    with as_process(log_path, None):
        config = load_config(config_path)
        finish(config, open_storage(config.storage), plan_uri)


def commit_step(config_path: Path, log_path: Path, plan_uri: str) -> None:
    """Commit alone."""
    with as_process(log_path, None):
        config = load_config(config_path)
        commit_plan(config, open_storage(config.storage), plan_uri)


def publish_alone_step(config_path: Path, log_path: Path, plan_uri: str, snapshot_id: int) -> None:
    """Publish what was committed and validated before."""
    with as_process(log_path, None):
        config = load_config(config_path)
        publish(config, open_storage(config.storage), plan_uri, snapshot_id)


def compact_step(config_path: Path, log_path: Path, dataset: str) -> None:
    """Compaction of ``main``."""
    with as_process(log_path, None):
        config = load_config(config_path)
        compact(open_storage(config.storage), find_layout(config, dataset), dry_run=False)


def finish(config: Config, storage: Storage, plan_uri: str) -> VersionRecord:
    """Commit, validate and publish; on top of another version when that came first."""
    for _ in range(5):
        info = commit_plan(config, storage, plan_uri)
        validate(config, storage, info)
        try:
            return publish(config, storage, plan_uri, info.snapshot_id)
        except CommitConflictError as error:
            print(error, flush=True)
    raise CommitConflictError("Other versions were always first.")


def validate(config: Config, storage: Storage, info: CommitInfo) -> None:
    """All facts that the validation suite judges; Great Expectations only puts them on a page."""
    job = read_job(storage.read(join_uri(info.plan_uri, JOB_FILE)))
    table = load_table(DatasetLayout(config, job.dataset, job.encode_id))
    with (
        tempfile.TemporaryDirectory(prefix="hcodec-chaos-") as folder,
        SnapshotFacts(job, Path(folder)) as facts,
    ):
        facts.gather(storage, rows_of_snapshot(table, info.snapshot_id))
        faulty = facts.faulty_files(5)
    if faulty.count:
        raise ValidationFailedError(f"{faulty.count} files at fault: {faulty.examples}.")
