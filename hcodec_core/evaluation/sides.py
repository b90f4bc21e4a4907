"""What an evaluation asks of a codec, and the count of what its codes say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.native import Samples
from hcodec_core.evaluation.documents import CodebookUse, SideFacts, StreamFacts
from hcodec_core.tokens import Codes

_NUM_BARS = 64


@dataclass(frozen=True)
class Transcoded:
    """What a side made of a clip: float32 [N], as long as the clip.

    codes: per stream int32 [Q, T], None for coders without codebooks; num_tokens: T.
    num_bits: of coders that count their own. Seconds are of wall-clock time.
    """

    audio: Samples
    encode_seconds: float
    decode_seconds: float
    codes: Mapping[str, Codes] | None = None
    num_tokens: int = 0
    num_bits: int | None = None


class CodecUnderTest(Protocol):
    """A codec with all that running it needs."""

    @property
    def facts(self) -> SideFacts:
        """What it is."""

    def transcode(self, clip: Samples) -> Transcoded:
        """Encode and decode float32 [N] at ``facts.sample_rate``.

        Raises ``HCodecError`` when the clip cannot be processed.
        """


class CodeTally:
    """Counts codes; memory is that of the codebooks, however long the audio."""

    def __init__(self, streams: list[StreamFacts]) -> None:
        """Nothing is counted yet."""
        self._counts: dict[str, npt.NDArray[np.int64]] = {
            stream.name: np.zeros((stream.num_codebooks, stream.codebook_size), np.int64)
            for stream in streams
        }

    def add(self, codes: Mapping[str, Codes]) -> None:
        """Count the codes of one clip: per stream int32 [Q, T]."""
        for name, values in codes.items():
            counts = self._counts[name]
            for book, row in enumerate(values):
                counts[book] += np.bincount(row, minlength=counts.shape[1])

    def uses(self) -> Iterator[CodebookUse]:
        """What was counted, codebook by codebook."""
        for name, counts in self._counts.items():
            for book, row in enumerate(counts):
                bars = np.array_split(row, min(_NUM_BARS, len(row)))
                yield CodebookUse(
                    stream=name,
                    codebook=book,
                    size=len(row),
                    num_codes=int(row.sum()),
                    num_used=int(np.count_nonzero(row)),
                    entropy_bits=entropy_bits(row),
                    bars=[int(bar.sum()) for bar in bars],
                )


def entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Entropy in bits of the frequencies that counts give; 0 without counts."""
    used = counts[counts > 0].astype(np.float64)
    if not len(used):
        return 0.0
    shares = used / used.sum()
    return max(0.0, float(-(shares * np.log2(shares)).sum()))
