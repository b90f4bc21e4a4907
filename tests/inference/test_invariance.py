"""The measures themselves: do they find what differs, and do they judge it rightly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hcodec_core.inference.engine import ClipTokens, Engine, compute_class
from hcodec_core.inference.invariance import (
    Agreement,
    compare_engines,
    measure_invariance,
    synthetic_clips,
)
from hcodec_core.inference.spans import start_margins
from hcodec_core.models.hcodec.convert import golden_cases
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings, ShapeRule

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return {
        version: str(golden_cases(GOLDEN / f"hcodec-{version}-tiny", folder)[0].codec_path)
        for version in ("1.5", "2.0")
    }


def engine_of(uri, **changes):
    return Engine(load_codec(uri, EncodeSettings(compute_class=compute_class("cpu"), **changes)))


@pytest.mark.parametrize(("version", "threshold"), [("1.5", 0.75), ("2.0", None)])
def test_later_versions_do_not_depend_on_company(uris, version, threshold):
    rows = ShapeRule(growth=1.25, batch_seconds=8.0, max_rows=3)
    engine = engine_of(uris[version], threshold=threshold, shapes=rows)
    clips = [clip[: 2 * engine.codec.sample_rate] for clip in synthetic_clips(16000, 5, 3)]
    report = measure_invariance(engine, clips, 4, 0)
    assert report.agreement.is_complete
    assert sum(report.agreement.total.values()) > 1000


def tokens_of(codes, spans):
    return ClipTokens({"semantic": np.array([codes], np.int32)}, len(codes), 640, spans)


def test_tokens_of_other_spans_are_no_agreement():
    agreement = Agreement()
    one = tokens_of([1, 2, 3], np.array([2, 1, 1], np.int32))
    assert agreement.add(one, one)
    assert agreement.is_complete
    assert not agreement.add(replace(one, frame_spans=np.array([1, 2, 1], np.int32)), one)
    assert not agreement.is_complete
    assert agreement.total["semantic", 0] == 3, "codes of other tokens are not compared"


def test_boundaries_are_judged_by_their_distance_from_the_threshold(uris):
    with np.load(GOLDEN / "hcodec-1.5-tiny" / "expected.npz") as arrays:
        clip = arrays["wav_1"]
    engine = engine_of(uris["1.5"], threshold=0.9)
    similarities = start_margins(engine.codec.double(), clip)[1:] + 0.9
    nearest = float(similarities[np.abs(similarities - 0.9).argmin()])
    near = engine_of(uris["1.5"], threshold=nearest + 2e-5)
    other = engine_of(uris["1.5"], threshold=nearest - 2e-5)
    agreement, differences = compare_engines(near, other, [clip])
    assert agreement.num_length_faults == 1
    (difference,) = differences
    assert difference.stream == "boundaries"
    assert similarities[difference.frame - 1] == pytest.approx(nearest, abs=1e-9)
    assert difference.margin == pytest.approx(2e-5, rel=0.1)
    assert difference.is_near_tie
    _, differences = compare_engines(near, engine_of(uris["1.5"], threshold=0.97), [clip])
    assert any(not difference.is_near_tie for difference in differences)
