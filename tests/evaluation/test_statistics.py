"""The bootstrap: coverage, determinism, groups."""

from __future__ import annotations

import numpy as np
import pytest

from hcodec_core.evaluation.statistics import bootstrap_mean, group_of, summarise

SETTINGS = {"confidence": 0.95, "num_resamples": 400, "seed": 0}


def each_alone(values) -> list[str]:
    return [str(index) for index in range(len(values))]


def test_bounds_cover_the_true_mean_about_as_often_as_they_say():
    generator = np.random.default_rng(1)
    below = above = 0
    for _ in range(400):
        values = generator.gamma(4.0, 0.25, size=40)  # skewed, mean 1
        found = bootstrap_mean(values, each_alone(values), **SETTINGS)
        below += found.lower <= 1.0
        above += found.upper >= 1.0
    # Binomial standard deviation is 1.1 %; percentile bounds of skewed data are a little off.
    assert 0.91 <= below / 400 <= 0.99
    assert 0.89 <= above / 400 <= 0.99


def test_the_same_arguments_give_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(2).standard_normal(30).tolist()
    first, again = (bootstrap_mean(values, each_alone(values), **SETTINGS) for _ in range(2))
    other = bootstrap_mean(values, each_alone(values), **(SETTINGS | {"seed": 1}))
    assert first == again
    assert first.mean == other.mean == pytest.approx(np.mean(values))
    assert first.lower != other.lower


def test_slices_of_resampling_do_not_change_the_result(monkeypatch):
    values = np.random.default_rng(2).standard_normal(30).tolist()
    whole = bootstrap_mean(values, each_alone(values), **SETTINGS)
    monkeypatch.setattr("hcodec_core.evaluation.statistics._CELLS_AT_ONCE", 30 * 7)
    assert bootstrap_mean(values, each_alone(values), **SETTINGS) == whole


def test_files_of_one_group_count_as_one_observation():
    speakers = np.random.default_rng(3).standard_normal(8)
    values = np.repeat(speakers, 20)
    alone = bootstrap_mean(values, each_alone(values), **SETTINGS)
    grouped = bootstrap_mean(values, [str(i // 20) for i in range(160)], **SETTINGS)
    assert grouped.mean == pytest.approx(alone.mean)
    assert grouped.upper - grouped.lower > 3 * (alone.upper - alone.lower)


def test_groups_are_leading_folders():
    assert group_of("speaker/chapter/a.flac", 0) == "speaker/chapter/a.flac"
    assert group_of("speaker/chapter/a.flac", 1) == "speaker"
    assert group_of("a.flac", 1) == ""


def test_summary_of_a_few_values():
    found = summarise([1.0, 2.0, 3.0, 10.0])
    assert (found.num_files, found.mean, found.median) == (4, 4.0, 2.5)
