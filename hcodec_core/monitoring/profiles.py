"""One side of a comparison: a fair sample of files with the use of their codes and their audio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hcodec_core.dataset.card_drift import FileSample, Floats
from hcodec_core.dataset.rowfacts import slices
from hcodec_core.dataset.schema import codes_column
from hcodec_core.tokens import CodecManifest, StreamSpec

MAX_SAMPLED = 1000
SILENT_BELOW_DB = -60.0
_KEPT = (
    "uri",
    "num_frames",
    "duration_seconds",
    "peak",
    "loudness_db",
    "clipped_share",
    "native_sample_rate",
    "native_channels",
)

Values = npt.NDArray[np.float64]


@dataclass
class Profile:
    """Rows stream by through ``add``; all are counted, at most ``max_sampled`` are kept."""

    manifest: CodecManifest
    max_sampled: int = MAX_SAMPLED
    num_files: int = 0
    num_seconds: float = 0.0
    sample: FileSample = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        kept = (*_KEPT, *self._perplexities)
        self.sample = FileSample(self.manifest.streams, self.max_sampled, kept)

    @property
    def columns(self) -> list[str]:
        """Columns that ``add`` reads."""
        codes = [codes_column(stream.name) for stream in self.manifest.streams]
        return ["audio_id", *_KEPT, *codes, *self._perplexities]

    @property
    def _perplexities(self) -> list[str]:
        return [f"{codes_column(stream.name)}_perplexity" for stream in self.manifest.streams]

    @property
    def books(self) -> Iterator[tuple[StreamSpec, int]]:
        """Every codebook of every stream, in the order of ``sample.counts``."""
        for stream in self.manifest.streams:
            for book in range(stream.num_codebooks):
                yield stream, book

    def add(self, batch: pa.RecordBatch) -> None:
        """Take the rows of a batch, which has ``columns``."""
        self.num_files += batch.num_rows
        self.num_seconds += float(batch.column("duration_seconds").to_numpy().sum())
        self.sample.add(batch)

    def fill(self, batches: Iterable[pa.RecordBatch]) -> Profile:
        """Take all batches; returns this profile."""
        for batch in slices(batches, self.manifest):
            self.add(batch)
        return self

    def audio_values(self) -> dict[str, Values]:
        """Audio statistics, one number for each sampled file, NaN where it is not known."""
        peak, level = self._floats("peak"), self._floats("loudness_db")
        # A silent file has a peak and no loudness; without a peak nothing is known of it.
        level = np.where(np.isnan(level), -np.inf, level)
        level = np.where(np.isnan(peak), np.nan, level)
        silent = np.where(np.isnan(level), np.nan, level < SILENT_BELOW_DB)
        seconds = self._floats("duration_seconds")
        values = {
            "duration": seconds,
            "loudness": level,
            "silence": silent,
            "peak": peak,
            "clipping": self._floats("clipped_share"),
            "sample rate": self._floats("native_sample_rate"),
            "channels": self._floats("native_channels"),
        }
        if self.manifest.is_variable_rate:
            values["tokens per second"] = self._floats("num_frames") / np.maximum(seconds, 1e-9)
        for name in self._perplexities:
            values[f"perplexity of {name.removesuffix('_perplexity')}"] = self._floats(name)
        return values

    def _floats(self, name: str) -> Floats:
        values = [file.columns[name] for file in self.sample.files]
        return np.array([np.nan if value is None else value for value in values], np.float64)
