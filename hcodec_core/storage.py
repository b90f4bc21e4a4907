"""Object storage behind one small interface: ``s3://`` (any S3 endpoint) and ``file://``.

boto3 carries control calls and conditional writes, obstore carries bulk listing and downloads.
No other module imports a storage SDK.

Conditional writes: a PUT with ``If-None-Match: *`` whose answer is lost is repeated by the client
and then refused although it won. ``create`` therefore compares the stored body with its own, so
bodies must be unique to their writer (carry a nonce).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

from hcodec_core.config import StorageConfig
from hcodec_core.errors import (
    AccessError,
    ConfigError,
    HCodecError,
    ObjectMissingError,
    SourceChangedError,
    StorageError,
)

_MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
_ACCESS_CODES = {
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "NoSuchBucket",
    "PermanentRedirect",
    "SignatureDoesNotMatch",
}
_CREATE_TRIES = 5


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
    return "/".join([prefix_uri.rstrip("/"), *(part.strip("/") for part in parts)])


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
                made: Storage = S3Storage(self._config) if scheme == "s3" else FileStorage()
                self._backends[scheme] = made
            return self._backends[scheme]

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


class FileStorage:
    """A local or mounted folder. The etag of a file is its modification time and size.

    A file name may hold any character; URIs carry names percent-encoded only where a URI must
    ("%" itself), so that a name reads as it is.
    """

    def read(self, uri: str) -> bytes:
        """See ``Storage``."""
        try:
            return self._path(uri).read_bytes()
        except OSError as error:
            raise _os_error(error, uri) from error

    def write(self, uri: str, data: bytes) -> None:
        """See ``Storage``; readers never see half a file."""
        path = self._path(uri)
        try:
            os.replace(self._scratch(path, data), path)
        except OSError as error:
            raise _os_error(error, uri) from error

    def create(self, uri: str, data: bytes) -> bool:
        """See ``Storage``; a hard link is the atomic step."""
        path = self._path(uri)
        try:
            scratch = self._scratch(path, data)
            try:
                os.link(scratch, path)
                return True
            except FileExistsError:
                return path.read_bytes() == data
            finally:
                os.unlink(scratch)
        except OSError as error:
            raise _os_error(error, uri) from error

    def head(self, uri: str) -> ObjectInfo | None:
        """See ``Storage``."""
        path = self._path(uri)
        return self._info(path) if path.is_file() else None

    def list_objects(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """See ``Storage``. Hidden scratch files are left out."""
        prefix = unquote(split_uri(prefix_uri)[2])
        root = Path(prefix) if prefix.endswith("/") else Path(prefix).parent
        if not root.is_dir():
            raise AccessError(f"Folder {root} does not exist: check {prefix_uri}.")
        files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
        wanted = (p for p in files if str(p).startswith(prefix) and not p.name.startswith(".tmp-"))
        for path in sorted(wanted, key=str):
            with contextlib.suppress(FileNotFoundError):
                yield self._info(path)

    def delete(self, uris: Iterable[str]) -> None:
        """See ``Storage``."""
        for uri in uris:
            self._path(uri).unlink(missing_ok=True)

    def download(self, uri: str, path: Path, etag: str | None = None) -> None:
        """See ``Storage``."""
        source = self._path(uri)
        try:
            if etag is not None and self._info(source).etag != etag:
                raise SourceChangedError(f"{uri} changed since it was listed.")
            shutil.copyfile(source, path)
        except OSError as error:
            raise _os_error(error, uri) from error

    def upload(self, path: Path, uri: str) -> ObjectInfo:
        """See ``Storage``."""
        target = self._path(uri)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = target.parent / f".tmp-{os.urandom(8).hex()}"
            shutil.copyfile(path, scratch)
            os.replace(scratch, target)
            return self._info(target)
        except OSError as error:
            raise _os_error(error, uri) from error

    @staticmethod
    def _path(uri: str) -> Path:
        return Path(unquote(split_uri(uri)[2]))

    @staticmethod
    def _scratch(path: Path, data: bytes) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return scratch

    @staticmethod
    def _info(path: Path) -> ObjectInfo:
        facts = path.stat()
        return ObjectInfo(
            uri="file://" + quote(str(path), safe="/ !\"#$&'()*+,:;<=>?@[]^_`{|}~"),
            etag=f"{facts.st_mtime_ns:x}-{facts.st_size:x}",
            size=facts.st_size,
            last_modified=datetime.fromtimestamp(facts.st_mtime, UTC),
        )


class S3Storage:
    """Any S3 endpoint; credentials come from the SDK's own chain (role, profile, environment)."""

    def __init__(self, config: StorageConfig) -> None:
        """Keep the configuration; no connection is made yet."""
        self._config = config
        self._lock = threading.Lock()
        self._boto_client: Any = None
        self._bulk_stores: dict[str, Any] = {}

    def read(self, uri: str) -> bytes:
        """See ``Storage``."""
        _, bucket, key = split_uri(uri)
        with _translated(uri):
            body: bytes = self._client.get_object(Bucket=bucket, Key=key)["Body"].read()
            return body

    def write(self, uri: str, data: bytes) -> None:
        """See ``Storage``."""
        _, bucket, key = split_uri(uri)
        with _translated(uri):
            self._client.put_object(Bucket=bucket, Key=key, Body=data)

    def create(self, uri: str, data: bytes) -> bool:
        """See ``Storage``; 412 is settled by the stored body, 409 is tried again."""
        from botocore.exceptions import ClientError

        _, bucket, key = split_uri(uri)
        for _ in range(_CREATE_TRIES):
            try:
                with _translated(uri, let_through={"412", "PreconditionFailed", "409"}):
                    self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
                    return True
            except ClientError as error:
                if _error_code(error) not in {"412", "PreconditionFailed"}:
                    continue
                try:
                    return self.read(uri) == data
                except ObjectMissingError:
                    continue  # deleted in between: the name is free again
        raise StorageError(f"Creating {uri} met a conflict {_CREATE_TRIES} times; try again.")

    def head(self, uri: str) -> ObjectInfo | None:
        """See ``Storage``."""
        _, bucket, key = split_uri(uri)
        try:
            with _translated(uri):
                facts = self._client.head_object(Bucket=bucket, Key=key)
        except ObjectMissingError:
            return None
        return ObjectInfo(
            uri, facts["ETag"].strip('"'), facts["ContentLength"], facts["LastModified"]
        )

    def list_objects(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """See ``Storage``."""
        _, bucket, prefix = split_uri(prefix_uri)
        # obstore lists by folder; a prefix inside a name is filtered here.
        folder = prefix.rpartition("/")[0]
        with _translated(prefix_uri):
            # An empty listing does not tell a missing bucket from an empty prefix everywhere.
            self._client.head_bucket(Bucket=bucket)
            found: list[Any] = []
            for page in self._bulk(bucket).list(prefix=folder or None, chunk_size=1000):
                found.extend(meta for meta in page if meta["path"].startswith(prefix))
        for meta in sorted(found, key=lambda m: str(m["path"])):
            yield ObjectInfo(
                uri=f"s3://{bucket}/{meta['path']}",
                etag=str(meta["e_tag"] or "").strip('"'),
                size=int(meta["size"]),
                last_modified=meta["last_modified"],
            )

    def delete(self, uris: Iterable[str]) -> None:
        """See ``Storage``; up to 1000 objects a request."""
        by_bucket: dict[str, list[str]] = {}
        for uri in uris:
            _, bucket, key = split_uri(uri)
            by_bucket.setdefault(bucket, []).append(key)
        for bucket, keys in by_bucket.items():
            for start in range(0, len(keys), 1000):
                self._delete_page(bucket, keys[start : start + 1000])

    def _delete_page(self, bucket: str, keys: list[str]) -> None:
        with _translated(f"s3://{bucket}"):
            answer = self._client.delete_objects(
                Bucket=bucket, Delete={"Objects": [{"Key": k} for k in keys], "Quiet": True}
            )
        for error in answer.get("Errors", []):
            raise StorageError(f"s3://{bucket}/{error['Key']} was not deleted: {error['Code']}.")

    def download(self, uri: str, path: Path, etag: str | None = None) -> None:
        """See ``Storage``."""
        import obstore.exceptions as obstore_errors

        _, bucket, key = split_uri(uri)
        options = {"if_match": f'"{etag}"'} if etag is not None else {}
        try:
            with _translated(uri), path.open("wb") as file:
                for chunk in self._bulk(bucket).get(key, options=options).stream():
                    file.write(chunk)
        except obstore_errors.PreconditionError as error:
            raise SourceChangedError(f"{uri} changed since it was listed.") from error

    def upload(self, path: Path, uri: str) -> ObjectInfo:
        """See ``Storage``; large files go in parts."""
        _, bucket, key = split_uri(uri)
        with _translated(uri):
            self._client.upload_file(str(path), bucket, key)
        info = self.head(uri)
        if info is None:
            raise StorageError(f"{uri} is not there after its upload; try again.")
        return info

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._boto_client is None:
                self._boto_client = self._make_client()
            return self._boto_client

    def _make_client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self._config.endpoint_url,
            region_name=self._config.region,
            config=Config(
                retries={"mode": "standard", "max_attempts": 5},
                connect_timeout=10,
                read_timeout=60,
                max_pool_connections=32,
                s3={"addressing_style": "path" if self._config.endpoint_url else "auto"},
            ),
        )

    def _bulk(self, bucket: str) -> Any:
        from boto3.session import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
        from obstore.store import S3Store

        with self._lock:
            if bucket not in self._bulk_stores:
                endpoint = self._config.endpoint_url
                self._bulk_stores[bucket] = S3Store(
                    bucket,
                    region=self._config.region,
                    virtual_hosted_style_request=endpoint is None,
                    client_options={"allow_http": True, "timeout": "120s"},
                    credential_provider=Boto3CredentialProvider(
                        Session(region_name=self._config.region)
                    ),
                    endpoint=endpoint,
                )
            return self._bulk_stores[bucket]


def sha256_of_file(path: Path) -> str:
    """Digest of a local file's content (64 hex digits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _error_code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _translated(uri: str, let_through: frozenset[str] | set[str] = frozenset()) -> Iterator[None]:
    """Turn SDK errors into ours; codes in ``let_through`` pass as they are."""
    import obstore.exceptions as obstore_errors
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = _error_code(error)
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        if code in let_through or status in let_through:
            raise
        raise _client_error(code, uri) from error
    except NoCredentialsError as error:
        raise AccessError(
            f"No credentials for {uri}: give this process a role, a profile or AWS_* variables."
        ) from error
    except (FileNotFoundError, obstore_errors.NotFoundError) as error:
        raise ObjectMissingError(f"{uri} does not exist.") from error
    except (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError) as error:
        raise AccessError(f"No permission for {uri}: check the policy of this identity.") from error
    except obstore_errors.PreconditionError:
        raise
    except (BotoCoreError, obstore_errors.BaseError) as error:
        raise StorageError(f"Storage did not answer for {uri}: {type(error).__name__}.") from error


def _client_error(code: str, uri: str) -> HCodecError:
    if code == "NoSuchBucket" or (code in _MISSING_CODES and not split_uri(uri)[2]):
        return AccessError(f"The bucket of {uri} does not exist: create it or correct the URI.")
    if code in _MISSING_CODES:
        return ObjectMissingError(f"{uri} does not exist.")
    if code in _ACCESS_CODES:
        return AccessError(f"No permission for {uri} ({code}): check the policy of this identity.")
    return StorageError(f"Storage refused a request for {uri} ({code}); try again.")


def _os_error(error: OSError, uri: str) -> HCodecError:
    if isinstance(error, FileNotFoundError):
        return ObjectMissingError(f"{uri} does not exist.")
    if isinstance(error, PermissionError):
        return AccessError(f"No permission for {uri}: check the rights of this user.")
    return StorageError(f"{uri} could not be read or written: {error.strerror}.")
