"""``hcodec train``, ``hcodec export-codec``, and the train jobs of ``hcodec run``.

Several processes train together when a launcher (torchrun, Kubeflow) says so by the environment
variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import Config, load_config
from hcodec_core.errors import EXIT_OK, ConfigError, HCodecError
from hcodec_core.jobs import TrainJob
from hcodec_core.storage import file_uri, split_uri

if TYPE_CHECKING:
    from hcodec_core.training.job import TrainingResult
    from hcodec_core.training.ranks import Ranks
    from hcodec_core.training.run import TrainOptions, TrainRequest
    from hcodec_core.training.trainer import TrainProgress

_LINE_SECONDS = 30.0
_PEER_WORDS = ("gloo", "nccl", "connection closed", "connection reset")


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    _add_export(commands)
    parser = commands.add_parser("train", help="train a codec; also under torchrun")
    parser.add_argument(
        "--recipe", required=True, help="name of a recipe that ships, or a TOML file"
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        help="folder, manifest, inventory or dataset:NAME@VERSION; may be given again",
    )
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--base", default=None, help="codec to go on from (default: from scratch)")
    parser.add_argument("--teacher", default=None, help="folder or hub id of the SSL model")
    parser.add_argument("--resume", action="store_true", help="go on where a run stopped")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an entry of the recipe, such as steps=1000 or losses.mel=45",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--workers", type=int, default=0, help="data processes of each rank")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for decoded audio")
    parser.add_argument(
        "--tracking",
        default=None,
        help="MLflow: sqlite:////folder/mlflow.db, http(s)://... or none (default: mlflow.db in a "
        "local run's folder)",
    )
    parser.add_argument("--experiment", default="hcodec", help="MLflow experiment")
    parser.add_argument("--licence", default="unknown", help="licence of the weights")
    add_config(parser)
    add_json(parser)
    parser.set_defaults(handler=_train)


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export-codec", help="make a codec of a training run's checkpoint, also while it trains"
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run (--out of hcodec train)")
    parser.add_argument(
        "--checkpoint",
        default="best",
        help="last, best (of the run's validation) or a step (default: best)",
    )
    parser.add_argument("--to", default=None, help="folder (default: below RUN/exports)")
    parser.add_argument("--licence", default=None, help="licence of the weights, if not the run's")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the checkpoint")
    add_config(parser)
    add_json(parser)
    parser.set_defaults(handler=_export_codec)


def _export_codec(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.config import StorageConfig
    from hcodec_core.storage import open_storage
    from hcodec_core.training.run import (
        TrainContext,
        TrainOptions,
        export_checkpoint,
        read_request,
    )

    config = load_config(options.config) if options.config.exists() else None
    context = TrainContext(
        storage=StorageConfig() if config is None else config.storage, config=config
    )
    request = read_request(open_storage(context.storage), _as_uri(options.run), options.licence)
    to_uri = "" if options.to is None else _as_uri(options.to)
    with _scratch(options.scratch) as scratch_path:
        made = export_checkpoint(
            request, options.checkpoint, to_uri, TrainOptions(scratch_path), context
        )
    score = "" if made.score is None else f", validation/mel {made.score:.4f}"
    output.result(asdict(made), f"Codec of step {made.step}{score}: {made.codec_uri}")


def _train(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.training.recipe import load_recipe
    from hcodec_core.training.run import TrainRequest

    config = load_config(options.config) if options.config.exists() else None
    out_uri = _as_uri(options.out)
    request = TrainRequest(
        recipe=load_recipe(options.recipe, dict(map(_change, options.set))),
        data_uris=tuple(
            uri if uri.startswith("dataset:") else _as_uri(uri) for uri in options.data
        ),
        out_uri=out_uri,
        base_uri=options.base,
        teacher=options.teacher,
        resumes=options.resume,
        tracking_uri=_tracking_uri(options.tracking, out_uri),
        experiment=options.experiment,
        licence=options.licence,
    )
    with _scratch(options.scratch) as scratch_path, _ranks(options.device) as (ranks, device):
        run_options = _run_options(options, scratch_path, device, options.workers)
        line = _ProgressLine(output) if ranks.is_first else None
        result = _run(request, run_options, ranks, config, _stop_on_signals(), line)
        if ranks.is_first:
            output.result(asdict(result), _text_of(result))


def run_job(
    job: TrainJob, options: argparse.Namespace, scratch_path: Path, stop: threading.Event
) -> int:
    """Run a train job for ``hcodec run``; returns the exit code."""
    from hcodec_core.promotion.codec_versions import registry_uri
    from hcodec_core.storage import open_storage
    from hcodec_core.training.job import finished
    from hcodec_core.training.recipe import recipe_of
    from hcodec_core.training.run import TrainRequest

    config = load_config(options.config)
    if finished(open_storage(config.storage), job.plan_uri) is not None:
        return EXIT_OK
    request = TrainRequest(
        recipe=recipe_of(job.recipe, f"of job {job.plan_id}"),
        data_uris=tuple(job.data_uris),
        out_uri=job.plan_uri,
        base_uri=None if job.base is None else job.base.uri,
        base_digest=None if job.base is None else job.base.digest,
        teacher=job.teacher,
        resumes=True,
        tracking_uri=registry_uri(config) if job.is_tracked else None,
        experiment=job.experiment,
        licence=job.weights_licence,
        sample_rate=job.sample_rate,
    )
    with _ranks(options.device) as (ranks, device):
        run_options = _run_options(options, scratch_path, device, options.decoders)
        _run(request, run_options, ranks, config, stop, None)
    return EXIT_OK


def _run(
    request: TrainRequest,
    options: TrainOptions,
    ranks: Ranks,
    config: Config | None,
    stop: threading.Event,
    line: _ProgressLine | None,
) -> TrainingResult:
    from hcodec_core.config import StorageConfig
    from hcodec_core.training.run import TrainContext, train

    context = TrainContext(
        ranks=ranks,
        storage=StorageConfig() if config is None else config.storage,
        config=config,
        stop=stop,
        report=_nothing if line is None else line,
    )
    try:
        return train(request, options, context)
    except RuntimeError as error:
        # Torch has no class of its own for a lost peer on every backend.
        if ranks.size == 1 or not any(word in str(error).lower() for word in _PEER_WORDS):
            raise
        raise HCodecError(
            "Another process of this run ended; see its own last words. Start all again with "
            "--resume."
        ) from error


def _run_options(
    options: argparse.Namespace, scratch_path: Path, device: str, num_workers: int
) -> TrainOptions:
    from hcodec_core.dataset.leases import worker_identity
    from hcodec_core.training.run import TrainOptions

    return TrainOptions(
        scratch_path=scratch_path,
        device=device,
        num_threads=options.threads,
        num_workers=num_workers,
        worker_id=worker_identity(getattr(options, "identity", None)),
    )


@contextmanager
def _ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """This process among those that the launcher started, and its own device."""
    from hcodec_core.training.ranks import Ranks

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(), device
        return
    import torch
    import torch.distributed as dist

    is_gpu = device == "cuda"
    if is_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    # Objects are exchanged on the CPU, gradients where they are.
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_gpu else "gloo")
    try:
        yield Ranks(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()


@contextmanager
def _scratch(path: Path | None) -> Iterator[Path]:
    """A folder of this process; one that was named is kept, so decoded audio is found again."""
    if path is None:
        with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
            yield Path(folder)
        return
    path.mkdir(parents=True, exist_ok=True)
    yield path


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _as_uri(text: str) -> str:
    if "://" not in text:
        return file_uri(Path(text).absolute())
    split_uri(text)  # refuses other schemes
    return text


def _tracking_uri(asked: str | None, out_uri: str) -> str | None:
    if asked is not None:
        return None if asked == "none" else asked
    scheme, _, path = split_uri(out_uri)
    if scheme != "file":
        return None
    Path(path).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path.rstrip('/')}/mlflow.db"


def _change(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _text_of(result: TrainingResult) -> str:
    scores = "".join(f"\n{name}: {value:.4f}" for name, value in result.scores.items())
    return (
        f"Trained {result.steps} steps on {result.num_training_files} files; "
        f"{result.num_held_out_files} held out.\nCodec: {result.codec_uri}{scores}"
    )


def _nothing(_: TrainProgress) -> None:
    pass


class _ProgressLine:
    """One line on standard error: kept up to date on a terminal, else every half minute."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._last = float("-inf")
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, progress: TrainProgress) -> None:
        now = time.monotonic()
        is_last = progress.step == progress.num_steps
        if now - self._last < (0.5 if self._is_terminal else _LINE_SECONDS) and not is_last:
            return
        self._last = now
        minutes, seconds = divmod(round(progress.eta_seconds), 60)
        text = (
            f"step {progress.step}/{progress.num_steps}, loss {progress.loss:.4f}, "
            f"{progress.steps_per_second:.2f} steps/s, waiting for data "
            f"{progress.data_wait_share:.0%}, {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        )
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if is_last else ""))
            sys.stderr.flush()
        else:
            self._output.note(text)
