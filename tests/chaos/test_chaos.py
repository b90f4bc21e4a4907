"""Faults of the table, each on a pipeline of its own: nothing lost, nothing twice, nothing left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.airflow_faults import AIRFLOW_FAULTS
from tests.chaos.airflow_house import House
from tests.chaos.bed import Bed, Server, make_reference
from tests.chaos.books import Books
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.harness import (
    EXIT_BAD,
    EXIT_GOOD,
    EXIT_NOT_HIT,
    Outcome,
    Stage,
    Verdict,
    airflow_stage,
    bed_stage,
    run,
    summarise,
)
from tests.chaos.patience import NotHitError, wait_until
from tests.chaos.proxy import Trap


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    make_reference(made)
    yield made
    made.close()


def judge_all(stage: Stage, faults: list[Fault], num_at_once: int = 3) -> None:
    verdicts: list[Verdict] = []
    for verdict in run(stage, faults, num_at_once):
        verdicts.append(verdict)
        print(verdict.line(len(verdicts)))
    assert len(verdicts) == len(faults)
    bad = [
        verdict.line(number)
        for number, verdict in enumerate(verdicts, 1)
        if verdict.outcome in (Outcome.BAD, Outcome.NOT_HIT)
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.slow
def test_some_faults_of_each_kind(server: Server) -> None:
    quick = [fault for fault in FAULTS if fault.is_quick]
    assert 8 <= len(quick) <= 12
    judge_all(bed_stage(server), quick)


@pytest.mark.chaos
def test_all_other_faults(server: Server) -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    judge_all(bed_stage(server), [fault for fault in FAULTS if not fault.is_quick])


@pytest.mark.chaos
@pytest.mark.airflow
def test_faults_of_a_real_airflow(server: Server) -> None:
    with House(server) as house:
        judge_all(airflow_stage(house), AIRFLOW_FAULTS, num_at_once=1)


@pytest.mark.slow
def test_the_books_see_what_is_wrong(server: Server) -> None:
    """A harness that cannot fail proves nothing."""
    with Bed(server) as bed:
        bed.finish(bed.worked_plan("0/"))
        bed.storage.write(f"{bed.layout.table_uri}/data/stray.parquet", b"x")
        table_uri = bed.layout.table_uri
        books = bed.books()
        assert (books.lost, books.doubled, books.orphans) == (10, 0, 0)
        # The sweep took the stray file away; one that comes after it is an orphan.
        bed.storage.write(f"{table_uri}/data/stray.parquet", b"x")
        assert list(bed.bookkeeper.orphans()) == [f"orphan {table_uri}/data/stray.parquet"]


@pytest.mark.slow
def test_a_fault_that_does_not_happen_is_not_green(server: Server) -> None:
    tries = []

    def inject(bed: Bed) -> None:
        tries.append(bed)
        trap = Trap("PUT .*/nowhere", "kill")
        bed.worker(bed.plan(num_shards=1), trap).killed_by(trap)

    missed = Fault("missed", "nowhere", "nothing", inject)
    (verdict,) = run(bed_stage(server), [missed], num_at_once=1)
    assert verdict.outcome is Outcome.NOT_HIT
    assert len(tries) == 3
    assert summarise([verdict], seed=1) == EXIT_NOT_HIT


def test_the_exit_status_tells_lost_rows_from_faults_that_were_not_hit(capsys) -> None:
    fault = Fault("one", "here", "that", lambda _: None)
    good = Verdict(fault, Outcome.GOOD, Books(), 1.0)
    bad = Verdict(fault, Outcome.BAD, Books(lost=2, doubled=1, orphans=3), 1.0)
    missed = Verdict(fault, Outcome.NOT_HIT, Books(), 1.0)
    assert summarise([good], 1) == EXIT_GOOD
    assert capsys.readouterr().out.endswith("1 faults, 0 rows lost, 0 rows doubled, 0 orphans\n")
    assert summarise([good, missed], 1) == EXIT_NOT_HIT
    assert "1 faults," in capsys.readouterr().out
    assert summarise([good], 1, ["another"]) == EXIT_NOT_HIT
    assert "not reached: another" in capsys.readouterr().out
    assert summarise([good, missed, bad], 1) == EXIT_BAD
    assert "2 faults, 2 rows lost, 1 rows doubled, 3 orphans" in capsys.readouterr().out


def test_waiting_ends_when_nothing_moves_and_not_before() -> None:
    beats = iter(range(20))
    wait_until(lambda: next(beats) == 19, "the end", lambda: object(), 0.01, 0.02)
    with pytest.raises(AssertionError, match="nothing moved"):
        wait_until(lambda: False, "never", lambda: 1, 0.05, 0.01)
    assert issubclass(NotHitError, Exception)
