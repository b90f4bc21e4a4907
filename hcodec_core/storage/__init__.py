"""Object storage behind one small interface: ``s3://`` (any S3 endpoint) and ``file://``.

Only ``storage.s3`` imports a storage SDK.

Conditional writes: a PUT with ``If-None-Match: *`` whose answer is lost is repeated by the client
and then refused although it won. ``create`` therefore compares the stored body with its own, so
bodies must be unique to their writer (carry a nonce).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from hcodec_core.config import StorageConfig
from hcodec_core.storage.files import FileStorage, file_uri
from hcodec_core.storage.interface import (
    ObjectInfo,
    Storage,
    join_uri,
    local_write_failed,
    probe_conditional_writes,
    sha256_of_file,
    split_uri,
)
from hcodec_core.storage.s3 import S3Storage

__all__ = [
    "FileStorage",
    "ObjectInfo",
    "S3Storage",
    "Storage",
    "join_uri",
    "local_write_failed",
    "open_storage",
    "probe_conditional_writes",
    "sha256_of_file",
    "split_uri",
    "file_uri",
]


def open_storage(config: StorageConfig) -> Storage:
    """Storage for all schemes; clients are made on first use."""
    return _AnyStorage(config)


class _AnyStorage:
    """Sends each call to the backend of its scheme."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        self._backends: dict[str, Storage] = {}
        self._lock = threading.Lock()

    def _backend(self, uri: str) -> Storage:
        scheme = split_uri(uri)[0]
        with self._lock:
            if scheme not in self._backends:
                self._backends[scheme] = self._make(scheme)
            return self._backends[scheme]

    def _make(self, scheme: str) -> Storage:
        return S3Storage(self._config) if scheme == "s3" else FileStorage()

    def read(self, uri: str) -> bytes:
        return self._backend(uri).read(uri)

    def write(self, uri: str, data: bytes) -> None:
        self._backend(uri).write(uri, data)

    def create(self, uri: str, data: bytes) -> bool:
        return self._backend(uri).create(uri, data)

    def head(self, uri: str) -> ObjectInfo | None:
        return self._backend(uri).head(uri)

    def list_objects(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        return self._backend(prefix_uri).list_objects(prefix_uri)

    def delete(self, uris: Iterable[str]) -> None:
        by_scheme: dict[str, list[str]] = {}
        for uri in uris:
            by_scheme.setdefault(split_uri(uri)[0], []).append(uri)
        for group in by_scheme.values():
            self._backend(group[0]).delete(group)

    def download(self, uri: str, path: Path, etag: str | None = None) -> None:
        self._backend(uri).download(uri, path, etag)

    def upload(self, path: Path, uri: str) -> ObjectInfo:
        return self._backend(uri).upload(path, uri)
