"""What the API server holds of one job, kept up to date by list and watch in an event loop.

Lists once, then watches from the list's resource version; an expired version (410) or a broken line
leads back to where it was left, at worst to a new list. While the server is away the view keeps
what it saw last, and says how old that is.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass, field

from hcodec_airflow.kubernetes.client import ClusterApi, GoneError
from hcodec_airflow.kubernetes.profiles import Object
from hcodec_core.errors import ClusterError

logger = logging.getLogger(__name__)

_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 10.0
_REMARK_SECONDS = 60.0


@dataclass
class Collection:
    """The objects of one list.

    ``objects`` by UID is replaced, never changed, so that any thread may look at it.
    """

    path: str
    selector: str
    objects: dict[str, Object] = field(default_factory=dict)
    resource_version: str = ""
    is_listed: bool = False
    heard_at: float = field(default_factory=time.monotonic)
    next_remark: float = 0.0

    def put(self, document: Object) -> None:
        """Take an object in, in place of an older state of it."""
        uid = document["metadata"]["uid"]
        self.objects = {**self.objects, uid: document}
        self._heard(document)

    def drop(self, document: Object) -> None:
        """Forget an object that was deleted."""
        uid = document["metadata"]["uid"]
        self.objects = {key: value for key, value in self.objects.items() if key != uid}
        self._heard(document)

    def replace(self, listed: Object) -> None:
        """Take a whole list in."""
        items = listed.get("items") or []
        self.objects = {item["metadata"]["uid"]: item for item in items}
        self.is_listed = True
        self._heard(listed)

    def bookmark(self, document: Object) -> None:
        """Note how far the server has told everything."""
        self._heard(document)

    def _heard(self, document: Object) -> None:
        self.resource_version = document["metadata"].get("resourceVersion", "")
        self.heard_at = time.monotonic()


class JobView:
    """Workloads and pods of one job. ``follow`` runs in an event loop; the rest in any thread."""

    def __init__(self, api: ClusterApi, workloads: Collection, pods: Collection) -> None:
        """Nothing is asked yet."""
        self._api = api
        self.workloads = workloads
        self.pods = pods
        self._ready = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether both lists have been read at least once."""
        return self.workloads.is_listed and self.pods.is_listed

    @property
    def silent_seconds(self) -> float:
        """How long ago the server was heard last, of the list that is further behind."""
        return time.monotonic() - min(self.workloads.heard_at, self.pods.heard_at)

    async def wait_until_ready(self, seconds: float, follower: asyncio.Task[None]) -> None:
        """Wait until both lists were read, ``follower`` has ended, or so long."""
        ready = asyncio.ensure_future(self._ready.wait())
        await asyncio.wait({ready, follower}, timeout=seconds, return_when="FIRST_COMPLETED")
        ready.cancel()

    async def follow(self) -> None:
        """Keep both lists up to date until cancelled.

        Raises ``AccessError`` or ``ConfigError`` when asking on is of no use.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(self.workloads))
            group.create_task(self._follow(self.pods))

    async def refresh(self) -> None:
        """Read both lists now: what they hold afterwards is not older than this call."""
        for collection in (self.workloads, self.pods):
            await self._list(collection)

    async def _follow(self, collection: Collection) -> None:
        delay = _FIRST_DELAY_SECONDS
        while True:
            try:
                if not collection.resource_version:
                    await self._list(collection)
                await self._watch(collection)
                delay = _FIRST_DELAY_SECONDS
            except GoneError:
                collection.resource_version = ""
            except ClusterError as error:
                _remark(collection, error)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, _MAX_DELAY_SECONDS)

    async def _list(self, collection: Collection) -> None:
        # Without a resource version the server answers with its newest state.
        query = {"labelSelector": collection.selector}
        collection.replace(await self._api.list_objects(collection.path, **query))
        if self.is_ready:
            self._ready.set()

    async def _watch(self, collection: Collection) -> None:
        version = collection.resource_version
        query = {"labelSelector": collection.selector}
        async for kind, document in self._api.watch(collection.path, version, **query):
            if kind == "OPEN":
                collection.heard_at = time.monotonic()
            elif kind == "DELETED":
                collection.drop(document)
            elif kind == "BOOKMARK":
                collection.bookmark(document)
            else:
                collection.put(document)


def _remark(collection: Collection, error: ClusterError) -> None:
    now = time.monotonic()
    if now >= collection.next_remark:
        collection.next_remark = now + _REMARK_SECONDS
        age = now - collection.heard_at
        logger.warning("%s Last heard %.0f s ago; workers go on; asking again.", error, age)
