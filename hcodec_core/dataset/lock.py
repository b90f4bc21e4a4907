"""The dataset lock: one run at a time tokenises, maintains or rolls back a dataset.

A lease whose holder is a run of several processes: its attempt number is the lock's epoch, its
steps move the sequence number on. The lock keeps runs from wasting work on each other; that a
dataset stays right does not rest on it.
"""

from __future__ import annotations

import time

from pydantic import BaseModel, ConfigDict

from hcodec_core.config import Config
from hcodec_core.dataset.leases import (
    Clock,
    Ending,
    EndingKind,
    LeaseTable,
    LeaseTerms,
    advance_heartbeat,
    end_attempt,
    latest_attempt,
)
from hcodec_core.errors import LeaseLostError
from hcodec_core.storage import Storage, join_uri

DEFAULT_STILL_SECONDS = 1800.0


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetLock(_Document):
    """A lock that is held. Any process of the run may renew or release it."""

    prefix_uri: str
    dataset: str
    owner: str
    epoch: int
    nonce: str


class Waiting(_Document):
    """Who holds the lock instead, and since when (for people: by the holder's own clock)."""

    dataset: str
    owner: str
    since: str
    epoch: int


class LockSeeker:
    """Asks for a dataset's lock again and again; never blocks.

    ``owner`` names the run (``dag/run``): its own retry gets the lock that it holds already.
    ``still_seconds``: how long the holder's sequence number must stand still, on this object's own
    monotonic clock, before the lock is taken over; keep the object while polling.
    """

    def __init__(
        self,
        config: Config,
        storage: Storage,
        dataset: str,
        owner: str,
        still_seconds: float = DEFAULT_STILL_SECONDS,
        clock: Clock = time.monotonic,
    ) -> None:
        """Keep the parts; nothing is asked yet."""
        self._storage = storage
        self._dataset = dataset
        self._owner = owner
        self._prefix_uri = lock_uri(config, dataset)
        self._leases = LeaseTable(storage, owner, LeaseTerms(still_seconds), clock)

    def acquire(self) -> DatasetLock | Waiting:
        """Take the lock when it is free, released, or its holder stood still; else say who has it.

        Raises ``StorageError`` and ``AccessError`` as storage does.
        """
        latest = latest_attempt(self._storage, self._prefix_uri)
        if latest is not None and latest.ending is None and latest.claim.worker_id == self._owner:
            return self._lock(latest.claim.attempt, latest.claim.nonce)
        # The first look at a lock that had holders before only learns about the last of them.
        lease = self._leases.try_claim(self._prefix_uri)
        lease = lease or self._leases.try_claim(self._prefix_uri)
        if lease is not None:
            lease.close()  # the run's steps keep it alive, not this process
            return self._lock(lease.attempt, lease.claim.nonce)
        holder = lock_holder(self._storage, self._prefix_uri, self._dataset)
        return holder or Waiting(dataset=self._dataset, owner="", since="", epoch=0)

    def _lock(self, epoch: int, nonce: str) -> DatasetLock:
        return DatasetLock(
            prefix_uri=self._prefix_uri,
            dataset=self._dataset,
            owner=self._owner,
            epoch=epoch,
            nonce=nonce,
        )


def lock_uri(config: Config, dataset: str) -> str:
    """Folder of a dataset's lock."""
    return join_uri(config.work.work_uri, "locks", dataset)


def lock_holder(storage: Storage, prefix_uri: str, dataset: str) -> Waiting | None:
    """Who holds a lock now, or None when nobody does."""
    latest = latest_attempt(storage, prefix_uri)
    if latest is None or latest.ending is not None:
        return None
    claim = latest.claim
    return Waiting(
        dataset=dataset, owner=claim.worker_id, since=claim.claimed_at, epoch=claim.attempt
    )


def renew(storage: Storage, lock: DatasetLock) -> None:
    """Show that the run goes on. Each of its steps calls this, and long steps now and then.

    Raises ``LeaseLostError`` when the lock was released or taken over.
    """
    latest = latest_attempt(storage, lock.prefix_uri)
    if latest is None or latest.claim.nonce != lock.nonce or latest.ending is not None:
        holder = "nobody" if latest is None else latest.claim.worker_id
        raise LeaseLostError(
            f"The lock of dataset {lock.dataset} is not held by {lock.owner} any more (last taken "
            f"by {holder}): this run must stop; what it wrote is not lost."
        )
    advance_heartbeat(storage, lock.prefix_uri, lock.epoch, lock.nonce)


def release(storage: Storage, lock: DatasetLock, detail: str = "") -> None:
    """Give the lock back; again, or after it was taken over, does no harm."""
    ending = Ending(kind=EndingKind.RELEASED, detail=detail, worker_id=lock.owner)
    end_attempt(storage, lock.prefix_uri, lock.epoch, ending)
