"""Runs faults and keeps the table: ``python -m tests.chaos.harness --seed 1 --minutes 20``.

Each fault of the table once and, among them and after them until the minutes are over, a random
walk: runs with several faults in each, the same for the same seed (as far as timing goes). Beside
both, in a lane of its own, the faults of a real Airflow. Exit status: 0 all good, 1 something was
lost, doubled or left behind, 3 a fault of the table could not be made to happen, or was not reached
when the run was asked to end (SIGTERM or Ctrl-C: what runs is finished; a second one ends it).
"""

from __future__ import annotations

import argparse
import itertools
import queue
import random
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from tests.chaos.airflow_faults import AIRFLOW_FAULTS
from tests.chaos.airflow_house import House
from tests.chaos.bed import Bed, Server, make_reference
from tests.chaos.books import Books
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.patience import NotHereError, NotHitError
from tests.chaos.walk import random_fault, replay

_TRIES = 3
EXIT_GOOD, EXIT_BAD, EXIT_NOT_HIT = 0, 1, 3


class Scene(Protocol):
    """Where a fault is made: a dataset, how it recovers, and its books."""

    def recover(self) -> None: ...

    def books(self) -> Books: ...

    def struck(self) -> list[str]:
        """What traps did, for people."""
        ...


Stage = Callable[[Fault], AbstractContextManager[Scene]]


class Outcome(StrEnum):
    """What came of a fault."""

    GOOD = "ok"
    BAD = "FAIL"
    NOT_HIT = "not hit"
    NOT_HERE = "not here"


@dataclass(frozen=True)
class Verdict:
    """What came of one fault; ``error`` is empty when the books could be made."""

    fault: Fault
    outcome: Outcome
    books: Books
    seconds: float
    error: str = ""
    struck: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Where the fault was; for a random one what its traps did."""
        return self.fault.where or ", ".join(self.struck) or "nowhere"

    def line(self, number: int) -> str:
        """One line for people."""
        books = self.books
        parts = [
            f"{number:3d} {self.outcome:<8} {self.fault.name}",
            self.where,
            self.fault.recovered_by,
            f"lost {books.lost}, doubled {books.doubled}, differing {books.differing}, "
            f"orphans {books.orphans}",
            f"{self.seconds:.1f} s",
        ]
        return " | ".join([*parts, *([self.error] if self.error else []), *books.details])


def judge(stage: Stage, fault: Fault) -> Verdict:
    """One fault on a scene of its own, recovery, books; tried again while it does not happen."""
    started = time.monotonic()
    for _ in range(_TRIES):
        verdict = _judge_once(stage, fault, started)
        if verdict.outcome is not Outcome.NOT_HIT or fault.is_random:
            break
    return verdict


def _judge_once(stage: Stage, fault: Fault, started: float) -> Verdict:
    books, error, struck = Books(), "", ()
    try:
        with stage(fault) as scene:
            fault.inject(scene)
            struck = tuple(scene.struck())
            scene.recover()
            books = scene.books()
        outcome = Outcome.GOOD if books.are_right else Outcome.BAD
        if fault.is_random and not struck and books.are_right:
            outcome = Outcome.NOT_HIT
    except NotHitError as reason:
        outcome, error = Outcome.NOT_HIT, str(reason)
    except NotHereError as reason:
        outcome, error = Outcome.NOT_HERE, str(reason)
    except Exception:  # noqa: BLE001 - whatever it is, it is in the table
        outcome, error = Outcome.BAD, traceback.format_exc()
    return Verdict(fault, outcome, books, time.monotonic() - started, error, struck)


def run(stage: Stage, faults: Iterable[Fault], num_at_once: int) -> Iterator[Verdict]:
    """Verdicts as they come; ``faults`` is asked for the next one whenever a lane is free."""
    source, lock = iter(faults), threading.Lock()
    done: queue.Queue[Verdict | None] = queue.Queue()

    def lane() -> None:
        while True:
            with lock:
                fault = next(source, None)
            if fault is None:
                break
            done.put(judge(stage, fault))
        done.put(None)

    for _ in range(num_at_once):
        threading.Thread(target=lane, daemon=True).start()
    for _ in range(num_at_once):
        while (verdict := done.get()) is not None:
            yield verdict


class Log:
    """Prints each verdict with how far the run is; safe for several lanes."""

    def __init__(self, named: Sequence[Fault], seconds: float) -> None:
        self.verdicts: list[Verdict] = []
        self._named = named
        self._began = time.monotonic()
        self._ends = self._began + seconds
        self._lock = threading.Lock()
        self._is_ending = False

    def end(self, *_: object) -> None:
        """Begin no other fault; asked again, stop at once."""
        if self._is_ending:
            raise KeyboardInterrupt
        self._is_ending = True

    def begun(self, faults: Iterable[Fault]) -> Iterator[Fault]:
        """``faults`` as long as the run is not asked to end."""
        return itertools.takewhile(lambda _: not self._is_ending, faults)

    def add(self, verdict: Verdict) -> None:
        """Keep and print it."""
        with self._lock:
            self.verdicts.append(verdict)
            print(f"{self._progress()} {verdict.line(len(self.verdicts))}", flush=True)

    def mix(self, named: Sequence[Fault], dice: random.Random) -> Iterator[Fault]:
        """All of ``named``; every third is a random one, and all are until the time is over."""
        waiting = deque(named)
        for turn in itertools.count():
            is_over = time.monotonic() >= self._ends
            if waiting and (is_over or turn % 3 != 2):
                yield waiting.popleft()
            elif not is_over:
                yield random_fault(dice)
            else:
                return

    def not_reached(self) -> list[str]:
        """Names of faults of the table that were not begun."""
        judged = {verdict.fault.name for verdict in self.verdicts}
        return [fault.name for fault in self._named if fault.name not in judged]

    def _progress(self) -> str:
        now = time.monotonic()
        gone = now - self._began
        done = sum(not verdict.fault.is_random for verdict in self.verdicts)
        left = max(self._lane_left(gone, True), self._lane_left(gone, False), self._ends - now)
        return f"[{done}/{len(self._named)} named, {_clock(gone)} gone, about {_clock(left)} left]"

    def _lane_left(self, gone: float, in_airflow: bool) -> float:
        num_all = sum(fault.in_airflow is in_airflow for fault in self._named)
        judged = [verdict.fault for verdict in self.verdicts if not verdict.fault.is_random]
        num_done = sum(fault.in_airflow is in_airflow for fault in judged)
        return gone / max(num_done, 1) * (num_all - num_done)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes}:{rest:02d}"


def table(verdicts: Iterable[Verdict]) -> str:
    """The table of ``docs/faults.md``: the named faults."""
    lines = [
        "| # | fault | where | recovered by | rows lost | rows doubled | orphans after sweep |",
        "|---|---|---|---|---|---|---|",
    ]
    named = [verdict for verdict in verdicts if not verdict.fault.is_random]
    for number, verdict in enumerate(named, 1):
        books, fault = verdict.books, verdict.fault
        counts = f"{books.lost} | {books.doubled} | {books.orphans}"
        if verdict.outcome in (Outcome.NOT_HIT, Outcome.NOT_HERE):
            counts = f"{verdict.outcome} | {verdict.outcome} | {verdict.outcome}"
        lines.append(
            f"| {number} | {fault.name} | {verdict.where} | {fault.recovered_by} | {counts} |"
        )
    return "\n".join(lines)


def bed_stage(server: Server) -> Stage:
    """A bed of its own for each fault."""
    return lambda _: Bed(server)


def airflow_stage(house: House) -> Stage:
    """A dataset of its own in one Airflow."""
    return lambda _: house.scene()


def main() -> int:
    """The command line; returns the exit status."""
    options = _read_options()
    named = [fault for fault in FAULTS if re.search(options.only, fault.name)]
    airflow = [fault for fault in AIRFLOW_FAULTS if re.search(options.only, fault.name)]
    airflow = [] if options.no_airflow else airflow
    if options.replay is not None:
        named, airflow = [replay(options.replay)], []
    server = Server()
    house = House(server)
    log = Log([*named, *airflow], 60 * options.minutes)
    beside = threading.Thread(target=_airflow_lane, args=(house, airflow, log), daemon=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, log.end)
    try:
        beside.start()
        _bed_lanes(server, named, log, options)
        beside.join()
    finally:
        house.close()
        server.close()
    if options.table is not None:
        options.table.write_text(table(log.verdicts) + "\n")
    return summarise(log.verdicts, options.seed, log.not_reached())


def _bed_lanes(server: Server, named: list[Fault], log: Log, options: argparse.Namespace) -> None:
    if not named and not options.minutes:
        return
    make_reference(server)
    stage, dice = bed_stage(server), random.Random(options.seed)
    for verdict in run(stage, log.begun(log.mix(named, dice)), options.at_once):
        log.add(verdict)


def _airflow_lane(house: House, faults: list[Fault], log: Log) -> None:
    """One after another: a killed scheduler is dead for all. They fail if Airflow does not come."""
    if not faults:
        return
    try:
        with house:
            for verdict in run(airflow_stage(house), log.begun(faults), num_at_once=1):
                log.add(verdict)
    except Exception:  # noqa: BLE001 - whatever it is, it is in the table
        reason = traceback.format_exc()
        judged = {verdict.fault for verdict in log.verdicts}
        for fault in faults:
            if fault not in judged:
                log.add(Verdict(fault, Outcome.BAD, Books(), 0.0, reason))
                reason = "Airflow was not there, see above"


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Break the pipeline on purpose, and count rows.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0.0, help="at least so many")
    parser.add_argument("--at-once", type=int, default=3, help="faults at the same time")
    parser.add_argument("--no-airflow", action="store_true", help="leave its faults out")
    parser.add_argument("--only", default="", help="faults whose name matches this pattern")
    parser.add_argument("--replay", type=int, default=None, help="only the random run so named")
    parser.add_argument("--table", type=Path, default=None, help="write the table as Markdown")
    return parser.parse_args()


def summarise(verdicts: Sequence[Verdict], seed: int, not_reached: Sequence[str] = ()) -> int:
    """Print the last lines; returns the exit status."""
    hit = [v for v in verdicts if v.outcome in (Outcome.GOOD, Outcome.BAD)]
    num_random = sum(verdict.fault.is_random for verdict in hit)
    print(f"{len(hit) - num_random} named faults, {num_random} random ones with seed {seed}")
    for verdict in verdicts:
        if verdict.outcome is not Outcome.GOOD and not _is_idle(verdict):
            print(f"{verdict.outcome}: {verdict.fault.name}")
    for name in not_reached:
        print(f"not reached: {name}")
    if num_idle := sum(map(_is_idle, verdicts)):
        print(f"{num_idle} random runs met none of their traps: not counted")
    lost, doubled, orphans = (
        sum(getattr(v.books, name) for v in hit) for name in ("lost", "doubled", "orphans")
    )
    print(f"{len(hit)} faults, {lost} rows lost, {doubled} rows doubled, {orphans} orphans")
    sys.stdout.flush()
    if any(verdict.outcome is Outcome.BAD for verdict in verdicts):
        return EXIT_BAD
    is_missed = bool(not_reached) or any(
        v.outcome is Outcome.NOT_HIT and not v.fault.is_random for v in verdicts
    )
    return EXIT_NOT_HIT if is_missed else EXIT_GOOD


def _is_idle(verdict: Verdict) -> bool:
    return verdict.fault.is_random and verdict.outcome is Outcome.NOT_HIT


if __name__ == "__main__":
    sys.exit(main())
