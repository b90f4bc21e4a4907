"""How fast codecs encode: a plain loop, mode exact and mode fast, measured in one run.

The plain loop is the same network as it is trained (``Codec.encode``), one file at a time, in
float32, as published scripts run theirs: on a CPU once with one thread and once with one per core,
and what counts is the faster. The modes run as embedded workers do: on a CPU one process per core
with one thread each, on a GPU one process. The ways take turns, so that a machine that slows down
slows all of them; beside the wall clock stands processor time, which others on a shared machine
disturb less.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from hcodec_core.jobs import ModeAgreement
from hcodec_core.models.base import Codec
from hcodec_core.models.loading import CodecCard, describe_codec, load_codec
from hcodec_core.models.random_weights import random_codec
from hcodec_core.tokens import CodecSpec, EncodeSettings

_ROUNDS = 3
_PROBE_SECONDS = 2.0
_FEWEST_SECONDS, _MOST_SECONDS = 6.0, 1200.0
_LOOP, _WIDE_LOOP = "loop", "loop on all cores"
_BYTES_PER_PARAMETER = 12.0  # float32, and what loading and encoding take beside it
# A GPU needs more audio than the loop can encode in the time: the clips several times over.
_GPU_REPEATS = {"exact": 8, "fast": 32}
_STATUS_PATH = Path("/proc/self/status")
_RESET_PATH = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to measure: a codec URI, or a preset with random weights.

    num_workers: processes of the modes. budget_seconds: how long one pass over the clips should
    take; their number follows from it and from how fast the codec is.
    """

    codec: str
    is_preset: bool
    device: str = "cpu"
    num_threads: int = 1
    num_workers: int = 1
    modes: tuple[Mode, ...] = ("exact", "fast")
    budget_seconds: float = 10.0
    threshold: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class BenchmarkRow:
    """One codec in one mode on one kind of device.

    x_realtime: seconds of audio per second, best of three passes. loop_x_realtime: of the plain
    loop in the same run. codes_equal: share of codes equal to the loop's. peak_bytes: of memory
    while encoding, all processes, the weights included; of the device where that is a GPU.
    bottleneck: the part of the codec that takes most of the time of one clip, and its share.
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
    """Rows of one codec, one for each mode, and what they were measured on.

    x_processor: seconds of audio per second of processor time, by way: "loop" and the modes.
    agreement: of mode fast with mode exact, where both were measured.
    """

    rows: Sequence[BenchmarkRow]
    num_parameters: int
    is_trained: bool
    num_workers: int
    num_clips: int
    audio_seconds: float
    loop_peak_bytes: int
    x_processor: dict[str, float]
    agreement: ModeAgreement | None


@dataclass(frozen=True)
class _Pass:
    """One process's pass over its clips: seconds of clock and processor, peak memory, tokens."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    tokens: list[ClipTokens]


@dataclass(frozen=True)
class _Facts:
    name: str
    device: str
    num_parameters: int
    is_trained: bool
    sample_rate: int
    bottleneck: str


class _Bench:
    """What one process measures with."""

    def __init__(self, request: BenchmarkRequest) -> None:
        self.request = request
        self.engines = _engines(request)
        self.codec = next(iter(self.engines.values())).codec

    def facts(self, clip: Clip) -> _Facts:
        manifest = self.codec.spec.manifest
        return _Facts(
            name=manifest.name,
            device=_device_name(self.codec.device),
            num_parameters=manifest.num_parameters,
            is_trained=manifest.is_trained,
            sample_rate=self.codec.sample_rate,
            bottleneck=_slowest_part(self.codec, clip, self.request.num_threads),
        )

    def run(self, way: str, clips: Sequence[Clip]) -> _Pass:
        with _watch_peak(self.codec.device) as peak:
            started, processor = time.perf_counter(), time.process_time()
            tokens = self._encode(way, clips)
            seconds = time.perf_counter() - started
            processor_seconds = time.process_time() - processor
        return _Pass(seconds, processor_seconds, peak(), tokens)

    def _encode(self, way: str, clips: Sequence[Clip]) -> list[ClipTokens]:
        if way == _LOOP:
            return _plain_loop(self.codec, clips, self.request.num_threads)
        if way == _WIDE_LOOP:
            return _plain_loop(self.codec, clips, os.cpu_count() or 1)
        engine = self.engines[_mode_of(way)]
        return engine.encode_clips(clips)


_bench: _Bench | None = None
"""Of this process, when it is one that measures."""


def _open(request: BenchmarkRequest) -> int:
    global _bench
    _bench = _Bench(request)
    return _bench.codec.spec.manifest.num_parameters


def _first_clips() -> list[Clip]:
    assert _bench is not None
    return _clips(_bench.codec, _bench.request)


def _facts(clip: Clip) -> _Facts:
    assert _bench is not None
    return _bench.facts(clip)


def _run(way: str, clips: Sequence[Clip]) -> _Pass:
    assert _bench is not None
    return _bench.run(way, clips)


def _mode_of(way: str) -> Mode:
    return "exact" if way == "exact" else "fast"


def run_benchmark(request: BenchmarkRequest) -> BenchmarkResult:
    """Measure one codec in processes of their own.

    Raises what loading raises: ``ConfigError``, ``CheckpointError``.
    """
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        first = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
        size = first.submit(_open, request).result()
        num_workers = min(request.num_workers, _fitting(size))
        lanes = [first]
        for _ in range(num_workers - 1):
            lanes.append(stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)))
        for opening in [lane.submit(_open, request) for lane in lanes[1:]]:
            opening.result()
        return _measure(replace(request, num_workers=num_workers), lanes)


def _fitting(num_parameters: int) -> int:
    """Processes of a codec that free memory holds."""
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 + int(free_bytes / (_BYTES_PER_PARAMETER * num_parameters + 0.5e9))


def _measure(request: BenchmarkRequest, lanes: Sequence[ProcessPoolExecutor]) -> BenchmarkResult:
    clips = lanes[0].submit(_first_clips).result()
    facts = lanes[0].submit(_facts, clips[0]).result()
    is_gpu = request.device.startswith("cuda")
    loops = [_LOOP] if is_gpu else [_LOOP, _WIDE_LOOP]
    order = [*loops, *request.modes]
    passes: dict[str, list[_Pass]] = {way: [] for way in order}
    for turn in range(_ROUNDS):
        # Each begins a round once: what comes first or last may meet another machine.
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            used = lanes[:1] if way in loops else lanes
            repeats = _GPU_REPEATS.get(way, 1) if is_gpu else 1
            passes[way].append(_together(used, way, clips, repeats))
    audio_seconds = sum(map(len, clips)) / facts.sample_rate
    best = {way: min(found, key=lambda one: one.seconds) for way, found in passes.items()}
    loop = min((best[way] for way in loops), key=lambda one: one.seconds)
    return BenchmarkResult(
        rows=[
            BenchmarkRow(
                codec=facts.name,
                mode=mode,
                device=facts.device,
                x_realtime=round(audio_seconds / best[mode].seconds, 2),
                loop_x_realtime=round(audio_seconds / loop.seconds, 2),
                codes_equal=_equal_share(best[mode].tokens, best[_LOOP].tokens, facts.sample_rate),
                peak_bytes=best[mode].peak_bytes,
                bottleneck=facts.bottleneck,
            )
            for mode in request.modes
        ],
        num_parameters=facts.num_parameters,
        is_trained=facts.is_trained,
        num_workers=request.num_workers,
        num_clips=len(clips),
        audio_seconds=audio_seconds,
        loop_peak_bytes=best[_LOOP].peak_bytes,
        x_processor={
            way: round(audio_seconds / min(one.processor_seconds for one in passes[way]), 2)
            for way in (_LOOP, *request.modes)
        },
        agreement=_agreement(best, facts.sample_rate),
    )


def _agreement(best: Mapping[str, _Pass], sample_rate: int) -> ModeAgreement | None:
    if not {"fast", "exact"} <= best.keys():
        return None
    tally = AgreementTally()
    for found, exact in zip(best["fast"].tokens, best["exact"].tokens, strict=True):
        tally.add(found, exact)
    return tally.result(sample_rate)


def _together(
    lanes: Sequence[ProcessPoolExecutor], way: str, clips: Sequence[Clip], repeats: int
) -> _Pass:
    """One pass, the clips dealt out to all processes; seconds of one pass over ``clips``."""
    # Long and short ones to each: the slowest process decides.
    order = sorted(range(len(clips)), key=lambda index: -len(clips[index]))
    shares = [order[number :: len(lanes)] for number in range(len(lanes))]
    running: list[Future[_Pass]] = [
        lane.submit(_run, way, [clips[index] for index in share] * repeats)
        for lane, share in zip(lanes, shares, strict=True)
    ]
    done = [one.result() for one in running]
    tokens: list[ClipTokens | None] = [None] * len(clips)
    for share, one in zip(shares, done, strict=True):
        for index, found in zip(share, one.tokens, strict=False):
            tokens[index] = found
    return _Pass(
        seconds=max(one.seconds for one in done) / repeats,
        processor_seconds=sum(one.processor_seconds for one in done) / repeats,
        peak_bytes=sum(one.peak_bytes for one in done),
        tokens=[found for found in tokens if found is not None],
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
