"""Decoded audio on a local disk, so that a file is decoded once and cropped many times.

Files are decoded in a supervised process (``audio.supervisor``). What is kept never changes what a
sample is, only how fast it comes. Any number of processes may share a folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from hcodec_core.audio.decode import DecodeSettings
from hcodec_core.audio.native import Samples
from hcodec_core.audio.supervisor import DecoderPool
from hcodec_core.errors import AudioError, HCodecError, QuarantineReason
from hcodec_core.storage import Storage, local_write_failed
from hcodec_core.training.sources import SourceFile

logger = logging.getLogger(__name__)

_SUFFIX = ".f32"
_WAITS_SECONDS = (0.5, 2.0, 8.0)
Result = TypeVar("Result")


class PcmStore:
    """Samples of source files at the codec's rate, kept below ``folder_path``.

    At most ``max_bytes`` are kept once a file is added; the files used longest ago go first.
    """

    def __init__(
        self, storage: Storage, folder_path: Path, max_bytes: int, pool: DecoderPool
    ) -> None:
        """The folder is made when missing; ``pool`` stays the caller's."""
        self._storage, self._folder_path = storage, folder_path
        self._max_bytes, self._pool = max_bytes, pool
        folder_path.mkdir(parents=True, exist_ok=True)

    def samples(
        self, file: SourceFile, min_samples: int = 1, allows_lower_rates: bool = True
    ) -> Samples:
        """All samples of a file, float32 [n], mapped from disk.

        Raises:
            AudioError: The file cannot be used; with ``allows_lower_rates`` off also when it was
                recorded at a lower rate than the codec's.
            SourceChangedError, ObjectMissingError: It is not the file that was listed.
            StorageError: Storage stayed away, or the disk is full.
        """
        settings = self._pool.settings
        key = f"{file.uri}\n{file.etag}\n{settings}\n{allows_lower_rates}"
        path = self._folder_path / (hashlib.sha256(key.encode()).hexdigest()[:32] + _SUFFIX)
        try:
            os.utime(path)
        except FileNotFoundError:
            self._fill(file, path, allows_lower_rates)
        samples: Samples = np.memmap(path, dtype="<f4", mode="r")
        if len(samples) < min_samples:
            raise AudioError(
                QuarantineReason.TOO_SHORT,
                f"The file has {len(samples)} samples at {settings.sample_rate} Hz; at least "
                f"{min_samples} are asked for.",
            )
        return samples

    def _fill(self, file: SourceFile, path: Path, allows_lower_rates: bool) -> None:
        part_path = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}")
        source_path = part_path.with_suffix(".source")
        decoded_path = part_path.with_suffix(".part")
        try:
            _patiently(lambda: self._storage.download(file.uri, source_path, file.etag))
            self._decode(source_path, decoded_path, allows_lower_rates)
            os.replace(decoded_path, path)
        except OSError as error:
            raise local_write_failed(error, path) from error
        finally:
            for left in (source_path, decoded_path):
                left.unlink(missing_ok=True)
        self._make_room(path)

    def _decode(self, source_path: Path, out_path: Path, allows_lower_rates: bool) -> None:
        with self._pool.decode(source_path) as stream, out_path.open("wb") as out:
            for block in stream:
                out.write(block.astype("<f4", copy=False).tobytes())
        rate, wanted = stream.info.sample_rate, self._pool.settings.sample_rate
        if rate < wanted and not allows_lower_rates:
            raise AudioError(
                QuarantineReason.UNSUPPORTED_RATE,
                f"The file has {rate} Hz; the codec works at {wanted} Hz and would learn from "
                "audio without its upper half: set data.allows_lower_rates to train on it anyway.",
            )

    def _make_room(self, newest_path: Path) -> None:
        kept = []
        for path in self._folder_path.glob(f"*{_SUFFIX}"):
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            kept.append((facts.st_mtime, facts.st_size, path))
        excess = sum(size for _, size, _ in kept) - self._max_bytes
        for _, size, path in sorted(kept):
            if excess <= 0:
                return
            # A file that another process has mapped stays readable there.
            if path != newest_path:
                path.unlink(missing_ok=True)
                excess -= size


def _patiently(call: Callable[[], Result]) -> Result:
    """Try again after errors of storage that may pass."""
    for wait_seconds in _WAITS_SECONDS:
        try:
            return call()
        except HCodecError as error:
            if not error.retryable:
                raise
            logger.warning("Trying again in %g s: %s", wait_seconds, error)
            time.sleep(wait_seconds)
    return call()


def decode_settings(sample_rate: int) -> DecodeSettings:
    """How training audio is decoded: the mean of all channels at the codec's rate."""
    return DecodeSettings(sample_rate=sample_rate, channel="mean")
