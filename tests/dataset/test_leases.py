from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.dataset.leases import (
    Ending,
    EndingKind,
    Lease,
    LeaseTable,
    LeaseTerms,
    attempts_counted,
    end_attempt,
    read_attempts,
    worker_identity,
)
from hcodec_core.errors import LeaseLostError, StorageError
from hcodec_core.storage import Storage, file_uri, open_storage

TERMS = LeaseTerms(lease_seconds=60, heartbeat_seconds=0.05)


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["s3", "file"])
def prefix_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("bucket_uri") + "/leases/shard 1"
    return file_uri(tmp_path) + "/leases/shard 1"


def claim(table: LeaseTable, prefix_uri: str) -> Lease:
    lease = table.try_claim(prefix_uri)
    assert lease is not None
    return lease


def wait_until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def sequence_of(storage: Storage, prefix_uri: str, attempt: int) -> int:
    uri = f"{prefix_uri}/{attempt}.heartbeat.json"
    return json.loads(storage.read(uri))["sequence"] if storage.head(uri) else 0


def test_a_held_lease_is_not_given_twice(s3_storage: Storage, prefix_uri: str) -> None:
    clock = FakeClock()
    first = LeaseTable(s3_storage, "first", TERMS)
    second = LeaseTable(s3_storage, "second", TERMS, clock)
    with claim(first, prefix_uri) as lease:
        assert lease.attempt == 1
        assert second.try_claim(prefix_uri) is None
        clock.now += 59
        assert second.try_claim(prefix_uri) is None
        lease.require()
    (attempt,) = read_attempts(s3_storage, prefix_uri)
    assert (attempt.claim.worker_id, attempt.is_counted) == ("first", False)


def test_a_lease_that_stands_still_is_taken_over(s3_storage: Storage, prefix_uri: str) -> None:
    clock = FakeClock()
    second = LeaseTable(s3_storage, "second", TERMS, clock)
    with claim(LeaseTable(s3_storage, "first", TERMS), prefix_uri) as lease:
        assert second.try_claim(prefix_uri) is None
        clock.now += 60
        taken = claim(second, prefix_uri)
        with taken:
            assert taken.attempt == 2
            assert taken.is_still_ours()
            assert not lease.is_still_ours()
            with pytest.raises(LeaseLostError, match="taken over"):
                lease.require()
    assert attempts_counted(s3_storage, prefix_uri) == 1


def test_progress_keeps_a_lease(s3_storage: Storage, prefix_uri: str) -> None:
    clock = FakeClock()
    second = LeaseTable(s3_storage, "second", TERMS, clock)
    with claim(LeaseTable(s3_storage, "first", TERMS), prefix_uri) as lease:
        for step in range(1, 4):
            assert second.try_claim(prefix_uri) is None
            lease.progress()
            wait_until(lambda step=step: sequence_of(s3_storage, prefix_uri, 1) == step)
            clock.now += 59.9
        assert second.try_claim(prefix_uri) is None
        clock.now += 59.9
        assert second.try_claim(prefix_uri) is None
        clock.now += 0.1
        claim(second, prefix_uri).close()


def test_an_idle_thread_never_advances_the_sequence(s3_storage: Storage, prefix_uri: str) -> None:
    with claim(LeaseTable(s3_storage, "first", TERMS), prefix_uri) as lease:
        lease.progress()
        wait_until(lambda: sequence_of(s3_storage, prefix_uri, 1) == 1)
        written = s3_storage.head(f"{prefix_uri}/1.heartbeat.json")
        time.sleep(0.4)
        assert s3_storage.head(f"{prefix_uri}/1.heartbeat.json") == written


def test_the_time_before_the_first_look_does_not_count(
    s3_storage: Storage, prefix_uri: str
) -> None:
    claim(LeaseTable(s3_storage, "dead", TERMS), prefix_uri).close()
    clock = FakeClock()
    late = LeaseTable(s3_storage, "late", TERMS, clock)
    clock.now += 10_000
    assert late.try_claim(prefix_uri) is None
    clock.now += 59.9
    assert late.try_claim(prefix_uri) is None
    clock.now += 0.2
    claim(late, prefix_uri).close()


def test_a_released_lease_is_free_at_once_and_not_counted(
    s3_storage: Storage, prefix_uri: str
) -> None:
    second = LeaseTable(s3_storage, "second", TERMS, FakeClock())
    with claim(LeaseTable(s3_storage, "first", TERMS), prefix_uri) as lease:
        assert second.try_claim(prefix_uri) is None
        lease.release("SIGTERM")
    with claim(second, prefix_uri) as taken:
        assert taken.attempt == 2
    assert attempts_counted(s3_storage, prefix_uri) == 0
    ending = read_attempts(s3_storage, prefix_uri)[0].ending
    assert ending is not None
    assert (ending.kind, ending.detail) == (EndingKind.RELEASED, "SIGTERM")


def test_a_failed_attempt_counts_until_someone_knows_better(
    s3_storage: Storage, prefix_uri: str
) -> None:
    second = LeaseTable(s3_storage, "second", TERMS, FakeClock())
    with claim(LeaseTable(s3_storage, "first", TERMS), prefix_uri) as lease:
        assert second.try_claim(prefix_uri) is None
        lease.fail("CUDA error")
    claim(second, prefix_uri).close()
    assert attempts_counted(s3_storage, prefix_uri) == 1
    end_attempt(s3_storage, prefix_uri, 1, Ending(kind=EndingKind.RELEASED, detail="node lost"))
    assert attempts_counted(s3_storage, prefix_uri) == 0


def test_used_up_attempts_leave_only_the_books_to_close(
    s3_storage: Storage, prefix_uri: str
) -> None:
    clock = FakeClock()
    table = LeaseTable(s3_storage, "worker", TERMS, clock)

    def attempt(finish) -> bool:
        lease = table.try_claim(prefix_uri, max_attempts=2)
        assert lease is not None
        finish(lease)
        lease.close()
        return lease.claim.is_counted

    assert attempt(lambda lease: lease.fail("first"))
    assert attempt(lambda lease: lease.release("evicted"))
    assert attempt(lambda lease: None)
    table.try_claim(prefix_uri, max_attempts=2)
    clock.now += 60
    assert not attempt(lambda lease: lease.fail("died while closing"))
    assert not attempt(lambda lease: None)
    assert attempts_counted(s3_storage, prefix_uri) == 2


def test_a_storage_outage_does_not_expire_leases(
    fault_proxy, s3_storage: Storage, bucket_uri: str
) -> None:
    prefix_uri = bucket_uri + "/lease"
    clock = FakeClock()
    behind_proxy = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    observer = LeaseTable(behind_proxy, "observer", TERMS, clock)
    with claim(LeaseTable(s3_storage, "first", TERMS), prefix_uri):
        assert observer.try_claim(prefix_uri) is None
        clock.now += 59
        fault_proxy.rule = lambda *_: 501
        with pytest.raises(StorageError):
            observer.try_claim(prefix_uri)
        fault_proxy.rule = lambda *_: None
        clock.now += 59
        assert observer.try_claim(prefix_uri) is None
        clock.now += 1
        claim(observer, prefix_uri).close()


def test_heartbeats_survive_a_storage_fault(
    fault_proxy, s3_storage: Storage, bucket_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefix_uri = bucket_uri + "/lease"
    behind_proxy = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    with claim(LeaseTable(behind_proxy, "first", TERMS), prefix_uri) as lease:
        fault_proxy.rule = lambda *_: 501
        lease.progress()
        wait_until(lambda: "Heartbeat" in caplog.text)
        fault_proxy.rule = lambda *_: None
        wait_until(lambda: sequence_of(s3_storage, prefix_uri, 1) == 1)


def test_the_heartbeat_thread_notices_a_takeover(s3_storage: Storage, prefix_uri: str) -> None:
    clock = FakeClock()
    second = LeaseTable(s3_storage, "second", TERMS, clock)
    with claim(LeaseTable(s3_storage, "first", TERMS), prefix_uri) as lease:
        second.try_claim(prefix_uri)
        lease.check()
        clock.now += 60
        with claim(second, prefix_uri):

            def is_lost() -> bool:
                try:
                    lease.check()
                except LeaseLostError:
                    return True
                return False

            wait_until(is_lost)


def test_a_long_history_is_found_with_few_requests(
    fault_proxy, s3_storage: Storage, bucket_uri: str
) -> None:
    prefix_uri = bucket_uri + "/lock"
    table = LeaseTable(s3_storage, "holder", TERMS)
    for _ in range(60):
        with claim(table, prefix_uri) as lease:
            lease.release()
    newcomer = LeaseTable(
        open_storage(StorageConfig(endpoint_url=fault_proxy.url)), "newcomer", TERMS
    )
    assert newcomer.try_claim(prefix_uri) is None
    with claim(newcomer, prefix_uri) as lease:
        assert lease.attempt == 61
    assert len(fault_proxy.requests) < 25


def race(storage: Storage, folder_uri: str, name: str, num_leases: int) -> list[str]:
    table = LeaseTable(storage, name, TERMS)
    won = []
    for index in range(num_leases):
        lease = table.try_claim(f"{folder_uri}/{index}")
        if lease is not None:
            won.append(f"{index}:{lease.attempt}")
            lease.release()
            lease.close()
    # Everyone looks again: all are free now, and each next attempt has one winner, too.
    for index in range(num_leases):
        lease = table.try_claim(f"{folder_uri}/{index}")
        if lease is not None:
            won.append(f"{index}:{lease.attempt}")
            lease.close()
    return won


def test_many_threads_race(s3_storage: Storage, prefix_uri: str) -> None:
    barrier = threading.Barrier(8)

    def run(name: str) -> list[str]:
        barrier.wait()
        return race(s3_storage, prefix_uri, name, 6)

    with ThreadPoolExecutor(8) as pool:
        won = [claim for claims in pool.map(run, "abcdefgh") for claim in claims]
    assert len(won) == len(set(won)), "two workers hold one attempt"
    assert {f"{index}:1" for index in range(6)} <= set(won)
    for index in range(6):
        attempts = read_attempts(s3_storage, f"{prefix_uri}/{index}")
        assert len(attempts) == sum(w.startswith(f"{index}:") for w in won)


def run_racer(endpoint: str, folder_uri: str, name: str, gate, answers) -> None:
    storage = open_storage(StorageConfig(endpoint_url=endpoint))
    storage.head(folder_uri + "/warm-up")
    gate.wait()
    answers.put(race(storage, folder_uri, name, 10))


def test_processes_race(s3_endpoint: str, s3_storage: Storage, prefix_uri: str) -> None:
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(3), context.Queue()
    racers = [
        context.Process(target=run_racer, args=(s3_endpoint, prefix_uri, name, gate, answers))
        for name in "xyz"
    ]
    for racer in racers:
        racer.start()
    won = [claim for _ in racers for claim in answers.get(timeout=60)]
    for racer in racers:
        racer.join()
    assert len(won) == len(set(won)), "two processes hold one attempt"
    assert {f"{index}:1" for index in range(10)} <= set(won)


HOLDER = """
import sys, time
from hcodec_core.config import StorageConfig
from hcodec_core.dataset.leases import LeaseTable, LeaseTerms
from hcodec_core.storage import open_storage

storage = open_storage(StorageConfig(endpoint_url=sys.argv[1]))
table = LeaseTable(storage, "holder", LeaseTerms(1.0, 0.1))
lease = table.try_claim(sys.argv[2])
print("claimed", flush=True)
while lease.is_still_ours():
    lease.progress()
    time.sleep(0.05)
print("lost", flush=True)
"""


def test_a_paused_holder_wakes_without_its_lease(
    s3_endpoint: str, s3_storage: Storage, bucket_uri: str
) -> None:
    prefix_uri = bucket_uri + "/lease"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, s3_endpoint, prefix_uri], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        observer = LeaseTable(s3_storage, "observer", LeaseTerms(1.0, 0.1))
        end = time.monotonic() + 1.6
        while time.monotonic() < end:
            assert observer.try_claim(prefix_uri) is None
            time.sleep(0.1)
        os.kill(holder.pid, signal.SIGSTOP)
        taken: list[Lease] = []

        def take() -> bool:
            lease = observer.try_claim(prefix_uri)
            taken.extend([lease] if lease else [])
            return bool(taken)

        wait_until(take, 10)
        os.kill(holder.pid, signal.SIGCONT)
        assert holder.stdout.readline() == "lost\n"
        assert taken[0].is_still_ours()
        taken[0].close()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_identities_are_unique_and_safe() -> None:
    pod = "0a1b/../c d"
    names = {worker_identity(pod), worker_identity(pod), worker_identity(), worker_identity()}
    assert len(names) == 4
    assert all(set(name) <= set("-_.") or "/" not in name for name in names)
    assert sum(name.startswith("0a1b-..-c-d-") for name in names) == 2
