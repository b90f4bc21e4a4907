"""S3 behind the ``Storage`` interface: boto3 for requests and listings, obstore for downloads.

Traps that shaped this file (each has a test): obstore drops empty segments, leading and trailing
slashes of a key, so that it would fetch another object; a HEAD of a missing bucket looks like a
missing key; a repeated PUT with ``If-None-Match`` is refused though its first answer was lost.
"""

from __future__ import annotations

import contextlib
import mimetypes
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree

from hcodec_core.config import StorageConfig
from hcodec_core.errors import (
    AccessError,
    ConfigError,
    HCodecError,
    ObjectMissingError,
    SourceChangedError,
    StorageError,
)
from hcodec_core.storage.interface import ObjectInfo, local_write_failed, split_uri

_MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
_ACCESS_CODES = {
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidBucketName",
    "PermanentRedirect",
    "SignatureDoesNotMatch",
}
_PRECONDITION_CODES = frozenset({"412", "PreconditionFailed"})
_CONFLICT_CODES = frozenset({"409", "ConditionalRequestConflict", "OperationAborted"})
_CREATE_TRIES = 5
_DELETE_PAGE = 1000
_CHUNK_BYTES = 4 * 1024**2


class S3Storage:
    """Any S3 endpoint; credentials come from the SDK's own chain (role, profile, environment)."""

    def __init__(self, config: StorageConfig) -> None:
        """Keep the configuration; no connection is made yet."""
        self._config = config
        self._lock = threading.Lock()
        self._boto_client: Any = None
        self._bulk_stores: dict[str, Any] = {}
        self._seen_buckets: set[str] = set()

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
                with _translated(uri, let_through=_PRECONDITION_CODES | _CONFLICT_CODES):
                    self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
                    return True
            except ClientError as error:
                if not _has_code(error, _PRECONDITION_CODES):
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
            self._check_bucket(bucket)
            return None
        return ObjectInfo(
            uri, facts["ETag"].strip('"'), facts["ContentLength"], facts["LastModified"]
        )

    def list_objects(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """See ``Storage``; one page of 1000 names is held at a time.

        Raises ``StorageError`` when the endpoint does not list in the order of names.
        """
        _, bucket, prefix = split_uri(prefix_uri)
        self._check_bucket(bucket)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        last = ""
        while True:
            with _translated(prefix_uri):
                page: dict[str, Any] = self._client.list_objects_v2(**request)[_PAGE]
            for info in page["objects"]:
                if info.uri <= last:
                    raise StorageError(
                        f"The endpoint of {prefix_uri} does not list in the order of names: use a "
                        "general-purpose bucket, or a manifest file as the source."
                    )
                last = info.uri
                yield info
            if not page["token"]:
                return
            request["ContinuationToken"] = page["token"]

    def delete(self, uris: Iterable[str]) -> None:
        """See ``Storage``; up to 1000 objects a request."""
        by_bucket: dict[str, list[str]] = {}
        for uri in uris:
            _, bucket, key = split_uri(uri)
            by_bucket.setdefault(bucket, []).append(key)
        for bucket, keys in by_bucket.items():
            # The request is XML, which cannot carry control characters.
            plain = [key for key in keys if key.isprintable()]
            for start in range(0, len(plain), _DELETE_PAGE):
                self._delete_page(bucket, plain[start : start + _DELETE_PAGE])
            for key in (key for key in keys if not key.isprintable()):
                with _translated(f"s3://{bucket}/{key}"):
                    self._client.delete_object(Bucket=bucket, Key=key)

    def _delete_page(self, bucket: str, keys: list[str]) -> None:
        with _translated(f"s3://{bucket}"):
            answer = self._client.delete_objects(
                Bucket=bucket, Delete={"Objects": [{"Key": k} for k in keys], "Quiet": True}
            )
        for error in answer.get("Errors", []):
            raise _client_error(str(error.get("Code", "")), f"s3://{bucket}/{error.get('Key')}")

    def download(self, uri: str, path: Path, etag: str | None = None) -> None:
        """See ``Storage``."""
        num_bytes = 0
        try:
            with path.open("wb") as file:
                for chunk in self._chunks(uri, etag):
                    num_bytes += file.write(chunk)
        except OSError as error:
            raise local_write_failed(error, path) from error

    def _chunks(self, uri: str, etag: str | None) -> Iterator[bytes]:
        # A generator of its own, so that errors of the local disk never look like the storage's.
        bucket, key = split_uri(uri)[1:]
        try:
            with _translated(uri, let_through=_PRECONDITION_CODES):
                chunks = self._bulk_chunks if _is_plain(key) else self._plain_chunks
                yield from chunks(bucket, key, etag)
        except ObjectMissingError:
            self._check_bucket(bucket)
            raise
        except _PreconditionFailedError as error:
            raise SourceChangedError(f"{uri} changed since it was listed.") from error

    def _bulk_chunks(self, bucket: str, key: str, etag: str | None) -> Iterator[bytes]:
        import obstore.exceptions as obstore_errors

        options = {"if_match": f'"{etag}"'} if etag is not None else {}
        try:
            answer = self._bulk(bucket).get(key, options=options)
        except obstore_errors.PreconditionError as error:
            raise _PreconditionFailedError from error
        _check_etag(etag, answer.meta["e_tag"])
        num_bytes = 0
        for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
            num_bytes += len(chunk)
            yield chunk
        _check_length(num_bytes, int(answer.meta["size"]))

    def _plain_chunks(self, bucket: str, key: str, etag: str | None) -> Iterator[bytes]:
        from botocore.exceptions import ClientError

        options = {"IfMatch": f'"{etag}"'} if etag is not None else {}
        try:
            answer = self._client.get_object(Bucket=bucket, Key=key, **options)
        except ClientError as error:
            if _has_code(error, _PRECONDITION_CODES):
                raise _PreconditionFailedError from error
            raise
        _check_etag(etag, answer["ETag"])
        yield from answer["Body"].iter_chunks(_CHUNK_BYTES)

    def upload(self, path: Path, uri: str) -> ObjectInfo:
        """See ``Storage``; large files go in parts."""
        _, bucket, key = split_uri(uri)
        size = path.stat().st_size
        # Without its type, a browser saves a report instead of showing it.
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        with _translated(uri):
            self._client.upload_file(str(path), bucket, key, ExtraArgs={"ContentType": kind})
        info = self.head(uri)
        if info is None or info.size != size:
            raise StorageError(f"{uri} is not there, or not whole, after its upload; try again.")
        return info

    def _check_bucket(self, bucket: str) -> None:
        """Raise ``AccessError`` when the bucket does not exist; asked once per bucket.

        Without the right to ask, the bucket counts as there.
        """
        if bucket in self._seen_buckets:
            return
        from botocore.exceptions import ClientError

        try:
            with _translated(f"s3://{bucket}", let_through={"403", "AccessDenied"}):
                self._client.head_bucket(Bucket=bucket)
        except ClientError:
            pass
        self._seen_buckets.add(bucket)

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._boto_client is None:
                self._boto_client = self._make_client()
            return self._boto_client

    def _make_client(self) -> Any:
        import boto3
        from botocore.config import Config

        own_endpoint = self._config.endpoint_url is not None
        # Many endpoints other than AWS refuse the checksums that boto3 adds unasked.
        checksums = "when_required" if own_endpoint else "when_supported"
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self._config.endpoint_url,
            region_name=self._config.region,
            config=Config(
                retries={"mode": "standard", "max_attempts": 5},
                connect_timeout=10,
                read_timeout=60,
                max_pool_connections=32,
                request_checksum_calculation=checksums,
                response_checksum_validation=checksums,
                s3={"addressing_style": "path" if own_endpoint else "auto"},
            ),
        )
        client.meta.events.register("before-parse.s3.ListObjectsV2", _parse_listing)
        return client

    def _bulk(self, bucket: str) -> Any:
        from boto3.session import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
        from obstore.store import S3Store

        with self._lock:
            if bucket not in self._bulk_stores:
                endpoint = self._config.endpoint_url
                session = Session(region_name=self._config.region)
                if session.get_credentials() is None:
                    raise _no_credentials(f"s3://{bucket}")
                self._bulk_stores[bucket] = S3Store(
                    bucket,
                    region=self._config.region,
                    virtual_hosted_style_request=endpoint is None,
                    # The overall timeout covers the body: it must let the largest object through.
                    client_options={
                        "allow_http": True,
                        "connect_timeout": "10s",
                        "read_timeout": "60s",
                        "timeout": "3h",
                    },
                    retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=90)},
                    credential_provider=Boto3CredentialProvider(session),
                    endpoint=endpoint,
                )
            return self._bulk_stores[bucket]


class _PreconditionFailedError(Exception):
    """The object is not the one that was asked for."""


_PAGE = "HCodecPage"


def _parse_listing(
    response_dict: Mapping[str, Any], customized_response_dict: dict[str, Any], **_: Any
) -> None:
    """Read a page of a listing ten times faster than botocore does, straight into values.

    botocore then parses an empty page. Called by botocore before it parses an answer.
    """
    if response_dict["status_code"] != 200:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])
    except ElementTree.ParseError as error:
        raise StorageError("A listing was cut off on its way; try again.") from error
    space = root.tag[: root.tag.find("}") + 1]
    is_encoded = root.findtext(f"{space}EncodingType") == "url"
    is_truncated = root.findtext(f"{space}IsTruncated") == "true"
    token = root.findtext(f"{space}NextContinuationToken") if is_truncated else None
    bucket = root.findtext(f"{space}Name")
    objects = [
        _listed(node, space, f"s3://{bucket}/", is_encoded)
        for node in root.iter(f"{space}Contents")
    ]
    customized_response_dict[_PAGE] = {"objects": objects, "token": token}
    response_dict["body"] = b"<ListBucketResult/>"  # type: ignore[index]


def _listed(node: ElementTree.Element, space: str, root_uri: str, is_encoded: bool) -> ObjectInfo:
    key = node.findtext(f"{space}Key") or ""
    modified = datetime.fromisoformat(node.findtext(f"{space}LastModified") or "")
    return ObjectInfo(
        uri=root_uri + (unquote_plus(key) if is_encoded else key),
        etag=(node.findtext(f"{space}ETag") or "").strip('"'),
        size=int(node.findtext(f"{space}Size") or 0),
        last_modified=modified if modified.tzinfo else modified.replace(tzinfo=UTC),
    )


def _is_plain(key: str) -> bool:
    """Whether obstore keeps this key as it is."""
    parts = key.split("/")
    return key.isprintable() and not any(part in {"", ".", ".."} for part in parts)


def _check_etag(wanted: str | None, found: str | None) -> None:
    # An endpoint that ignores If-Match must not pass another content off as the listed one.
    if wanted is not None and found is not None and found.strip('"') != wanted:
        raise _PreconditionFailedError


def _check_length(num_bytes: int, expected: int) -> None:
    if num_bytes != expected:
        raise StorageError(f"Got {num_bytes} of {expected} bytes of an object; try again.")


def _has_code(error: Any, codes: frozenset[str] | set[str]) -> bool:
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    return _error_code(error) in codes or status in codes


def _error_code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _translated(uri: str, let_through: frozenset[str] | set[str] = frozenset()) -> Iterator[None]:
    """Turn SDK errors into ours; ``ClientError`` with a code in ``let_through`` passes as it is."""
    import obstore.exceptions as obstore_errors
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if _has_code(error, let_through):
            raise
        raise _client_error(_error_code(error), uri) from error
    except (BotoCoreError, Boto3Error) as error:
        raise _boto_error(error, uri) from error
    except FileNotFoundError as error:  # what obstore raises for a missing object
        raise ObjectMissingError(f"{uri} does not exist.") from error
    except (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError) as error:
        raise AccessError(f"No permission for {uri}: check the policy of this identity.") from error
    except obstore_errors.BaseError as error:
        raise StorageError(f"Storage did not answer for {uri}: {type(error).__name__}.") from error


def _boto_error(error: Exception, uri: str) -> HCodecError:
    from botocore.exceptions import (
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
    )

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return _no_credentials(uri)
    if isinstance(error, ParamValidationError):
        return ConfigError(f"{uri!r} cannot name an object: correct the URI.")
    # The transfer manager wraps the answer that made it give up.
    for cause in (error.__cause__, error.__context__):
        if isinstance(cause, ClientError):
            return _client_error(_error_code(cause), uri)
    return StorageError(f"Storage did not answer for {uri}: {type(error).__name__}.")


def _no_credentials(uri: str) -> AccessError:
    return AccessError(
        f"No credentials for {uri}: give this process a role, a profile or AWS_* variables."
    )


def _client_error(code: str, uri: str) -> HCodecError:
    if code == "NoSuchBucket" or (code in _MISSING_CODES and not split_uri(uri)[2]):
        return AccessError(f"The bucket of {uri} does not exist: create it or correct the URI.")
    if code in _MISSING_CODES:
        return ObjectMissingError(f"{uri} does not exist.")
    if code in _ACCESS_CODES:
        return AccessError(f"No permission for {uri} ({code}): check the policy of this identity.")
    return StorageError(f"Storage refused a request for {uri} ({code}); try again.")
