"""Commands that schedulers run: ``hcodec run`` and ``hcodec env``."""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
from pathlib import Path

from hcodec_core.cli.output import Commands, Output, add_config, add_json


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    run = commands.add_parser("run", help="work on a plan until all its shards are accounted for")
    run.add_argument("job_uri", metavar="JOB_URI", help="s3://.../job.json or file:///.../job.json")
    add_config(run)
    run.add_argument("--index", type=int, default=0, help="where to start among the shards")
    run.add_argument("--identity", default=None, help="unique name of this process (pod UID)")
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
    from hcodec_core.inference.worker import WorkerOptions, run_worker
    from hcodec_core.storage import open_storage

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    config = load_config(options.config)
    with tempfile.TemporaryDirectory(prefix="hcodec-", dir=options.scratch) as scratch:
        worker = WorkerOptions(
            index=options.index,
            identity=options.identity,
            device=options.device,
            num_threads=options.threads,
            num_decoders=options.decoders,
            scratch_path=Path(scratch),
        )
        return run_worker(options.job_uri, open_storage(config.storage), worker, stop)


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
