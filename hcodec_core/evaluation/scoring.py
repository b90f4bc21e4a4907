"""All metrics of one file for one side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from hcodec_core.audio.measures import si_sdr
from hcodec_core.audio.native import Samples
from hcodec_core.evaluation import perception
from hcodec_core.evaluation.distances import mel_distance_db, stft_distance
from hcodec_core.evaluation.metrics import METRICS
from hcodec_core.evaluation.perception import (
    NARROW_RATE,
    SPEECH_RATE,
    Dnsmos,
    NotMeasurableError,
)

SI_SDR_RANGE = (-60.0, 100.0)
_DNSMOS = ("ovrl", "sig", "bak", "p808")

ModelScores = Callable[[Samples, Samples], float]
"""A local model: (source, result), float32 [N] at 16 kHz each, to a value.

Raises ``NotMeasurableError``.
"""


@dataclass(frozen=True)
class Tools:
    """What there is to measure with. ``not_run``: why a metric is not tried."""

    names: tuple[str, ...]
    dnsmos: Dnsmos | None = None
    models: Mapping[str, ModelScores] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A source and what a side made of it, float32 [N] each at the side's ``sample_rate``."""

    sample_rate: int
    source: Samples
    result: Samples

    def at(self, sample_rate: int) -> tuple[Samples, Samples]:
        """Both at another rate (soxr HQ)."""
        if sample_rate == self.sample_rate:
            return self.source, self.result
        source, result = (resampled(x, self.sample_rate, sample_rate) for x in self._both)
        return source, result

    @property
    def _both(self) -> tuple[Samples, Samples]:
        return self.source, self.result


def resampled(audio: Samples, from_rate: int, to_rate: int) -> Samples:
    """Float32 [N] at another rate (soxr HQ)."""
    if from_rate == to_rate:
        return audio
    import soxr

    changed: Samples = soxr.resample(audio, from_rate, to_rate, quality="HQ").astype(np.float32)
    return changed


def open_tools(
    names: tuple[str, ...], models: Mapping[str, ModelScores], num_threads: int = 1
) -> Tools:
    """Tools for the metrics asked for (none: all); what is not installed is not run."""
    wanted = names or tuple(METRICS)
    not_run: dict[str, str] = {
        name: f"no local model was given for {METRICS[name].title}"
        for name in ("wer", "speaker_similarity", "utmos")
        if name in wanted and name not in models
    }
    not_run |= {name: "it was not asked for" for name in METRICS if name not in wanted}
    not_run |= _missing_packages(wanted)
    dnsmos = None
    if any(name.startswith("dnsmos_") and name not in not_run for name in wanted):
        try:
            dnsmos = Dnsmos(num_threads)
        except ImportError:
            not_run |= {name: _install("DNSMOS") for name in wanted if name.startswith("dnsmos_")}
    runnable = tuple(name for name in METRICS if name in wanted and name not in not_run)
    return Tools(runnable, dnsmos, models, not_run)


def score(pair: Pair, tools: Tools) -> tuple[dict[str, float], dict[str, str]]:
    """Value by metric, and why others have none."""
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for names, measure in _measures(pair, tools):
        if not set(names) & set(tools.names):
            continue
        try:
            found = dict(zip(names, measure(), strict=True))
        except NotMeasurableError as error:
            reasons |= {name: str(error) for name in names if name in tools.names}
            continue
        for name in (name for name in names if name in tools.names):
            if math.isfinite(found[name]):
                values[name] = found[name]
            else:
                reasons[name] = "the source is silent"
    return values, reasons


def _measures(
    pair: Pair, tools: Tools
) -> Iterator[tuple[tuple[str, ...], Callable[[], tuple[float, ...]]]]:
    """Metrics by what computes them together."""
    rate, source, result = pair.sample_rate, pair.source, pair.result
    yield ("mel_distance_db",), lambda: (mel_distance_db(source, result, rate),)
    yield ("stft_distance",), lambda: (stft_distance(source, result),)
    yield ("si_sdr_db",), lambda: (_si_sdr(source, result),)
    yield ("stoi",), lambda: (perception.stoi(source, result, rate),)
    # Which PESQ applies follows from the codec's rate: wide-band needs 8 kHz of bandwidth.
    if rate >= SPEECH_RATE:
        yield ("pesq_wb",), lambda: (perception.pesq(*pair.at(SPEECH_RATE), SPEECH_RATE),)
    else:
        yield ("pesq_nb",), lambda: (perception.pesq(*pair.at(NARROW_RATE), NARROW_RATE),)
    if tools.dnsmos is not None:
        yield tuple(f"dnsmos_{part}" for part in _DNSMOS), lambda: _dnsmos(pair, tools)
    for name, model in tools.models.items():
        yield (name,), lambda model=model: (model(*pair.at(SPEECH_RATE)),)  # type: ignore[misc]


def _si_sdr(source: Samples, result: Samples) -> float:
    value = si_sdr(source, result)
    return value if math.isnan(value) else min(max(value, SI_SDR_RANGE[0]), SI_SDR_RANGE[1])


def _dnsmos(pair: Pair, tools: Tools) -> tuple[float, ...]:
    assert tools.dnsmos is not None
    scores = tools.dnsmos.scores(pair.at(SPEECH_RATE)[1])
    return tuple(scores[part] for part in _DNSMOS)


def _missing_packages(wanted: tuple[str, ...]) -> dict[str, str]:
    from importlib.util import find_spec

    needs = {"stoi": "pystoi", "pesq_wb": "pesq", "pesq_nb": "pesq"}
    return {
        name: _install(METRICS[name].title)
        for name, package in needs.items()
        if name in wanted and find_spec(package) is None
    }


def _install(what: str) -> str:
    return f"{what} is not installed: install this package with the extra 'train'"
