"""The gate's verdicts, at the edge of the margin and around missing values."""

from __future__ import annotations

import pytest

from hcodec_core.config import GateConfig, MetricMargin
from hcodec_core.errors import ConfigError
from hcodec_core.evaluation.documents import FileScores, SideFacts, SideSummary, Verdict
from hcodec_core.evaluation.verdicts import judge


def side(name: str) -> SideSummary:
    facts = SideFacts(name=name, uri=name, sample_rate=16_000)
    return SideSummary(facts=facts, num_files=0, num_failed=0, audio_seconds=0.0, metrics={})


BOTH = {"codec": side("new"), "against": side("old")}


def gate(**values) -> GateConfig:
    margins = {"stoi": MetricMargin(margin=0.25, is_required=True)}
    return GateConfig(**({"min_files": 4, "num_resamples": 500, "metrics": margins} | values))


def files(gains, base: float = 0.5, metric: str = "stoi") -> list[FileScores]:
    return [
        FileScores(
            name=f"{index:03}.wav",
            seconds=1.0,
            scores={"codec": {metric: base + gain}, "against": {metric: base}},
        )
        for index, gain in enumerate(gains)
    ]


def verdict(scores, **values) -> Verdict:
    return judge(scores, BOTH, {}, gate(**values))


def test_a_loss_of_exactly_the_margin_passes_and_a_little_more_fails():
    # Powers of two: the differences are exact.
    assert verdict(files([-0.25] * 6)).status == "pass"
    found = verdict(files([-0.25 - 2**-20] * 6))
    assert found.status == "fail"
    assert "clearly more than the margin" in found.metrics[0].sentence


def test_an_interval_that_reaches_below_the_margin_fails_and_says_why():
    found = verdict(files([0.3, -0.5, 0.3, -0.5, 0.3, -0.5]))
    assert found.status == "fail"
    assert found.metrics[0].lower < -0.25 < found.metrics[0].gain
    assert "More files may show it" in found.metrics[0].sentence


def test_too_few_pairs_decide_nothing():
    found = verdict(files([0.1] * 3))
    assert found.status == "not enough files"
    assert found.metrics[0].status == "not enough files"
    assert "3 files could be used, the gate asks for 4" in found.sentence


def test_less_is_better_for_distances():
    margins = {"mel_distance_db": MetricMargin(margin=0.5)}
    better = verdict(files([-1.0] * 5, 8.0, "mel_distance_db"), metrics=margins)
    worse = verdict(files([1.0] * 5, 8.0, "mel_distance_db"), metrics=margins)
    assert (better.status, worse.status) == ("pass", "fail")
    assert better.metrics[0].gain == pytest.approx(1.0)


def test_files_that_only_the_challenger_fails_count_against_it():
    scores = [*files([0.1] * 8)]
    broken = scores[0].model_copy(update={"failures": {"codec": "no"}, "scores": {}})
    found = verdict([broken, *scores[1:]])
    assert found.status == "fail"
    assert "cannot process 1 file that the champion can" in found.sentence
    assert verdict([broken, *scores[1:]], max_challenger_failures=1).status == "pass"


def test_files_that_both_fail_are_left_out():
    scores = files([0.1] * 8)
    broken = scores[0].model_copy(
        update={"failures": {"codec": "no", "against": "no"}, "scores": {}}
    )
    found = verdict([broken, *scores[1:]])
    assert (found.status, found.num_pairs) == ("pass", 7)


def test_a_score_that_only_the_challenger_lacks_counts_against_it():
    # A challenger that gives silence has no PESQ there: leaving such files out would flatter it.
    scores = files([0.1] * 8)
    silent = scores[0].model_copy(update={"scores": {"codec": {}, "against": {"stoi": 0.5}}})
    found = verdict([silent, *scores[1:]])
    assert found.status == "fail"
    assert "could not be measured for the challenger in 1 file" in found.metrics[0].sentence


def test_a_required_metric_that_was_not_run_fails_and_others_are_skipped():
    margins = {"stoi": MetricMargin(margin=0.1, is_required=True), "wer": MetricMargin(margin=0.1)}
    scores = files([0.1] * 5, metric="pesq_wb")
    found = judge(scores, BOTH, {"stoi": "pystoi is not installed"}, gate(metrics=margins))
    assert found.status == "fail"
    assert [v.metric for v in found.metrics] == ["stoi"]
    assert "pystoi is not installed" in found.metrics[0].sentence


def test_a_verdict_names_what_had_no_say():
    margins = {"stoi": MetricMargin(margin=0.1), "dnsmos_ovrl": MetricMargin(margin=0.1)}
    found = verdict(files([0.1] * 5), metrics=margins)
    assert found.status == "pass"
    assert found.sentence.endswith("Not measured, so not judged: DNSMOS overall.")
    twins = {"pesq_wb": MetricMargin(margin=0.1), "pesq_nb": MetricMargin(margin=0.1)}
    assert "Not measured" not in verdict(files([0.1] * 5, metric="pesq_wb"), metrics=twins).sentence


def test_without_a_champion_only_bounds_count():
    scores = [f.model_copy(update={"scores": {"codec": f.scores["codec"]}}) for f in files([0] * 5)]
    alone = {"codec": side("new")}
    low = gate(metrics={"stoi": MetricMargin(margin=0.1, worst=0.4)})
    high = gate(metrics={"stoi": MetricMargin(margin=0.1, worst=0.6)})
    assert judge(scores, alone, {}, low).status == "pass"
    found = judge(scores, alone, {}, high)
    assert found.status == "fail"
    assert "not at least 0.600" in found.metrics[0].sentence


def test_a_bound_counts_beside_the_margin():
    margins = {"stoi": MetricMargin(margin=0.1, worst=0.6)}
    assert verdict(files([0.05] * 5), metrics=margins).status == "fail"


def test_an_unknown_metric_in_the_gate_is_refused():
    with pytest.raises(ConfigError, match="no metric 'loveliness'"):
        verdict(files([0.0] * 5), metrics={"loveliness": MetricMargin(margin=1)})


def test_verdicts_are_the_same_again():
    scores = files([0.1, -0.2, 0.05, 0.0, -0.1, 0.3])
    assert verdict(scores) == verdict(scores)
