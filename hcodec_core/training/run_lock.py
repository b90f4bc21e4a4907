"""Keeps two starts apart that were pointed at one run folder.

A lease of the first rank's process, under ``lock`` in the run's folder. Its sequence number moves
as long as the process lives, not only while training gets on: a process that hangs may wake up and
write, so it keeps others away. One that was killed on this host is known to be gone at once; any
other is believed dead when its number has stood still for ``TERMS.lease_seconds``.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from hcodec_core.dataset.leases import (
    Attempt,
    Clock,
    Ending,
    EndingKind,
    Lease,
    LeaseTable,
    LeaseTerms,
    end_attempt,
    is_gone,
    is_running_here,
    latest_attempt,
    read_sequence,
)
from hcodec_core.errors import HCodecError, LeaseLostError
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)

FOLDER = "lock"
TERMS = LeaseTerms(lease_seconds=90.0)
_POLL_SECONDS = 1.0


class RunLock:
    """A run folder that this process holds; a context manager that gives it back."""

    def __init__(self, lease: Lease, run_uri: str, terms: LeaseTerms) -> None:
        """Begin to show that this process lives."""
        self._lease, self._run_uri = lease, run_uri
        self._stopped = threading.Event()
        self._interval_seconds = terms.interval_seconds / 2
        self._thread = threading.Thread(target=self._live, name="run-lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise ``LeaseLostError`` when another process took the run over meanwhile."""
        if not self._lease.is_still_ours():
            raise LeaseLostError(
                f"Another process took over the run {self._run_uri} while this one stood still: "
                "this one stops, and what the other one writes counts."
            )

    def __enter__(self) -> Self:
        """The lock itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the folder back: the next process may begin at once."""
        self._stopped.set()
        try:
            self._lease.release()
        except HCodecError as failure:
            logger.warning("The run's lock was not given back, it will lapse: %s", failure)
        self._lease.close()

    def _live(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            self._lease.progress()


def take_run(
    storage: Storage,
    run_uri: str,
    worker_id: str,
    terms: LeaseTerms = TERMS,
    clock: Clock = time.monotonic,
) -> RunLock:
    """Take a run's folder; waits while it is not known whether its holder lives.

    Raises ``LeaseLostError`` naming the holder when it does, and what the storage raises.
    """
    prefix_uri = join_uri(run_uri, FOLDER)
    leases = LeaseTable(storage, worker_id, terms, clock)
    watched: tuple[int, int] | None = None
    while True:
        # The first look at a folder that had holders before only learns about the last of them.
        lease = leases.try_claim(prefix_uri) or leases.try_claim(prefix_uri)
        if lease is not None:
            return RunLock(lease, run_uri, terms)
        holder = latest_attempt(storage, prefix_uri)
        if holder is None or holder.ending is not None:
            continue
        if is_gone(holder.claim.worker_id):
            _end(storage, prefix_uri, holder)
            continue
        number = holder.claim.attempt
        seen = (number, read_sequence(storage, prefix_uri, number))
        if is_running_here(holder.claim.worker_id) or watched not in {None, seen}:
            raise _busy(run_uri, holder)
        if watched is None:
            logger.info(
                "Run %s is held by %s: looking for up to %.0f s whether it lives.",
                run_uri,
                holder.claim.worker_id,
                terms.lease_seconds,
            )
        watched = seen
        time.sleep(min(_POLL_SECONDS, terms.interval_seconds))


def _end(storage: Storage, prefix_uri: str, holder: Attempt) -> None:
    logger.info("%s, which held the run, does not live any more.", holder.claim.worker_id)
    ending = Ending(
        kind=EndingKind.RELEASED, detail="its process is gone", worker_id=holder.claim.worker_id
    )
    end_attempt(storage, prefix_uri, holder.claim.attempt, ending)


def _busy(run_uri: str, holder: Attempt) -> LeaseLostError:
    claim = holder.claim
    return LeaseLostError(
        f"The run {run_uri} is being trained by process {claim.worker_id} since "
        f"{claim.claimed_at}: stop that one first, or name another folder with --out."
    )
