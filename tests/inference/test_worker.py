"""Workers on real plans: real files, real decoder processes, the shipped codec, an S3 server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from hcodec_core.audio.decode import DecodeSettings, decode_all
from hcodec_core.audio.segments import segments
from hcodec_core.config import StorageConfig
from hcodec_core.dataset.leases import LeaseTable, LeaseTerms, attempts_counted, read_attempts
from hcodec_core.dataset.results import result_uri
from hcodec_core.dataset.schema import unflatten_codes
from hcodec_core.dataset.shards import (
    lease_uri,
    publish_result,
    release_attempts_of,
    results_by_shard,
)
from hcodec_core.errors import CheckpointError, ConfigError, QuarantineReason
from hcodec_core.inference.engine import Engine
from hcodec_core.inference.worker import WorkerOptions, run_worker
from hcodec_core.jobs import Outcome, ShardResult, TokenizeJob, WorkerProgress, WorkUse
from hcodec_core.models.loading import load_codec
from hcodec_core.storage import ObjectInfo, Storage, file_uri, open_storage
from tests.inference.plans import (
    SETTINGS,
    contents,
    job_uri,
    outcomes,
    rows,
    speech,
    wav,
    write_plan,
)

BROKEN = Path(__file__).parents[1] / "corpus" / "clips" / "broken"
SHARD = "shard-0-g0"


@pytest.fixture
def root_uri(tmp_path: Path) -> str:
    (tmp_path / "root").mkdir()
    return file_uri(tmp_path / "root")


@pytest.fixture
def options(tmp_path: Path) -> WorkerOptions:
    (tmp_path / "scratch").mkdir()
    return WorkerOptions(scratch_path=tmp_path / "scratch", heartbeat_seconds=0.3)


def run(
    storage: Storage,
    job: TokenizeJob,
    options: WorkerOptions,
    stop: threading.Event | None = None,
) -> int:
    return run_worker(job_uri(job), storage, options, stop or threading.Event())


class Background:
    """A worker in a thread, for tests that need it to be in the middle of something."""

    def __init__(self, storage: Storage, job: TokenizeJob, options: WorkerOptions) -> None:
        self.stop = threading.Event()
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run, args=(storage, job, options))
        self.thread.start()

    def _run(self, storage: Storage, job: TokenizeJob, options: WorkerOptions) -> None:
        self.code = run(storage, job, options, self.stop)

    def join(self, seconds: float = 60) -> int | None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the worker does not end"
        return self.code


@contextlib.contextmanager
def background(storage: Storage, job: TokenizeJob, options: WorkerOptions) -> Iterator[Background]:
    worker = Background(storage, job, options)
    try:
        yield worker
    finally:
        worker.stop.set()
        worker.join()


def wait_until(is_so, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def reports(storage: Storage, job: TokenizeJob) -> list[WorkerProgress]:
    found = storage.list_objects(job.plan_uri + "/workers")
    return [WorkerProgress.model_validate_json(storage.read(info.uri)) for info in found]


# One worker -------------------------------------------------------------------------------------


def test_every_file_has_its_own_tokens_or_its_reason(
    s3_storage: Storage,
    root_uri: str,
    options: WorkerOptions,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Codes are those of each file alone, whatever it was batched with."""
    files = speech(7) | {
        "long.wav": wav(10.3, seed=50),
        "other rate é.wav": wav(2.0, seed=51, rate=44_100),
        "one sample.wav": wav(1 / 16_000),
        "text.wav": (BROKEN / "text.wav").read_bytes(),
        "empty.wav": b"",
        "huge.wav": wav(0.5) + b"\0" * 2_000_000,
    }
    job = write_plan(s3_storage, root_uri, files, num_shards=2, limits={"max_bytes": 1_000_000})
    with caplog.at_level(logging.INFO):
        assert run(s3_storage, job, options) == 0
    found = outcomes(s3_storage, job)
    reasons = {name: o.reason for name, o in found.items() if o.outcome is not Outcome.TOKENS}
    assert reasons == {
        "text.wav": QuarantineReason.NOT_AUDIO,
        "empty.wav": QuarantineReason.EMPTY,
        "huge.wav": QuarantineReason.TOO_LARGE,
    }
    assert all(found[name].detail for name in reasons)
    table = rows(s3_storage, job)
    assert table.keys() == files.keys() - reasons.keys()
    engine = Engine(load_codec("hcodec-nano", SETTINGS))
    for name, row in table.items():
        path = tmp_path / "alone"
        path.write_bytes(files[name])
        assert_is_file_alone(engine, path, row)
        assert (row["plan_id"], row["metadata"]) == ("plan", [("name", name)])
        assert found[name].audio_seconds == row["duration_seconds"]
    check_books(s3_storage, job, caplog)
    assert [path.name for path in options.scratch_path.iterdir()] == ["files.parquet"]


def assert_is_file_alone(engine: Engine, path: Path, row: dict) -> None:
    """The row is what the engine makes of the file's segments one by one."""
    spec = engine.codec.spec
    samples, info = decode_all(path, DecodeSettings(spec.sample_rate))
    kept: dict[str, list[np.ndarray]] = {stream.name: [] for stream in spec.streams}
    for segment in segments(
        [samples],
        sample_rate=spec.sample_rate,
        hop_length=spec.hop_length,
        segment_seconds=SETTINGS.segment_seconds,
        halo_seconds=SETTINGS.halo_seconds,
    ):
        (tokens,) = engine.encode_clips([segment.samples])
        for name, codes in tokens.codes.items():
            kept[name].append(codes[:, segment.interior])
    for name, codes in kept.items():
        flat = np.array(row[name], np.int32)
        np.testing.assert_array_equal(
            unflatten_codes(flat, row[f"{name}_num_codebooks"]), np.concatenate(codes, axis=1)
        )
    assert row["content_sha256"] == info.pcm_sha256
    assert (row["num_samples"], row["sample_rate"]) == (len(samples), spec.sample_rate)
    assert row["num_frames"] == spec.num_frames(len(samples))
    assert row["peak"] == pytest.approx(float(np.abs(samples).max()))
    rms = 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)))
    assert row["loudness_db"] == pytest.approx(rms, abs=0.01)
    assert row["native_sample_rate"] == info.sample_rate


def check_work(
    report: WorkerProgress, done: Iterable[ShardResult], caplog: pytest.LogCaptureFixture
) -> None:
    """Where the time went stands in the results of shards, the report and the last line."""
    works = [result.work for result in done]
    assert all(works)
    work = WorkUse.total(work for work in works if work is not None)
    assert report.work is not None
    assert list(work.steps) == ["network", "decode", "encode", "write"] == list(report.work.steps)
    assert all(0 < step.share <= 1 for step in work.steps.values())
    for name, step in work.steps.items():
        assert report.work.steps[name].busy_seconds == pytest.approx(step.busy_seconds)
    decoded_seconds = sum(use.audio_seconds for use in work.formats.values())
    assert decoded_seconds >= work.audio_seconds * (1 - 1e-9)
    assert all(use.num_bytes and use.decode_seconds for use in work.formats.values())
    assert f"Where the time went: {report.work.for_people}." in caplog.messages


def check_books(storage: Storage, job: TokenizeJob, caplog: pytest.LogCaptureFixture) -> None:
    """Result documents, progress report and log say the same."""
    done = results_by_shard(storage, job).values()
    assert {result.status for result in done} == {"done"}
    (report,) = reports(storage, job)
    assert report.phase == "done"
    assert (report.num_shards_done, report.num_files) == (2, job.num_files)
    assert report.num_tokens == sum(result.num_tokens for result in done) > 0
    assert report.audio_seconds == pytest.approx(sum(result.audio_seconds for result in done))
    assert report.sequence > 0
    assert report.held_shards == {}
    assert list(report.start_seconds) == [
        "import",
        "plan",
        "weights",
        "first batch",
        "first tokens",
    ]
    assert all(seconds >= 0 for seconds in report.start_seconds.values())
    check_work(report, done, caplog)
    lines = [r.fields for r in caplog.records if hasattr(r, "fields")]
    assert sorted(line["shard_id"] for line in lines) == sorted(results_by_shard(storage, job))
    assert sum(line["num_quarantined"] for line in lines) == 3
    assert all(line["real_time_factor"] > 0 for line in lines)
    json.dumps(lines)
    for result in done:
        timings = result.timings
        assert 0 < timings.decode_seconds
        assert 0 < timings.encode_seconds <= timings.total_seconds
        assert result.data_file is not None
        assert result.data_file.stats.num_rows == sum(
            o.outcome is Outcome.TOKENS for o in result.outcomes
        )
        assert result.build["compute_class"] == SETTINGS.compute_class


def test_a_second_run_changes_nothing(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, root_uri, speech(2))
    assert run(s3_storage, job, options) == 0
    before = list(s3_storage.list_objects(root_uri + "/"))
    assert run(s3_storage, job, replace(options, index=1)) == 0
    assert list(s3_storage.list_objects(root_uri + "/")) == before


def test_a_plan_without_good_files_has_no_data_file(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, root_uri, {"a.wav": b"", "b.wav": b"no audio at all"})
    assert run(s3_storage, job, options) == 0
    (result,) = results_by_shard(s3_storage, job).values()
    assert (result.status, result.data_file, len(result.outcomes)) == ("done", None, 2)


def test_a_small_scratch_disk_only_slows_down(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    """Two shards share a disk that holds one file at a time, and three decoders."""
    files = speech(8) | {"empty.wav": b"", "text.wav": b"text"}
    job = write_plan(s3_storage, root_uri, files, num_shards=2)
    narrow = replace(options, scratch_bytes=1, num_parallel_shards=2, num_decoders=3)
    assert run(s3_storage, job, narrow) == 0
    assert len(rows(s3_storage, job)) == 8
    assert len(outcomes(s3_storage, job)) == 10


def test_changed_and_deleted_sources_are_accounted_for(
    s3_storage: Storage, bucket_uri: str, options: WorkerOptions
) -> None:
    files = speech(4)
    job = write_plan(s3_storage, bucket_uri, files)
    names = sorted(files)
    s3_storage.write(f"{bucket_uri}/audio/{names[1]}", wav(1.0, seed=99))
    s3_storage.delete([f"{bucket_uri}/audio/{names[2]}"])
    assert run(s3_storage, job, options) == 0
    found = {name: outcome.outcome for name, outcome in outcomes(s3_storage, job).items()}
    tokens = Outcome.TOKENS
    assert list(found.values()) == [tokens, Outcome.CHANGED, Outcome.DELETED, tokens]
    assert set(rows(s3_storage, job)) == {names[0], names[3]}


def test_a_file_that_kills_the_decoder_is_quarantined_and_the_shard_goes_on(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    files = speech(4) | {"clip 01b poison.wav": wav(900, seed=3)}
    job = write_plan(s3_storage, root_uri, files)
    poison_path = options.scratch_path / f"{SHARD}-1" / "audio" / "2"
    killed: list[int] = []
    done = threading.Event()

    def kill_its_decoders() -> None:
        # The encoder is slower than the decoder, which therefore holds the file for seconds.
        while not done.is_set():
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if any(file.path == str(poison_path) for file in child.open_files()):
                        child.send_signal(signal.SIGSEGV)
                        killed.append(child.pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_its_decoders)
    killer.start()
    try:
        assert run(s3_storage, job, options) == 0
    finally:
        done.set()
        killer.join()
    found = outcomes(s3_storage, job)
    assert found["clip 01b poison.wav"].reason is QuarantineReason.CRASHED
    assert len(rows(s3_storage, job)) == 4
    assert len(set(killed)) == 2


# Configuration ----------------------------------------------------------------------------------


def test_another_compute_class_is_refused(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    settings = SETTINGS.model_copy(update={"compute_class": "nvidia-h200-torch2.13.0"})
    job = write_plan(s3_storage, root_uri, speech(1), settings=settings)
    with pytest.raises(ConfigError, match="nvidia-h200") as caught:
        run(s3_storage, job, options)
    assert caught.value.exit_code == 43
    assert results_by_shard(s3_storage, job) == {}


def test_another_codec_is_refused(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, root_uri, speech(1), encode_id="f" * 32)
    with pytest.raises(ConfigError, match="encode id"):
        run(s3_storage, job, options)
    manifest = job.manifest.model_copy(update={"num_parameters": 7})
    job = write_plan(s3_storage, root_uri, speech(1), plan="second", manifest=manifest)
    with pytest.raises(CheckpointError, match="expected"):
        run(s3_storage, job, options)


def test_storage_without_conditional_writes_is_refused(
    fault_proxy, s3_storage: Storage, bucket_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, bucket_uri, speech(1))

    def strip(method: str, path: str, headers: dict[str, str]) -> None:
        headers.pop("if-none-match", None)

    fault_proxy.rule = strip
    with pytest.raises(ConfigError, match="If-None-Match"):
        run(open_storage(StorageConfig(endpoint_url=fault_proxy.url)), job, options)


# Failing attempts -------------------------------------------------------------------------------


def test_a_shard_that_always_fails_is_failed_after_its_last_attempt(
    fault_proxy, s3_storage: Storage, bucket_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(
        s3_storage, bucket_uri, speech(4), num_shards=2, max_attempts=2, lease_seconds=2.0
    )
    fault_proxy.rule = lambda _, path, __: 400 if "clip%2001" in path else None
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    assert run(storage, job, options) == 0
    done, failed = (results_by_shard(s3_storage, job)[f"shard-{i}-g0"] for i in range(2))
    assert (done.status, failed.status) == ("done", "failed")
    assert "2 attempts failed" in failed.error
    assert "StorageError" in failed.error
    attempts = read_attempts(s3_storage, lease_uri(job, failed.shard_id))
    assert [attempt.claim.is_counted for attempt in attempts] == [True, True, False]
    assert len(contents(s3_storage, job)) == 1
    # Terminal within the plan: what is finished later is not taken.
    assert not publish_result(s3_storage, job, failed.model_copy(update={"status": "done"}))


def test_a_passing_fault_costs_one_attempt(
    fault_proxy, s3_storage: Storage, bucket_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, bucket_uri, speech(2), lease_seconds=2.0)
    faults = iter([501])
    fault_proxy.rule = lambda method, path, _: (
        next(faults, None) if method == "PUT" and path.endswith(".parquet") else None
    )
    storage = open_storage(StorageConfig(endpoint_url=fault_proxy.url))
    assert run(storage, job, options) == 0
    (result,) = results_by_shard(s3_storage, job).values()
    assert (result.status, result.attempt) == ("done", 2)
    first = read_attempts(s3_storage, lease_uri(job, SHARD))[0]
    assert first.is_counted
    assert first.ending is not None
    assert "StorageError" in first.ending.detail
    assert len(contents(s3_storage, job)) == 1


def test_a_machine_that_fails_shard_after_shard_gives_up(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, root_uri, speech(5), num_shards=5)
    for shard in range(5):
        # The scratch disk has no place for their folders.
        (options.scratch_path / f"shard-{shard}-g0-1").write_bytes(b"in the way")
    assert run(s3_storage, job, options) == 1
    assert results_by_shard(s3_storage, job) == {}
    counted = [attempts_counted(s3_storage, lease_uri(job, f"shard-{i}-g0")) for i in range(5)]
    assert sorted(counted) == [0, 0, 1, 1, 1]


# Several workers --------------------------------------------------------------------------------


def test_an_idle_worker_waits_for_the_others(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, root_uri, speech(2), lease_seconds=1.5)
    other = LeaseTable(s3_storage, "other", LeaseTerms(1.5, 0.1))
    lease = other.try_claim(lease_uri(job, SHARD))
    assert lease is not None
    with lease, background(s3_storage, job, options) as worker:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            lease.progress()
            time.sleep(0.1)
            assert worker.thread.is_alive()
        assert reports(s3_storage, job)[0].phase == "waiting for other workers"
        result = ShardResult(
            plan_id=job.plan_id,
            shard_id=SHARD,
            shard_index=0,
            attempt=1,
            worker_id="other",
            status="done",
        )
        lease.require()
        assert publish_result(s3_storage, job, result)
        assert worker.join(10) == 0
    assert results_by_shard(s3_storage, job) == {SHARD: result}


class Meddler:
    """Storage that runs ``meddle`` before the first upload of a data file."""

    def __init__(self, storage: Storage, meddle) -> None:
        self._storage, self._meddle = storage, meddle

    def upload(self, path: Path, uri: str) -> ObjectInfo:
        meddle, self._meddle = self._meddle, lambda: None
        meddle()
        return self._storage.upload(path, uri)

    def __getattr__(self, name: str):
        return getattr(self._storage, name)


@pytest.mark.parametrize("is_stuck", [False, True])
def test_a_slow_download_keeps_its_lease_and_a_stuck_one_does_not(
    s3_storage: Storage, root_uri: str, options: WorkerOptions, is_stuck: bool
) -> None:
    job = write_plan(s3_storage, root_uri, speech(1), lease_seconds=1.5)
    go_on = threading.Event()

    class Slow:
        def download(self, uri: str, path: Path, etag: str | None = None) -> None:
            if uri.endswith(".wav"):
                with path.open("wb", buffering=0) as file:
                    while not go_on.wait(0.1):
                        file.write(b"" if is_stuck else b"0")
            s3_storage.download(uri, path, etag)

        def __getattr__(self, name: str):
            return getattr(s3_storage, name)

    observer = LeaseTable(s3_storage, "observer", LeaseTerms(1.5, 0.1))
    taken = None
    with background(Slow(), job, options) as worker:
        try:
            wait_until(lambda: any(r.held_shards for r in reports(s3_storage, job)))
            end = time.monotonic() + 4
            while taken is None and time.monotonic() < end:
                taken = observer.try_claim(lease_uri(job, SHARD))
                time.sleep(0.1)
        finally:
            go_on.set()
        if taken is not None:
            taken.release()
            taken.close()
        assert worker.join() == 0
    assert (taken is not None) == is_stuck


def test_a_holder_that_lost_its_lease_writes_no_result_and_takes_its_file_away(
    s3_storage: Storage, root_uri: str, options: WorkerOptions, tmp_path: Path
) -> None:
    job = write_plan(s3_storage, root_uri, speech(3), lease_seconds=2.0)
    prefix = lease_uri(job, SHARD)
    taken = []

    def take_over() -> None:
        # As after a pause of this very worker: the claim of another stands beside it.
        clock = [0.0]
        table = LeaseTable(s3_storage, "other", LeaseTerms(2.0, 0.1), lambda: clock[0])
        while not taken:
            lease = table.try_claim(prefix)
            clock[0] += 1
            taken.extend([lease] if lease else [])

    with background(Meddler(s3_storage, take_over), job, options) as worker:
        wait_until(lambda: taken)
        time.sleep(1.0)
        assert results_by_shard(s3_storage, job) == {}
        assert contents(s3_storage, job) == {}
        taken[0].release()
        taken[0].close()
        assert worker.join() == 0
    (result,) = results_by_shard(s3_storage, job).values()
    assert (result.attempt, result.worker_id == "other") == (3, False)
    assert len(contents(s3_storage, job)) == 1


def test_two_workers_that_finish_one_shard_leave_one_result(
    s3_storage: Storage, root_uri: str, options: WorkerOptions, tmp_path: Path
) -> None:
    """The second finishes between the first one's last look at its lease and its result."""
    job = write_plan(s3_storage, root_uri, speech(3), lease_seconds=2.0)
    other_job = write_plan(s3_storage, root_uri, speech(3), plan="other", lease_seconds=2.0)
    (tmp_path / "scratch2").mkdir()
    second = replace(options, scratch_path=tmp_path / "scratch2")
    assert run(s3_storage, other_job, second) == 0
    (theirs,) = results_by_shard(s3_storage, other_job).values()

    class Late:
        """The result of another worker comes in just before ours."""

        def create(self, uri: str, data: bytes) -> bool:
            if uri == result_uri(job.plan_uri, SHARD):
                assert publish_result(s3_storage, job, theirs)
            return s3_storage.create(uri, data)

        def __getattr__(self, name: str):
            return getattr(s3_storage, name)

    assert run(Late(), job, options) == 0
    assert results_by_shard(s3_storage, job) == {SHARD: theirs}
    assert list(s3_storage.list_objects(job.data_uri + "/")) == []
    assert theirs.data_file is not None
    assert s3_storage.head(theirs.data_file.uri) is not None


def test_stopping_releases_at_once(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, root_uri, speech(20), lease_seconds=600.0)
    quick = replace(options, progress_seconds=0.1)
    with background(s3_storage, job, quick) as worker:
        wait_until(lambda: any(r.held_shards and r.num_files for r in reports(s3_storage, job)))
        worker.stop.set()
        stopped = time.monotonic()
        assert worker.join(10) == 143
        assert time.monotonic() - stopped < 8
    assert results_by_shard(s3_storage, job) == {}
    assert contents(s3_storage, job) == {}
    assert attempts_counted(s3_storage, lease_uri(job, SHARD)) == 0
    (attempt,) = read_attempts(s3_storage, lease_uri(job, SHARD))
    assert attempt.ending is not None
    stop = threading.Event()
    stop.set()
    assert run(s3_storage, job, options, stop) == 143
    # The next worker goes on at once: it would wait ten minutes for a lease to expire.
    assert run(s3_storage, job, options) == 0
    (result,) = results_by_shard(s3_storage, job).values()
    assert (result.status, result.attempt, len(result.outcomes)) == ("done", 2, 20)


def test_an_operator_releases_what_an_evicted_pod_held(
    s3_storage: Storage, root_uri: str, options: WorkerOptions
) -> None:
    job = write_plan(s3_storage, root_uri, speech(40), lease_seconds=600.0)
    with background(s3_storage, job, replace(options, identity="pod/uid-1")):
        wait_until(lambda: any(r.held_shards for r in reports(s3_storage, job)))
        assert release_attempts_of(s3_storage, job, "pod/uid", "evicted") == []
        assert release_attempts_of(s3_storage, job, "pod/uid-1", "evicted") == [SHARD]
    ending = read_attempts(s3_storage, lease_uri(job, SHARD))[0].ending
    assert ending is not None
    assert ending.detail == "evicted"


# Real processes ---------------------------------------------------------------------------------


class Process:
    """``hcodec run`` as pods and local backends start it."""

    def __init__(self, job: TokenizeJob, folder: Path, endpoint: str | None, index: int) -> None:
        folder.mkdir()
        config = folder / "hcodec.toml"
        root = job.plan_uri.partition("/plans/")[0]
        storage = f'[storage]\nendpoint_url = "{endpoint}"\n' if endpoint else ""
        config.write_text(
            f"""format_version = 1
{storage}
[access]
source_prefixes = ["{root}/"]
destination_prefixes = ["{root}/"]
[catalog]
uri = "sqlite:///{folder}/catalog.db"
warehouse_uri = "{root}/data"
[work]
work_uri = "{root}/plans"
"""
        )
        command = [sys.executable, "-m", "hcodec_core.cli", "run", job_uri(job)]
        command += ["--config", str(config), "--index", str(index), "--scratch", str(folder)]
        self.log_path = folder / "log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def is_mid_shard(self, storage: Storage, job: TokenizeJob) -> bool:
        """Whether this process holds a shard (reported at once; how far it is, only seldom)."""
        mine = [r for r in reports(storage, job) if f"-{self.process.pid}-" in r.worker_id]
        assert self.process.poll() is None, self.log_path.read_text()
        return any(r.held_shards for r in mine)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def process(
    job: TokenizeJob, folder: Path, endpoint: str | None = None, index: int = 0
) -> Iterator[Process]:
    started = Process(job, folder, endpoint, index)
    try:
        yield started
    finally:
        started.end()


def test_a_killed_process_costs_nothing(
    s3_endpoint: str,
    s3_storage: Storage,
    bucket_uri: str,
    options: WorkerOptions,
    tmp_path: Path,
) -> None:
    """Two processes on one plan, one killed mid-shard: byte for byte what one worker writes."""
    # Enough work that a report comes in the middle of it, however fast the machine.
    files = speech(240)
    alone = write_plan(s3_storage, bucket_uri, files, num_shards=3, plan="alone")
    # That one worker mixes the files of two shards in its batches, to no effect.
    wide = replace(options, num_parallel_shards=2, num_decoders=2)
    assert run(s3_storage, alone, wide) == 0
    job = write_plan(s3_storage, bucket_uri, files, num_shards=3, lease_seconds=3.0)
    with (
        process(job, tmp_path / "a", s3_endpoint, 0) as first,
        process(job, tmp_path / "b", s3_endpoint, 1) as second,
    ):
        wait_until(lambda: first.is_mid_shard(s3_storage, job))
        first.process.kill()
        assert len(results_by_shard(s3_storage, job)) < 3
        assert second.process.wait(120) == 0, second.log_path.read_text()
    assert contents(s3_storage, job, max_orphans=1) == contents(s3_storage, alone)
    assert set(rows(s3_storage, job)) == set(files)
    counted = [attempts_counted(s3_storage, lease_uri(job, f"shard-{i}-g0")) for i in range(3)]
    assert sum(counted) == 1
    assert '"message": "Shard' in second.log_path.read_text()


@pytest.mark.slow
def test_a_terminated_process_hands_over(
    s3_storage: Storage, root_uri: str, options: WorkerOptions, tmp_path: Path
) -> None:
    job = write_plan(s3_storage, root_uri, speech(240), lease_seconds=600.0)
    with process(job, tmp_path / "a") as first:
        wait_until(lambda: first.is_mid_shard(s3_storage, job))
        first.process.terminate()
        started = time.monotonic()
        assert first.process.wait(20) == 143, first.log_path.read_text()
        assert time.monotonic() - started < 10
    assert run(s3_storage, job, options) == 0
    (result,) = results_by_shard(s3_storage, job).values()
    assert (result.status, result.attempt) == ("done", 2)
    assert attempts_counted(s3_storage, lease_uri(job, SHARD)) == 0
    assert len(contents(s3_storage, job)) == 1


@pytest.mark.slow
def test_a_bad_job_exits_with_43(s3_storage: Storage, root_uri: str, tmp_path: Path) -> None:
    job = write_plan(s3_storage, root_uri, speech(1), encode_id="f" * 32)
    with process(job, tmp_path / "a") as worker:
        assert worker.process.wait(60) == 43
        assert "encode id" in worker.log_path.read_text()


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_in_chaos(
    s3_endpoint: str, s3_storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    """Workers are killed, paused for longer than a lease, and terminated, again and again."""
    rng = np.random.default_rng(5)
    files = speech(60) | {f"bad {i}.wav": b"no audio" for i in range(6)}
    job = write_plan(
        s3_storage, bucket_uri, files, num_shards=8, lease_seconds=2.0, max_attempts=100
    )
    running: list[Process] = []
    paused: list[tuple[float, Process]] = []
    started = 0
    end = time.monotonic() + 240
    try:
        while len(results_by_shard(s3_storage, job)) < 8:
            assert time.monotonic() < end
            running = [one for one in running if one.process.poll() is None]
            while len(running) < 3:
                folder = tmp_path / f"worker{started}"
                running.append(Process(job, folder, s3_endpoint, started))
                started += 1
            time.sleep(float(rng.uniform(2, 5)))
            for since, one in [*paused]:
                if time.monotonic() - since > 4:
                    one.process.send_signal(signal.SIGCONT)
                    paused.remove((since, one))
            victim = running[rng.integers(len(running))]
            if started >= 12 or any(one is victim for _, one in paused):
                continue
            fate = rng.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
            victim.process.send_signal(fate)
            if fate == signal.SIGSTOP:
                paused.append((time.monotonic(), victim))
        for _, one in paused:
            one.process.send_signal(signal.SIGCONT)
        for one in running:
            assert one.process.wait(60) in {0, 143, -signal.SIGKILL}, one.log_path.read_text()
    finally:
        for one in running:
            one.end()
    assert set(rows(s3_storage, job)) == {name for name in files if "clip" in name}
    found = outcomes(s3_storage, job)
    assert sum(o.outcome is Outcome.QUARANTINED for o in found.values()) == 6
    assert len(contents(s3_storage, job, max_orphans=started)) == 8
