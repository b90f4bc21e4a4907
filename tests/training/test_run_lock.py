"""Two processes pointed at one run folder: one trains, the other says who does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import kill, start_ranks, write_clips, write_teacher

from hcodec_core.cli import main
from hcodec_core.config import StorageConfig
from hcodec_core.dataset.leases import LeaseTable, LeaseTerms, is_gone, worker_identity
from hcodec_core.errors import LeaseLostError
from hcodec_core.storage import Storage, open_storage
from hcodec_core.training.recipe import load_recipe
from hcodec_core.training.run import TrainContext, TrainOptions, TrainRequest, train
from hcodec_core.training.run_lock import RunLock, take_run
from hcodec_core.training.trainer import TrainProgress

ELSEWHERE = "elsewhere-12-345-0123abcd"
LIVELY = LeaseTerms(lease_seconds=300.0, heartbeat_seconds=0.2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lock")
    write_clips(path / "clips", 8)
    write_teacher(path / "teacher")
    return path


@pytest.fixture
def storage() -> Storage:
    return open_storage(StorageConfig())


def claimed(storage: Storage, run_uri: str, worker_id: str, terms: LeaseTerms) -> RunLock:
    lease = LeaseTable(storage, worker_id, terms).try_claim(f"{run_uri}/lock")
    assert lease is not None
    return RunLock(lease, run_uri, terms)


@pytest.fixture
def abandoned(storage: Storage, tmp_path: Path) -> Iterator[RunLock]:
    """A lock whose holder, on another host, shows no sign of life for the length of the test."""
    lock = claimed(storage, f"file://{tmp_path}", ELSEWHERE, LeaseTerms(3000.0, 3000.0))
    yield lock
    lock.__exit__(None, None, None)


def test_a_second_process_is_told_who_trains_and_a_killed_one_lets_go(
    place: Path, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "run"
    arguments = ["train", "--recipe", "tiny", "--data", str(place / "clips"), "--out", str(out)]
    arguments += ["--teacher", str(place / "teacher"), "--tracking", "none", "--resume"]
    arguments += ["--config", str(place / "none.toml"), "--set", "steps=100000"]
    ranks = start_ranks([*arguments, "--set", "cadence.checkpoint_every=100000"], 1)
    try:
        ranks[0].wait_for_step(1)
        assert ranks[0].process.poll() is None, "".join(ranks[0].lines)
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert f"run file://{out} is being trained by process" in said
        assert f"-{ranks[0].process.pid}-" in said
    finally:
        kill(ranks)
    with take_run(storage, f"file://{out}", worker_identity()) as lock:
        lock.require()


def test_one_on_another_host_that_lives_keeps_the_run(storage: Storage, tmp_path: Path) -> None:
    with (
        claimed(storage, f"file://{tmp_path}", ELSEWHERE, LIVELY),
        pytest.raises(LeaseLostError, match=f"is being trained by process {ELSEWHERE} since"),
    ):
        take_run(storage, f"file://{tmp_path}", worker_identity(), LIVELY)
    take_run(storage, f"file://{tmp_path}", worker_identity(), LIVELY).__exit__(None, None, None)


def test_one_that_shows_no_life_loses_the_run(
    storage: Storage, tmp_path: Path, abandoned: RunLock
) -> None:
    terms = LeaseTerms(lease_seconds=1.0)
    with take_run(storage, f"file://{tmp_path}", worker_identity(), terms) as lock:
        lock.require()
        with pytest.raises(LeaseLostError, match="took over the run"):
            abandoned.require()


def test_a_process_that_lost_its_run_writes_no_checkpoint(
    place: Path, storage: Storage, tmp_path: Path
) -> None:
    run_uri = f"file://{tmp_path}/run"
    taken = threading.Event()

    def take_over(progress: TrainProgress) -> None:
        if progress.step == 3:
            claim = b'{"attempt": 2, "worker_id": "other", "nonce": "n"}'
            assert storage.create(f"{run_uri}/lock/2.json", claim)
            taken.set()

    recipe = load_recipe("tiny", {"steps": 10, "cadence.num_samples": 0})
    request = TrainRequest(
        recipe, (f"file://{place}/clips",), run_uri, teacher=str(place / "teacher")
    )
    with pytest.raises(LeaseLostError, match="took over the run"):
        train(request, TrainOptions(tmp_path), TrainContext(report=take_over))
    assert taken.is_set()
    assert not list((tmp_path / "run").glob("checkpoints/*/complete.json"))


@pytest.mark.parametrize("name", ["elsewhere-12-345-0123abcd", "0f1e-pod-uid", "trainer"])
def test_what_cannot_be_told_is_not_called_gone(name: str) -> None:
    assert not is_gone(name)
    assert not is_gone(worker_identity())
