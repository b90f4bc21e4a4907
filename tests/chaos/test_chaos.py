"""Faults of the table, each on a pipeline of its own: nothing lost, nothing twice, nothing left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.bed import Bed, Server, make_reference
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.harness import Verdict, run

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    make_reference(made)
    yield made
    made.close()


def judge_all(server: Server, faults: list[Fault]) -> None:
    verdicts: list[Verdict] = []
    for verdict in run(server, faults, num_at_once=3):
        verdicts.append(verdict)
        print(verdict.line(len(verdicts)))
    assert len(verdicts) == len(faults)
    bad = [
        verdict.line(number) for number, verdict in enumerate(verdicts, 1) if not verdict.is_good
    ]
    assert not bad, "\n".join(bad)


def test_some_faults_of_each_kind(server: Server) -> None:
    quick = [fault for fault in FAULTS if fault.is_quick]
    assert len(quick) >= 8
    judge_all(server, quick)


@pytest.mark.slow
def test_all_other_faults(server: Server) -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    judge_all(server, [fault for fault in FAULTS if not fault.is_quick])


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
        assert list(bed._orphans()) == [f"orphan {table_uri}/data/stray.parquet"]
