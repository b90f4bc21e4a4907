"""A dataset of mode fast carries how far its codes agree with those of mode exact."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.dataset.shards import results_by_shard
from hcodec_core.inference.worker import WorkerOptions, run_worker
from hcodec_core.jobs import ModeAgreement
from hcodec_core.storage import file_uri, open_storage
from tests.inference.plans import SETTINGS, job_uri, speech, write_plan


@pytest.mark.parametrize(("mode", "num_files"), [("exact", 2), ("fast", 11)])
def test_agreement_is_measured_and_stored_with_the_shard(
    tmp_path: Path, mode: str, num_files: int
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "scratch").mkdir()
    storage = open_storage(StorageConfig())
    settings = SETTINGS.model_copy(update={"mode": mode})
    job = write_plan(storage, file_uri(tmp_path / "root"), speech(num_files), 2, settings=settings)
    options = WorkerOptions(scratch_path=tmp_path / "scratch")
    assert run_worker(job_uri(job), storage, options, threading.Event()) == 0
    results = list(results_by_shard(storage, job).values())
    assert len(results) == 2
    assert {result.build["arithmetic"] for result in results} <= {"float32", "bfloat16"}
    parts = [result.agreement for result in results if result.agreement is not None]
    if mode == "exact":
        assert parts == []
        return
    total = ModeAgreement.total(parts)
    assert total is not None
    assert total.num_clips == 11
    assert {(d.stream, d.codebook) for d in total.depths} == {
        (stream, book) for stream in ("semantic", "acoustic") for book in range(4)
    }
    frames = total.depths[0].num_frames
    assert frames == pytest.approx(25 * total.audio_seconds, abs=16)
    assert all(d.num_frames == frames for d in total.depths)
    share = total.depths[0].holding_share
    assert share is not None
    assert share > 0.9
