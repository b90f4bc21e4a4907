"""The job's state machine: results count first, processes second."""

from __future__ import annotations

import pytest

from hcodec_airflow.backends.base import Observation, Phase, Worker
from hcodec_airflow.states import JobState, JobStateMachine, judge


def _seen(phase: Phase, *workers: Worker) -> Observation:
    return Observation(phase, workers)


def _ended(code: int | None, num_starts: int = 1) -> Worker:
    return Worker(0, False, num_starts, code)


@pytest.mark.parametrize(
    ("observation", "is_accounted", "expected"),
    [
        # All results are there: done, whatever became of the workers.
        (_seen(Phase.ENDED, _ended(None, 9)), True, JobState.DONE),
        (_seen(Phase.RUNNING, Worker(0, True, 1)), True, JobState.DONE),
        (_seen(Phase.ENDED, _ended(43)), True, JobState.DONE),
        # A refused configuration fails at once, also while others run.
        (_seen(Phase.RUNNING, Worker(1, True, 1), _ended(43)), False, JobState.FAILED),
        # Ended for another reason: started again while a start is left.
        (_seen(Phase.ENDED, _ended(143)), False, JobState.SCHEDULING),
        (_seen(Phase.ENDED, _ended(None, 2)), False, JobState.SCHEDULING),
        (_seen(Phase.ENDED, _ended(1, 3)), False, JobState.FAILED),
        (_seen(Phase.RUNNING, Worker(1, True, 1), _ended(1, 3)), False, JobState.RUNNING),
        (_seen(Phase.KILLED, _ended(143)), False, JobState.KILLED),
        (_seen(Phase.QUEUED), False, JobState.QUEUED),
        (_seen(Phase.SCHEDULING), False, JobState.SCHEDULING),
    ],
)
def test_judge(observation, is_accounted, expected):
    assert judge(observation, is_accounted=is_accounted, max_restarts=2) is expected


def test_machine_moves_and_says_when_it_changed():
    machine = JobStateMachine()
    assert machine.move(JobState.SCHEDULING)
    assert machine.move(JobState.RUNNING)
    assert not machine.move(JobState.RUNNING)
    assert machine.move(JobState.SCHEDULING)
    assert machine.move(JobState.DONE)


@pytest.mark.parametrize("final", [JobState.DONE, JobState.FAILED, JobState.KILLED])
def test_final_states_are_left_by_no_move(final):
    assert final.is_final
    with pytest.raises(AssertionError):
        JobStateMachine(final).move(JobState.RUNNING)
