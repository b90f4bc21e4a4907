"""The declared rate of false alarms holds, and a real change is seen."""

from __future__ import annotations

import numpy as np
import pytest

from hcodec_core.monitoring.bins import Bins
from hcodec_core.monitoring.culprits import culprits
from hcodec_core.monitoring.judging import judge
from tests.monitoring.conftest import OTHER, SPEECH, profile_of, toy_tokens

RATE = 0.2
NUM_WINDOWS = 120


def _rows(manifest, label, count, kind=SPEECH, **options):
    return [toy_tokens(manifest, f"{label}-{n}", kind, **options) for n in range(count)]


def _judged(manifest, reference, window, **options):
    sides = profile_of(manifest, reference), profile_of(manifest, window)
    settings = {"false_alarm_rate": RATE, "least_psi": 0.0, "num_draws": 99, **options}
    return judge(*sides, **settings)


def _moved(found):
    return {statistic.name for statistic in found if statistic.is_drifted}


@pytest.mark.parametrize(("num_reference", "num_window"), [(60, 20), (40, 40)])
def test_windows_without_change_drift_at_the_declared_rate(manifest, num_reference, num_window):
    """Reference and window are drawn anew each time, so that no sample's luck decides."""
    pool = _rows(manifest, "pool", 600)
    rng = np.random.default_rng(1)
    num_hits = 0
    for _ in range(NUM_WINDOWS):
        chosen = [pool[n] for n in rng.choice(len(pool), num_reference + num_window, False)]
        found = _judged(manifest, chosen[:num_reference], chosen[num_reference:])
        num_hits += bool(_moved(found))
    # 24 expected, four standard deviations are 17.
    assert 7 <= num_hits <= 41, num_hits


def test_another_kind_of_audio_is_seen(manifest):
    reference = _rows(manifest, "r", 60)
    window = _rows(manifest, "w", 15) + _rows(manifest, "x", 15, OTHER)
    found = _judged(manifest, reference, window, false_alarm_rate=0.01, num_draws=400)
    assert {"semantic 0", "acoustic 0", "acoustic 1"} <= _moved(found)
    assert not {"channels", "sample rate", "duration"} & _moved(found)


def test_another_gain_is_seen_in_the_audio_alone(manifest):
    reference = _rows(manifest, "r", 60)
    found = _judged(
        manifest,
        reference,
        _rows(manifest, "w", 30, gain_db=6.0),
        false_alarm_rate=0.01,
        num_draws=400,
    )
    assert _moved(found) == {"loudness", "peak"}


def test_codes_of_one_file_are_no_independent_codes(manifest):
    """PSI is far above any rule of thumb where nothing changed, and that is no drift."""
    found = _judged(
        manifest,
        _rows(manifest, "r", 60),
        _rows(manifest, "w", 20),
        false_alarm_rate=0.01,
        num_draws=400,
    )
    assert max(statistic.psi for statistic in found if statistic.stream) > 0.1
    assert _moved(found) == set()


def test_a_drift_too_small_to_matter_does_not_count(manifest):
    reference, window = _rows(manifest, "r", 60), _rows(manifest, "x", 30, OTHER)
    assert _moved(_judged(manifest, reference, window))
    assert not _moved(_judged(manifest, reference, window, least_psi=100.0))


def test_judged_again_it_is_the_same(manifest):
    sides = _rows(manifest, "r", 40), _rows(manifest, "w", 20)
    assert _judged(manifest, *sides) == _judged(manifest, *(side[::-1] for side in sides))


def test_files_that_add_most_are_the_odd_ones(manifest):
    reference = profile_of(manifest, _rows(manifest, "r", 60))
    window = profile_of(manifest, _rows(manifest, "w", 15) + _rows(manifest, "odd", 5, OTHER))
    found = judge(reference, window, false_alarm_rate=0.05, least_psi=0.0, num_draws=200)
    moved = [statistic for statistic in found if statistic.is_drifted]
    files = culprits(reference, window, moved, num_files=5)
    assert {file.uri.split("-")[0] for file in files} == {"odd"}
    everything = culprits(reference, window, moved, num_files=20)
    assert sum(file.share for file in everything) == pytest.approx(1, abs=1e-4)
    assert culprits(reference, window, []) == []


def test_bins_of_few_and_of_many_values():
    few = Bins.of(np.array([16000.0, 8000.0, 16000.0, np.nan]))
    assert few.labels == ["8000", "16000", "not known"]
    assert few.one_hot(np.array([16000.0, np.nan])).tolist() == [[0, 1, 0], [0, 0, 1]]
    many = Bins.of(np.arange(100.0))
    assert len(many.labels) == 11
    counts = many.one_hot(np.array([*np.arange(100.0), -np.inf, np.nan])).sum(axis=0)
    assert counts.tolist() == [11, *[10] * 9, 1]


def test_silence_and_unknown_level_are_told_apart(manifest):
    rows = _rows(manifest, "r", 3)
    rows[0]["loudness_db"], rows[0]["peak"] = None, 0.0
    rows[1]["loudness_db"], rows[1]["peak"] = None, None
    profile = profile_of(manifest, rows)
    by_uri = {file.columns["uri"]: place for place, file in enumerate(profile.sample.files)}
    values = profile.audio_values()
    silence = [values["silence"][by_uri[f"r-{n}"]] for n in range(3)]
    assert silence[0] == 1
    assert np.isnan(silence[1])
    assert silence[2] == 0
