"""Runs faults and keeps the table: ``python -m tests.chaos.harness --seed 1 --minutes 20``.

First each fault of the table once, then, until the minutes are over, a random walk of runs with
several faults in each, the same for the same seed (as far as timing goes).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.bed import Bed, Books, Server, make_reference
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.walk import random_fault


@dataclass(frozen=True)
class Verdict:
    """What came of one fault; ``error`` is empty when the books could be made."""

    fault: Fault
    books: Books
    seconds: float
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.error and self.books.are_right

    def line(self, number: int) -> str:
        books = self.books
        head = f"{number:3d} {'ok  ' if self.is_good else 'FAIL'} {self.fault.name}"
        return (
            f"{head} | {self.fault.where} | {self.fault.recovered_by} | lost {books.lost}, "
            f"doubled {books.doubled}, differing {books.differing}, orphans {books.orphans} | "
            f"{self.seconds:.1f} s{self.error and ' | ' + self.error}"
            f"{(books.details and ' | ' + '; '.join(books.details)) or ''}"
        )


def judge(server: Server, fault: Fault) -> Verdict:
    """One fault on a bed of its own, recovery, books."""
    started = time.monotonic()
    with Bed(server) as bed:
        try:
            fault.inject(bed)
            bed.recover()
            books, error = bed.books(), ""
        except Exception:  # noqa: BLE001 - whatever it is, it is in the table
            books, error = Books(0, 0, 0, 0), traceback.format_exc()
    return Verdict(fault, books, time.monotonic() - started, error)


def run(server: Server, faults: Iterable[Fault], num_at_once: int) -> Iterator[Verdict]:
    """Verdicts in the order of ``faults``."""
    with ThreadPoolExecutor(num_at_once) as pool:
        yield from pool.map(lambda fault: judge(server, fault), faults)


def table(verdicts: Iterable[Verdict]) -> str:
    """The table of ``docs/faults.md``."""
    lines = [
        "| # | fault | where | recovered by | rows lost | rows doubled | orphans after sweep |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, verdict in enumerate(verdicts, 1):
        books, fault = verdict.books, verdict.fault
        lines.append(
            f"| {number} | {fault.name} | {fault.where} | {fault.recovered_by} | {books.lost} | "
            f"{books.doubled} | {books.orphans} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the pipeline on purpose, and count rows.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0.0, help="of all, the table included")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--table", type=Path, default=None, help="write the table as Markdown")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    server = Server()
    make_reference(server)
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    verdicts: list[Verdict] = []
    for verdict in run(server, chosen, options.at_once):
        verdicts.append(verdict)
        print(verdict.line(len(verdicts)), flush=True)
    if options.table is not None:
        options.table.write_text(table(verdicts) + "\n")
    dice = random.Random(options.seed)
    while time.monotonic() < until:
        batch = [random_fault(dice) for _ in range(options.at_once)]
        for verdict in run(server, batch, options.at_once):
            verdicts.append(verdict)
            print(verdict.line(len(verdicts)), flush=True)
    server.close()
    return summarise(verdicts, len(chosen), options.seed)


def summarise(verdicts: list[Verdict], num_named: int, seed: int) -> int:
    """Print the last line; returns the exit status."""
    lost = sum(verdict.books.lost for verdict in verdicts)
    doubled = sum(verdict.books.doubled for verdict in verdicts)
    orphans = sum(verdict.books.orphans for verdict in verdicts)
    bad = [verdict for verdict in verdicts if not verdict.is_good]
    print(f"{num_named} named faults, {len(verdicts) - num_named} random ones with seed {seed}")
    for verdict in bad:
        print(f"FAILED: {verdict.fault.name}")
    print(
        f"{len(verdicts)} faults, {lost} rows lost, {doubled} rows doubled, {orphans} orphans",
        flush=True,
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
