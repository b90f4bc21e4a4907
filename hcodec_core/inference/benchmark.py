"""How fast codecs encode: a plain loop, mode exact and mode fast, measured in one run.

The plain loop is the same network, one file at a time, in float32, as published scripts run
theirs. Each codec is measured in a process of its own, so that peaks of memory are its own; the
three ways take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hcodec_core.inference.agreement import AgreementTally
from hcodec_core.inference.arithmetic import Mode
from hcodec_core.inference.clips import Clip, ClipTokens
from hcodec_core.inference.engine import Engine, compute_class
from hcodec_core.inference.invariance import synthetic_clips
from hcodec_core.models.base import Codec
from hcodec_core.models.loading import CodecCard, describe_codec, load_codec
from hcodec_core.models.random_weights import random_codec
from hcodec_core.tokens import CodecSpec, EncodeSettings

_ROUNDS = 3
_PROBE_SECONDS = 2.0
_FEWEST_SECONDS, _MOST_SECONDS = 6.0, 1200.0
_LOOP = "loop"
_STATUS_PATH = Path("/proc/self/status")
_RESET_PATH = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to measure: a codec URI, or a preset with random weights.

    budget_seconds: how long one pass over the clips should take; their number follows from it and
    from how fast the codec is.
    """

    codec: str
    is_preset: bool
    device: str = "cpu"
    num_threads: int = 1
    modes: tuple[Mode, ...] = ("exact", "fast")
    budget_seconds: float = 10.0
    threshold: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class BenchmarkRow:
    """One codec in one mode on one kind of device.

    x_realtime: seconds of audio per second, best of three passes. loop_x_realtime: of the plain
    loop in the same run. codes_equal: share of codes equal to the loop's. peak_bytes: of memory
    while encoding, the weights included; of the device where that is a GPU. bottleneck: the part
    of the codec that takes most of the time of one clip, and its share.
    """

    codec: str
    mode: str
    device: str
    x_realtime: float
    loop_x_realtime: float
    codes_equal: float
    peak_bytes: int
    bottleneck: str


@dataclass(frozen=True)
class BenchmarkResult:
    """Rows of one codec, one for each mode, and what they were measured on."""

    rows: Sequence[BenchmarkRow]
    num_parameters: int
    is_trained: bool
    num_clips: int
    audio_seconds: float
    loop_peak_bytes: int


def run_benchmark(request: BenchmarkRequest) -> BenchmarkResult:
    """Measure one codec in a process of its own.

    Raises what loading raises: ``ConfigError``, ``CheckpointError``.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, request).result()


def measure(request: BenchmarkRequest) -> BenchmarkResult:
    """Measure one codec in this process."""
    engines = _engines(request)
    codec = next(iter(engines.values())).codec
    clips = _clips(codec, request)
    ways: dict[str, Callable[[], list[ClipTokens]]] = {
        _LOOP: lambda: _plain_loop(codec, clips, request.num_threads),
        **{mode: _passes(engine, clips) for mode, engine in engines.items()},
    }
    seconds = {way: float("inf") for way in ways}
    peaks: dict[str, int] = {}
    tokens: dict[str, list[ClipTokens]] = {}
    order = list(ways)
    for turn in range(_ROUNDS):
        # Each begins a round once: what comes first or last may meet another machine.
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            with _watch_peak(codec.device) as peak:
                started = time.perf_counter()
                tokens[way] = ways[way]()
                seconds[way] = min(seconds[way], time.perf_counter() - started)
            peaks[way] = peak()
    audio_seconds = sum(map(len, clips)) / codec.sample_rate
    rates = {way: audio_seconds / taken for way, taken in seconds.items()}
    part = _slowest_part(codec, clips[0], request.num_threads)
    rows = [
        BenchmarkRow(
            codec=codec.spec.name,
            mode=mode,
            device=_device_name(codec.device),
            x_realtime=round(rates[mode], 2),
            loop_x_realtime=round(rates[_LOOP], 2),
            codes_equal=_equal_share(tokens[mode], tokens[_LOOP], codec.sample_rate),
            peak_bytes=peaks[mode],
            bottleneck=part,
        )
        for mode in engines
    ]
    manifest = codec.spec.manifest
    return BenchmarkResult(
        rows=rows,
        num_parameters=manifest.num_parameters,
        is_trained=manifest.is_trained,
        num_clips=len(clips),
        audio_seconds=audio_seconds,
        loop_peak_bytes=peaks[_LOOP],
    )


def _engines(request: BenchmarkRequest) -> dict[Mode, Engine]:
    here = compute_class(request.device, request.num_threads)
    values = {"compute_class": here, "mode": request.modes[0], "threshold": request.threshold}
    settings = EncodeSettings.model_validate(values)
    if request.is_preset:
        built = random_codec(request.codec, request.seed).requires_grad_(False)
        card = CodecCard(request.codec, is_trained=False, weights_licence="none")
        manifest = describe_codec(built, card, "0" * 64)
        codec = built.to(request.device).eval().bind(CodecSpec(manifest, settings))
    else:
        codec = load_codec(request.codec, settings, request.device)
    first = Engine(codec, request.num_threads)
    return {mode: first.in_mode(mode) for mode in request.modes}


def _clips(codec: Codec, request: BenchmarkRequest) -> list[Clip]:
    """Clips of 0.2 to 12 s, as many as one pass of the loop can encode within the budget."""
    rate = codec.sample_rate
    probe = [np.resize(synthetic_clips(rate, 1, request.seed)[0], int(_PROBE_SECONDS * rate))]
    _plain_loop(codec, probe, request.num_threads)
    started = time.perf_counter()
    _plain_loop(codec, probe, request.num_threads)
    speed = _PROBE_SECONDS / (time.perf_counter() - started)
    wanted = min(max(speed * request.budget_seconds, _FEWEST_SECONDS), _MOST_SECONDS)
    pool = synthetic_clips(rate, int(wanted / 3) + 2, request.seed)
    pool = [clip for clip in pool if len(clip) >= codec.spec.min_samples]
    ends = np.cumsum([len(clip) for clip in pool]) / rate
    return pool[: max(2, int(np.searchsorted(ends, wanted)) + 1)]


def _passes(engine: Engine, clips: Sequence[Clip]) -> Callable[[], list[ClipTokens]]:
    return lambda: engine.encode_clips(clips)


def _plain_loop(codec: Codec, clips: Sequence[Clip], num_threads: int) -> list[ClipTokens]:
    """One clip after the other, with torch as it comes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = []
        for clip in clips:
            audio = torch.from_numpy(clip)[None, None]
            tokens = codec.encode(audio, torch.tensor([len(clip)]))
            spans = None if tokens.frame_spans is None else tokens.frame_spans[0]
            found.append(ClipTokens(tokens.clip(0), int(tokens.num_frames[0]), len(clip), spans))
        return found
    finally:
        torch.set_num_threads(threads)


def _equal_share(
    found: Sequence[ClipTokens], expected: Sequence[ClipTokens], sample_rate: int
) -> float:
    """Share of equal codes on the base grid."""
    tally = AgreementTally()
    for one, other in zip(found, expected, strict=True):
        tally.add(one, other)
    result = tally.result(sample_rate)
    assert result is not None
    equal = sum(depth.num_equal for depth in result.depths)
    return round(equal / sum(depth.num_frames for depth in result.depths), 6)


def _slowest_part(codec: Codec, clip: Clip, num_threads: int) -> str:
    """Top-level module that takes most of the time of one clip, with its share."""
    spent: dict[str, float] = {}
    began: dict[str, float] = {}
    hooks: list[Any] = []

    def now() -> float:
        if codec.device.type == "cuda":
            torch.cuda.synchronize(codec.device)
        return time.perf_counter()

    for name, module in _parts(codec):

        def before(*_: Any, name: str = name) -> None:
            began[name] = now()

        def after(*_: Any, name: str = name) -> None:
            spent[name] = spent.get(name, 0.0) + now() - began[name]

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        started = now()
        _plain_loop(codec, [clip], num_threads)
        total = now() - started
    finally:
        for hook in hooks:
            hook.remove()
    spent["rest"] = max(0.0, total - sum(spent.values()))
    slowest = max(spent, key=lambda name: spent[name])
    return f"{slowest} {100 * spent[slowest] / total:.0f} %"


def _parts(codec: Codec) -> Iterator[tuple[str, nn.Module]]:
    """Top-level modules, and inside lists and SSL models (never called whole) their children."""
    for name, module in codec.named_children():
        if isinstance(module, nn.ModuleDict | nn.ModuleList) or name == "ssl":
            for inner, child in module.named_children():
                yield f"{name}.{inner}", child
        else:
            yield name, module


@contextmanager
def _watch_peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Peak memory while the block runs, in bytes; ask after it ended."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        torch.cuda.synchronize(device)
        return
    if _RESET_PATH.exists():
        _RESET_PATH.write_text("5")  # Linux: forget the peak of the resident memory
    yield _peak_resident


def _peak_resident() -> int:
    if _STATUS_PATH.exists():
        lines = _STATUS_PATH.read_text().splitlines()
        (peak,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
