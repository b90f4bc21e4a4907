"""The command ``bench``: speed and memory of codecs, beside a plain loop in the same run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcodec_core.cli.output import Commands, Output, add_json
from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from hcodec_core.inference.benchmark import BenchmarkRequest, BenchmarkResult

_PRESETS = (
    "hcodec-1.0",
    "hcodec-1.5",
    "hcodec-2.0",
    "ucodec-5hz",
    "hhcodec-24khz",
    "xcodec-hubert-general",
    "mimi",
    "dac-16khz",
    "encodec-24khz",
)
_HEADS = (
    "codec",
    "parameters",
    "loop",
    "exact",
    "fast",
    "exact / loop",
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
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: both where there are")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--budget", type=float, default=10.0, help="seconds that a pass should take (default: 10)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of <machine>.json and .md")
    add_json(parser)
    parser.set_defaults(handler=_bench)


def _bench(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.inference.benchmark import run_benchmark

    if options.budget <= 0 or options.threads < 1:
        raise ConfigError("--budget must be positive and --threads at least 1.")
    for device in _devices(options.device):
        requests = list(_requests(options, device))
        results = []
        with output.progress() as progress:
            bar = progress.add_task(device, total=len(requests))
            for request in requests:
                results.append(run_benchmark(request))
                progress.advance(bar)
        _show(results, device, options, output)


def _devices(wanted: str) -> list[str]:
    if wanted != "auto":
        return [wanted]
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _requests(options: argparse.Namespace, device: str) -> list[BenchmarkRequest]:
    from hcodec_core.inference.benchmark import BenchmarkRequest

    is_default = options.codec is None and options.preset is None
    codecs = ["hcodec-nano"] if is_default else options.codec or []
    presets = list(_PRESETS) if is_default else options.preset or []
    return [
        BenchmarkRequest(
            codec=name,
            is_preset=is_preset,
            device=device,
            num_threads=options.threads,
            budget_seconds=options.budget,
            threshold=0.8 if "1.5" in name else None,
        )
        for is_preset, names in ((False, codecs), (True, presets))
        for name in names
    ]


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
    name = re.sub(r"[^a-z0-9]+", "-", _machine(device).lower()).strip("-")
    path = options.out / f"{name}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else []
    fresh = {(row["codec"], row["mode"], row["device"]) for row in rows}
    kept = [row for row in known if (row["codec"], row["mode"], row["device"]) not in fresh]
    path.write_text(json.dumps([*kept, *rows], indent=1) + "\n")
    path.with_suffix(".md").write_text(_page(results, device, options))


def _page(results: Sequence[BenchmarkResult], device: str, options: argparse.Namespace) -> str:
    import torch
    import transformers

    load = " / ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"# Codecs on {_machine(device)}",
        "",
        f"`hcodec bench` (what `make bench-codecs` runs) on {datetime.now(UTC):%Y-%m-%d}; "
        f"{options.threads} CPU thread(s) per product, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; load average at the end "
        f"{load}.",
        "",
        "Seconds of audio per second, best of three passes that take turns. Loop: the same "
        "network, one file at a time, in float32. Equal: share of codes equal to the loop's. Peak: "
        "memory while encoding, weights included. Clips are synthetic, 0.2 to 12 s. **Weights are "
        "random unless a codec is said to be trained**: speed does not depend on them, agreement "
        "of mode fast does.",
        "",
        "| " + " | ".join(_HEADS) + " |",
        "|" + "---|" * len(_HEADS),
        *("| " + " | ".join(_line(result)) + " |" for result in results),
    ]
    return "\n".join(lines) + "\n"


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
        f"{exact.x_realtime / exact.loop_x_realtime:.3f}",
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
