"""Progress as read from storage and as said to people."""

from __future__ import annotations

import pytest

from hcodec_airflow.progress import JobSize, Progress, ProgressMeter, ProgressReader, clock
from hcodec_core.config import StorageConfig
from hcodec_core.jobs import WorkerProgress
from hcodec_core.storage import open_storage


def _heartbeat(worker_id: str, sequence: int, files: int, seconds: float) -> bytes:
    report = WorkerProgress(
        worker_id=worker_id,
        plan_id="p",
        sequence=sequence,
        phase="encode",
        num_files=files,
        audio_seconds=seconds,
        num_tokens=int(seconds * 50),
    )
    return report.model_dump_json().encode()


def test_reader_sums_workers_and_counts_results(tmp_path):
    storage = open_storage(StorageConfig())
    plan_uri = f"file://{tmp_path}/plan"
    reader = ProgressReader(storage, plan_uri)
    assert reader.read() == Progress()
    storage.write(f"{plan_uri}/workers/a.json", _heartbeat("a", 1, 2, 10.0))
    storage.write(f"{plan_uri}/workers/b.json", _heartbeat("b", 1, 3, 20.0))
    storage.write(f"{plan_uri}/workers/c.json", b"{half a heartb")
    storage.write(f"{plan_uri}/results/s0.json", b"{}")
    progress = reader.read()
    assert (progress.num_shards_done, progress.num_files, progress.audio_seconds) == (1, 5, 30.0)
    assert progress.num_tokens == 1500
    assert progress.phases == ("encode",)
    storage.write(f"{plan_uri}/workers/a.json", _heartbeat("a", 2, 4, 15.0))
    assert reader.read().num_files == 7


def test_meter_line_has_pace_and_time_to_go():
    meter = ProgressMeter(JobSize(num_shards=8, num_files=40))
    start = Progress(phases=("download",))
    assert meter.line(start, 100.0, 2, 2) == (
        "running 2/2 workers, shards 0/8, files 0/40, 0.00 h audio, now download"
    )
    later = Progress(num_shards_done=3, num_files=10, audio_seconds=432.0)
    assert meter.line(later, 112.0, 2, 2) == (
        "running 2/2 workers, shards 3/8, files 10/40, 0.12 h audio, 36 x real time, ETA 0:36"
    )


def test_meter_counts_pace_from_what_it_saw_first():
    meter = ProgressMeter(JobSize(num_shards=8, num_files=40))
    meter.line(Progress(num_files=20, audio_seconds=1000.0), 0.0, 1, 2)
    line = meter.line(Progress(num_files=30, audio_seconds=1100.0), 10.0, 1, 2)
    assert line.endswith("10 x real time, ETA 0:10")
    stuck = ProgressMeter(JobSize(8, 40))
    stuck.line(Progress(), 0.0, 1, 2)
    assert stuck.line(Progress(), 10.0, 1, 2).endswith("ETA unknown")


def test_meter_never_says_more_files_than_there_are():
    meter = ProgressMeter(JobSize(num_shards=1, num_files=4))
    assert "files 4/4" in meter.line(Progress(num_files=6), 0.0, 1, 1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (20.4, "0:20"), (61, "1:01"), (3661, "1:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
