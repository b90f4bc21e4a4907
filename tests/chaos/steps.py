"""What the processes of the test bed run: the worker's own command, and the steps after it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hcodec_core.cli import main
from hcodec_core.config import Config, load_config
from hcodec_core.dataset.checks import rows_of_snapshot
from hcodec_core.dataset.commit import CommitInfo, commit_plan
from hcodec_core.dataset.compaction import compact
from hcodec_core.dataset.facts import SnapshotFacts
from hcodec_core.dataset.inventory import take_inventory
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.maintenance import Upkeep, maintain, sweep_orphans
from hcodec_core.dataset.plan import PlanRequest, make_plan
from hcodec_core.dataset.table import find_layout, load_table
from hcodec_core.dataset.versions import VersionRecord, publish
from hcodec_core.errors import EXIT_FAILURE, CommitConflictError, HCodecError, ValidationFailedError
from hcodec_core.jobs import JOB_FILE, read_job
from hcodec_core.storage import Storage, join_uri, open_storage
from tests.chaos.clocks import VARIABLE
from tests.chaos.patience import NotHereError


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


@dataclass(frozen=True)
class WorkTerms:
    """What a worker gets: ``max_file_bytes`` no file may pass, ``scratch_path`` a folder."""

    max_file_bytes: int | None = None
    scratch_path: Path | None = None


@dataclass(frozen=True)
class Place:
    """What surrounds a process: the file of its wall clock, its folder for temporary files."""

    clock_path: Path | None = None
    tmp_path: Path | None = None


def in_place(place: Place, step: Callable[..., None], *values: object) -> None:
    """Run a step in its surroundings."""
    if place.clock_path is not None:
        os.environ[VARIABLE] = str(place.clock_path)
    if place.tmp_path is not None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(place.tmp_path)
    step(*values)


def work(config_path: Path, log_path: Path, job_uri: str, index: int, terms: WorkTerms) -> None:
    """``hcodec run``."""
    with as_process(log_path, terms.max_file_bytes):
        words = ["run", job_uri, "--config", str(config_path), "--index", str(index)]
        if terms.scratch_path is not None:
            words += ["--scratch", str(terms.scratch_path)]
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


def maintain_step(config_path: Path, log_path: Path, dataset: str) -> None:
    """Upkeep on the shortest terms that it takes."""
    with as_process(log_path, None):
        config = load_config(config_path)
        layout = find_layout(config, dataset)
        terms = Upkeep(expire_after_days=0, orphan_age_days=1 / 24)
        maintain(config, open_storage(config.storage), layout, "chaos", terms, dry_run=False)


def sweep_step(config_path: Path, log_path: Path, dataset: str) -> None:
    """Sweep alone, on its usual terms."""
    with as_process(log_path, None):
        config = load_config(config_path)
        storage = open_storage(config.storage)
        sweep_orphans(storage, find_layout(config, dataset), dry_run=False)


def mount_small(path: Path, num_kibibytes: int) -> None:
    """Mount a memory file system of so much room. Raises ``NotHereError`` without the right to."""
    options = f"size={num_kibibytes}k"
    try:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise NotHereError("needs the right to mount a small file system (root)") from error


def unmount(path: Path) -> None:
    """The end of ``mount_small``, also while a process is still in it."""
    subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)


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
