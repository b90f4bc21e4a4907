"""Which files of a window add most to what moved.

The window's half of a Jensen-Shannon divergence is a mean over its codes of how much more likely a
code is in the window than in window and reference together. So it falls apart into its files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hcodec_core.dataset.card_drift import Floats
from hcodec_core.monitoring.documents import FileDrift, StatisticDrift
from hcodec_core.monitoring.judging import rounded
from hcodec_core.monitoring.profiles import Profile

NUM_FILES = 20


def culprits(
    reference: Profile, window: Profile, moved: Sequence[StatisticDrift], num_files: int = NUM_FILES
) -> list[FileDrift]:
    """The files that add most to the codebooks that moved; none when no codebook did."""
    names = {(statistic.stream, statistic.codebook) for statistic in moved}
    chosen = [
        (index, stream.codebook_size)
        for index, (stream, book) in enumerate(reference.books)
        if (stream.name, book) in names
    ]
    if not chosen:
        return []
    parts = sum(_bits(reference, window, index, size) for index, size in chosen)
    codes = sum(window.sample.counts(index, size).sum(axis=1) for index, size in chosen)
    bits, num_codes = np.asarray(parts), np.asarray(codes)
    total = bits.sum() or 1.0
    order = np.argsort(-bits, kind="stable")[:num_files]
    files = window.sample.files
    return [
        FileDrift(
            uri=files[place].columns["uri"],
            share=rounded(bits[place] / total),
            bits_per_code=rounded(bits[place] / max(num_codes[place], 1)),
            seconds=rounded(files[place].columns["duration_seconds"]),
            loudness_db=files[place].columns["loudness_db"],
        )
        for place in order
    ]


def _bits(reference: Profile, window: Profile, index: int, size: int) -> Floats:
    """For each file of the window, the bits that its codes of one codebook add: float64 [file]."""
    counts = window.sample.counts(index, size)
    after = counts.sum(axis=0)
    before = reference.sample.counts(index, size).sum(axis=0)
    p, q = (side / max(side.sum(), 1.0) for side in (after, before))
    used = p > 0
    gain = np.log2(np.divide(2 * p, p + q, out=np.ones_like(p), where=used))
    return np.asarray(counts @ gain)
