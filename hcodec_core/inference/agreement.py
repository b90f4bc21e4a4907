"""How far the codes of one way to encode agree with those of another, by stream and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hcodec_core.errors import ConfigError
from hcodec_core.inference.engine import Clip, ClipTokens, Engine
from hcodec_core.jobs import DepthAgreement, ModeAgreement
from hcodec_core.tokens import Codes

Starts = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


class AgreementTally:
    """Counts clip by clip; ``result`` may be asked at any time.

    Codes are compared frame by frame on the base grid: a token of a variable rate stands for all
    the frames that it spans, so that tokens are never compared by their place in the stream.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self._num_clips = 0
        self._num_samples = 0
        self._starts = np.zeros(3, np.int64)
        self._books: dict[str, Counts] = {}

    def add(self, found: ClipTokens, exact: ClipTokens) -> None:
        """Count one clip: codes under test, and codes that are right.

        Raises ``ConfigError`` when they are not tokens of the same codec and clip.
        """
        starts = [_starts(tokens) for tokens in (found, exact)]
        if len(starts[0]) != len(starts[1]) or found.codes.keys() != exact.codes.keys():
            raise ConfigError("Codes of different clips or codecs cannot be compared.")
        self._num_clips += 1
        self._num_samples += exact.num_samples
        self._starts += [starts[0].sum(), starts[1].sum(), (starts[0] & starts[1]).sum()]
        for stream, codes in exact.codes.items():
            counts = _count(_on_grid(found.codes[stream], starts[0]), _on_grid(codes, starts[1]))
            self._books[stream] = self._books.get(stream, 0) + counts

    def result(self, sample_rate: int) -> ModeAgreement | None:
        """All that was counted; None when nothing was. ``sample_rate``: of the codec, Hz."""
        if not self._num_clips:
            return None
        num_starts, num_exact_starts, num_common_starts = (int(n) for n in self._starts)
        return ModeAgreement(
            num_clips=self._num_clips,
            audio_seconds=self._num_samples / sample_rate,
            num_starts=num_starts,
            num_exact_starts=num_exact_starts,
            num_common_starts=num_common_starts,
            depths=list(_depths(self._books)),
        )


def measure_agreement(engine: Engine, exact: Engine, clips: Sequence[Clip]) -> ModeAgreement | None:
    """Encode ``clips`` (float32 [N] each) together with ``engine``, alone with ``exact``."""
    tally = AgreementTally()
    for clip, found in zip(clips, engine.encode_clips(clips), strict=True):
        tally.add(found, exact.encode_clips([clip])[0])
    return tally.result(exact.codec.sample_rate)


def _starts(tokens: ClipTokens) -> Starts:
    """Base frames at which tokens begin."""
    if tokens.frame_spans is None:
        return np.ones(tokens.num_frames, np.bool_)
    starts = np.zeros(int(tokens.frame_spans.sum()), np.bool_)
    starts[np.cumsum(tokens.frame_spans) - tokens.frame_spans] = True
    return starts


def _on_grid(codes: Codes, starts: Starts) -> Codes:
    return codes[:, np.cumsum(starts) - 1]


def _count(found: Codes, exact: Codes) -> Counts:
    """[Q, 4]: frames, equal codes, frames reached, frames that diverge there."""
    equal = found == exact
    before = np.ones((1, equal.shape[1]), np.bool_)
    reached = np.concatenate((before, np.logical_and.accumulate(equal, axis=0)[:-1]))
    columns = (np.ones_like(equal), equal, reached, reached & ~equal)
    return np.stack([column.sum(axis=1) for column in columns], axis=1).astype(np.int64)


def _depths(books: Mapping[str, Counts]) -> list[DepthAgreement]:
    names = ("num_frames", "num_equal", "num_reached", "num_diverged")
    return [
        DepthAgreement(
            stream=stream,
            codebook=codebook,
            **dict(zip(names, (int(n) for n in row), strict=True)),
        )
        for stream, counts in books.items()
        for codebook, row in enumerate(counts)
    ]
