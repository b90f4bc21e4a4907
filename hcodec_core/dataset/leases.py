"""Leases on work, kept in object storage: who works on what, and what happens when one dies.

A lease has a prefix; its attempts are numbered 1, 2, ... without gaps. Beside each other lie

    <prefix>/<k>.json             ``Claim``: attempt k and who makes it; created, never changed
    <prefix>/<k>.heartbeat.json   ``Heartbeat``: a sequence number that only progress advances
    <prefix>/<k>.released.json    ``Ending``: asked to stop, or evicted; does not count
    <prefix>/<k>.failed.json      ``Ending``: an error; counts, unless it was released as well

Attempt k is the valid one until k+1 is claimed. Anyone may claim k+1 at once when k has ended, and
otherwise when its sequence number stood still for ``lease_seconds`` on the *claimant's own*
monotonic clock: clocks of two machines are never compared. A holder that was paused and wakes up
finds k+1 and must write nothing. That check and the write are two steps, so the last word has the
conditional write of the result itself; a lease saves work, it does not guard data.

Attempts that ended as released do not count against the limit of attempts; those that failed, or
stood still until they were taken over, do.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.errors import HCodecError, LeaseLostError, ObjectMissingError, StorageError
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 2.0

Clock = Callable[[], float]
"""Seconds on a clock that never goes back; ``time.monotonic`` but in tests."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1


class Claim(_Document):
    """Who makes an attempt. ``nonce`` makes the body unique; times are for people only."""

    attempt: int
    worker_id: str
    nonce: str
    claimed_at: str = ""
    is_counted: bool = True


class Heartbeat(_Document):
    """How far an attempt is; equal numbers mean that nothing happened in between."""

    sequence: int
    nonce: str


class EndingKind(StrEnum):
    """Why an attempt ended before its work was done."""

    RELEASED = "released"  # preempted, evicted, stopped: not the work's fault, not counted
    FAILED = "failed"  # an error: counted


class Ending(_Document):
    """The end of an attempt that did not finish its work; ``detail`` is for people."""

    kind: EndingKind
    detail: str = ""
    worker_id: str = ""


@dataclass(frozen=True)
class Attempt:
    """One attempt as an observer sees it; ``ending`` is None while it may be alive."""

    claim: Claim
    ending: Ending | None
    is_latest: bool

    @property
    def is_counted(self) -> bool:
        """Whether it used up one of the attempts that the work has."""
        if not self.claim.is_counted:
            return False
        if self.ending is not None:
            return self.ending.kind is EndingKind.FAILED
        return not self.is_latest  # taken over after standing still


def worker_identity(hint: str | None = None) -> str:
    """Unique name of this process, safe in an object name.

    ``hint``: the pod's UID where there is one, else host, process id and process start stand for
    it. A fresh nonce is added: a pod whose container restarts is another worker.
    """
    where = hint or f"{socket.gethostname()}-{os.getpid()}-{_process_start()}"
    return f"{_safe(where)}-{uuid.uuid4().hex[:8]}"


def is_worker_of(worker_id: str, hint: str) -> bool:
    """Whether ``worker_identity(hint)`` made this name, in whatever start of the process."""
    return worker_id.rpartition("-")[0] == _safe(hint)


def _safe(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in name)


def is_running_here(worker_id: str) -> bool:
    """Whether ``worker_identity()`` of a process that runs on this host made this name."""
    process = _process_here(worker_id)
    return process is not None and _stat_of(process[0])[1] == process[1]


def is_gone(worker_id: str) -> bool:
    """Whether ``worker_identity()`` of a process that has ended on this host made this name.

    False where that cannot be told: another host, a hint, a platform without ``/proc``.
    """
    process = _process_here(worker_id)
    if process is None or not Path("/proc/self/stat").exists():
        return False
    state, start = _stat_of(process[0])
    return start != process[1] or state in {"Z", "X"}  # ended, but its parent has not looked


def _process_here(worker_id: str) -> tuple[str, str] | None:
    """Process id and start in a name of this host."""
    parts = worker_id.rsplit("-", 3)  # host, process id, start, nonce
    is_ours = len(parts) == 4 and parts[0] == _safe(socket.gethostname())
    if not is_ours or not (parts[1] + parts[2]).isdigit():
        return None
    return parts[1], parts[2]


def _process_start() -> str:
    return _stat_of("self")[1] or str(int(time.time()))


def _stat_of(process: str) -> tuple[str, str]:
    """State and start of a process; empty where there is none."""
    try:
        # Fields count from after the command name, which may itself hold spaces.
        fields = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


@dataclass(frozen=True)
class LeaseTerms:
    """How leases are kept.

    lease_seconds: how long a sequence number must stand still before others take over.
    heartbeat_seconds: how often progress is written out, at most.
    """

    lease_seconds: float
    heartbeat_seconds: float = 5.0

    @property
    def interval_seconds(self) -> float:
        """Time between two heartbeats: several fit into the time that makes a lease expire."""
        return min(self.heartbeat_seconds, self.lease_seconds / 6)


class Lease:
    """One attempt that this process holds. Use it as a context manager; it ends with its block.

    A thread writes the sequence number out when it has moved, and looks whether another worker has
    taken over; it never moves the number by itself.
    """

    def __init__(self, storage: Storage, prefix_uri: str, claim: Claim, terms: LeaseTerms) -> None:
        """Start heartbeats for a claim that has been made."""
        self.prefix_uri = prefix_uri
        self.claim = claim
        self._storage = storage
        self._terms = terms
        self._sequence = 0
        self._written = 0
        self._is_lost = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self.claim.attempt

    def progress(self) -> None:
        """Report that work got done; only this keeps the lease alive. Cheap; any thread."""
        self._sequence += 1  # an increment lost between threads does no harm

    def check(self) -> None:
        """Raise ``LeaseLostError`` when the attempt has ended, or was seen to be taken over."""
        if self._is_lost:
            raise self._lost()

    def is_still_ours(self) -> bool:
        """Ask storage whether nobody has taken over; ``StorageError`` when it cannot tell."""
        following = _claim_uri(self.prefix_uri, self.attempt + 1)
        if not self._is_lost and self._storage.head(following) is not None:
            self._is_lost = True
        return not self._is_lost

    def require(self) -> None:
        """Ask storage, and raise ``LeaseLostError`` when another worker has taken over."""
        if not self.is_still_ours():
            raise self._lost()

    def release(self, detail: str = "") -> None:
        """End the attempt uncounted: the next may begin at once."""
        self._end(EndingKind.RELEASED, detail)

    def fail(self, detail: str) -> None:
        """End the attempt as failed: it counts, and the next may begin at once."""
        self._end(EndingKind.FAILED, detail)

    def close(self) -> None:
        """Stop heartbeats. Without an ending before it, the lease expires in its time."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            # A beat that is stuck in a slow request may come later: it harms nothing.
            self._thread.join(timeout=_JOIN_SECONDS)

    def __enter__(self) -> Self:
        """The lease itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop heartbeats."""
        self.close()

    def _end(self, kind: EndingKind, detail: str) -> None:
        self._stopped.set()
        # Whatever still runs for this attempt must not write results any more.
        self._is_lost = True
        end_attempt(
            self._storage,
            self.prefix_uri,
            self.attempt,
            Ending(kind=kind, detail=detail[:2000], worker_id=self.claim.worker_id),
        )

    def _lost(self) -> LeaseLostError:
        return LeaseLostError(
            f"Attempt {self.attempt} of {self.prefix_uri} has ended or was taken over by another "
            "worker: its results are dropped here."
        )

    def _beat(self) -> None:
        while not self._stopped.wait(self._terms.interval_seconds):
            try:
                self._write_heartbeat()
                if not self.is_still_ours():
                    return
            except HCodecError as error:
                # The next beat tries again; if storage stays away, the lease expires as it should.
                logger.warning("Heartbeat of %s was not written: %s", self.prefix_uri, error)

    def _write_heartbeat(self) -> None:
        sequence = self._sequence
        if sequence == self._written:
            return
        beat = Heartbeat(sequence=sequence, nonce=self.claim.nonce)
        _write_sequence(self._storage, self.prefix_uri, self.attempt, beat)
        self._written = sequence


class LeaseTable:
    """What one process knows of leases, and how it gets them. For use by one thread.

    It remembers for each prefix since when, on its own clock, the sequence number has stood still.
    """

    def __init__(
        self,
        storage: Storage,
        worker_id: str,
        terms: LeaseTerms,
        clock: Clock = time.monotonic,
    ) -> None:
        """Keep the parts; nothing is read yet."""
        self._storage = storage
        self._worker_id = worker_id
        self._terms = terms
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def try_claim(self, prefix_uri: str, max_attempts: int | None = None) -> Lease | None:
        """Claim the next attempt, or None when another worker holds the lease or was faster.

        When ``max_attempts`` counted ones have been made, the new claim is not counted: it is not
        for doing the work but for writing that it failed. Only one worker at a time gets that far.

        Raises ``StorageError`` and ``AccessError`` as storage does.
        """
        seen = self._seen.get(prefix_uri)
        # The common case is a lease that nobody has asked for: one request, no look before.
        if seen is not None and not self._may_follow(prefix_uri, seen):
            return None
        attempt = 1 if seen is None else self._seen[prefix_uri].attempt + 1
        claim = Claim(
            attempt=attempt,
            worker_id=self._worker_id,
            nonce=uuid.uuid4().hex,
            claimed_at=datetime.now(UTC).isoformat(timespec="seconds"),
            is_counted=not self._is_used_up(prefix_uri, attempt, max_attempts),
        )
        body = claim.model_dump_json().encode()
        is_won = self._storage.create(_claim_uri(prefix_uri, attempt), body)
        self._seen[prefix_uri] = _Seen(attempt, 0, self._clock())
        return Lease(self._storage, prefix_uri, claim, self._terms) if is_won else None

    def _is_used_up(self, prefix_uri: str, attempt: int, max_attempts: int | None) -> bool:
        if max_attempts is None or attempt <= max_attempts:
            return False
        before = read_attempts(self._storage, prefix_uri)
        # The last one is about to be taken over, so it counts unless it was released.
        counted = sum(replace(made, is_latest=False).is_counted for made in before)
        return counted >= max_attempts

    def _may_follow(self, prefix_uri: str, seen: _Seen) -> bool:
        try:
            return self._observe(prefix_uri, seen)
        except StorageError:
            # While storage is away no heartbeat can be written: a still number means nothing.
            self._seen[prefix_uri] = _Seen(seen.attempt, seen.sequence, self._clock())
            raise

    def _observe(self, prefix_uri: str, seen: _Seen) -> bool:
        latest = _latest_attempt(self._storage, prefix_uri, seen.attempt)
        if read_ending(self._storage, prefix_uri, latest) is not None:
            self._seen[prefix_uri] = _Seen(latest, -1, self._clock())
            return True
        sequence = read_sequence(self._storage, prefix_uri, latest)
        now = self._clock()
        if (latest, sequence) != (seen.attempt, seen.sequence):
            self._seen[prefix_uri] = _Seen(latest, sequence, now)
            return False
        return now - seen.since >= self._terms.lease_seconds


@dataclass(frozen=True)
class _Seen:
    attempt: int
    sequence: int
    since: float = field(compare=False)


def read_attempts(storage: Storage, prefix_uri: str) -> list[Attempt]:
    """All attempts at a lease, in order; empty when it was never claimed."""
    claims: list[Claim] = []
    while (claim := _read(storage, _claim_uri(prefix_uri, len(claims) + 1), Claim)) is not None:
        claims.append(claim)
    return [
        Attempt(claim, read_ending(storage, prefix_uri, claim.attempt), claim is claims[-1])
        for claim in claims
    ]


def latest_attempt(storage: Storage, prefix_uri: str) -> Attempt | None:
    """The last attempt at a lease, None when it was never claimed; few requests at any age."""
    if storage.head(_claim_uri(prefix_uri, 1)) is None:
        return None
    number = _latest_attempt(storage, prefix_uri, 1)
    claim = _read(storage, _claim_uri(prefix_uri, number), Claim)
    assert claim is not None, "claims are never deleted"
    return Attempt(claim, read_ending(storage, prefix_uri, number), is_latest=True)


def advance_heartbeat(storage: Storage, prefix_uri: str, attempt: int, nonce: str) -> None:
    """Report progress of an attempt whose holder is several processes, each of which calls this."""
    sequence = read_sequence(storage, prefix_uri, attempt) + 1
    _write_sequence(storage, prefix_uri, attempt, Heartbeat(sequence=sequence, nonce=nonce))


def attempts_counted(storage: Storage, prefix_uri: str) -> int:
    """How many attempts at a lease failed, or stood still until they were taken over."""
    return sum(attempt.is_counted for attempt in read_attempts(storage, prefix_uri))


def end_attempt(storage: Storage, prefix_uri: str, attempt: int, ending: Ending) -> None:
    """Write that an attempt ended.

    Its holder calls this, or whoever knows better: an operator that sees a pod evicted releases the
    attempt for it, also after it was taken over.
    """
    uri = _ending_uri(prefix_uri, attempt, ending.kind)
    storage.create(uri, ending.model_dump_json().encode())


def read_ending(storage: Storage, prefix_uri: str, attempt: int) -> Ending | None:
    """How an attempt ended, or None while it has not. Released goes before failed."""
    for kind in EndingKind:
        ending = _read(storage, _ending_uri(prefix_uri, attempt, kind), Ending)
        if ending is not None:
            return ending
    return None


def _latest_attempt(storage: Storage, prefix_uri: str, known: int) -> int:
    """Number of the last attempt, given one that exists; few requests also for a long history."""

    def exists(attempt: int) -> bool:
        return storage.head(_claim_uri(prefix_uri, attempt)) is not None

    step = 1
    while exists(known + step):
        known += step
        step *= 2
    beyond = known + step
    while beyond - known > 1:
        middle = (known + beyond) // 2
        known, beyond = (middle, beyond) if exists(middle) else (known, middle)
    return known


def read_sequence(storage: Storage, prefix_uri: str, attempt: int) -> int:
    """How far an attempt is; 0 before its first heartbeat."""
    beat = _read(storage, _heartbeat_uri(prefix_uri, attempt), Heartbeat)
    return 0 if beat is None else beat.sequence


def _write_sequence(storage: Storage, prefix_uri: str, attempt: int, beat: Heartbeat) -> None:
    storage.write(_heartbeat_uri(prefix_uri, attempt), beat.model_dump_json().encode())


_DocumentT = TypeVar("_DocumentT", bound=_Document)


def _read(storage: Storage, uri: str, kind: type[_DocumentT]) -> _DocumentT | None:
    try:
        return kind.model_validate_json(storage.read(uri))
    except ObjectMissingError:
        return None
    except ValidationError as error:
        raise StorageError(f"{uri} is damaged: remove it, or start a new plan.") from error


def _claim_uri(prefix_uri: str, attempt: int) -> str:
    return join_uri(prefix_uri, f"{attempt}.json")


def _heartbeat_uri(prefix_uri: str, attempt: int) -> str:
    return join_uri(prefix_uri, f"{attempt}.heartbeat.json")


def _ending_uri(prefix_uri: str, attempt: int, kind: EndingKind) -> str:
    return join_uri(prefix_uri, f"{attempt}.{kind}.json")
