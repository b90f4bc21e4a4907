from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from hcodec_core.dataset.lock import (
    DatasetLock,
    LockSeeker,
    Waiting,
    lock_holder,
    lock_uri,
    release,
    renew,
)
from hcodec_core.errors import LeaseLostError
from tests.dataset.factories import World


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def seeker(world: World, owner: str, clock: FakeClock | None = None) -> LockSeeker:
    return LockSeeker(world.config, world.storage, "demo", owner, 60, clock or FakeClock())


def acquired(answer: DatasetLock | Waiting) -> DatasetLock:
    assert isinstance(answer, DatasetLock)
    return answer


def test_one_run_holds_the_lock_and_others_learn_who(world: World) -> None:
    lock = acquired(seeker(world, "dag/run1").acquire())
    assert lock.epoch == 1
    answer = seeker(world, "dag/run2").acquire()
    assert isinstance(answer, Waiting)
    assert (answer.owner, answer.epoch) == ("dag/run1", 1)
    assert answer.since.startswith("20")
    release(world.storage, lock)
    assert lock_holder(world.storage, lock_uri(world.config, "demo"), "demo") is None
    assert acquired(seeker(world, "dag/run2").acquire()).epoch == 2


def test_a_retry_of_the_same_run_keeps_its_lock(local_world: World) -> None:
    lock = acquired(seeker(local_world, "dag/run1").acquire())
    assert seeker(local_world, "dag/run1").acquire() == lock
    text = lock.model_dump(mode="json")
    renew(local_world.storage, DatasetLock.model_validate(text))
    release(local_world.storage, lock)
    assert acquired(seeker(local_world, "dag/run1").acquire()).epoch == 2


def test_only_a_holder_that_stood_still_is_replaced(world: World) -> None:
    lock = acquired(seeker(world, "old").acquire())
    clock = FakeClock()
    waiting = seeker(world, "new", clock)
    for _ in range(3):  # the holder goes on, however long it takes
        assert isinstance(waiting.acquire(), Waiting)
        clock.now += 59
        renew(world.storage, lock)
    assert isinstance(waiting.acquire(), Waiting)
    clock.now += 59
    assert isinstance(waiting.acquire(), Waiting)
    clock.now += 2
    taken = acquired(waiting.acquire())
    assert (taken.epoch, taken.owner) == (2, "new")
    with pytest.raises(LeaseLostError, match="last taken by new"):
        renew(world.storage, lock)
    release(world.storage, lock)
    renew(world.storage, taken)


def test_a_fresh_observer_must_watch_for_itself(local_world: World) -> None:
    acquired(seeker(local_world, "old").acquire())
    clock = FakeClock()
    clock.now = 1e9
    assert isinstance(seeker(local_world, "new", clock).acquire(), Waiting)


def test_a_released_lock_cannot_be_renewed(local_world: World) -> None:
    lock = acquired(seeker(local_world, "run").acquire())
    release(local_world.storage, lock)
    release(local_world.storage, lock)
    with pytest.raises(LeaseLostError):
        renew(local_world.storage, lock)


def test_locks_of_two_datasets_are_two(local_world: World) -> None:
    acquired(seeker(local_world, "run").acquire())
    other = LockSeeker(local_world.config, local_world.storage, "other", "run2")
    acquired(other.acquire())


def test_of_many_seekers_one_wins(world: World) -> None:
    for epoch in range(1, 4):
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda n: seeker(world, f"run{n}").acquire(), range(6)))
        held = [answer for answer in answers if isinstance(answer, DatasetLock)]
        assert [lock.epoch for lock in held] == [epoch]
        release(world.storage, held[0])
