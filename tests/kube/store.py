"""What etcd and the watch cache are to an API server: objects, versions, and their history.

Every change takes the next ``resourceVersion`` of one counter and is kept in a history, from which
watches are served until it is compacted. Whoever reads and then writes holds ``lock``.
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.kube.clock import Clock
from tests.kube.errors import Object, already_exists, not_found
from tests.kube.kinds import Kind

Key = tuple[str, str, str]  # resource, namespace ("" when the kind has none), name


@dataclass(frozen=True)
class Change:
    """One line of the history; ``previous`` tells a selector what left it."""

    version: int
    type: str
    key: Key
    object: Object
    previous: Object | None


class Store:
    """Objects by resource, namespace and name.

    A stored object is never edited, only replaced, so lists and the history share it: read only.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lock = threading.Condition(threading.RLock())
        self.version = 1
        self.oldest_version = 1
        self.history: list[Change] = []
        self._objects: dict[Key, Object] = {}

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """A copy; None when it is not there."""
        with self.lock:
            return copy.deepcopy(self._objects.get((kind.resource, namespace, name)))

    def list(self, kind: Kind, namespace: str = "") -> list[Object]:
        """In the order of their keys, as etcd lists them. Not copies: read only."""
        with self.lock:
            keys = sorted(
                key
                for key in self._objects
                if key[0] == kind.resource and (not namespace or key[1] == namespace)
            )
            return [self._objects[key] for key in keys]

    def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Store a new object with its uid, creation time and first version."""
        with self.lock:
            metadata = body["metadata"]
            key = (kind.resource, namespace, metadata["name"])
            if key in self._objects:
                raise already_exists(kind, metadata["name"])
            made = copy.deepcopy(body)
            made["metadata"].setdefault("uid", str(uuid.uuid4()))
            made["metadata"]["creationTimestamp"] = self.clock.timestamp()
            if kind.is_namespaced:
                made["metadata"]["namespace"] = namespace
            if "spec" in made and kind.plural not in _WITHOUT_GENERATION:
                made["metadata"]["generation"] = 1
            return self._record("ADDED", key, made, None)

    def update(
        self, kind: Kind, namespace: str, name: str, change: Callable[[Object], Any]
    ) -> Object:
        """Let ``change`` edit the object in place and store it, unless nothing became different.

        Removes it when its deletion was only waiting for this. Raises 404 when it is not there.
        """
        with self.lock:
            key = (kind.resource, namespace, name)
            before = self._objects.get(key)
            if before is None:
                raise not_found(kind, name)
            after = copy.deepcopy(before)
            change(after)
            if after == before:
                return copy.deepcopy(before)
            metadata = after["metadata"]
            if "generation" in metadata and after.get("spec") != before.get("spec"):
                metadata["generation"] += 1
            if is_ready_to_go(after):
                return self._record("DELETED", key, after, before)
            return self._record("MODIFIED", key, after, before)

    def remove(self, kind: Kind, namespace: str, name: str) -> Object:
        """Take the object out now, whatever its finalizers say."""
        with self.lock:
            key = (kind.resource, namespace, name)
            before = self._objects.get(key)
            if before is None:
                raise not_found(kind, name)
            return self._record("DELETED", key, copy.deepcopy(before), before)

    def compact(self) -> None:
        """Watches and continued lists that begin before now are answered with 410.

        Those that run already go on, as they do from a real server's watch cache.
        """
        with self.lock:
            self.version += 1
            self.oldest_version = self.version

    def changes_since(self, version: int) -> list[Change]:
        """The history after ``version``, oldest first."""
        with self.lock:
            found = []
            for change in reversed(self.history):
                if change.version <= version:
                    break
                found.append(change)
            return found[::-1]

    def _record(self, type_: str, key: Key, after: Object, before: Object | None) -> Object:
        self.version += 1
        after["metadata"]["resourceVersion"] = str(self.version)
        if type_ == "DELETED":
            self._objects.pop(key)
        else:
            self._objects[key] = after
        self.history.append(Change(self.version, type_, key, after, before))
        self.lock.notify_all()
        return copy.deepcopy(after)


_WITHOUT_GENERATION = frozenset({"pods", "namespaces", "nodes", "resourcequotas", "leases"})


def is_ready_to_go(item: Object) -> bool:
    """Deletion was asked for, nobody holds it up, and no grace period is left to a kubelet."""
    metadata = item["metadata"]
    return (
        "deletionTimestamp" in metadata
        and not metadata.get("finalizers")
        and not metadata.get("deletionGracePeriodSeconds")
    )
