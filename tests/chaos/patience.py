"""Waiting on a loaded machine: as long as anything moves, not by the clock on the wall."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from hcodec_core.errors import HCodecError

STILL_SECONDS = 240.0
_LONGEST_SECONDS = 1200.0


Answer = TypeVar("Answer")


class NotHitError(Exception):
    """The fault was to be made at a point that was not reached this time: nothing was tested."""


class NotHereError(Exception):
    """This machine cannot make the fault; the message says what it lacks."""


def wait_until(
    condition: Callable[[], object],
    what: str,
    pulse: Callable[[], object],
    still_seconds: float = STILL_SECONDS,
    poll_seconds: float = 0.05,
) -> None:
    """Return once ``condition`` holds.

    Raises ``AssertionError`` when ``pulse`` gave the same value for ``still_seconds``: a slow
    machine is waited for, one on which nothing happens is not (nor one that runs in circles).
    """
    started = moved = time.monotonic()
    last = pulse()
    while not condition():
        now, value = time.monotonic(), pulse()
        if value != last:
            last, moved = value, now
        if now - moved > still_seconds or now - started > _LONGEST_SECONDS:
            raise AssertionError(f"nothing moved for {now - moved:.0f} s, waiting for: {what}")
        time.sleep(poll_seconds)


def patiently(ask: Callable[[], Answer], num_tries: int = 4) -> Answer:
    """The answer; asked again, as a scheduler would, when a loaded machine gave none in time."""
    for _ in range(num_tries - 1):
        try:
            return ask()
        except OSError:
            time.sleep(1.0)
        except HCodecError as error:
            if not error.retryable:
                raise
            time.sleep(1.0)
    return ask()
