"""Coders that a codec is compared with, by name. They are part of the evaluation only.

opus6         libopus at 6 kbit/s (6 to 64)
trivial2      RVQ on log-mels and Griffin-Lim at 2 kbit/s (multiples of 0.5)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hcodec_core.audio.native import Samples
from hcodec_core.errors import AudioError, ConfigError
from hcodec_core.evaluation.held_out import first_seconds, local_files, open_local
from hcodec_core.evaluation.opus import Opus
from hcodec_core.evaluation.sides import CodecUnderTest
from hcodec_core.evaluation.trivial import TrivialCoder

_NAME = re.compile(r"(opus|trivial)(\d+(?:\.\d+)?)")
_MAX_FIT_SECONDS = 60.0
OPUS_KILOBITS = range(6, 65)


def open_baseline(name: str, sample_rate: int, fit_audio: Path | None = None) -> CodecUnderTest:
    """A baseline by name (see the module) at the rate of the codec beside it.

    ``fit_audio``: folder on which ``trivial`` fits its codebooks; never the held-out set.

    Raises ``ConfigError`` for an unknown name, or ``trivial`` without audio to fit.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"There is no baseline {name!r}: write opus6 or trivial2 (kbit/s).")
    kind, kilobits = found[1], float(found[2])
    if kind == "opus":
        if kilobits not in OPUS_KILOBITS:
            raise ConfigError(f"Baseline {name!r}: Opus takes 6 to 64 whole kbit/s.")
        return Opus(sample_rate, int(kilobits))
    if fit_audio is None:
        raise ConfigError(
            f"Baseline {name!r} fits its codebooks on audio: name a folder with --fit-audio "
            "that shares nothing with the held-out set."
        )
    return TrivialCoder(sample_rate, round(1000 * kilobits), _recordings(fit_audio, sample_rate))


def _recordings(folder: Path, sample_rate: int) -> Iterator[Samples]:
    for file in local_files(folder):
        with open_local(file) as path:
            try:
                yield first_seconds(path, sample_rate, _MAX_FIT_SECONDS)
            except AudioError:
                continue  # whatever is no audio is not fitted
