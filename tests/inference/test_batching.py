from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from hcodec_core.errors import AudioError, PreemptedError, QuarantineReason
from hcodec_core.inference.batching import Batcher, BatchShape
from hcodec_core.inference.engine import ClipTokens


class Recorder:
    """Stands for the engine: notes the batches, and breaks on marked clips."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode_clips(self, clips):
        assert self.gate.wait(10)
        self.batches.append([len(clip) for clip in clips])
        if any(np.isnan(clip).any() for clip in clips):
            raise AudioError(QuarantineReason.NON_FINITE, "not finite")
        if any(np.isinf(clip).any() for clip in clips):
            raise RuntimeError("device lost")
        codes = {"semantic": np.zeros((1, 1), np.int32)}
        return [ClipTokens(codes, 1, len(clip)) for clip in clips]


def clip(num_samples: int, value: float = 0.0) -> np.ndarray:
    return np.full(num_samples, value, np.float32)


def batcher_of(recorder: Recorder, **options) -> Batcher:
    """Clips of 10 to 19 samples share batches of 3, and so on."""
    options = {"max_held_samples": 1000, "max_wait_seconds": 60} | options
    return Batcher(recorder, lambda n: BatchShape(n // 10, 3), **options)


def test_full_batches_run_and_others_wait_for_company() -> None:
    recorder = Recorder()
    with batcher_of(recorder) as batcher:
        batcher.begin()
        alone = batcher.submit(clip(25))
        full = [batcher.submit(clip(10 + i)) for i in range(3)]
        for index, future in enumerate(full):
            assert future.result(5).tokens.num_samples == 10 + index
        time.sleep(0.3)
        assert not alone.done()
        batcher.end()
        assert alone.result(5).tokens.num_samples == 25
    assert recorder.batches == [[10, 11, 12], [25]]


def test_a_clip_does_not_wait_for_ever() -> None:
    recorder = Recorder()
    with batcher_of(recorder, max_wait_seconds=0.2) as batcher:
        batcher.begin()
        started = time.monotonic()
        batcher.submit(clip(10)).result(5)
        assert time.monotonic() - started >= 0.2


def test_company_may_come_from_another_shard() -> None:
    recorder = Recorder()
    with batcher_of(recorder) as batcher:
        batcher.begin()
        batcher.begin()
        first = [batcher.submit(clip(10)), batcher.submit(clip(11))]
        batcher.end()
        time.sleep(0.2)
        assert not first[0].done()
        batcher.submit(clip(12)).result(5)
        assert all(future.done() for future in first)
    assert recorder.batches == [[10, 11, 12]]


def test_too_much_held_audio_runs_part_filled_batches_and_holds_feeders_back() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    with batcher_of(recorder, max_held_samples=50) as batcher:
        batcher.begin()
        futures = [batcher.submit(clip(25)), batcher.submit(clip(35))]
        late: list = []
        feeder = threading.Thread(target=lambda: late.append(batcher.submit(clip(45))))
        feeder.start()
        feeder.join(0.3)
        assert feeder.is_alive(), "more audio is held than allowed"
        recorder.gate.set()
        for future in futures:
            future.result(5)
        feeder.join(5)
        assert not feeder.is_alive()
        batcher.end()
        late[0].result(5)


def test_one_bad_clip_does_not_spoil_its_batch() -> None:
    recorder = Recorder()
    with batcher_of(recorder) as batcher:
        batcher.begin()
        futures = [batcher.submit(clip(10, value)) for value in (0.0, np.nan, 0.0)]
        assert futures[0].result(5).tokens.num_frames == 1
        with pytest.raises(AudioError):
            futures[1].result(5)
        assert futures[2].result(5).tokens.num_frames == 1


def test_an_error_of_the_device_reaches_all_who_wait_and_the_thread_goes_on() -> None:
    recorder = Recorder()
    with batcher_of(recorder) as batcher:
        batcher.begin()
        futures = [batcher.submit(clip(10, value)) for value in (0.0, np.inf, 0.0)]
        for future in futures:
            with pytest.raises(RuntimeError, match="device lost"):
                future.result(5)
        batcher.end()
        batcher.submit(clip(10)).result(5)


def test_cancelled_clips_are_not_encoded() -> None:
    recorder = Recorder()
    with batcher_of(recorder) as batcher:
        batcher.begin()
        futures = [batcher.submit(clip(10 + i)) for i in range(2)]
        futures[0].cancel()
        batcher.end()
        futures[1].result(5)
    assert recorder.batches == [[11]]


def test_closing_lets_nobody_wait() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    batcher = batcher_of(recorder, max_held_samples=30)
    batcher.begin()
    running = [batcher.submit(clip(10)) for _ in range(3)]
    time.sleep(0.2)
    errors: list[BaseException] = []

    def feed() -> None:
        try:
            batcher.submit(clip(10))
        except PreemptedError as error:
            errors.append(error)

    feeder = threading.Thread(target=feed)
    feeder.start()
    closer = threading.Thread(target=batcher.close)
    closer.start()
    feeder.join(5)
    assert len(errors) == 1
    recorder.gate.set()
    closer.join(5)
    assert all(future.result(5) for future in running)
    with pytest.raises(PreemptedError):
        batcher.submit(clip(10))


def test_closing_cancels_what_waits() -> None:
    with batcher_of(Recorder()) as batcher:
        batcher.begin()
        waiting = batcher.submit(clip(10))
    with pytest.raises(CancelledError):
        waiting.result(5)


def test_seconds_are_shared_by_length() -> None:
    recorder = Recorder()
    with batcher_of(recorder) as batcher:
        batcher.begin()
        recorder.gate.clear()
        futures = [batcher.submit(clip(n)) for n in (10, 10, 19)]
        time.sleep(0.2)
        recorder.gate.set()
        seconds = [future.result(5).seconds for future in futures]
        assert seconds[2] == pytest.approx(1.9 * seconds[0])
        assert sum(seconds) == pytest.approx(batcher.busy_seconds)
