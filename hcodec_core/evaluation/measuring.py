"""Running an evaluation: file by file, one in memory at a time, whatever the size of the set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hcodec_core.audio.native import Samples
from hcodec_core.config import GateConfig
from hcodec_core.errors import AudioError, ConfigError, HCodecError
from hcodec_core.evaluation.documents import (
    AGAINST,
    CODEC,
    EvaluationResult,
    FileScores,
    HeldOut,
    SideFacts,
    SideSummary,
    SideTiming,
    UnreadableFile,
)
from hcodec_core.evaluation.held_out import OpenFile, SetDigest, first_seconds
from hcodec_core.evaluation.metrics import METRICS, check_names
from hcodec_core.evaluation.perception import SPEECH_RATE
from hcodec_core.evaluation.scoring import Pair, Tools, score
from hcodec_core.evaluation.sides import CodecUnderTest, CodeTally, Transcoded
from hcodec_core.evaluation.statistics import summarise
from hcodec_core.evaluation.verdicts import judge
from hcodec_core.jobs import HeldOutFile
from hcodec_core.tokens import digest_of

logger = logging.getLogger(__name__)

Progress = Callable[[int, float], None]
"""Called with the number of files done and the seconds of audio done."""


@dataclass(frozen=True)
class Task:
    """What is to be evaluated.

    ``sides``: by label; ``codec`` must be there, ``against`` makes a comparison. ``max_seconds``:
    of each file. ``build``, ``local_models``: what the result shall say of them.
    """

    sides: Mapping[str, CodecUnderTest]
    files: Sequence[HeldOutFile]
    held_out_uri: str
    open_file: OpenFile
    tools: Tools
    max_seconds: float = 30.0
    gate: GateConfig = field(default_factory=GateConfig)
    build: Mapping[str, str] = field(default_factory=dict)
    local_models: Mapping[str, str] = field(default_factory=dict)


def evaluate(task: Task, progress: Progress = lambda *_: None) -> EvaluationResult:
    """Score all sides on all files.

    Files that are no audio, and files that a side cannot process, are named in the result.

    Raises:
        ConfigError: There are no files, none of them is usable audio, or the gate names a metric
            that does not exist.
    """
    if not task.files:
        raise ConfigError(f"The held-out set {task.held_out_uri} is empty: put audio there.")
    assert CODEC in task.sides
    check_names(list(task.gate.metrics))
    return _Run(task).run(progress)


class _SideSums:
    """What one side has done so far."""

    def __init__(self, side: CodecUnderTest) -> None:
        self.side = side
        self.facts: SideFacts = side.facts
        self.tally = CodeTally(self.facts.streams)
        self.num_files = self.num_failed = 0
        self.audio_seconds = self.encode_seconds = self.decode_seconds = 0.0
        self.num_tokens = 0
        self.num_bits: int | None = None
        self.is_warm = False

    def transcode(self, clip: Samples) -> Transcoded:
        """Transcode and count. Raises ``HCodecError`` also for audio that is not finite."""
        if not self.is_warm:
            # The first run of a codec pays for set-up that no later one does.
            self.side.transcode(clip)
            self.is_warm = True
        done = self.side.transcode(clip)
        if done.audio.shape != clip.shape or not np.isfinite(done.audio).all():
            raise ConfigError(
                f"{self.facts.name} made {done.audio.shape} samples of {clip.shape}, or some that "
                "are not finite."
            )
        self.encode_seconds += done.encode_seconds
        self.decode_seconds += done.decode_seconds
        self.audio_seconds += len(clip) / self.facts.sample_rate
        self.num_files += 1
        self.num_tokens += done.num_tokens
        if done.codes is not None:
            self.tally.add(done.codes)
        if done.num_bits is not None:
            self.num_bits = (self.num_bits or 0) + done.num_bits
        return done

    def summary(self, values: Mapping[str, Sequence[float]]) -> SideSummary:
        uses = list(self.tally.uses())
        seconds = self.audio_seconds
        # Each token draws one code of every codebook.
        bits = sum(use.entropy_bits * use.num_codes for use in uses)
        has_codes = bool(uses) and seconds > 0
        return SideSummary(
            facts=self.facts,
            num_files=self.num_files,
            num_failed=self.num_failed,
            audio_seconds=seconds,
            metrics={name: summarise(values[name]) for name in METRICS if values.get(name)},
            codebooks=uses,
            tokens_per_second=self.num_tokens / seconds if has_codes else None,
            entropy_bits_per_second=bits / seconds if has_codes else None,
            measured_bits_per_second=(
                None if self.num_bits is None or not seconds else self.num_bits / seconds
            ),
        )

    def timing(self) -> SideTiming:
        return SideTiming(
            encode_seconds=self.encode_seconds,
            decode_seconds=self.decode_seconds,
            encode_realtime_factor=_ratio(self.audio_seconds, self.encode_seconds),
            decode_realtime_factor=_ratio(self.audio_seconds, self.decode_seconds),
        )


class _Run:
    """One evaluation while it runs."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._sums = {label: _SideSums(side) for label, side in task.sides.items()}
        self._files: list[FileScores] = []
        self._unreadable: list[UnreadableFile] = []
        self._digest = SetDigest()

    def run(self, progress: Progress) -> EvaluationResult:
        seconds = 0.0
        for index, file in enumerate(self._task.files):
            with self._task.open_file(file) as path:
                self._digest.add(file.name, path)
                try:
                    sources = self._sources(path)
                except AudioError as error:
                    self._unreadable.append(UnreadableFile(name=file.name, reason=str(error)))
                    logger.warning("%s cannot be used: %s", file.name, error)
                else:
                    self._files.append(self._score(file.name, sources))
                    seconds += self._files[-1].seconds
            progress(index + 1, seconds)
        if not self._files:
            raise ConfigError(
                f"None of the {len(self._task.files)} files in {self._task.held_out_uri} is usable "
                f"audio ({self._unreadable[0].name}: {self._unreadable[0].reason})."
            )
        return self._result(seconds)

    def _sources(self, path: Path) -> dict[int, Samples]:
        """The file at every rate that a side has."""
        rates = {sums.facts.sample_rate for sums in self._sums.values()}
        return {rate: first_seconds(path, rate, self._task.max_seconds) for rate in sorted(rates)}

    def _score(self, name: str, sources: Mapping[int, Samples]) -> FileScores:
        scores: dict[str, dict[str, float]] = {}
        failures: dict[str, str] = {}
        unmeasured: dict[str, dict[str, str]] = {}
        for label, sums in self._sums.items():
            rate = sums.facts.sample_rate
            try:
                done = sums.transcode(sources[rate])
            except HCodecError as error:
                sums.num_failed += 1
                failures[label] = str(error)
                continue
            pair = Pair(rate, sources[rate], done.audio)
            scores[label], reasons = score(pair, self._task.tools)
            if reasons:
                unmeasured[label] = reasons
        rate, clip = max(sources.items())
        return FileScores(
            name=name,
            seconds=len(clip) / rate,
            scores=scores,
            failures=failures,
            unmeasured=unmeasured,
        )

    def _result(self, seconds: float) -> EvaluationResult:
        task = self._task
        sides = {label: sums.summary(self._values(label)) for label, sums in self._sums.items()}
        digest = self._digest.value
        has_champion = AGAINST in sides
        not_run = dict(task.tools.not_run)
        return EvaluationResult(
            evaluation_id=self._evaluation_id(digest),
            held_out=HeldOut(
                uri=task.held_out_uri,
                digest=digest,
                num_files=len(task.files),
                num_usable=len(self._files),
                audio_seconds=seconds,
                max_seconds=task.max_seconds,
                unreadable=self._unreadable,
            ),
            sides=sides,
            files=self._files,
            not_run=not_run,
            notes=_notes({label: sums.facts for label, sums in self._sums.items()}, task),
            gate=task.gate,
            verdict=judge(self._files, sides, not_run, task.gate) if has_champion else None,
            local_models=dict(task.local_models),
            timings={label: sums.timing() for label, sums in self._sums.items()},
            build=dict(task.build),
        )

    def _evaluation_id(self, digest: str) -> str:
        task = self._task
        facts = {
            label: sums.facts.model_dump(mode="json", exclude={"uri", "version"})
            for label, sums in self._sums.items()
        }
        return digest_of(
            {
                "sides": facts,
                "held_out": digest,
                "max_seconds": task.max_seconds,
                "metrics": list(task.tools.names),
                "local_models": dict(task.local_models),
            }
        )[:24]

    def _values(self, label: str) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for scores in self._files:
            for name, value in scores.scores.get(label, {}).items():
                values.setdefault(name, []).append(value)
        return values


def _notes(facts: Mapping[str, SideFacts], task: Task) -> list[str]:
    notes = [f"The first {task.max_seconds:g} seconds of each file were used."]
    rates = {label: side.sample_rate for label, side in facts.items()}
    if len(set(rates.values())) > 1:
        listed = ", ".join(f"{facts[label].name} {rate} Hz" for label, rate in rates.items())
        notes.append(
            f"The sample rates differ ({listed}): mel and STFT distance, SI-SDR and STOI compare "
            "each side with the source resampled to its own rate, so these distances cover "
            "different bands; PESQ, DNSMOS and local models hear all sides at 16 kHz."
        )
    if any(rate < SPEECH_RATE for rate in rates.values()):
        notes.append(
            "Below 16 kHz PESQ is narrow-band; DNSMOS and local models hear upsampled audio."
        )
    notes += [
        f"The weights of {side.name} are random: its scores say nothing about the architecture."
        for side in facts.values()
        if not side.is_trained
    ]
    return notes


def _ratio(audio_seconds: float, seconds: float) -> float | None:
    return audio_seconds / seconds if seconds > 0 else None
