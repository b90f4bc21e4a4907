"""A local or mounted folder behind the ``Storage`` interface."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote_to_bytes

from hcodec_core.errors import (
    AccessError,
    FolderMissingError,
    HCodecError,
    ObjectMissingError,
    SourceChangedError,
    StorageError,
)
from hcodec_core.storage.interface import ObjectInfo, local_write_failed, split_uri

_CHUNK_BYTES = 4 * 1024**2
_SCRATCH_PREFIX = ".tmp-"


class FileStorage:
    """A local or mounted folder. The etag of a file is its modification time and size.

    A file name may hold any byte; URIs carry names percent-encoded only where a URI must ("%"
    itself, control characters and bytes that are no UTF-8), so that a name reads as it is.
    """

    def read(self, uri: str) -> bytes:
        """See ``Storage``."""
        with _translated(uri):
            return _path_of(uri).read_bytes()

    def write(self, uri: str, data: bytes) -> None:
        """See ``Storage``; readers never see half a file."""
        path = _path_of(uri)
        with _translated(uri), _scratch_file(path) as scratch:
            _write_durably(scratch, data)
            os.replace(scratch, path)

    def create(self, uri: str, data: bytes) -> bool:
        """See ``Storage``; a hard link is the atomic step."""
        path = _path_of(uri)
        with _translated(uri), _scratch_file(path) as scratch:
            _write_durably(scratch, data)
            while True:
                try:
                    os.link(scratch, path)
                    return True
                except FileExistsError:
                    with contextlib.suppress(FileNotFoundError):
                        return path.read_bytes() == data

    def head(self, uri: str) -> ObjectInfo | None:
        """See ``Storage``."""
        with _translated(uri):
            return _info_of(_path_of(uri))

    def list_objects(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """See ``Storage``. Only regular files; scratch files of this class are left out.

        Raises ``FolderMissingError`` when the folder does not exist: a volume that is not mounted
        must not look like an empty one.
        """
        path = _path_of(prefix_uri)
        root, name = (path, "") if prefix_uri.endswith("/") else (path.parent, path.name)
        if not root.is_dir():
            raise FolderMissingError(f"Folder {root} does not exist: check {prefix_uri}.")
        for found in sorted(_walk(root, name), key=str):
            with _translated(prefix_uri):
                info = _info_of(found)
            if info is not None:
                yield info

    def delete(self, uris: Iterable[str]) -> None:
        """See ``Storage``."""
        for uri in uris:
            with _translated(uri), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _path_of(uri).unlink()

    def download(self, uri: str, path: Path, etag: str | None = None) -> None:
        """See ``Storage``."""
        with _translated(uri):
            source = _path_of(uri).open("rb")
        with source:
            self._check_etag(source, uri, etag)
            try:
                with path.open("wb") as target:
                    shutil.copyfileobj(source, target, _CHUNK_BYTES)
            except OSError as error:
                raise local_write_failed(error, path) from error
            # Again: a file written to while it was read is neither content.
            self._check_etag(source, uri, etag)

    @staticmethod
    def _check_etag(source: IO[bytes], uri: str, etag: str | None) -> None:
        if etag is not None and _etag_of(os.fstat(source.fileno())) != etag:
            raise SourceChangedError(f"{uri} changed since it was listed.")

    def upload(self, path: Path, uri: str) -> ObjectInfo:
        """See ``Storage``."""
        target = _path_of(uri)
        with path.open("rb") as source, _translated(uri), _scratch_file(target) as scratch:
            with scratch.open("xb") as file:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        info = self.head(uri)
        if info is None:
            raise StorageError(f"{uri} is not there after its upload; try again.")
        return info


def file_uri(path: str | Path) -> str:
    """The ``file://`` URI of an absolute path, as listings give it."""
    name = str(path)
    if name.isprintable() and "%" not in name:
        return f"file://{name}"  # nearly all names, and listings have millions
    quoted = (
        quote(char, errors="surrogateescape") if char == "%" or not char.isprintable() else char
        for char in name
    )
    return "file://" + "".join(quoted)


def _path_of(uri: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(split_uri(uri)[2])))


def _etag_of(facts: os.stat_result) -> str:
    return f"{facts.st_mtime_ns:x}-{facts.st_size:x}"


def _info_of(path: Path) -> ObjectInfo | None:
    """Facts about a regular file; None for what is gone or something else (a pipe, a folder)."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(facts.st_mode):
        return None
    return ObjectInfo(
        uri=file_uri(path),
        etag=_etag_of(facts),
        size=facts.st_size,
        last_modified=datetime.fromtimestamp(facts.st_mtime, UTC),
    )


def _walk(root: Path, name: str) -> Iterator[Path]:
    """Files under ``root`` whose first path part below it starts with ``name``."""

    def refuse(error: OSError) -> None:
        # A folder that cannot be read would make its files look deleted.
        if not isinstance(error, FileNotFoundError):
            raise _os_error(error, file_uri(Path(error.filename)))

    for folder, folders, files in os.walk(root, onerror=refuse):
        if folder == str(root):
            folders[:] = [entry for entry in folders if entry.startswith(name)]
            files = [entry for entry in files if entry.startswith(name)]
        yield from (Path(folder, file) for file in files if not file.startswith(_SCRATCH_PREFIX))


@contextlib.contextmanager
def _scratch_file(target: Path) -> Iterator[Path]:
    """A free name beside ``target``; what still bears it afterwards is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f"{_SCRATCH_PREFIX}{os.urandom(8).hex()}"
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _os_error(error, uri) from error


def _os_error(error: OSError, uri: str) -> HCodecError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return ObjectMissingError(f"{uri} does not exist.")
    if isinstance(error, PermissionError):
        return AccessError(f"No permission for {uri}: check the rights of this user.")
    return StorageError(f"{uri} could not be read or written: {error.strerror}.")
