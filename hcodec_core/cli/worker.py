"""Commands that schedulers run: ``hcodec run`` and ``hcodec env``."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcodec_core.cli.output import Commands, Output, add_config, add_json

if TYPE_CHECKING:
    from hcodec_core.storage import Storage


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    run = commands.add_parser("run", help="work on a plan until all its shards are accounted for")
    run.add_argument("job_uri", metavar="JOB_URI", help="s3://.../job.json or file:///.../job.json")
    add_config(run)
    run.add_argument(
        "--index",
        type=int,
        default=os.environ.get("JOB_COMPLETION_INDEX", "0"),
        help="where to start among the shards (default: $JOB_COMPLETION_INDEX, else 0)",
    )
    run.add_argument(
        "--identity",
        default=os.environ.get("HCODEC_WORKER_ID"),
        help="unique name of this process (default: $HCODEC_WORKER_ID, in a pod its UID)",
    )
    run.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    run.add_argument("--threads", type=int, default=1, help="CPU threads of the encoder")
    run.add_argument("--decoders", type=int, default=1, help="audio decoding processes")
    run.add_argument("--scratch", type=Path, default=None, help="folder for downloads")
    run.set_defaults(handler=_run, log_json=True)

    env = commands.add_parser("env", help="compute class and library versions of this machine")
    env.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    env.add_argument("--threads", type=int, default=1, help="CPU threads of the encoder")
    add_json(env)
    env.set_defaults(handler=_env)


def _run(options: argparse.Namespace, output: Output) -> int:
    from hcodec_core.config import load_config
    from hcodec_core.jobs import read_any_job
    from hcodec_core.storage import open_storage

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    storage = open_storage(load_config(options.config).storage)
    job = read_any_job(storage.read(options.job_uri))
    with tempfile.TemporaryDirectory(prefix="hcodec-", dir=options.scratch) as scratch:
        return _RUNNERS[job.kind](job, storage, options, Path(scratch), stop)


def _run_tokenize(
    job: Any, storage: Storage, options: argparse.Namespace, scratch: Path, stop: threading.Event
) -> int:
    from hcodec_core.inference.worker import WorkerOptions, run_worker

    worker = WorkerOptions(
        index=options.index,
        identity=options.identity,
        device=options.device,
        num_threads=options.threads,
        num_decoders=options.decoders,
        scratch_path=scratch,
    )
    return run_worker(options.job_uri, storage, worker, stop)


def _run_evaluate(
    job: Any, storage: Storage, options: argparse.Namespace, scratch: Path, stop: threading.Event
) -> int:
    from hcodec_core.cli.evaluation import run_job

    return run_job(job, storage, options, scratch, stop)


def _run_train(
    job: Any, storage: Storage, options: argparse.Namespace, scratch: Path, stop: threading.Event
) -> int:
    from hcodec_core.cli.training import run_job

    return run_job(job, options, scratch, stop)


def _run_audit(
    job: Any, storage: Storage, options: argparse.Namespace, scratch: Path, stop: threading.Event
) -> int:
    from hcodec_core.inference.audit import run_audit
    from hcodec_core.inference.worker import WorkerOptions

    worker = WorkerOptions(
        identity=options.identity,
        device=options.device,
        num_threads=options.threads,
        scratch_path=scratch,
    )
    return run_audit(job, storage, worker, stop)


_RUNNERS = {
    "tokenize": _run_tokenize,
    "evaluate": _run_evaluate,
    "train": _run_train,
    "audit": _run_audit,
}
"""What runs a job, by its kind (see ``jobs.read_any_job``)."""


def _env(options: argparse.Namespace, output: Output) -> None:
    import platform

    import torch

    from hcodec_core.inference.engine import compute_class

    output.result(
        {
            "compute_class": compute_class(options.device, options.threads),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
    )
