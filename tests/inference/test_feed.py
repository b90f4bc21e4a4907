from __future__ import annotations

import threading
import time

import pytest

from hcodec_core.errors import PreemptedError
from hcodec_core.inference.feed import ScratchBudget


def never() -> None:
    """A check that never stops the work."""


def take_in_thread(budget: ScratchBudget, num_bytes: int) -> threading.Thread:
    thread = threading.Thread(target=budget.take, args=(num_bytes, never))
    thread.start()
    thread.join(0.3)
    return thread


def test_room_is_given_until_it_is_used_up() -> None:
    budget = ScratchBudget(100)
    budget.take(60, never)
    budget.take(40, never)
    waiting = take_in_thread(budget, 1)
    assert waiting.is_alive()
    budget.give_back(40)
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_file_larger_than_the_disk_share_comes_alone() -> None:
    budget = ScratchBudget(100)
    budget.take(500, never)
    waiting = take_in_thread(budget, 0)
    assert waiting.is_alive()
    budget.give_back(500)
    waiting.join(5)
    assert not waiting.is_alive()


def test_the_number_of_files_is_bounded_too() -> None:
    budget = ScratchBudget(100, max_files=2)
    budget.take(0, never)
    budget.take(0, never)
    waiting = take_in_thread(budget, 0)
    assert waiting.is_alive()
    budget.give_back(0)
    waiting.join(5)
    assert not waiting.is_alive()


def test_whoever_waits_can_be_stopped() -> None:
    budget = ScratchBudget(1)
    budget.take(1, never)
    started = time.monotonic()

    def stop() -> None:
        raise PreemptedError("stop")

    with pytest.raises(PreemptedError):
        budget.take(1, stop)
    assert time.monotonic() - started < 2
