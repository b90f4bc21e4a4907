"""Segments joined in memory are what a worker writes; what cutting costs is measured."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import soundfile
import torch

from hcodec_core.errors import ConfigError
from hcodec_core.inference.engine import Engine, compute_class
from hcodec_core.inference.files import LocalEncoding, TokenFile
from hcodec_core.inference.invariance import synthetic_clips
from hcodec_core.inference.seams import measure_seams
from hcodec_core.inference.segmented import encode_in_segments
from hcodec_core.inference.worker import WorkerOptions
from hcodec_core.models.loading import CodecCard, load_codec, save_codec
from hcodec_core.models.registry import build_codec, presets
from hcodec_core.tokens import EncodeSettings

RATE = 16000


def settings(**changes) -> EncodeSettings:
    values = {"segment_seconds": 3.0, "halo_seconds": 0.5} | changes
    return EncodeSettings(compute_class=compute_class("cpu"), **values)


@pytest.fixture(scope="module")
def sound():
    clips = synthetic_clips(RATE, 6, 1)
    return np.concatenate(clips)[: int(10.3 * RATE)]


@pytest.mark.parametrize("preset", ["hcodec-tiny", "hcodec-1.5-tiny"])
def test_segments_in_memory_are_those_of_a_worker(tmp_path, sound, preset):
    torch.manual_seed(0)
    built = build_codec("hcodec", presets("hcodec")[preset]().architecture())
    folder = tmp_path / "codec"
    save_codec(built, CodecCard("tiny", False, "none"), folder)
    chosen = settings(threshold=0.9 if built.is_variable_rate else None)
    # 16 bits, so that the file holds exactly what is encoded here.
    sound = np.round(sound * 20000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="PCM_16")
    (tmp_path / "scratch").mkdir()
    encoding = LocalEncoding([tmp_path / "a.wav"], str(folder), chosen, tmp_path / "scratch")
    options = WorkerOptions(scratch_path=tmp_path / "scratch")
    encoding.run(options, tmp_path / "t.parquet", threading.Event())
    (row,) = TokenFile(tmp_path / "t.parquet").rows()
    engine = Engine(load_codec(str(folder), chosen))
    found = encode_in_segments(engine, (sound / 32768).astype(np.float32))
    assert found.num_samples == row.tokens.num_samples == len(sound)
    for stream, codes in row.tokens.codes.items():
        np.testing.assert_array_equal(found.codes[stream], codes)
    if built.is_variable_rate:
        np.testing.assert_array_equal(found.frame_spans, row.tokens.frame_spans)


def test_what_cutting_costs_is_told_by_distance_from_the_cuts(sound):
    pieces = Engine(load_codec("hcodec-nano", settings()))
    whole = Engine(load_codec("hcodec-nano", settings(segment_seconds=60.0)))
    report = measure_seams(pieces, whole, sound)
    assert report.num_cuts == 3
    assert sum(band.num_frames for band in report.bands) == report.num_frames == 258
    near = report.bands[0]
    assert near.num_frames == 3 * 4
    # The semantic stream sees 0.5 s at most: with this halo no cut shows.
    assert all(
        share == 1.0
        for band in report.bands
        for (stream, _), share in band.equal.items()
        if stream == "semantic"
    )
    assert report.bands[-1].num_frames == 0
    assert report.bands[-1].wave_db is None
    bare = Engine(load_codec("hcodec-nano", settings(halo_seconds=0.0)))
    assert measure_seams(bare, whole, sound).bands[0].equal["semantic", 0] < 1.0


def test_seams_need_a_clip_that_is_cut_in_one_way_only(sound):
    pieces = Engine(load_codec("hcodec-nano", settings()))
    with pytest.raises(ConfigError, match="not cut in one way"):
        measure_seams(pieces, pieces, sound)
    with pytest.raises(ConfigError, match="not cut in one way"):
        measure_seams(pieces, pieces, sound[:RATE])
