"""Random faults: what the table has one by one, mixed."""

from __future__ import annotations

import random

from hcodec_core.errors import HCodecError
from tests.chaos.bed import Bed, new_clip
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
_DEEDS = ("kill", "kill", "status", "lose", "cut", "drop", "late", "term")


def random_fault(dice: random.Random) -> Fault:
    """Two or three workers and publishers with a trap or two each, and perhaps a moving source."""
    seed = dice.getrandbits(32)
    return Fault(f"random {seed}", "anywhere", "next runs", lambda bed: _inject(bed, seed))


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
    plan = bed.plan(num_shards=dice.choice((1, 3, 6)), max_attempts=9)
    _move_source(bed, dice)
    for _ in range(dice.choice((1, 2))):
        traps = [_trap(dice, _WORKER_POINTS) for _ in range(dice.choice((1, 2)))]
        workers = [bed.worker(plan, trap, index=index) for index, trap in enumerate(traps)]
        for worker in workers:
            worker.wait()
    bed.worker(plan).wait()
    for _ in range(dice.choice((1, 2))):
        traps = [_trap(dice, _PUBLISHER_POINTS) for _ in range(dice.choice((1, 2)))]
        publishers = [bed.publisher(plan, trap) for trap in traps]
        for publisher in publishers:
            publisher.wait()


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
