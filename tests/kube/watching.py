"""Watches: changes since a version, bookmarks, time-outs and 410."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.kube.errors import Object, bad_request, expired
from tests.kube.kinds import Kind
from tests.kube.logs import is_set
from tests.kube.selectors import Selector
from tests.kube.store import Change

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

_INITIAL_EVENTS_END = {"k8s.io/initial-events-end": "true"}


@dataclass(frozen=True)
class WatchQuery:
    """What a watch asked for."""

    kind: Kind
    namespace: str
    selector: Selector
    version: int | None  # None: begin with what is there
    timeout_seconds: float
    wants_bookmarks: bool
    wants_initial_events_end: bool
    opened: float = field(default_factory=time.monotonic)

    @classmethod
    def parse(cls, kind: Kind, namespace: str, name: str, query: dict[str, str]) -> WatchQuery:
        fields = query.get("fieldSelector", "")
        if name:
            fields = f"metadata.name={name}"
        version = query.get("resourceVersion") or "0"
        if not version.isdigit():
            raise bad_request(f'invalid resource version: "{version}"')
        wants_initial = is_set(query, "sendInitialEvents")
        wants_bookmarks = is_set(query, "allowWatchBookmarks")
        return cls(
            kind,
            namespace,
            Selector(kind.resource, query.get("labelSelector", ""), fields),
            None if version == "0" or wants_initial else int(version),
            float(query.get("timeoutSeconds") or 1800),
            wants_bookmarks,
            wants_initial and wants_bookmarks,
        )


def stream(api: KubeServer, query: WatchQuery) -> Iterator[Object | None]:
    """Events as JSON; None now and then, to look whether the client is still there."""
    store = api.store
    deadline = query.opened + query.timeout_seconds
    next_bookmark = query.opened + api.settings.bookmark_seconds
    version, first = _beginning(api, query)
    yield from first
    if version is None:
        return
    while time.monotonic() < deadline and not api.faults.is_watch_dropped(query.opened):
        before = version
        with store.lock:
            changes = store.changes_since(version)
            if not changes:
                store.lock.wait(min(0.25, max(0.0, deadline - time.monotonic())))
                changes = store.changes_since(version)
            version = changes[-1].version if changes else version
            current = store.version
        if api.is_stopped:
            return
        if api.faults.are_watches_frozen:
            version = before
            time.sleep(0.05)
            yield None
            continue
        yield from (event for change in changes if (event := _event(query, change)))
        if query.wants_bookmarks and time.monotonic() > next_bookmark:
            version = max(version, current)
            next_bookmark = time.monotonic() + api.settings.bookmark_seconds
            yield _bookmark(query.kind, version)
        yield None
    if query.wants_bookmarks and not api.faults.is_watch_dropped(query.opened):
        # The watch cache sends one shortly before a watch times out.
        yield _bookmark(query.kind, version)


def _beginning(api: KubeServer, query: WatchQuery) -> tuple[int | None, list[Object]]:
    """Where to go on from, and what to send first; version None ends the watch."""
    store = api.store
    with store.lock:
        if query.version is not None:
            if query.version < store.oldest_version or api.faults.takes_gone(query.kind):
                message = f"too old resource version: {query.version} ({store.oldest_version})"
                # A watch is answered 200 and then tells the error as an event.
                return None, [{"type": "ERROR", "object": expired(message).as_status()}]
            return query.version, []
        items = store.list(query.kind, query.namespace)
        first: list[Object] = [
            {"type": "ADDED", "object": item} for item in items if query.selector.matches(item)
        ]
        if query.wants_initial_events_end:
            first.append(_bookmark(query.kind, store.version, _INITIAL_EVENTS_END))
        return store.version, first


def _event(query: WatchQuery, change: Change) -> Object | None:
    """How a change looks through the watch's selector."""
    resource, namespace, _ = change.key
    if resource != query.kind.resource or query.namespace not in ("", namespace):
        return None
    matches = query.selector.matches(change.object)
    matched = change.previous is not None and query.selector.matches(change.previous)
    if change.type == "DELETED":
        return {"type": "DELETED", "object": change.object} if matched else None
    if matches and matched:
        return {"type": "MODIFIED", "object": change.object}
    if matches:
        return {"type": "ADDED", "object": change.object}
    return {"type": "DELETED", "object": change.object} if matched else None


def _bookmark(kind: Kind, version: int, annotations: Any = None) -> Object:
    metadata: Object = {"resourceVersion": str(version), "creationTimestamp": None}
    if annotations:
        metadata["annotations"] = annotations
    item = {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": metadata}
    return {"type": "BOOKMARK", "object": item}
