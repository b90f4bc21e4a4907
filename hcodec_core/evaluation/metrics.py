"""The metrics of an evaluation: their names, units and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hcodec_core.errors import ConfigError


@dataclass(frozen=True)
class Metric:
    """One number per file. ``more_is_better``; ``digits`` after the point when shown."""

    name: str
    title: str
    unit: str
    more_is_better: bool
    digits: int
    meaning: str

    def shown(self, value: float) -> str:
        """A value with its unit, for people."""
        text = f"{value:.{self.digits}f}"
        return f"{text} {self.unit}" if self.unit else text

    def gain(self, challenger: float, champion: float) -> float:
        """How much better the challenger's value is; negative: worse."""
        return (challenger - champion) * (1 if self.more_is_better else -1)


_LIST = (
    Metric("mel_distance_db", "Mel distance", "dB", False, 2, "log-mel levels, seven windows"),
    Metric("stft_distance", "STFT distance", "", False, 3, "convergence and log magnitude"),
    Metric("si_sdr_db", "SI-SDR", "dB", True, 2, "waveform; low for codecs that draw new phases"),
    Metric("stoi", "STOI", "", True, 3, "intelligibility, 0 to 1"),
    Metric("pesq_wb", "PESQ wide-band", "", True, 2, "quality at 16 kHz, 1.0 to 4.6"),
    Metric("pesq_nb", "PESQ narrow-band", "", True, 2, "quality at 8 kHz, 1.0 to 4.5"),
    Metric("dnsmos_ovrl", "DNSMOS overall", "", True, 2, "estimated opinion, no reference"),
    Metric("dnsmos_sig", "DNSMOS speech", "", True, 2, "estimated opinion of the voice"),
    Metric("dnsmos_bak", "DNSMOS background", "", True, 2, "estimated opinion of the noise"),
    Metric("dnsmos_p808", "DNSMOS P.808", "", True, 2, "estimated opinion after P.808"),
    Metric("wer", "Word errors", "", False, 3, "words heard otherwise than in the source"),
    Metric("speaker_similarity", "Speaker similarity", "", True, 3, "cosine of embeddings"),
    Metric("utmos", "UTMOS", "", True, 2, "estimated opinion by a local model"),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _LIST}
"""By name, in the order in which they are shown."""


def check_names(names: list[str] | tuple[str, ...]) -> None:
    """Raise ``ConfigError`` for a metric that does not exist."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"There is no metric {name!r}: known are {', '.join(METRICS)}.")
