"""One local audio file to mono float32 at the codec's rate, streaming, in bounded memory.

Order of the steps, which decides bits and never depends on block sizes: sniff, decode, channel
rule, gain, resample. The resampler is soxr HQ as a stream, bit-equal to one-shot. It gives
``round(n * out_rate / in_rate)`` samples (halves up) for n samples in; soxr does not round up to
the next whole sample.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hcodec_core.audio.containers import Container, Layout
from hcodec_core.audio.native import NativeReader, Samples, open_native
from hcodec_core.audio.sniff import inspect_file
from hcodec_core.errors import AudioError, ConfigError, QuarantineReason

MIN_RATE, MAX_RATE = 8_000, 192_000
MAX_CHANNELS = 8
# A 16-bit recorder that ran over its range stops at 32767 / 32768.
_CLIP_LEVEL = np.float32(32767 / 32768)
_SILENCE_DB = -120.0


@dataclass(frozen=True)
class DecodeSettings:
    """How files become samples, and how much of them is allowed.

    sample_rate: Hz out. channel: keep the first channel, or the mean of all. gain: factor on the
    samples before resampling. max_seconds: longest audio. max_bytes: largest file on disk.
    timeout_seconds: longest time without a new block in a supervised decoder.
    Raises ``ConfigError`` on construction for values that cannot be used.
    """

    sample_rate: int
    channel: Literal["first", "mean"] = "mean"
    gain: float = 1.0
    max_seconds: float = 6 * 3600.0
    max_bytes: int = 4 << 30
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse values that no file could be decoded with."""
        if not MIN_RATE <= self.sample_rate <= MAX_RATE:
            raise ConfigError(
                f"Sample rate {self.sample_rate} Hz is outside {MIN_RATE}..{MAX_RATE} Hz."
            )
        if self.channel not in ("first", "mean"):
            raise ConfigError(f"Channel rule {self.channel!r} is unknown: use 'first' or 'mean'.")
        limits = (self.gain, self.max_seconds, self.max_bytes, self.timeout_seconds)
        if not all(math.isfinite(value) and value > 0 for value in limits):
            raise ConfigError("Gain, max_seconds, max_bytes and timeout_seconds must be positive.")


@dataclass(frozen=True)
class DecodedInfo:
    """What was decoded, known at the end of the stream.

    sample_rate (Hz), num_channels, num_native_frames: of the file. num_samples: at the target
    rate. duration_seconds: of the file. pcm_sha256: of the float32 little-endian mono samples at
    the target rate. peak: largest magnitude of those; rms_db: their level in dB re full scale,
    -120 at least. clipped_share: share of the file's own samples at full scale, all channels.
    """

    container: Container
    sample_rate: int
    num_channels: int
    num_native_frames: int
    num_samples: int
    duration_seconds: float
    pcm_sha256: str
    peak: float
    rms_db: float
    clipped_share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecodedInfo:
        """Inverse of ``to_dict``."""
        return cls(**{**values, "container": Container(values["container"])})


class Decoding:
    """Iterator over the samples of one file: float32 [n] blocks, n varies.

    After the last block ``info`` is set. ``digest`` is the running sha256 (bytes) over the samples
    given so far. Raises ``AudioError`` while iterating, with any reason that decoding can find.
    """

    def __init__(self, path: Path, settings: DecodeSettings) -> None:
        """Nothing is opened before the first block is asked for."""
        self._path, self._settings = path, settings
        self._meter = _Meter()
        self._info: DecodedInfo | None = None
        self._blocks = self._run()

    def __iter__(self) -> Iterator[Samples]:
        """The blocks."""
        return self

    def __next__(self) -> Samples:
        """Next block, never empty."""
        return next(self._blocks)

    @property
    def info(self) -> DecodedInfo:
        """Facts about the whole file; only after the last block."""
        assert self._info is not None, "info is known only after the last block"
        return self._info

    @property
    def digest(self) -> bytes:
        """sha256 over all samples given so far, 32 bytes."""
        return self._meter.sha256.digest()

    def _run(self) -> Iterator[Samples]:
        self._check_size()
        layout = inspect_file(self._path)
        with closing(open_native(self._path, layout)) as reader:
            _check_form(reader, layout, self._settings)
            mono = self._mono(reader)
            for block in _resampled(mono, reader.sample_rate, self._settings.sample_rate):
                self._meter.add_output(block)
                yield block
            self._info = self._meter.info(layout.container, reader)

    def _check_size(self) -> None:
        size, limit = self._path.stat().st_size, self._settings.max_bytes
        if size > limit:
            raise AudioError(
                QuarantineReason.TOO_LARGE, f"The file has {size} bytes, more than {limit}."
            )

    def _mono(self, reader: NativeReader) -> Iterator[Samples]:
        max_frames = self._settings.max_seconds * reader.sample_rate
        for block in reader.blocks():
            self._meter.add_native(block)
            if self._meter.num_native_frames > max_frames:
                raise _too_long(self._settings)
            _check_finite(block, self._meter.num_native_frames - len(block))
            yield _mix(block, self._settings)


def _check_form(reader: NativeReader, layout: Layout, settings: DecodeSettings) -> None:
    """Refuse what need not be decoded to be refused."""
    rate = reader.sample_rate
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            QuarantineReason.UNSUPPORTED_RATE,
            f"The file has {rate} Hz; {MIN_RATE} to {MAX_RATE} Hz are supported.",
        )
    if reader.num_channels > MAX_CHANNELS:
        raise AudioError(
            QuarantineReason.TOO_MANY_CHANNELS,
            f"The file has {reader.num_channels} channels; at most {MAX_CHANNELS} are supported.",
        )
    promised_rate = layout.sample_rate or rate
    if layout.num_frames and layout.num_frames > settings.max_seconds * promised_rate:
        raise _too_long(settings)


def _too_long(settings: DecodeSettings) -> AudioError:
    return AudioError(
        QuarantineReason.TOO_LARGE,
        f"The file holds more than {settings.max_seconds:g} seconds of audio: split it.",
    )


def _check_finite(block: Samples, start_frame: int) -> None:
    if not np.isfinite(block).all():
        frame = start_frame + int(np.argmin(np.isfinite(block).all(axis=1)))
        raise AudioError(
            QuarantineReason.NON_FINITE,
            f"Sample frame {frame} of the file is not a finite number: write the file again.",
        )


def _mix(block: Samples, settings: DecodeSettings) -> Samples:
    """[frames, channels] to [frames], by the channel rule and the gain.

    Channels are summed one after the other: numpy's own sum over an axis may change its order
    with the shape, and with it the bits.
    """
    mono = block[:, 0].copy()
    if settings.channel == "mean" and block.shape[1] > 1:
        for channel in range(1, block.shape[1]):
            mono += block[:, channel]
        mono /= np.float32(block.shape[1])
    if settings.gain != 1.0:
        mono *= np.float32(settings.gain)
    return mono


def _resampled(blocks: Iterator[Samples], rate_in: int, rate_out: int) -> Iterator[Samples]:
    if rate_in == rate_out:
        yield from blocks
        return
    import soxr

    stream = soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32", quality="HQ")
    for block in blocks:
        out = stream.resample_chunk(block, last=False)
        if len(out):
            yield out
    out = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    if len(out):
        yield out


class _Meter:
    """Running facts about one file."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.num_native_frames = 0
        self._num_clipped = 0
        self._num_values = 0
        self._num_samples = 0
        self._peak = 0.0
        self._energy = 0.0

    def add_native(self, block: Samples) -> None:
        self.num_native_frames += len(block)
        self._num_values += block.size
        self._num_clipped += int(np.count_nonzero(np.abs(block) >= _CLIP_LEVEL))

    def add_output(self, block: Samples) -> None:
        self.sha256.update(block.astype("<f4", copy=False).tobytes())
        self._num_samples += len(block)
        self._peak = max(self._peak, float(np.abs(block).max()))
        # No dot product: that of a BLAS library changes with its number of threads.
        self._energy += float(np.square(block, dtype=np.float64).sum())

    def info(self, container: Container, reader: NativeReader) -> DecodedInfo:
        """Facts about the whole file. Raises ``AudioError`` TOO_SHORT when no sample came out."""
        if self._num_samples == 0:
            raise AudioError(
                QuarantineReason.TOO_SHORT,
                f"The file has {self.num_native_frames} sample frames at {reader.sample_rate} Hz: "
                "none is left after resampling.",
            )
        rms = math.sqrt(self._energy / self._num_samples)
        level = 20 * math.log10(rms) if rms > 0 else _SILENCE_DB
        return DecodedInfo(
            container=container,
            sample_rate=reader.sample_rate,
            num_channels=reader.num_channels,
            num_native_frames=self.num_native_frames,
            num_samples=self._num_samples,
            duration_seconds=self.num_native_frames / reader.sample_rate,
            pcm_sha256=self.sha256.hexdigest(),
            peak=self._peak,
            rms_db=max(level, _SILENCE_DB),
            clipped_share=self._num_clipped / self._num_values,
        )


def decode_all(path: Path, settings: DecodeSettings) -> tuple[Samples, DecodedInfo]:
    """Whole file at once, in this process: for tools and tests, not for untrusted corpora.

    Returns float32 [num_samples] and the facts. Raises ``AudioError``.
    """
    decoding = Decoding(path, settings)
    return np.concatenate(list(decoding)), decoding.info
