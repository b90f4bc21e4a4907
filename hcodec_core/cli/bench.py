"""The command ``bench``: speed and memory of codecs, beside a plain loop in the same run."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcodec_core.cli.output import Commands, Output, add_json
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import short

if TYPE_CHECKING:
    from hcodec_core.inference.benchmark import BenchmarkRequest, BenchmarkResult
    from hcodec_core.inference.benchmark_feed import FeedRow

_PRESETS = ("hcodec-1.0", "xcodec-hubert-general", "mimi", "dac-16khz")
_GPU_PRESETS = ("hcodec-1.5", "hcodec-2.0")
_OTHER_PRESETS = ("hcodec-1.5", "hcodec-2.0", "ucodec-5hz", "hhcodec-24khz", "encodec-24khz")
_RATES = (250, 5_000, 15_000)
"""Encoders to feed, times real time: nano on a core, 1.0 on a GPU batched plainly, and faster."""
_HEADS = (
    "codec",
    "parameters",
    "loop",
    "exact",
    "fast",
    "exact / loop",
    "exact / loop, processor",
    "workers",
    "exact equal",
    "fast equal",
    "peak loop",
    "peak exact",
    "peak fast",
    "slowest part",
    "audio",
)


def add_commands(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "bench", help="speed and memory of codecs beside a plain one-file loop in the same run"
    )
    parser.add_argument("--codec", nargs="*", default=None, help="codec URIs")
    parser.add_argument("--preset", nargs="*", default=None, help="presets, with random weights")
    parser.add_argument("--all", action="store_true", help="more presets (half an hour on a CPU)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: both where there are")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--workers", type=int, default=None, help="processes (default: one per core; 1 on a GPU)"
    )
    parser.add_argument("--feed", action="store_true", help="also measure decoding, by format")
    parser.add_argument(
        "--budget", type=float, default=10.0, help="seconds that a pass should take (default: 10)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of <machine>.json and .md")
    add_json(parser)
    parser.set_defaults(handler=_bench)


def _bench(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.inference.benchmark import run_benchmark

    if options.budget <= 0 or options.threads < 1 or (options.workers or 1) < 1:
        raise ConfigError("--budget must be positive, --threads and --workers at least 1.")
    for device in _devices(options.device):
        requests = list(_requests(options, device))
        results = []
        with output.progress() as progress:
            bar = progress.add_task(device, total=len(requests))
            for request in requests:
                results.append(run_benchmark(request))
                progress.advance(bar)
        _show(results, device, options, output)
    if options.feed:
        _feed(options, output)


def _feed(options: argparse.Namespace, output: Output) -> None:
    """Decoding and a worker end to end, by format; beside the other page, as ``-feed``."""
    from hcodec_core.inference.benchmark_feed import measure_feed

    logging.getLogger("hcodec_core").setLevel(logging.ERROR)  # a worker's log is for clusters
    rows = measure_feed("hcodec-nano", max(2, round(4 * options.budget)))
    heads = ("format", "decode, x real time per core", *map(_rate_head, _RATES), "worker", "where")
    lines = [_feed_line(row) for row in rows]
    if options.out is not None:
        path = _machine_path(options.out, "cpu")
        path = path.with_name(f"{path.stem}-feed.json")
        path.write_text(json.dumps([_feed_document(row) for row in rows], indent=1) + "\n")
        path.with_suffix(".md").write_text(_feed_page(heads, lines))
    if not output.is_json:
        output.table(f"Feeding an encoder, {_machine('cpu')}", heads, lines)


def _rate_head(rate: int) -> str:
    return f"for {rate} x: cores, MB/s"


def _feed_line(row: FeedRow) -> tuple[str, ...]:
    needs = [row.decode.needs(rate) for rate in _RATES]
    return (
        row.name,
        f"{row.decode.audio_seconds / row.decode.decode_seconds:.0f}",
        *(f"{short(cores)}, {short(megabytes)}" for cores, megabytes in needs),
        f"{row.worker_x_realtime:.0f} x",
        row.work.for_people.partition("; an encoder")[0],
    )


def _feed_document(row: FeedRow) -> dict[str, Any]:
    return {
        "format": row.name,
        "decode": row.decode.model_dump(mode="json"),
        "worker_x_realtime": row.worker_x_realtime,
        "encode_x_realtime": round(row.work.encode_rate, 2),
        "work": row.work.model_dump(mode="json"),
    }


def _feed_page(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = [
        f"# Feeding an encoder on {_machine('cpu')}",
        "",
        f"`hcodec bench --feed` on {datetime.now(UTC):%Y-%m-%d}. Decode: sniff, decode, mix to one "
        "channel and resample to 16 kHz, in processor time of one core. For an encoder of so many "
        "times real time: the cores that decode for it, and MB/s from storage. Worker: one with "
        "hcodec-nano, one thread and one decoder process, from files on disk to Parquet, and where "
        "its time went.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]
    return "\n".join(text) + "\n"


def _devices(wanted: str) -> list[str]:
    import torch

    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "There is no GPU here that torch can use: nothing was measured. Run this on a machine "
            "with one, or measure the CPU with --device cpu."
        )
    if wanted != "auto":
        return [wanted]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _requests(options: argparse.Namespace, device: str) -> list[BenchmarkRequest]:
    from hcodec_core.inference.benchmark import BenchmarkRequest

    is_default = options.codec is None and options.preset is None
    codecs = ["hcodec-nano"] if is_default else options.codec or []
    presets = list(_default_presets(options, device)) if is_default else options.preset or []
    usual = 1 if device.startswith("cuda") else (os.cpu_count() or 1) // options.threads
    return [
        BenchmarkRequest(
            codec=name,
            is_preset=is_preset,
            device=device,
            num_threads=options.threads,
            num_workers=max(1, options.workers or usual),
            budget_seconds=options.budget,
            threshold=0.8 if "1.5" in name else None,
        )
        for is_preset, names in ((False, codecs), (True, presets))
        for name in names
    ]


def _default_presets(options: argparse.Namespace, device: str) -> Sequence[str]:
    if options.all:
        return (*_PRESETS, *_OTHER_PRESETS)
    return (*_PRESETS, *_GPU_PRESETS) if device.startswith("cuda") else _PRESETS


def _show(
    results: Sequence[BenchmarkResult], device: str, options: argparse.Namespace, output: Output
) -> None:
    rows = [asdict(row) for result in results for row in result.rows]
    if options.out is not None:
        _write(rows, results, device, options)
    if output.is_json:
        output.result(rows)
        return
    title = f"Times real time, {_machine(device)}, {options.threads} CPU thread(s)"
    output.table(title, _HEADS, [_line(result) for result in results])


def _write(
    rows: list[dict[str, Any]],
    results: Sequence[BenchmarkResult],
    device: str,
    options: argparse.Namespace,
) -> None:
    """Rows of codecs measured before stay, in the JSON; the page is of this run."""
    path = _machine_path(options.out, device)
    known = json.loads(path.read_text()) if path.exists() else []
    fresh = {(row["codec"], row["mode"], row["device"]) for row in rows}
    kept = [row for row in known if (row["codec"], row["mode"], row["device"]) not in fresh]
    path.write_text(json.dumps([*kept, *rows], indent=1) + "\n")
    path.with_suffix(".md").write_text(_page(results, device, options))


def _machine_path(folder_path: Path, device: str) -> Path:
    """The JSON of this machine, in a folder that is there now."""
    folder_path.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", _machine(device).lower()).strip("-")
    return folder_path / f"{name}.json"


def _page(results: Sequence[BenchmarkResult], device: str, options: argparse.Namespace) -> str:
    import torch
    import transformers

    load = " / ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"# Codecs on {_machine(device)}",
        "",
        f"`hcodec bench` (what `make bench` and `make bench-gpu` run) on "
        f"{datetime.now(UTC):%Y-%m-%d}; "
        f"{options.threads} CPU thread(s) per product, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; load average at the end "
        f"{load}.",
        "",
        "Seconds of audio per second, best of three passes that take turns. Loop: the same "
        "network as it is trained, one file at a time, in float32; on a CPU the faster of one "
        "thread and one per core. The modes run in as many worker processes as are named. "
        "Processor: the same ratio in seconds of processor time, for one worker, which others on a "
        "shared machine disturb less. Equal: share of codes equal to the loop's. Peak: "
        "memory while encoding, all workers, weights included. Clips are synthetic, 0.2 to 12 s. "
        "**Weights are random unless a codec is said to be trained**: speed does not depend on "
        "them, agreement of mode fast does.",
        "",
        "| " + " | ".join(_HEADS) + " |",
        "|" + "---|" * len(_HEADS),
        *("| " + " | ".join(_line(result)) + " |" for result in results),
        "",
        "## Mode fast against mode exact",
        "",
        "Holds: of the frames in which all codebooks before it agree, those in which this one does "
        "too; 1 - holds is where codes first diverge.",
        "",
        "| codec | stream | codebook | frames | equal | holds |",
        "|---|---|---|---|---|---|",
        *(line for result in results for line in _agreement_lines(result)),
    ]
    return "\n".join(lines) + "\n"


def _agreement_lines(result: BenchmarkResult) -> Iterator[str]:
    """One line per stream and codebook."""
    for depth in result.agreement.depths if result.agreement else ():
        yield (
            f"| {result.rows[0].codec} | {depth.stream} | {depth.codebook} | {depth.num_frames} | "
            f"{_percent(depth.equal_share)} | {_percent(depth.holding_share)} |"
        )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _line(result: BenchmarkResult) -> tuple[str, ...]:
    exact, fast = (
        next(row for row in result.rows if row.mode == mode) for mode in ("exact", "fast")
    )
    trained = " (trained)" if result.is_trained else ""
    return (
        exact.codec + trained,
        f"{result.num_parameters / 1e6:.1f} M",
        f"{exact.loop_x_realtime:.2f}",
        f"{exact.x_realtime:.2f}",
        f"{fast.x_realtime:.2f}",
        f"{exact.x_realtime / exact.loop_x_realtime:.2f}",
        f"{result.x_processor['exact'] / result.x_processor['loop']:.2f}",
        f"{result.num_workers}",
        f"{100 * exact.codes_equal:.3f} %",
        f"{100 * fast.codes_equal:.2f} %",
        f"{result.loop_peak_bytes / 1e9:.2f} GB",
        f"{exact.peak_bytes / 1e9:.2f} GB",
        f"{fast.peak_bytes / 1e9:.2f} GB",
        exact.bottleneck,
        f"{result.num_clips} clips, {result.audio_seconds:.0f} s",
    )


def _machine(device: str) -> str:
    """Kind of machine, never its name: processor and cores, or the GPU."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    plain = re.sub(r"\((R|TM)\)", "", names[0]) if names else platform.machine()
    return " ".join(plain.split())
