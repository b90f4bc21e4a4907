"""Decoder processes that die, hang, run out of memory or lose their parent. All faults are real."""

import gc
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from hcodec_core.audio.decode import DecodeSettings, decode_all
from hcodec_core.audio.native import Samples
from hcodec_core.audio.segments import segments
from hcodec_core.audio.supervisor import DecodedStream, DecoderPool
from hcodec_core.errors import (
    AudioError,
    HCodecError,
    PreemptedError,
    QuarantineReason,
    StorageError,
)

CLIPS = Path(__file__).parents[1] / "corpus" / "clips"
SETTINGS = DecodeSettings(sample_rate=16_000, timeout_seconds=20)


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2, SETTINGS) as pool:
        yield pool


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    """Ten minutes: more than all pipes and buffers hold."""
    return write_noise(tmp_path / "long.wav", 600)


def write_noise(path: Path, seconds: int) -> Path:
    """Noise at 8 kHz, 16 bits, in a WAV file of unfinished length."""
    noise = np.random.default_rng(0).integers(-9000, 9000, 8_000 * seconds, dtype=np.int16)
    fmt = struct.pack("<IHHIIHH", 16, 1, 1, 8_000, 16_000, 2, 16)
    size = struct.pack("<I", noise.nbytes)
    path.write_bytes(b"RIFF\0\0\0\0WAVEfmt " + fmt + b"data" + size + noise.tobytes())
    return path


def kill(stream: DecodedStream, number: int = signal.SIGKILL) -> None:
    """Kill the process of a stream, and wait until it is gone."""
    assert stream.child_pid is not None
    process = psutil.Process(stream.child_pid)
    process.send_signal(number)
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def collected(stream: DecodedStream) -> Samples:
    return np.concatenate(list(stream))


# Deaths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_one_death_costs_nothing(pool: DecoderPool, long_file: Path, number: int) -> None:
    """The blocks after the restart go on where those before it ended, to the bit."""
    stream = pool.decode(long_file)
    blocks = [next(stream) for _ in range(5)]
    first_pid = stream.child_pid
    kill(stream, number)
    blocks.append(next(stream))
    while stream.child_pid == first_pid:  # what was in the pipe comes first
        blocks.append(next(stream))
    blocks.extend(stream)
    samples, info = decode_all(long_file, SETTINGS)
    np.testing.assert_array_equal(np.concatenate(blocks), samples)
    assert stream.info == info


def kill_again_and_again(stream: DecodedStream) -> None:
    for _ in stream:
        kill(stream, signal.SIGSEGV)


def test_two_deaths_are_the_files_fault(pool: DecoderPool, long_file: Path) -> None:
    with pytest.raises(AudioError, match=r"killed the decoder process 2 times .*SIGSEGV") as error:
        kill_again_and_again(pool.decode(long_file))
    assert error.value.reason is QuarantineReason.CRASHED
    # The pool goes on.
    assert len(collected(pool.decode(CLIPS / "short/blip.wav"))) == 3200


def test_a_death_while_idle_is_nobodys_fault() -> None:
    with DecoderPool(1, SETTINGS) as pool:
        for _ in range(3):
            stream = pool.decode(CLIPS / "short/blip.wav")
            assert stream.child_pid is not None
            child = psutil.Process(stream.child_pid)
            assert len(collected(stream)) == 3200
            child.kill()
            wait_until(lambda child=child: child.status() == psutil.STATUS_ZOMBIE)


def test_silence_is_a_timeout(long_file: Path) -> None:
    with DecoderPool(1, DecodeSettings(16_000, timeout_seconds=2)) as pool:
        stream = pool.decode(long_file)
        next(stream)
        pid = stream.child_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(AudioError, match=r"silent for 2 s") as error:
            list(stream)
        assert error.value.reason is QuarantineReason.TIMEOUT
        assert not psutil.pid_exists(pid)
        assert len(collected(pool.decode(CLIPS / "short/blip.wav"))) == 3200


def test_a_slow_consumer_is_no_timeout(long_file: Path) -> None:
    with DecoderPool(1, DecodeSettings(16_000, timeout_seconds=2)) as pool:
        stream = pool.decode(long_file)
        next(stream)
        time.sleep(3)
        assert len(collected(stream)) > 9_000_000


def test_a_missing_file_is_not_the_files_fault(pool: DecoderPool, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        list(pool.decode(tmp_path / "gone.wav"))


def test_reasons_cross_the_pipe(pool: DecoderPool) -> None:
    with pytest.raises(AudioError, match="playlist or script") as error:
        list(pool.decode(CLIPS / "broken/concat-script.flac"))
    assert error.value.reason is QuarantineReason.REFUSED_CONTAINER


def test_names_that_are_not_unicode(pool: DecoderPool, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.wav"))
    path.write_bytes((CLIPS / "short/blip.wav").read_bytes())
    assert len(collected(pool.decode(path))) == 3200


# Memory -----------------------------------------------------------------------------------------


def test_memory_stays_bounded_and_the_decoder_waits(tmp_path: Path) -> None:
    """115 MB of samples pass through; neither side ever holds more than a few blocks."""
    with DecoderPool(1, SETTINGS) as pool:
        stream = pool.decode(write_noise(tmp_path / "longer.wav", 1800))
        blocks = iter(stream)
        next(blocks)
        assert stream.child_pid is not None
        child = psutil.Process(stream.child_pid)
        time.sleep(0.5)
        assert child.io_counters().read_chars < 12_000_000  # of 29 MB: held back by the pipe
        before = psutil.Process().memory_info().rss
        peak = child_peak = num_samples = 0
        for index, block in enumerate(blocks):
            num_samples += len(block)
            if index % 20 == 0 and stream.child_pid:
                peak = max(peak, psutil.Process().memory_info().rss)
                child_peak = max(child_peak, child.memory_info().rss)
        assert num_samples > 28_000_000
        assert peak - before < 20_000_000
        assert child_peak < 120_000_000


def test_address_space_is_limited_and_its_end_is_a_reason(tmp_path: Path) -> None:
    """An index of 250 MB (sparse) does not fit into a process of 400 MB."""
    path = tmp_path / "huge.m4a"
    size = 250 << 20
    path.write_bytes(
        struct.pack(">I", 16) + b"ftypM4A " + bytes(4) + struct.pack(">I", size) + b"moov"
    )
    os.truncate(path, 16 + size)
    with DecoderPool(1, SETTINGS, address_space_bytes=400 << 20) as pool:
        with pytest.raises(AudioError, match="more memory than allowed") as error:
            list(pool.decode(path))
        assert error.value.reason is QuarantineReason.TOO_LARGE
        assert len(collected(pool.decode(CLIPS / "short/blip.wav"))) == 3200
    with DecoderPool(1, SETTINGS) as pool, pytest.raises(AudioError, match="no audio track"):
        list(pool.decode(path))


def test_a_process_that_cannot_start_is_no_files_fault() -> None:
    with (
        DecoderPool(1, SETTINGS, address_space_bytes=30 << 20) as pool,
        pytest.raises(HCodecError, match="does not start") as error,
    ):
        pool.decode(CLIPS / "short/blip.wav")
    assert not isinstance(error.value, AudioError)


# Several files, leaving early, closing ----------------------------------------------------------


def test_threads_share_a_pool(pool: DecoderPool) -> None:
    paths = sorted((CLIPS / "english").iterdir()) * 2

    def num_frames(path: Path) -> int:
        parts = segments(
            pool.decode(path),
            sample_rate=16_000,
            hop_length=320,
            segment_seconds=10,
            halo_seconds=1,
        )
        return sum(part.num_interior_frames for part in parts)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(num_frames, paths))
    expected = [-(-decode_all(path, SETTINGS)[1].num_samples // 320) for path in paths]
    assert found == expected


def test_files_are_in_flight_side_by_side(pool: DecoderPool, long_file: Path) -> None:
    one, other = pool.decode(long_file), pool.decode(long_file)
    assert one.child_pid != other.child_pid
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_stream_left_early_gives_its_process_back(long_file: Path) -> None:
    with DecoderPool(1, SETTINGS) as pool:
        with pool.decode(long_file) as stream:
            next(stream)
        assert stream.child_pid is None
        forgotten = pool.decode(long_file)
        next(forgotten)
        del forgotten
        gc.collect()
        assert len(collected(pool.decode(CLIPS / "short/blip.wav"))) == 3200


def test_closing_ends_streams_waiters_and_processes(long_file: Path) -> None:
    pool = DecoderPool(1, SETTINGS)
    stream = pool.decode(long_file)
    next(stream)
    pid = stream.child_pid
    refused: list[BaseException] = []

    def wait_for_a_process() -> None:
        try:
            pool.decode(long_file)
        except PreemptedError as error:
            refused.append(error)

    waiters = [threading.Thread(target=wait_for_a_process) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.1)
    pool.close()
    for waiter in waiters:
        waiter.join(10)
    assert len(refused) == 3
    with pytest.raises(PreemptedError):
        list(stream)
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert psutil.Process().children() == []


def test_an_idle_pool_closes_at_once() -> None:
    """Its process ends by itself when its input is closed."""
    with DecoderPool(1, SETTINGS) as pool:
        assert len(collected(pool.decode(CLIPS / "short/blip.wav"))) == 3200
        start = time.monotonic()
    assert time.monotonic() - start < 1.5


# Parents ----------------------------------------------------------------------------------------

PARENT = """
    import sys, threading
    from pathlib import Path
    from hcodec_core.audio.decode import DecodeSettings
    from hcodec_core.audio.supervisor import DecoderPool

    pool = DecoderPool(1, DecodeSettings(sample_rate=16_000))
    streams = []

    def begin():
        streams.append(pool.decode(Path(sys.argv[1])))
        next(streams[0])

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    print(streams[0].child_pid, flush=True)
    sys.stdin.read()
    next(streams[0])
    print(streams[0].child_pid, flush=True)
    sys.exit(0)
"""


def start_parent(long_file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(long_file)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_decoders_die_with_a_killed_parent(long_file: Path) -> None:
    with start_parent(long_file) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
        wait_until(lambda: not psutil.pid_exists(pid) or is_zombie(pid))


def test_decoders_outlive_the_thread_that_asked_and_end_at_exit(long_file: Path) -> None:
    with start_parent(long_file) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        parent.stdin.close()
        assert int(parent.stdout.readline()) == pid
        assert parent.wait(20) == 0
    wait_until(lambda: not psutil.pid_exists(pid) or is_zombie(pid))


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_start_up_is_light() -> None:
    """Neither side loads torch or a model library to decode; the parent loads no decoder."""
    code = (
        "import sys, hcodec_core.audio.supervisor, hcodec_core.audio.decoder_child;"
        "print(sorted({'torch', 'pydantic', 'soundfile', 'av', 'soxr'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"[]"
