"""Every clip of the sample corpus decodes to its true length or is refused for its one reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from hcodec_core.audio.decode import DecodedInfo, DecodeSettings, decode_all
from hcodec_core.audio.sniff import HEAD_BYTES, sniff
from hcodec_core.audio.supervisor import DecoderPool
from hcodec_core.errors import AudioError

ROOT = Path(__file__).parent
CLIPS = ROOT / "clips"
MANIFEST: list[dict[str, Any]] = json.loads((ROOT / "manifest.json").read_text("utf-8"))
GOOD = [entry for entry in MANIFEST if entry["expected"] == "decoded"]
BROKEN = [entry for entry in MANIFEST if entry["expected"] != "decoded"]
SETTINGS = DecodeSettings(sample_rate=16_000)


def name_of(entry: dict[str, Any]) -> str:
    return str(entry["file"])


def test_manifest_names_exactly_the_files_that_are_there() -> None:
    there = {path.relative_to(CLIPS).as_posix() for path in CLIPS.rglob("*") if path.is_file()}
    assert there == set(map(name_of, MANIFEST))


def test_corpus_is_small_and_varied() -> None:
    assert sum(path.stat().st_size for path in CLIPS.rglob("*") if path.is_file()) < 6_000_000
    assert 240 <= sum(entry["seconds"] for entry in GOOD) <= 360
    assert {entry["sample_rate"] for entry in GOOD} >= {8_000, 16_000, 44_100, 48_000}
    assert {entry["num_channels"] for entry in GOOD} == {1, 2}


@pytest.mark.parametrize("entry", GOOD, ids=name_of)
def test_good_clip_has_its_true_length(entry: dict[str, Any]) -> None:
    samples, info = decode_all(CLIPS / entry["file"], SETTINGS)
    assert (info.sample_rate, info.num_channels) == (entry["sample_rate"], entry["num_channels"])
    extra_frames = info.num_native_frames - entry["num_frames"]
    assert 0 <= extra_frames <= entry["tolerance_frames"]
    # soxr rounds halves up.
    rate = info.sample_rate
    assert len(samples) == info.num_samples
    assert len(samples) == (2 * info.num_native_frames * 16_000 + rate) // (2 * rate)
    assert (info.rms_db == -120) == (entry["kind"] == "silence")


@pytest.mark.parametrize("entry", BROKEN, ids=name_of)
def test_broken_clip_is_refused_for_its_reason(entry: dict[str, Any]) -> None:
    with pytest.raises(AudioError) as refusal:
        decode_all(CLIPS / entry["file"], SETTINGS)
    assert refusal.value.reason == entry["expected"]


@pytest.mark.parametrize("entry", GOOD, ids=name_of)
def test_first_bytes_alone_accept_every_good_clip(entry: dict[str, Any]) -> None:
    data = (CLIPS / entry["file"]).read_bytes()
    for num_bytes in (4096, HEAD_BYTES):
        assert sniff(data[:num_bytes], len(data))


def outcome(pool: DecoderPool, path: Path) -> tuple[str, DecodedInfo | None]:
    stream = pool.decode(path)
    try:
        num_samples = sum(len(block) for block in stream)
    except AudioError as error:
        return error.reason.value, None
    assert stream.info.num_samples == num_samples
    return "decoded", stream.info


def test_supervised_processes_agree_with_this_process() -> None:
    with DecoderPool(2, SETTINGS) as pool:
        for entry in MANIFEST:
            path = CLIPS / entry["file"]
            result, info = outcome(pool, path)
            assert result == entry["expected"]
            assert info is None or info == decode_all(path, SETTINGS)[1]
