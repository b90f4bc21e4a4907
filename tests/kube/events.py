"""Events: what controllers say about an object, counted instead of repeated."""

from __future__ import annotations

import uuid

from tests.kube import kinds
from tests.kube.errors import Object
from tests.kube.store import Store


class Recorder:
    """Writes core/v1 Events; the same words about the same object raise its ``count``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def say(self, item: Object, type_: str, reason: str, message: str, source: str) -> None:
        metadata = item["metadata"]
        namespace = metadata.get("namespace", "default")
        now = self._store.clock.timestamp()
        with self._store.lock:
            known = self._known(metadata["uid"], namespace, reason, message)
            if known is not None:
                name = known["metadata"]["name"]
                self._store.update(kinds.EVENT, namespace, name, lambda e: _count(e, now))
                return
            event = {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}"},
                "involvedObject": {
                    "kind": item["kind"],
                    "apiVersion": item["apiVersion"],
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                    "resourceVersion": metadata["resourceVersion"],
                    "namespace": metadata.get("namespace"),
                },
                "type": type_,
                "reason": reason,
                "message": message,
                "source": {"component": source},
                "reportingComponent": source,
                "reportingInstance": "",
                "firstTimestamp": now,
                "lastTimestamp": now,
                "eventTime": None,
                "count": 1,
            }
            self._store.create(kinds.EVENT, namespace, event)

    def _known(self, uid: str, namespace: str, reason: str, message: str) -> Object | None:
        for event in self._store.list(kinds.EVENT, namespace):
            about = event["involvedObject"].get("uid"), event.get("reason"), event.get("message")
            if about == (uid, reason, message):
                return event
        return None


def _count(event: Object, now: str) -> None:
    event["count"] = event.get("count", 1) + 1
    event["lastTimestamp"] = now
