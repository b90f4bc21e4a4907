"""A job from start to verdict: the truth is in storage, processes are started again."""

from __future__ import annotations

import logging

import pytest

from hcodec_airflow.progress import JobSize, ProgressReader
from hcodec_airflow.states import JobState
from hcodec_airflow.watch import JobWatch, Pace, last_sentence, readable
from hcodec_core.errors import StorageError

# Each worker writes one shard's result, and dies by force the first time.
DIE_ONCE = """
import os, pathlib, signal, sys
index, plan = int(sys.argv[1]), pathlib.Path(sys.argv[2])
once = plan / f"seen-{index}"
if not once.exists():
    once.touch()
    os.kill(os.getpid(), signal.SIGKILL)
(plan / "results").mkdir(exist_ok=True)
(plan / "results" / f"s{index}.json").write_text("{}")
"""
# Worker 0 accounts for everything and dies; worker 1 hangs.
FINISH_AND_DIE = """
import os, pathlib, signal, sys, time
index, plan = int(sys.argv[1]), pathlib.Path(sys.argv[2])
if index == 1:
    time.sleep(60)
(plan / "results").mkdir(exist_ok=True)
for shard in range(2):
    (plan / "results" / f"s{shard}.json").write_text("{}")
os.kill(os.getpid(), signal.SIGKILL)
"""
REFUSE = """
import sys, time
if sys.argv[1] == "1":
    time.sleep(60)
print("some line", file=sys.stderr)
print("hcodec: Codec s3://m/h1 does not exist: correct the URI.", file=sys.stderr)
sys.exit(43)
"""


def _run(watch, wait_until):
    verdicts = []
    wait_until(lambda: verdicts or verdicts.extend(filter(None, [watch.step()])), seconds=30)
    return verdicts[0]


@pytest.fixture
def make_watch(make_backend, request_for_two, storage):
    def make(script, **options):
        backend = make_backend(script)
        backend.submit_or_adopt(request_for_two, "try-1")
        reader = ProgressReader(storage, request_for_two.plan_uri)
        size = JobSize(num_shards=2, num_files=5)
        return JobWatch(
            backend, reader, request_for_two, "try-1", size, pace=Pace(0.2, 0.2), **options
        )

    return make


def test_done_after_workers_died_and_were_restarted(make_watch, wait_until, caplog):
    caplog.set_level(logging.INFO)
    verdict = _run(make_watch(DIE_ONCE), wait_until)
    assert verdict.state is JobState.DONE
    assert verdict.message == "All 2 shards are accounted for."
    assert verdict.progress.num_files == 5
    assert "Worker 0 was ended by force" in caplog.text
    assert "Logs of 2 workers are kept" in caplog.text


def test_results_count_and_not_processes(make_watch, wait_until, monkeypatch):
    monkeypatch.setattr("hcodec_airflow.watch.ENDING_GRACE_SECONDS", 0.5)
    watch = make_watch(FINISH_AND_DIE)
    assert _run(watch, wait_until).state is JobState.DONE
    assert watch._backend.observe(watch._request).num_alive == 0  # the idle one was ended


def test_refused_job_fails_at_once_with_the_workers_sentence(make_watch, wait_until, caplog):
    watch = make_watch(REFUSE)
    verdict = _run(watch, wait_until)
    assert verdict.state is JobState.FAILED
    assert not verdict.is_retryable
    assert verdict.message == (
        "Worker 0 refused the job: Codec s3://m/h1 does not exist: correct the URI."
    )
    assert "worker 0 | some line" in caplog.text
    assert watch._backend.observe(watch._request).num_alive == 0


def test_workers_that_never_succeed_fail_the_try(make_watch, wait_until, caplog):
    script = "import sys; [print('x' * 5000) for _ in range(100)]; sys.exit(1)"
    verdict = _run(make_watch(script), wait_until)
    assert verdict.state is JobState.FAILED
    assert verdict.is_retryable
    assert "2 of 2 shards pending, after 1 restarts each" in verdict.message
    told = [record.getMessage() for record in caplog.records if "| x" in record.getMessage()]
    assert len(told) <= 2 * 2 * 20  # two workers, two starts, twenty lines each
    assert max(map(len, told)) < 450


def test_killed_workers_are_not_restarted(make_watch, wait_until):
    watch = make_watch("import time; time.sleep(60)")
    assert watch.step() is None
    assert watch.state is JobState.RUNNING
    watch._backend.kill(watch._request, "try-1")
    verdict = _run(watch, wait_until)
    assert verdict.state is JobState.KILLED


def test_a_watch_of_an_older_try_does_not_restart(make_watch, wait_until):
    old = make_watch("import time; time.sleep(60)")
    backend, request = old._backend, old._request
    backend.submit_or_adopt(request, "try-2")
    backend.kill(request, "try-2")
    old._backend.restart_ended(request, "try-1")
    assert backend.observe(request).num_alive == 0


def test_what_the_job_holds_is_renewed(make_watch, wait_until):
    renewed = []
    watch = make_watch("import time; time.sleep(60)", renew=lambda: renewed.append(1))
    wait_until(lambda: watch.step() or len(renewed) >= 2)


def test_storage_that_does_not_answer_is_waited_for(make_watch, monkeypatch):
    watch = make_watch("import time; time.sleep(60)")

    def fail():
        raise StorageError("Storage did not answer for s3://b/k: ReadTimeout.")

    monkeypatch.setattr(watch._reader, "read", fail)
    assert watch.step() is None
    monkeypatch.setattr("hcodec_airflow.watch.STORAGE_PATIENCE_SECONDS", 0.0)
    verdict = watch.step()
    assert verdict is not None
    assert verdict.is_retryable
    assert watch._backend.observe(watch._request).num_alive == 2  # the next try adopts them


def test_reports_at_most_once_per_pace(make_watch, caplog):
    caplog.set_level(logging.INFO)
    watch = make_watch("import time; time.sleep(60)")
    for _ in range(3):
        watch.step()
    lines = [r.getMessage() for r in caplog.records if "x real time" in r.getMessage()]
    lines += [r.getMessage() for r in caplog.records if r.getMessage().startswith("running 2/2")]
    assert len(lines) == 1


def test_worker_lines_for_people():
    assert readable('{"level": "warning", "message": "late", "time": "t"}') == "warning: late"
    assert readable("Traceback (most recent call last):") == "Traceback (most recent call last):"
    assert readable("12") == "12"
    assert last_sentence(["hcodec: Wrong."]) == "Wrong."
    assert last_sentence([]) == "it left no log."
