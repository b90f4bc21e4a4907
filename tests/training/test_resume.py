"""A run that is killed anywhere and resumed gives the same bits as one that was not."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
from runs import finish, history_of, kill, start_ranks, write_clips, write_teacher

from hcodec_core.models.hcodec.config import tiny_1_5

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    write_clips(path / "clips", 10)
    # Some files that no sample can come from: what replaces them must not depend on workers.
    (path / "clips" / "broken-1.wav").write_bytes(b"RIFF nonsense")
    (path / "clips" / "broken-2.wav").write_bytes(b"")
    write_teacher(path / "teacher")
    return path


def arguments(place: Path, out: str, *more: str, num_workers: int = 0) -> list[str]:
    return [
        *("train", "--recipe", "tiny", "--data", str(place / "clips"), "--out", str(place / out)),
        *("--teacher", str(place / "teacher"), "--tracking", "none", "--resume"),
        *("--config", str(place / "none.toml"), "--workers", str(num_workers)),
        *("--set", f"steps={STEPS}", "--set", "cadence.checkpoint_every=5", *more),
    ]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run of two ranks that nobody disturbed."""
    finish(start_ranks(arguments(place, "whole"), 2))
    return place / "whole"


def weights_of(run_path: Path) -> bytes:
    return (run_path / "codec" / "model.safetensors").read_bytes()


def check_same(run_path: Path, whole: Path) -> None:
    assert weights_of(run_path) == weights_of(whole)
    assert history_of(run_path) == history_of(whole)
    assert sorted(history_of(run_path)) == list(range(1, STEPS + 1))


def run_with_kills(place: Path, out: str, kill_steps: list[int]) -> Path:
    for step in kill_steps:
        ranks = start_ranks(arguments(place, out), 2)
        ranks[0].wait_for_step(step)
        kill(ranks)
    finish(start_ranks(arguments(place, out), 2))
    return place / out


def test_killed_terminated_and_resumed(place: Path, whole: Path):
    first, second = random.randint(1, 5), random.randint(6, STEPS - 2)
    ranks = start_ranks(arguments(place, "broken-off"), 2)
    ranks[0].wait_for_step(first)
    kill(ranks)
    ranks = start_ranks(arguments(place, "broken-off"), 2)
    ranks[0].wait_for_step(second)
    ranks[1].process.send_signal(signal.SIGTERM)  # one rank is told; all must stop together
    codes = [rank.process.wait(timeout=300) for rank in ranks]
    assert codes == [143, 143], "".join(ranks[0].lines)
    newest = max(place.glob("broken-off/checkpoints/*/complete.json"))
    assert int(newest.parent.name.removeprefix("step-")) >= second
    finish(start_ranks(arguments(place, "broken-off"), 2))
    check_same(place / "broken-off", whole)


@pytest.mark.slow
def test_killed_at_ten_random_steps(place: Path, whole: Path):
    steps = sorted(random.randint(1, STEPS - 1) for _ in range(10))
    check_same(run_with_kills(place, "killed-often", steps), whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(place: Path, whole: Path):
    ranks = start_ranks(arguments(place, "damaged", "--set", "cadence.keep_last=3"), 2)
    ranks[0].wait_for_step(11)
    kill(ranks)
    run_path = place / "damaged"
    folders = sorted(p.parent for p in run_path.glob("checkpoints/*/complete.json"))
    assert [folder.name for folder in folders] == ["step-000000005", "step-000000010"]
    victim = next(folders[-1].glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    ranks = start_ranks(arguments(place, "damaged"), 2)
    finish(ranks)
    assert any("step 10 cannot be used" in line for line in ranks[0].lines), ranks[0].lines
    check_same(run_path, whole)


@pytest.mark.slow
def test_worker_processes_change_nothing(place: Path, whole: Path):
    finish(start_ranks(arguments(place, "workers", num_workers=1), 2))
    check_same(place / "workers", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "num_ranks", "changes"),
    [
        ("hcodec-1.5-tiny", 1, []),  # thresholds, groups and first codebooks must come back
        (
            "hhcodec-tiny",  # averages of hits, the head beside the codec, and the stage
            2,
            ["quantizer.dead_below=0", "losses.distillation=1", 'learns_from={"vocoder": 7}'],
        ),
    ],
)
def test_other_families_killed_and_resumed(
    place: Path, codec: str, num_ranks: int, changes: list[str]
):
    teacher = place / "teacher"
    if codec == "hcodec-1.5-tiny":
        teacher = write_teacher(place / "teacher-1.5", tiny_1_5().ssl)
    more = ["--teacher", str(teacher)]
    for change in (f"codec={codec}", *changes):
        more += ["--set", change]
    finish(start_ranks(arguments(place, f"whole-{codec}", *more), num_ranks))
    ranks = start_ranks(arguments(place, f"killed-{codec}", *more), num_ranks)
    ranks[0].wait_for_step(random.randint(6, STEPS - 2))
    kill(ranks)
    finish(start_ranks(arguments(place, f"killed-{codec}", *more), num_ranks))
    check_same(place / f"killed-{codec}", place / f"whole-{codec}")


def test_bad_files_are_named_once(whole: Path):
    bad = json.loads((whole / "quarantine.json").read_text())
    names = {entry["uri"].rpartition("/")[2]: entry["reason"] for entry in bad}
    assert names.get("broken-2.wav", "empty") == "empty"
    assert set(names) <= {"broken-1.wav", "broken-2.wav"}
    assert names
