"""Decoding in supervised processes: what kills a decoder costs one file, never the worker.

Each process decodes one file at a time and streams blocks through a pipe, so a slow consumer slows
the decoder and memory stays bounded for files of any length. Processes are started afresh (never
forked from this one, which may hold a GPU) and die with it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from hcodec_core.audio.child_handle import ChildDiedError, ChildHandle, ChildHungError
from hcodec_core.audio.decode import DecodedInfo, DecodeSettings
from hcodec_core.audio.messages import DIGEST_BYTES, Kind
from hcodec_core.audio.native import Samples
from hcodec_core.errors import (
    AudioError,
    HCodecError,
    PreemptedError,
    QuarantineReason,
    StorageError,
)

MAX_TRIES = 2
DEFAULT_ADDRESS_SPACE_BYTES = 2 << 30


class DecodedStream:
    """Samples of one file: float32 [n] blocks at the codec's rate, n varies.

    Iterate to the end, then read ``info``. A stream left early must be closed (``with`` does), so
    that its process can take another file.
    """

    def __init__(self, pool: DecoderPool, child: ChildHandle, path: Path) -> None:
        """Use ``DecoderPool.decode``."""
        self._pool, self._child, self._path = pool, child, path
        self._info: DecodedInfo | None = None
        self._is_open = True
        self._num_tries = 1
        self._num_given = self._num_received = 0
        self._digest = b""

    def __iter__(self) -> Iterator[Samples]:
        """The blocks."""
        return self

    def __next__(self) -> Samples:
        """Next block, never empty.

        Raises ``AudioError`` with the decoder's reason, CRASHED when the file killed two
        processes, TIMEOUT when its process was silent for ``timeout_seconds``. Raises
        ``StorageError`` when the local file cannot be read, ``PreemptedError`` when the pool was
        closed meanwhile.
        """
        while self._is_open:
            kind, payload = self._receive()
            if kind is Kind.BLOCK:
                block = self._take(payload)
                if block is not None:
                    return block
            elif kind is Kind.INFO:
                self._info = DecodedInfo.from_dict(json.loads(payload))
                self._finish()
            else:
                self._finish()
                raise _error_of(kind, payload)
        raise StopIteration

    def __enter__(self) -> Self:
        """This stream."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the stream."""
        self.close()

    def __del__(self) -> None:
        """Give the process back though nobody closed the stream."""
        self.close()

    @property
    def info(self) -> DecodedInfo:
        """Facts about the whole file; only after the last block."""
        assert self._info is not None, "info is known only after the last block"
        return self._info

    @property
    def child_pid(self) -> int | None:
        """Id of the process that decodes this file, None when it has ended."""
        return self._child.pid if self._is_open else None

    def close(self) -> None:
        """Stop decoding; the process is replaced, as it may be in the middle of the file."""
        if self._is_open:
            self._child.kill()
            self._finish()

    def _receive(self) -> tuple[Kind, bytearray]:
        try:
            return self._child.receive(self._pool.settings.timeout_seconds)
        except ChildHungError as error:
            self.close()
            raise AudioError(
                QuarantineReason.TIMEOUT, f"The decoder was {error}: it was stopped."
            ) from error
        except ChildDiedError as error:
            self._child.kill()
            self._try_again(error)
            return self._receive()

    def _try_again(self, error: ChildDiedError) -> None:
        if self._pool.is_closed:
            self._finish()
            raise PreemptedError("The decoders were closed while a file was being decoded.")
        if self._num_tries == MAX_TRIES:
            self._finish()
            raise AudioError(
                QuarantineReason.CRASHED,
                f"The file killed the decoder process {MAX_TRIES} times (last: {error}).",
            ) from error
        self._num_tries += 1
        self._num_received = 0
        try:
            self._child.ask(self._path)
        except HCodecError:
            self._finish()
            raise

    def _take(self, payload: bytearray) -> Samples | None:
        """Block of a payload; None for one that was given before the process was replaced."""
        samples = np.frombuffer(payload, dtype=np.float32, offset=DIGEST_BYTES)
        digest = bytes(payload[:DIGEST_BYTES])
        self._num_received += len(samples)
        if self._num_received > self._num_given:
            self._num_given, self._digest = self._num_received, digest
            return samples
        if self._num_received == self._num_given and digest != self._digest:
            self.close()
            raise AudioError(
                QuarantineReason.CRASHED,
                "The file killed its decoder process and decoded differently on the second try.",
            )
        return None

    def _finish(self) -> None:
        self._is_open = False
        self._pool.take_back(self._child)


def _error_of(kind: Kind, payload: bytearray) -> HCodecError:
    content = json.loads(payload)
    if kind is Kind.REFUSED:
        return AudioError(QuarantineReason(content["reason"]), content["message"])
    assert kind is Kind.UNREADABLE, kind
    return StorageError(content["message"])


class DecoderPool:
    """Decoder processes of one worker; safe to use from several threads.

    ``num_processes`` files can be in flight at once, one per process: ``decode`` waits until a
    process is free, so a thread must not hold more streams open than there are processes.
    ``address_space_bytes`` caps the memory of each process (Linux; 0: no cap). Use as a context
    manager, or call ``close``.
    """

    def __init__(
        self,
        num_processes: int,
        settings: DecodeSettings,
        *,
        address_space_bytes: int = DEFAULT_ADDRESS_SPACE_BYTES,
    ) -> None:
        """Processes start with the first files, not here."""
        assert num_processes > 0
        self.settings = settings
        self.is_closed = False
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="decoder-spawner")
        command = _command(settings, address_space_bytes)
        self._children = [ChildHandle(command, self._spawner) for _ in range(num_processes)]
        self._idle: queue.LifoQueue[ChildHandle | None] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def __enter__(self) -> Self:
        """This pool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pool."""
        self.close()

    def decode(self, path: Path) -> DecodedStream:
        """Begin to decode a local file; blocks until a process is free.

        Errors of the file itself are raised by the stream. Raises ``HCodecError`` when decoder
        processes cannot be started, ``PreemptedError`` when the pool is closed.
        """
        child = self._idle.get()
        if child is None or self.is_closed:
            self._idle.put(child)
            raise PreemptedError("The decoders are closed: no more files can be decoded.")
        try:
            child.ask(path)
        except HCodecError:
            self.take_back(child)
            raise
        return DecodedStream(self, child, path)

    def take_back(self, child: ChildHandle) -> None:
        """For streams: their process is free again."""
        if self.is_closed:
            child.kill()
        self._idle.put(child)

    def close(self) -> None:
        """End all processes; streams still open in other threads raise ``PreemptedError``."""
        if self.is_closed:
            return
        self.is_closed = True
        for child in self._idle_children():
            child.stop()
        for child in self._children:
            child.interrupt()
        # Wakes whoever waits for a free process.
        self._idle.put(None)
        self._spawner.shutdown()

    def _idle_children(self) -> Iterator[ChildHandle]:
        while True:
            try:
                child = self._idle.get_nowait()
            except queue.Empty:
                return
            if child is not None:
                yield child


def _command(settings: DecodeSettings, address_space_bytes: int) -> list[str]:
    # -P: a file in the working directory must not shadow a module.
    program = [sys.executable, "-P", "-m", "hcodec_core.audio.decoder_child"]
    return [
        *program,
        f"--settings={json.dumps(asdict(settings))}",
        f"--parent-pid={os.getpid()}",
        f"--address-space-bytes={address_space_bytes}",
    ]
