"""Two codecs, or one codec run in two ways, over the same files: codes, lengths, decoded audio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hcodec_core.audio.decode import DecodeSettings, decode_all
from hcodec_core.audio.measures import log_spectral_distance, si_sdr
from hcodec_core.errors import AudioError
from hcodec_core.inference.agreement import AgreementTally
from hcodec_core.inference.clips import Clip, ClipTokens
from hcodec_core.inference.engine import Engine
from hcodec_core.inference.segmented import encode_in_segments


@dataclass(frozen=True)
class Distance:
    """Between two signals of one length: ``si_sdr_db`` and ``spectral_db`` (see ``measures``)."""

    si_sdr_db: float
    spectral_db: float


@dataclass(frozen=True)
class SideResult:
    """What one side made of a file: tokens (of all streams), and its audio against the original."""

    num_frames: int
    num_codes: int
    num_samples: int
    distance: Distance


@dataclass(frozen=True)
class Sounds:
    """Audio at one rate, float32 [N] each: the original and what the two sides decoded."""

    sample_rate: int
    original: Clip
    first: Clip
    second: Clip


@dataclass(frozen=True)
class FileComparison:
    """One file. ``between``: the second side's audio against the first's, at the lower rate.

    ``sounds``: at the lower rate of the two codecs.
    """

    path: Path
    seconds: float
    first: SideResult
    second: SideResult
    between: Distance
    sounds: Sounds


@dataclass(frozen=True)
class Refusal:
    """A file that one side cannot use, and why."""

    path: Path
    reason: str


class Comparison:
    """Compares file by file. ``tally``: agreement of codes, None where codebooks differ."""

    def __init__(self, first: Engine, second: Engine) -> None:
        """Take both sides, loaded."""
        self.first, self.second = first, second
        is_same = first.codec.spec.codebook_id == second.codec.spec.codebook_id
        same_grid = first.codec.spec.frame_rate == second.codec.spec.frame_rate
        self.tally = AgreementTally() if is_same and same_grid else None

    def files(self, paths: Sequence[Path]) -> Iterator[FileComparison | Refusal]:
        """Compare the files named, and all files in the folders named."""
        for path in audio_files(paths):
            try:
                yield self._compare(path)
            except AudioError as error:
                yield Refusal(path, str(error))

    def _compare(self, path: Path) -> FileComparison:
        originals = [_original(path, engine) for engine in (self.first, self.second)]
        tokens = [
            encode_in_segments(engine, clip)
            for engine, clip in zip((self.first, self.second), originals, strict=True)
        ]
        decoded = [
            engine.decode_clips([found])[0]
            for engine, found in zip((self.first, self.second), tokens, strict=True)
        ]
        rates = [engine.codec.sample_rate for engine in (self.first, self.second)]
        sides = [
            _side(original, found, audio, rate)
            for original, found, audio, rate in zip(originals, tokens, decoded, rates, strict=True)
        ]
        if self.tally is not None:
            self.tally.add(tokens[1], tokens[0])
        sounds = _at_one_rate(originals, decoded, rates)
        return FileComparison(
            path=path,
            seconds=len(originals[0]) / rates[0],
            first=sides[0],
            second=sides[1],
            between=_distance(sounds.first, sounds.second, sounds.sample_rate),
            sounds=sounds,
        )


def audio_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all files in the folders named, in the order of their names."""
    found = [path.rglob("*") if path.is_dir() else [path] for path in paths]
    return sorted(file for group in found for file in group if file.is_file())


def _original(path: Path, engine: Engine) -> Clip:
    settings = engine.codec.spec.settings
    return decode_all(
        path,
        DecodeSettings(
            sample_rate=engine.codec.sample_rate, channel=settings.channel, gain=settings.gain
        ),
    )[0]


def _side(original: Clip, tokens: ClipTokens, decoded: Clip, sample_rate: int) -> SideResult:
    return SideResult(
        num_frames=tokens.num_frames,
        num_codes=sum(codes.size for codes in tokens.codes.values()),
        num_samples=len(decoded),
        distance=_distance(original, decoded, sample_rate),
    )


def _distance(reference: Clip, estimate: Clip, sample_rate: int) -> Distance:
    return Distance(
        si_sdr(reference, estimate), log_spectral_distance(reference, estimate, sample_rate)
    )


def _at_one_rate(
    originals: Sequence[Clip], decoded: Sequence[Clip], rates: Sequence[int]
) -> Sounds:
    lower = min(rates)
    first, second = (_resampled(x, rate, lower) for x, rate in zip(decoded, rates, strict=True))
    original = originals[rates.index(lower)]
    size = min(len(original), len(first), len(second))
    return Sounds(lower, original[:size], first[:size], second[:size])


def _resampled(audio: Clip, from_rate: int, to_rate: int) -> Clip:
    if from_rate == to_rate:
        return audio
    import soxr

    resampled: Clip = soxr.resample(audio, from_rate, to_rate, quality="HQ").astype(np.float32)
    return resampled
