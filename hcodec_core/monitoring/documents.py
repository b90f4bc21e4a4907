"""What monitoring is asked, what it finds, and what it remembers."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

PINNED = "pinned"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MonitorTerms(_Document):
    """How to judge a window, and when to raise an alarm.

    ``reference``: a version, another tag, or ``pinned`` for the newest pinned version.
    ``window``: ``added`` judges the files that came since the last window, ``version`` all files.
    ``false_alarm_rate``: how often a window without any change may be called drifted, over all
    statistics together. ``least_psi``: drifts below it are real perhaps, but too small to matter.
    ``min_files``: of a window, and of the reference; with fewer nothing is judged.
    ``windows_in_a_row``: drifted windows that make an alarm. ``cool_down_days``: after an alarm,
    no window counts towards another one.
    """

    reference: str = Field(default=PINNED, min_length=1)
    window: Literal["added", "version"] = "added"
    false_alarm_rate: float = Field(default=0.01, gt=0, lt=0.5)
    least_psi: float = Field(default=0.05, ge=0)
    min_files: int = Field(default=50, ge=20)
    windows_in_a_row: int = Field(default=2, ge=1)
    cool_down_days: float = Field(default=7.0, ge=0)


class WindowState(StrEnum):
    """What became of a window."""

    SAME = "same"
    DRIFTED = "drifted"
    TOO_FEW = "too few files"  # they are judged together with those of the next window
    NOTHING_NEW = "nothing new"


class Bin(_Document):
    """One bin of a statistic's histogram: its share in the reference and in the window."""

    label: str
    reference: float
    window: float


class StatisticDrift(_Document):
    """How far one statistic moved, beside what chance alone reaches at the declared rate.

    ``stream`` and ``codebook`` are None for statistics of the audio. ``js_bits`` and ``psi`` are
    compared with their thresholds. ``bins``: the histogram, of codebooks over ranges of entries.
    """

    name: str
    stream: str | None = None
    codebook: int | None = None
    num_reference: int
    num_window: int
    js_bits: float
    js_threshold: float
    psi: float
    psi_threshold: float
    bins: list[Bin] = []

    @property
    def is_drifted(self) -> bool:
        """Whether either measure is above its threshold."""
        return self.js_bits > self.js_threshold or self.psi > self.psi_threshold

    @property
    def excess(self) -> float:
        """The larger one of both measures in units of its threshold."""
        return max(self.js_bits / self.js_threshold, self.psi / self.psi_threshold)


class FileDrift(_Document):
    """One file's part of the divergence of all codebooks that moved.

    ``share``: of what all files of the sample add, those like the reference a negative one;
    ``bits_per_code``: how unlike the reference its codes are.
    """

    uri: str
    share: float
    bits_per_code: float
    seconds: float
    loudness_db: float | None


class DriftReport(_Document):
    """One window beside the reference. ``base_version``: whose files the window leaves out.

    ``num_sampled``: files of the reference, and of the window, that all numbers come from.
    """

    format_version: Literal[1] = 1
    dataset: str
    encode_id: str
    codec_name: str
    state: WindowState
    version: str
    snapshot_id: int
    base_version: str | None
    reference: str
    reference_snapshot_id: int
    terms: MonitorTerms
    num_reference_files: int
    num_window_files: int
    num_reference_seconds: float = 0.0
    num_window_seconds: float = 0.0
    num_sampled: tuple[int, int] = (0, 0)
    statistics: list[StatisticDrift] = []
    files: list[FileDrift] = []

    @property
    def moved(self) -> list[StatisticDrift]:
        """Statistics above their thresholds, the largest excess first."""
        found = [statistic for statistic in self.statistics if statistic.is_drifted]
        return sorted(found, key=lambda statistic: -statistic.excess)


class WindowStep(_Document):
    """One judged window in the history of a dataset; step N is created once.

    ``num_in_a_row``: drifted windows up to this one that count towards an alarm, 0 after one.
    ``cool_until``: no window that is judged before counts. ``owner``: the run that judged it, whose
    retry may tell of the alarm again.
    """

    format_version: Literal[1] = 1
    number: int = Field(ge=1)
    version: str
    snapshot_id: int
    base_version: str | None
    reference: str
    reference_snapshot_id: int
    state: WindowState
    num_window_files: int
    moved: list[str]
    num_in_a_row: int
    is_alarm: bool
    judged_at: datetime
    cool_until: datetime | None = None
    evidence_uri: str
    owner: str


class MonitorResult(_Document):
    """What one call found. ``step``: what the window became (None: nothing was recorded).

    ``report``: None when the window had been counted before; it is not counted again.
    ``is_alarm``: this call, or an earlier try of it, raised the alarm.
    """

    state: WindowState
    text: str
    report: DriftReport | None
    step: WindowStep | None
    is_alarm: bool
