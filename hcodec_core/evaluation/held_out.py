"""The held-out set: which files, and their first seconds as samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from hcodec_core.audio.decode import DecodeSettings, Decoding
from hcodec_core.audio.native import Samples
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import HeldOutFile
from hcodec_core.storage import Storage, file_uri, sha256_of_file

OpenFile = Callable[[HeldOutFile], AbstractContextManager[Path]]
"""Makes a file of the set local for as long as it is looked at."""

Item = TypeVar("Item")


def local_files(folder: Path, max_files: int | None = None) -> list[HeldOutFile]:
    """All files in a folder (or one file), by name; a spread choice of ``max_files`` of them.

    Raises ``ConfigError`` when it does not exist or holds no file.
    """
    if not folder.exists():
        raise ConfigError(f"The held-out set {folder} does not exist: name a folder of audio.")
    whole = folder.resolve()
    paths = [whole] if whole.is_file() else sorted(p for p in whole.rglob("*") if p.is_file())
    root = whole.parent if whole.is_file() else whole
    if not paths:
        raise ConfigError(f"The held-out set {folder} is empty: put audio files there.")
    return [
        HeldOutFile(name=path.relative_to(root).as_posix(), uri=file_uri(path), etag="")
        for path in spread(paths, max_files)
    ]


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most ``limit`` items, evenly spread over all of them, in their order."""
    if limit is None or len(items) <= limit:
        return list(items)
    if limit < 1:
        raise ConfigError(f"A held-out set of {limit} files was asked for: ask for at least 1.")
    return [items[index * len(items) // limit] for index in range(limit)]


@contextmanager
def open_local(file: HeldOutFile) -> Iterator[Path]:
    """``OpenFile`` for files of this machine."""
    from urllib.parse import unquote

    yield Path(unquote(file.uri.removeprefix("file://")))


def opener(storage: Storage, scratch_path: Path) -> OpenFile:
    """``OpenFile`` that downloads to ``scratch_path`` and removes the copy afterwards.

    Raises ``SourceChangedError`` when a file is not the one that the job pins.
    """

    @contextmanager
    def open_file(file: HeldOutFile) -> Iterator[Path]:
        name = hashlib.sha256(file.uri.encode()).hexdigest()[:16]
        path = scratch_path / f"{name}{Path(file.name).suffix}"
        try:
            storage.download(file.uri, path, file.etag or None)
            yield path
        finally:
            path.unlink(missing_ok=True)

    return open_file


def first_seconds(path: Path, sample_rate: int, max_seconds: float) -> Samples:
    """Mono float32 [N] of the first ``max_seconds`` at ``sample_rate``, resampled by soxr HQ.

    Reading stops there, so memory does not grow with the file. Raises ``AudioError``.
    """
    wanted = int(max_seconds * sample_rate)
    blocks, size = [], 0
    for block in Decoding(path, DecodeSettings(sample_rate=sample_rate)):
        blocks.append(block)
        size += len(block)
        if size >= wanted:
            break
    return np.concatenate(blocks)[:wanted]


class SetDigest:
    """Digest over names and contents of the files of a set, in the order in which they come."""

    def __init__(self) -> None:
        """Nothing is in it yet."""
        self._sha256 = hashlib.sha256()

    def add(self, name: str, path: Path) -> None:
        """Take one more file in."""
        self._sha256.update(f"{name}\n{sha256_of_file(path)}\n".encode())

    @property
    def value(self) -> str:
        """32 hex digits."""
        return self._sha256.hexdigest()[:32]
