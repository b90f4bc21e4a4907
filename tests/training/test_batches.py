"""Samples are functions of (seed, step, place); sources are pinned and split once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from runs import RATE, write_clips

from hcodec_core.config import StorageConfig
from hcodec_core.errors import BudgetExceededError, ConfigError
from hcodec_core.storage import Storage, open_storage
from hcodec_core.training.augment import change_speed, vary
from hcodec_core.training.batches import (
    Batch,
    BatchSource,
    Place,
    SampleDataset,
    SamplePlan,
    Share,
)
from hcodec_core.training.recipe import AugmentRecipe, DataRecipe
from hcodec_core.training.sources import (
    SourceFile,
    list_sources,
    read_sources,
    split_sources,
    write_sources,
)
from tests.dataset.conftest import local_world
from tests.dataset.factories import World

__all__ = ["local_world"]

VARIED = AugmentRecipe(equaliser_share=0.5, noise_share=0.5, speed=(0.9, 1.1))


@pytest.fixture
def storage() -> Storage:
    return open_storage(StorageConfig())


def dataset(
    files: list[SourceFile], scratch_path: Path, data: DataRecipe | None = None, seed: int = 3
) -> SampleDataset:
    data = data or DataRecipe(allows_lower_rates=True, synthetic_share=0.2)
    plan = SamplePlan(seed, RATE, 6400, data, VARIED)
    return SampleDataset(files, plan, Place(StorageConfig(), scratch_path))


def steps_of(
    source: SampleDataset, share: Share, start: int, end: int, num_workers: int = 0
) -> list[Batch]:
    return list(BatchSource(source, share, num_workers).batches(start, end))


def test_batches_follow_from_their_step_alone(tmp_path: Path, storage: Storage):
    files = list_sources(storage, [write_clips(tmp_path / "clips", 5)], RATE)
    source = dataset(files, tmp_path / "a")
    whole = steps_of(source, Share(4), 0, 5)
    late = steps_of(dataset(files, tmp_path / "b"), Share(4), 3, 5)
    for expected, found in zip(whole[3:], late, strict=True):
        assert torch.equal(expected.audio, found.audio)
        assert expected.origins == found.origins
    other = dataset(files, tmp_path / "a", seed=4)
    assert not torch.equal(steps_of(other, Share(4), 0, 1)[0].audio, whole[0].audio)
    source.close()


def test_ranks_share_a_batch_in_order(tmp_path: Path, storage: Storage):
    files = list_sources(storage, [write_clips(tmp_path / "clips", 5)], RATE)
    source = dataset(files, tmp_path / "a")
    whole = steps_of(source, Share(4), 2, 3)[0]
    halves = [steps_of(source, Share(4, rank, 2), 2, 3)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat([half.audio for half in halves]), whole.audio)
    source.close()


def test_every_file_is_taken_once_an_epoch(tmp_path: Path, storage: Storage):
    files = list_sources(storage, [write_clips(tmp_path / "clips", 6)], RATE)
    source = dataset(files, tmp_path / "a", DataRecipe(allows_lower_rates=True))
    for epoch in (0, 1):
        batches = steps_of(source, Share(2), 3 * epoch, 3 * epoch + 3)
        uris = [origin.uri for batch in batches for origin in batch.origins]
        assert sorted(uris) == [file.uri for file in files]
    source.close()


def test_worker_processes_give_the_same_batches(tmp_path: Path, storage: Storage):
    files = list_sources(storage, [write_clips(tmp_path / "clips", 5)], RATE)
    source = dataset(files, tmp_path / "a")
    own = steps_of(source, Share(4), 0, 3)
    theirs = steps_of(source, Share(4), 0, 3, num_workers=2)
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(own, theirs, strict=True))
    source.close()


def test_bad_and_changed_files_are_replaced_and_named(tmp_path: Path, storage: Storage):
    uri = write_clips(tmp_path / "clips", 3)
    (tmp_path / "clips" / "x.wav").write_bytes(b"no audio")
    files = list_sources(storage, [uri], RATE)
    changed = tmp_path / "clips" / "000-a.wav"
    changed.write_bytes(changed.read_bytes() + b"\0\0")
    source = dataset(files, tmp_path / "a", DataRecipe(allows_lower_rates=True))
    batches = steps_of(source, Share(4), 0, 3)
    bad = {b.uri.rpartition("/")[2]: b.reason for batch in batches for b in batch.bad}
    assert bad == {"x.wav": "not_audio", "000-a.wav": "changed"}
    again = steps_of(dataset(files, tmp_path / "b", source._plan.data), Share(4), 2, 3)
    assert torch.equal(again[0].audio, batches[2].audio)
    source.close()


def test_nothing_but_bad_files_stops(tmp_path: Path, storage: Storage):
    (tmp_path / "clips").mkdir()
    for number in range(2):
        (tmp_path / "clips" / f"{number}.wav").write_bytes(b"no audio")
    files = list_sources(storage, [f"file://{tmp_path}/clips"], RATE)
    source = dataset(files, tmp_path / "a", DataRecipe())
    with pytest.raises(BudgetExceededError, match="in a row gave no sample"):
        steps_of(source, Share(2), 0, 1)
    source.close()


def test_lower_rates_are_refused_unless_allowed(tmp_path: Path, storage: Storage):
    files = list_sources(storage, [write_clips(tmp_path / "clips", 1, rate=8000)], RATE)
    refusing = dataset(files, tmp_path / "a", DataRecipe())
    with pytest.raises(BudgetExceededError, match="8000 Hz"):
        steps_of(refusing, Share(1), 0, 1)
    allowing = dataset(files, tmp_path / "a", DataRecipe(allows_lower_rates=True))
    assert steps_of(allowing, Share(1), 0, 1)[0].audio.shape == (1, 1, 6400)
    refusing.close()
    allowing.close()


def test_the_cache_is_bounded_and_changes_nothing(tmp_path: Path, storage: Storage):
    files = list_sources(storage, [write_clips(tmp_path / "clips", 4)], RATE)
    data = DataRecipe(allows_lower_rates=True)
    plan = SamplePlan(3, RATE, 6400, data, VARIED)
    small = SampleDataset(files, plan, Place(StorageConfig(), tmp_path / "s", cache_bytes=100_000))
    large = SampleDataset(files, plan, Place(StorageConfig(), tmp_path / "l"))
    for a, b in zip(steps_of(small, Share(4), 0, 3), steps_of(large, Share(4), 0, 3), strict=True):
        assert torch.equal(a.audio, b.audio)
    assert len(list((tmp_path / "s" / "pcm").iterdir())) == 1
    assert len(list((tmp_path / "l" / "pcm").iterdir())) == 4
    small.close()
    large.close()


def test_no_group_is_on_both_sides():
    files = [SourceFile(f"file:///a/{n % 7}-{n}.flac", "e") for n in range(70)]
    recipe = DataRecipe(held_out_share=0.4, speaker_pattern=r"/(\d+)-\d+")
    split = split_sources(files, recipe)
    sides = [
        {f.uri.rpartition("/")[2][0] for f in side} for side in (split.training, split.held_out)
    ]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    fewer = split_sources(files[:49], recipe)  # other files move nobody to the other side
    assert set(fewer.held_out) <= set(split.held_out)
    moved = [SourceFile(f.uri.replace("/a/", "/b/c/"), f.etag) for f in files]
    assert [f.uri.rpartition("/")[2] for f in split_sources(moved, recipe).held_out] == [
        f.uri.rpartition("/")[2] for f in split.held_out
    ]


@pytest.mark.parametrize(("share", "side"), [(1e-6, "None"), (1 - 1e-6, "All")])
def test_an_empty_side_is_refused(share: float, side: str):
    files = [SourceFile(f"file:///a/{n}.flac", "e") for n in range(3)]
    with pytest.raises(ConfigError, match=f"^{side} of 3 files|^{side} 3 files"):
        split_sources(files, DataRecipe(held_out_share=share))


def test_sources_are_pinned_as_they_were(tmp_path: Path, storage: Storage):
    folder_uri = write_clips(tmp_path / "clips", 3)
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(
        '{"audio_filepath": "clips/000-a.wav", "speaker": "ann"}\n'
        '{"audio_filepath": "clips/001-a.wav"}\n'
    )
    files = list_sources(storage, [f"file://{manifest}", folder_uri], RATE)
    assert [file.speaker for file in files] == ["ann", None, None]
    write_sources(storage, f"file://{tmp_path}/files.parquet", files)
    assert read_sources(storage, f"file://{tmp_path}/files.parquet") == files


def test_a_version_of_another_rate_is_refused(local_world: World):
    local_world.put("a.wav", "b.wav")
    local_world.version()
    config = local_world.config
    found = list_sources(local_world.storage, ["dataset:demo@v1"], 16_000, config)
    assert [file.uri for file in found] == [local_world.uri("a.wav"), local_world.uri("b.wav")]
    with pytest.raises(ConfigError, match=r"demo v1 was made at 16000 Hz; .* works at 48000 Hz"):
        list_sources(local_world.storage, ["dataset:demo@v1"], 48_000, config)


def test_no_files_is_an_error(tmp_path: Path, storage: Storage):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="There is no file under"):
        list_sources(storage, [f"file://{tmp_path}/empty"], RATE)


def test_augmentation_keeps_length_and_level():
    rng = np.random.default_rng(0)
    audio = rng.standard_normal(8000).astype(np.float32) * 0.1
    for speed in (0.9, 1.0, 1.1):
        assert len(change_speed(audio, speed, 7000)) == 7000
    recipe = AugmentRecipe(peak=(0.5, 0.5), equaliser_share=1, noise_share=1)
    varied = vary(audio, RATE, recipe, np.random.default_rng(1))
    assert varied.dtype == np.float32
    assert abs(np.abs(varied).max() - 0.5) < 1e-6
    plain = vary(audio, RATE, AugmentRecipe(peak=None), np.random.default_rng(1))
    assert np.array_equal(plain, audio)
    silence = np.zeros(8000, dtype=np.float32)
    assert not vary(silence, RATE, AugmentRecipe(), np.random.default_rng(1)).any()


def test_speed_changes_pitch(tmp_path: Path):
    seconds = np.arange(RATE) / RATE
    tone = np.sin(2 * np.pi * 1000 * seconds).astype(np.float32)
    faster = change_speed(tone, 1.1, 8000)
    peak = np.abs(np.fft.rfft(faster * np.hanning(8000))).argmax() * RATE / 8000
    assert abs(peak - 1100) < 3
    soundfile.write(tmp_path / "x.wav", faster, RATE)
