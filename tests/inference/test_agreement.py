from __future__ import annotations

import numpy as np
import pytest
import torch

from hcodec_core.errors import ConfigError
from hcodec_core.inference.agreement import AgreementTally, measure_agreement
from hcodec_core.inference.engine import ClipTokens, Engine, compute_class
from hcodec_core.inference.invariance import synthetic_clips
from hcodec_core.jobs import ModeAgreement
from hcodec_core.models.loading import load_codec
from hcodec_core.tokens import EncodeSettings

RATE = 16000


def tokens(rows, spans=None, name="acoustic") -> ClipTokens:
    codes = np.array(rows, np.int32)
    spans = None if spans is None else np.array(spans, np.int32)
    return ClipTokens({name: codes}, codes.shape[1], codes.shape[1] * 640, spans)


def counts(result: ModeAgreement) -> list[tuple[int, int, int, int]]:
    return [(d.num_frames, d.num_equal, d.num_reached, d.num_diverged) for d in result.depths]


def test_first_divergence_is_counted_once_per_frame():
    exact = tokens([[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    found = tokens([[1, 9, 1, 1], [2, 9, 9, 2], [3, 3, 9, 9]])
    tally = AgreementTally()
    tally.add(found, exact)
    result = tally.result(RATE)
    assert counts(result) == [(4, 3, 4, 1), (4, 2, 3, 1), (4, 2, 2, 1)]
    assert [d.holding_share for d in result.depths] == [0.75, pytest.approx(2 / 3), 0.5]
    assert result.depths[1].equal_share == 0.5
    assert result.boundary_f1 == 1.0
    assert result.audio_seconds == pytest.approx(4 * 640 / RATE)


def test_variable_rates_are_compared_on_the_base_grid():
    exact = tokens([[1, 2, 3]], [2, 1, 3])
    found = tokens([[1, 3]], [3, 3])
    tally = AgreementTally()
    tally.add(found, exact)
    result = tally.result(RATE)
    assert counts(result) == [(6, 5, 6, 1)]
    assert (result.num_starts, result.num_exact_starts, result.num_common_starts) == (2, 3, 2)
    assert result.boundary_f1 == pytest.approx(0.8)


def test_totals_add_up():
    one, both = AgreementTally(), AgreementTally()
    pairs = [(tokens([[1, 2], [3, 4]]), tokens([[1, 2], [3, 5]])), (tokens([[7], [7]]),) * 2]
    parts = []
    for found, exact in pairs:
        both.add(found, exact)
        one = AgreementTally()
        one.add(found, exact)
        parts.append(one.result(RATE))
    assert ModeAgreement.total(parts) == both.result(RATE)
    assert ModeAgreement.total([]) is None
    assert AgreementTally().result(RATE) is None


def test_codes_of_another_clip_are_refused():
    tally = AgreementTally()
    for found in (tokens([[1, 2]]), tokens([[1, 2, 3]], name="semantic")):
        with pytest.raises(ConfigError, match="different clips or codecs"):
            tally.add(found, tokens([[1, 2, 3]]))


def test_an_engine_agrees_with_itself_and_shares_its_weights():
    settings = EncodeSettings(mode="fast", compute_class=compute_class("cpu"))
    fast = Engine(load_codec("hcodec-nano", settings))
    exact = fast.in_mode("exact")
    assert (fast.mode, exact.mode) == ("fast", "exact")
    assert exact.codec.spec.encode_id != fast.codec.spec.encode_id
    assert exact.codec.spec.settings == EncodeSettings(compute_class=compute_class("cpu"))
    assert next(exact.codec.parameters()) is next(fast.codec.parameters())
    clips = synthetic_clips(RATE, 3, 0)
    same = measure_agreement(exact, exact.in_mode("exact"), clips)
    assert all(d.num_diverged == 0 and d.num_equal == d.num_frames for d in same.depths)
    assert len(same.depths) == 8
    fast.narrow_type = torch.bfloat16  # on a CPU nano itself stays in float32
    found = measure_agreement(fast, exact, clips)
    assert found.depths[0].stream == "semantic"
    assert 0.9 < found.depths[0].holding_share < 1
    assert found.depths[3].num_reached < found.depths[0].num_reached
