"""The baseline ``trivial``: residual vector quantisation of log-mels, Griffin-Lim back to audio.

No network at all: what a learned codec has to beat at the same bit rate. Codebooks are fitted by
k-means on other audio than the held-out set. Windows of 32 ms every 20 ms; between them levels are
interpolated to four times as many windows, from which Griffin-Lim with momentum (Perraudin et al.,
2013) finds phases far better.

Shape letters: N sample, M mel, F frequency, T frame, K entry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from hcodec_core.audio.native import Samples
from hcodec_core.errors import ConfigError
from hcodec_core.evaluation.distances import Matrix, mel_bank
from hcodec_core.evaluation.documents import SideFacts, StreamFacts
from hcodec_core.evaluation.sides import Transcoded
from hcodec_core.tokens import digest_of

logger = logging.getLogger(__name__)

Complex = npt.NDArray[np.complex128]

_FRAMES_PER_SECOND = 50
_NUM_MELS = 80
_ENTRIES = 1024
_BITS = 10
_FLOOR = 1e-5
_KMEANS_ROUNDS = 12
_MOST_FRAMES = 60_000
_ITERATIONS = 60
_WINDOW_SECONDS = 0.032
_FINER = 4  # windows of the synthesis per coded frame
_HOPS_PER_TRANSFORM = 16
_MOMENTUM = 0.99
_ROWS_AT_ONCE = 8192


class TrivialCoder:
    """Fitted coder at one bit rate: ``bits_per_second / 500`` codebooks of 1024 entries, 50 Hz."""

    def __init__(self, sample_rate: int, bits_per_second: int, recordings: Iterable[Samples]):
        """Fit the codebooks on ``recordings`` (float32 [N] each, at ``sample_rate``), seeded.

        Raises ``ConfigError`` for a bit rate that is no multiple of 500 or too little audio.
        """
        step = _FRAMES_PER_SECOND * _BITS
        if bits_per_second < step or bits_per_second % step:
            raise ConfigError(
                f"The trivial coder makes multiples of {step} bit/s, not {bits_per_second}."
            )
        self._hop = round(sample_rate / _FRAMES_PER_SECOND / _FINER)
        self._n_fft = _HOPS_PER_TRANSFORM * self._hop
        self._window = _centred_window(round(_WINDOW_SECONDS * sample_rate), self._n_fft)
        self._bank = mel_bank(_NUM_MELS, self._n_fft, sample_rate)
        self._inverse = np.linalg.pinv(self._bank)
        frames = self._training_frames(recordings)
        self._mean = frames.mean(axis=0)
        self._books = _fit(frames - self._mean, bits_per_second // step)
        self._facts = self._describe(sample_rate, bits_per_second)

    @property
    def facts(self) -> SideFacts:
        """See ``CodecUnderTest``."""
        return self._facts

    def transcode(self, clip: Samples) -> Transcoded:
        """See ``CodecUnderTest``."""
        begun = time.perf_counter()
        codes = self._encode(clip)
        encoded = time.perf_counter()
        audio = self._decode(codes, len(clip))
        done = time.perf_counter()
        return Transcoded(
            audio=audio,
            encode_seconds=encoded - begun,
            decode_seconds=done - encoded,
            codes={"acoustic": codes},
            num_tokens=codes.shape[1],
        )

    def _describe(self, sample_rate: int, bits_per_second: int) -> SideFacts:
        kilobits = f"{bits_per_second / 1000:g}"
        sums = [float(value) for value in self._books.sum(axis=(1, 2))]
        return SideFacts(
            name=f"trivial{kilobits}",
            uri=f"baseline:trivial{kilobits}",
            digest=digest_of([*sums, float(self._mean.sum())]),
            sample_rate=sample_rate,
            num_parameters=int(self._books.size),
            streams=[
                StreamFacts(name="acoustic", num_codebooks=len(self._books), codebook_size=_ENTRIES)
            ],
            frames_per_second=sample_rate / (_FINER * self._hop),
            nominal_bits_per_second=float(bits_per_second),
        )

    def _training_frames(self, recordings: Iterable[Samples]) -> Matrix:
        parts = [self._log_mels(audio) for audio in recordings]
        frames = np.concatenate(parts) if parts else np.zeros((0, _NUM_MELS))
        if len(frames) < 2 * _ENTRIES:
            raise ConfigError(
                f"The trivial coder is fitted on {len(frames)} frames of audio; it needs at least "
                f"{2 * _ENTRIES} ({2 * _ENTRIES // _FRAMES_PER_SECOND} seconds): name more."
            )
        step = max(1, -(-len(frames) // _MOST_FRAMES))
        kept: Matrix = frames[::step]
        return kept

    def _log_mels(self, audio: Samples) -> Matrix:
        """[T, M], one frame for every four windows of the synthesis."""
        spectrum = np.abs(self._spectrum(audio)[::_FINER])
        levels: Matrix = np.log(np.maximum(spectrum @ self._bank.T, _FLOOR))
        return levels

    def _encode(self, clip: Samples) -> npt.NDArray[np.int32]:
        residual = self._log_mels(clip) - self._mean
        codes = []
        for book in self._books:
            nearest = _nearest(residual, book)
            residual = residual - book[nearest]
            codes.append(nearest)
        return np.stack(codes).astype(np.int32)

    def _decode(self, codes: npt.NDArray[np.int32], num_samples: int) -> Samples:
        levels = self._mean + sum(book[row] for book, row in zip(self._books, codes, strict=True))
        wanted = np.maximum(np.exp(_finer(levels)) @ self._inverse.T, 0.0)
        wanted = wanted[: -(-num_samples // self._hop)]
        return self._griffin_lim(wanted, num_samples).astype(np.float32)

    def _griffin_lim(self, wanted: Matrix, num_samples: int) -> Matrix:
        """Audio whose magnitudes are near ``wanted`` [T, F]; phases begin at seeded noise."""
        phases = np.random.default_rng(0).uniform(-np.pi, np.pi, wanted.shape)
        angles = np.exp(1j * phases)
        before = np.zeros_like(angles)
        for _ in range(_ITERATIONS):
            rebuilt = self._spectrum(self._audio(wanted * angles, num_samples))
            pushed = rebuilt - _MOMENTUM / (1 + _MOMENTUM) * before
            angles = pushed / np.maximum(np.abs(pushed), 1e-16)
            before = rebuilt
        return self._audio(wanted * angles, num_samples)

    def _spectrum(self, audio: npt.NDArray[np.floating]) -> Complex:
        """[T, F], T = ceil(N / hop) windows of the synthesis."""
        num_frames = -(-len(audio) // self._hop)
        padded = np.zeros((num_frames - 1) * self._hop + self._n_fft)
        start = self._n_fft // 2
        end = min(len(audio), len(padded) - start)
        padded[start : start + end] = audio[:end]
        frames = np.lib.stride_tricks.sliding_window_view(padded, self._n_fft)[:: self._hop]
        spectrum: Complex = np.fft.rfft(frames * self._window, axis=1)
        return spectrum

    def _audio(self, spectrum: Complex, num_samples: int) -> Matrix:
        """Weighted overlap-add: the least-squares inverse of ``_spectrum``."""
        frames = np.fft.irfft(spectrum, self._n_fft, axis=1) * self._window
        squares = np.broadcast_to(np.square(self._window), frames.shape)
        whole = self._overlapped(frames) / np.maximum(self._overlapped(squares), 1e-8)
        start = self._n_fft // 2
        kept = whole[start : start + num_samples]
        return np.pad(kept, (0, num_samples - len(kept)))

    def _overlapped(self, frames: Matrix) -> Matrix:
        """Frames [T, n_fft] added up, one every hop; a transform is a whole number of hops."""
        blocks = frames.reshape(len(frames), _HOPS_PER_TRANSFORM, self._hop)
        total = np.zeros((len(frames) + _HOPS_PER_TRANSFORM - 1, self._hop))
        for place in range(_HOPS_PER_TRANSFORM):
            total[place : place + len(frames)] += blocks[:, place]
        return total.reshape(-1)


def _centred_window(size: int, n_fft: int) -> Matrix:
    window = np.zeros(n_fft)
    start = (n_fft - size) // 2
    window[start : start + size] = np.hanning(size + 1)[:-1]
    return window


def _finer(levels: Matrix) -> Matrix:
    """Levels [T, M] interpolated to [4 T, M]; the last frame stands still."""
    places = np.minimum(np.arange(_FINER * len(levels)) / _FINER, len(levels) - 1)
    before = places.astype(int)
    after = np.minimum(before + 1, len(levels) - 1)
    share = (places - before)[:, None]
    finer: Matrix = levels[before] * (1 - share) + levels[after] * share
    return finer


def _fit(frames: Matrix, num_books: int) -> npt.NDArray[np.float64]:
    """Codebooks [Q, K, M], each fitted to what the ones before it leave over."""
    books = []
    for index in range(num_books):
        book = _kmeans(frames, np.random.default_rng(index))
        frames = frames - book[_nearest(frames, book)]
        books.append(book)
        logger.info("Codebook %d of %d fitted.", index + 1, num_books)
    return np.stack(books)


def _kmeans(frames: Matrix, generator: np.random.Generator) -> Matrix:
    book = frames[generator.choice(len(frames), _ENTRIES, replace=False)]
    for _ in range(_KMEANS_ROUNDS):
        nearest = _nearest(frames, book)
        counts = np.bincount(nearest, minlength=_ENTRIES)
        order = np.argsort(nearest, kind="stable")
        firsts = np.minimum(np.cumsum(counts) - counts, len(frames) - 1)
        sums = np.add.reduceat(frames[order], firsts, axis=0)
        used = counts > 0
        book = book.copy()
        book[used] = sums[used] / counts[used, None]
        # An entry that nothing chose begins anew at some frame.
        dead = int((~used).sum())
        book[~used] = frames[generator.choice(len(frames), dead, replace=False)]
    return book


def _nearest(frames: Matrix, book: Matrix) -> npt.NDArray[np.int64]:
    """Index of the nearest entry of [K, M] for each frame of [T, M]."""
    norms = np.square(book).sum(axis=1)
    parts = [
        np.argmin(norms - 2 * frames[first : first + _ROWS_AT_ONCE] @ book.T, axis=1)
        for first in range(0, len(frames), _ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)
