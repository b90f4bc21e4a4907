"""The few requests that the backends make, asynchronously, on plain JSON.

Plain JSON and not the generated models: fields that this version of the client does not know would
be dropped, and the answers' headers (``Date``, ``Retry-After``) would be out of reach.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from hcodec_airflow.kubernetes.profiles import Object
from hcodec_core.errors import AccessError, ClusterError, ConfigError, HCodecError

logger = logging.getLogger(__name__)

OpenClient = Callable[[], AbstractAsyncContextManager[Any]]

REQUEST_SECONDS = 30.0
_TRIES = 4
_KEPT_LOG_INS = 2
_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 20.0
_WATCH_SECONDS = 240
# A watch that says nothing for longer than it was asked to last hangs in the network.
_WATCH_SILENCE_SECONDS = _WATCH_SECONDS + 30
_MERGE_PATCH = "application/merge-patch+json"


class NotFoundError(HCodecError):
    """There is no such object (404)."""


class ConflictError(HCodecError):
    """The object exists already, or is no longer as it was when last read (409)."""


class GoneError(HCodecError):
    """A resource version is too old to go on from (410): list again."""


class UnauthorizedError(HCodecError):
    """The credentials are not valid, or no longer (401)."""


class ServerClock:
    """The API server's time, by the ``Date`` of its last answer: pods' timestamps are on it."""

    def __init__(self) -> None:
        """Begin with this machine's time; the first answer corrects it."""
        self._offset_seconds = 0.0
        self._heard_at = 0.0

    def hear(self, date: str | None) -> None:
        """Take the time from an answer's ``Date`` header."""
        if not date:
            return
        self._offset_seconds = parsedate_to_datetime(date).timestamp() - time.monotonic()
        self._heard_at = time.monotonic()

    def now(self) -> datetime:
        """Time on the server, whole seconds of error at most."""
        if not self._heard_at:
            return datetime.now(UTC)
        return datetime.fromtimestamp(time.monotonic() + self._offset_seconds, UTC)

    def seconds_since(self, timestamp: str) -> float:
        """Seconds from an object's timestamp (RFC 3339) until now, never negative."""
        return max(0.0, (self.now() - parse_time(timestamp)).total_seconds())


def parse_time(timestamp: str) -> datetime:
    """A timestamp of Kubernetes."""
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00"))


class ClusterApi:
    """One API server, one namespace. Use it as an asynchronous context manager, in one loop.

    All methods raise ``ClusterError`` for what may pass (after a few tries), ``AccessError`` for
    what the account may not do, ``ConfigError`` for what the server finds wrong.
    """

    def __init__(self, open_client: OpenClient, namespace: str) -> None:
        """``open_client`` gives a client of ``kubernetes_asyncio``, logged in."""
        self.namespace = namespace
        self.clock = ServerClock()
        self._open_client = open_client
        self._log_ins: list[AsyncExitStack] = []
        self._client: Any = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Log in."""
        await self._log_in(None)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all connections."""
        for stack in self._log_ins:
            await stack.aclose()

    async def list_objects(self, collection: str, **query: str) -> Object:
        """A list, with its resource version."""
        return await self._json("GET", collection, query)

    async def read(self, collection: str, name: str) -> Object:
        """One object. Raises ``NotFoundError``."""
        return await self._json("GET", f"{collection}/{quote(name)}")

    async def create(self, collection: str, manifest: Mapping[str, Any]) -> Object:
        """Create an object. Raises ``ConflictError`` when its name is taken."""
        return await self._json("POST", collection, body=manifest)

    async def patch(self, collection: str, name: str, change: Mapping[str, Any]) -> Object:
        """Merge ``change`` into an object; with a resource version in it only if that still holds.

        Raises ``NotFoundError``, ``ConflictError``.
        """
        path = f"{collection}/{quote(name)}"
        return await self._json("PATCH", path, body=change, content_type=_MERGE_PATCH)

    async def delete(self, collection: str, known: Mapping[str, Any]) -> None:
        """Delete the object that was read as ``known``, and nothing that took its place since.

        Raises ``NotFoundError``, ``ConflictError``.
        """
        metadata = known["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
        }
        await self._json("DELETE", f"{collection}/{quote(metadata['name'])}", body=body)

    async def text(self, path: str, **query: str) -> str:
        """A text answer, such as a log. Raises ``NotFoundError``."""
        return (await self._ask("GET", path, query)).decode(errors="replace")

    async def watch(
        self, collection: str, resource_version: str, **query: str
    ) -> AsyncIterator[tuple[str, Object]]:
        """Events since ``resource_version``: (type, object); ends when the server ends it.

        The first is of type ``OPEN``: the server has taken the watch on.

        Raises ``GoneError`` when the version is too old, ``ClusterError`` when the line broke.
        """
        asked = {
            **query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
            "resourceVersion": resource_version,
        }
        used = self._client
        try:
            answer = await self._send("GET", collection, asked, seconds=_WATCH_SILENCE_SECONDS)
        except UnauthorizedError as error:
            await self._log_in(used)
            raise ClusterError(f"{error}. Logged in again.") from error
        try:
            yield "OPEN", {}
            async for line in answer.content:
                yield _event_of(line)
        except _network_errors() as error:
            raise ClusterError(f"The watch of {collection} broke: {_named(error)}.") from error
        finally:
            answer.close()

    async def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        content = await self._ask(method, path, query or {}, body, content_type)
        document: Object = json.loads(content)
        return document

    async def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        """Send until it is answered, a few times; creating twice ends in a conflict."""
        for number in range(1, _TRIES + 1):
            used = self._client
            try:
                answer = await self._send(method, path, query, body, content_type)
                return bytes(await answer.read())
            except UnauthorizedError as error:
                # Tokens expire; a new log-in reads the present one.
                if number > 1:
                    raise AccessError(str(error)) from error
                await self._log_in(used)
            except _passing_errors() as error:
                if number == _TRIES:
                    raise _as_cluster_error(error, method, path) from error
                await asyncio.sleep(_delay(error, number))
        raise AssertionError("unreachable")

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        seconds: float = REQUEST_SECONDS,
    ) -> Any:
        """The raw answer; raises for every status that is no success."""
        import aiohttp

        try:
            answer = await self._client.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": "application/json, */*", "Content-Type": content_type},
                body=dict(body) if body is not None else None,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=aiohttp.ClientTimeout(sock_connect=10.0, sock_read=seconds),
            )
        except _network_errors() as error:
            raise _as_cluster_error(error, method, path) from error
        self.clock.hear(answer.headers.get("Date"))
        if answer.status >= 300:
            raise _error_of(method, path, answer.status, answer.headers, await answer.read())
        return answer

    async def _log_in(self, used: Any) -> None:
        """Log in anew, unless another request has done so since ``used`` was refused.

        The log-in before stays open for what is still under way.
        """
        async with self._turn:
            if self._client is not used:
                return
            stack = AsyncExitStack()
            self._client = await stack.enter_async_context(self._open_client())
            self._log_ins.append(stack)
            while len(self._log_ins) > _KEPT_LOG_INS:
                await self._log_ins.pop(0).aclose()


class _BusyError(ClusterError):
    """The server asked to wait."""

    def __init__(self, message: str, wait_seconds: float) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


def _event_of(line: bytes) -> tuple[str, Object]:
    try:
        event = json.loads(line)
    except ValueError as error:
        raise ClusterError("A watch broke in the middle of a line.") from error
    if event["type"] != "ERROR":
        return event["type"], event["object"]
    status = event["object"]
    message = str(status.get("message", "no reason given"))
    if status.get("code") == 410:
        raise GoneError(message)
    raise ClusterError(f"The watch ended with an error: {message}.")


def _network_errors() -> tuple[type[BaseException], ...]:
    import aiohttp

    return (aiohttp.ClientError, asyncio.TimeoutError, OSError)


def _passing_errors() -> tuple[type[BaseException], ...]:
    return (ClusterError, *_network_errors())


def _as_cluster_error(error: BaseException, method: str, path: str) -> ClusterError:
    if isinstance(error, ClusterError):
        return error
    return ClusterError(f"Kubernetes did not answer {method} {path}: {_named(error)}.")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip()


def _delay(error: BaseException, number: int) -> float:
    if isinstance(error, _BusyError) and error.wait_seconds:
        return min(error.wait_seconds, _MAX_DELAY_SECONDS)
    return _FIRST_DELAY_SECONDS * float(2 ** (number - 1)) * random.uniform(0.5, 1.0)


def _error_of(
    method: str, path: str, status: int, headers: Mapping[str, str], content: bytes
) -> HCodecError:
    """The error for an answer that is no success, in the server's own words."""
    message = _message_of(content)
    what = f"Kubernetes answered {status} to {method} {path}: {message}"
    known: dict[int, type[HCodecError]] = {
        401: UnauthorizedError,
        404: NotFoundError,
        409: ConflictError,
        410: GoneError,
        400: ConfigError,
        405: ConfigError,
        415: ConfigError,
        422: ConfigError,
    }
    if status in known:
        return known[status](what)
    if status == 403 and "exceeded quota" in message:
        # A namespace's quota of Jobs: room may be made.
        return ClusterError(what)
    if status == 403:
        return AccessError(
            f"{what}. Give the account that verb (see docs/kubernetes.md), or test the connection."
        )
    return _BusyError(what, _wait_of(headers))


def _wait_of(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def _message_of(content: bytes) -> str:
    try:
        return str(json.loads(content).get("message", "")).rstrip(".")
    except (ValueError, AttributeError):
        return content[:200].decode(errors="replace")
