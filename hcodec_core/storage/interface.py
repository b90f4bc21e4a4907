"""What the system asks of object storage, and how its names are written."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from hcodec_core.errors import ConfigError, StorageError


@dataclass(frozen=True)
class ObjectInfo:
    """One object as listed. ``etag`` without quotes; ``size`` in bytes; time in UTC."""

    uri: str
    etag: str
    size: int
    last_modified: datetime


class Storage(Protocol):
    """What the system asks of object storage. All methods may be called from many threads.

    Every method raises ``AccessError`` when the bucket is missing or permission is denied and
    ``StorageError`` for what may pass on a later try.
    """

    def read(self, uri: str) -> bytes:
        """Content of an object. Raises ``ObjectMissingError``."""

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace an object."""

    def create(self, uri: str, data: bytes) -> bool:
        """Create an object unless it exists; true when the stored body is ``data``."""

    def head(self, uri: str) -> ObjectInfo | None:
        """Facts about one object, or None when there is none."""

    def list_objects(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Objects whose URI starts with ``prefix_uri``, in the order of their names."""

    def delete(self, uris: Iterable[str]) -> None:
        """Delete objects; those that are gone already are no error."""

    def download(self, uri: str, path: Path, etag: str | None = None) -> None:
        """Write an object to a local file, in bounded memory.

        Raises ``ObjectMissingError``, and ``SourceChangedError`` when ``etag`` is given and the
        object has another one.
        """

    def upload(self, path: Path, uri: str) -> ObjectInfo:
        """Create or replace an object from a local file."""


def split_uri(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and key of a URI (``file://`` has no bucket, its key is the path).

    Raises ``ConfigError`` when the URI has no known scheme or no bucket.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "file" and rest.startswith("/"):
        return scheme, "", rest
    bucket, _, key = rest.partition("/")
    if separator and scheme == "s3" and bucket:
        return scheme, bucket, key
    raise ConfigError(f"{uri!r} is not a storage URI: write s3://bucket/prefix or file:///folder.")


def join_uri(prefix_uri: str, *parts: str) -> str:
    """Join a prefix and names with single slashes."""
    scheme, separator, rest = prefix_uri.partition("://")
    joined = "/".join([rest.rstrip("/"), *(part.strip("/") for part in parts)])
    return f"{scheme}{separator}{joined}"


def probe_conditional_writes(storage: Storage, folder_uri: str) -> None:
    """Make sure that the storage under ``folder_uri`` keeps the promise of ``create``.

    Raises ``ConfigError`` when it overwrites instead of refusing: leases would not be exclusive.
    """
    uri = join_uri(folder_uri, f".probe-{uuid.uuid4().hex}")
    try:
        first, second = storage.create(uri, b"first"), storage.create(uri, b"second")
        if not first or second or storage.read(uri) != b"first":
            raise ConfigError(
                f"The storage of {folder_uri} ignores If-None-Match: workers could not lease work "
                "from it; use one with conditional writes."
            )
    finally:
        storage.delete([uri])


def sha256_of_file(path: Path) -> str:
    """Digest of a local file's content (64 hex digits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_write_failed(error: OSError, path: Path) -> StorageError:
    """The error for a local file that could not be written: never that of the object's storage."""
    return StorageError(
        f"{path} could not be written ({error.strerror}): free or enlarge the scratch disk."
    )
