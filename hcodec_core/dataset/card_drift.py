"""How far the use of codebooks moved from one version to the next, beside how far chance moves it.

Divergences between two samples of one distribution are not zero: over 1024 entries the PSI of two
samples of 10 000 codes each is about 0.2. Codes of one file depend on each other, so chance is
measured over files: samples as large as the two versions are drawn again and again from files of
the previous one, and a divergence means something where it exceeds nearly all of theirs.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hcodec_core.dataset.schema import codes_column
from hcodec_core.tokens import StreamSpec

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SAMPLE_FILES = 256
MIN_FILES = 20  # fewer say too little about how files differ
NUM_DRAWS = 200
NOISE_QUANTILE = 0.99
_DRAWS_AT_ONCE = 10  # bounds the temporaries of large codebooks


def jensen_shannon_bits(first: Floats | Ints, second: Floats | Ints) -> Floats:
    """Jensen-Shannon divergence of counts over the last axis, in 0 (equal) .. 1 (disjoint) bits."""
    p, q = _shares(first), _shares(second)
    gain = _entropy_bits((p + q) / 2) - (_entropy_bits(p) + _entropy_bits(q)) / 2
    return np.asarray(np.clip(gain, 0, 1))


def population_stability(first: Floats | Ints, second: Floats | Ints) -> Floats:
    """Population stability index of counts over the last axis; half a count is added to each."""
    p, q = (_shares(counts.astype(np.float64) + 0.5) for counts in (first, second))
    return np.asarray(((p - q) * np.log(p / q)).sum(axis=-1))


def _shares(counts: Floats | Ints) -> Floats:
    total = np.asarray(counts).sum(axis=-1, keepdims=True)
    return np.asarray(counts / np.maximum(total, 1e-300))


def _entropy_bits(shares: Floats) -> Floats:
    return np.asarray(-(shares * np.log2(np.maximum(shares, 1e-300))).sum(axis=-1))


@dataclass(frozen=True)
class Noise:
    """What chance alone reaches in one codebook (99 % of draws are below)."""

    js_bits: float
    psi: float


@dataclass(frozen=True)
class SampledFile:
    """One file: per stream and codebook the entries used and how often; the columns asked for."""

    audio_id: str
    books: list[tuple[Ints, Ints]]
    columns: dict[str, Any]


@dataclass
class FileSample:
    """The files with the smallest ids: ids are digests, so it is a fair sample in any order.

    ``files`` are in order of ids. ``columns``: what else of a row is kept.
    """

    streams: Sequence[StreamSpec]
    max_files: int = SAMPLE_FILES
    columns: Sequence[str] = ()
    files: list[SampledFile] = field(default_factory=list)

    def add(self, batch: pa.RecordBatch) -> None:
        """Take those rows of a batch that belong into the sample."""
        for row, audio_id in enumerate(batch.column("audio_id").to_pylist()):
            if len(self.files) < self.max_files or audio_id < self.files[-1].audio_id:
                kept = {name: batch.column(name)[row].as_py() for name in self.columns}
                file = SampledFile(audio_id, self._books(batch, row), kept)
                insort(self.files, file, key=lambda item: item.audio_id)
                del self.files[self.max_files :]

    def noise(self, num_first: int, num_second: int) -> Iterator[Noise | None]:
        """Per codebook: what two samples of so many files differ by when nothing changed.

        None where the sample is too small to say.
        """
        sizes = [s.codebook_size for s in self.streams for _ in range(s.num_codebooks)]
        if len(self.files) < MIN_FILES:
            yield from (None for _ in sizes)
            return
        chances = np.full(len(self.files), 1 / len(self.files))
        rng = np.random.default_rng(0)  # a card is the same each time it is made
        first = rng.multinomial(num_first, chances, NUM_DRAWS)
        second = rng.multinomial(num_second, chances, NUM_DRAWS)
        for book, size in enumerate(sizes):
            yield _noise_of(self.counts(book, size), first, second)

    def counts(self, book: int, size: int) -> Floats:
        """Counts [file, entry] of a codebook (over all streams); float64 holds their sums."""
        dense = np.zeros((len(self.files), size))
        for row, file in enumerate(self.files):
            entries, counts = file.books[book]
            dense[row, entries] = counts
        return dense

    def _books(self, batch: pa.RecordBatch, row: int) -> list[tuple[Ints, Ints]]:
        found = []
        for stream in self.streams:
            codes = batch.column(codes_column(stream.name))[row].values.to_numpy()
            whole = len(codes) // stream.num_codebooks * stream.num_codebooks
            frames = codes[:whole].reshape(-1, stream.num_codebooks)
            for book in range(stream.num_codebooks):
                entries, counts = np.unique(frames[:, book], return_counts=True)
                usable = (entries >= 0) & (entries < stream.codebook_size)
                found.append((entries[usable].astype(np.int64), counts[usable].astype(np.int64)))
        return found


def _noise_of(counts: Floats, first: Ints, second: Ints) -> Noise:
    js, psi = [], []
    for start in range(0, len(first), _DRAWS_AT_ONCE):
        drawn = slice(start, start + _DRAWS_AT_ONCE)
        one, other = first[drawn] @ counts, second[drawn] @ counts
        js.append(jensen_shannon_bits(one, other))
        psi.append(population_stability(one, other))
    return Noise(
        js_bits=float(np.quantile(np.concatenate(js), NOISE_QUANTILE)),
        psi=float(np.quantile(np.concatenate(psi), NOISE_QUANTILE)),
    )
