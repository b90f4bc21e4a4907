"""Random faults: what the table has one by one, mixed."""

from __future__ import annotations

import random
from functools import partial

from hcodec_core.errors import HCodecError
from tests.chaos.bed import Bed, new_clip
from tests.chaos.clocks import JumpingClock
from tests.chaos.faults import (
    ANY,
    CLAIM,
    DATA,
    FILES,
    MANIFEST,
    METADATA,
    RECORD,
    RESULT,
    SOURCE,
    Fault,
)
from tests.chaos.proxy import Trap

_WORKER_POINTS = (FILES, CLAIM, SOURCE, DATA, RESULT, ANY, "HEAD ", "PUT ")
_PUBLISHER_POINTS = (r"GET .*/results/", MANIFEST, METADATA, RECORD, ANY, "PUT ")
_DEEDS = ("kill", "kill", "stop", "status", "lose", "cut", "drop", "late", "term")


def random_fault(dice: random.Random) -> Fault:
    """Two or three workers and publishers with a trap or two each, and perhaps a moving source."""
    return replay(dice.getrandbits(32))


def replay(seed: int) -> Fault:
    """The random fault of this number."""
    inject = partial(_inject, seed=seed)
    return Fault(f"random {seed}", "", "next runs", inject, is_random=True)


def _trap(dice: random.Random, points: tuple[str, ...]) -> Trap:
    return Trap(
        dice.choice(points),
        dice.choice(_DEEDS),
        is_after=dice.random() < 0.5,
        status=dice.choice((500, 503, 503)),
        seconds=dice.uniform(0.2, 4.0),
        skip=dice.choice((0, 0, 1, 2, 5, 13)),
        times=dice.choice((1, 1, 2, 4)),
    )


def _inject(bed: Bed, seed: int) -> None:
    dice = random.Random(seed)
    if dice.random() < 0.4:
        bed.finish(bed.worked_plan("0/"))
    plan = bed.plan(num_shards=dice.choice((1, 3, 6)))
    _move_source(bed, dice)
    for _ in range(dice.choice((1, 2))):
        traps = [_trap(dice, _WORKER_POINTS) for _ in range(dice.choice((1, 2)))]
        workers = [
            bed.worker(plan, trap, index=index, clock=_clock(bed, dice))
            for index, trap in enumerate(traps)
        ]
        for worker in workers:
            worker.wait_or_stop()
    bed.worker(plan).wait()
    for _ in range(dice.choice((1, 2))):
        traps = [_trap(dice, _PUBLISHER_POINTS) for _ in range(dice.choice((1, 2)))]
        publishers = [bed.publisher(plan, trap, clock=_clock(bed, dice)) for trap in traps]
        for publisher in publishers:
            publisher.wait_or_stop()
    # Those that were stopped wake before the next run, or find it done.
    if dice.random() < 0.5:
        bed.next_run()


def _clock(bed: Bed, dice: random.Random) -> JumpingClock | None:
    hours = dice.choice((0.0, 0.0, 0.0, 7.0, -11.0))
    return bed.clock(hours) if hours and bed.server.has_clocks else None


def _move_source(bed: Bed, dice: random.Random) -> None:
    name = f"{dice.choice('01')}/clip {dice.randrange(20):02d}.wav"
    deed = dice.choice(("nothing", "nothing", "put", "delete"))
    try:
        if deed == "put":
            bed.put(name, new_clip(dice.randrange(4)))
        elif deed == "delete":
            bed.delete(name)
    except HCodecError as error:
        raise AssertionError("the source could not be moved") from error
