"""The gate: is the challenger no worse than the champion, metric by metric?

A metric passes when the lower bound of the mean gain over paired files lies above minus the margin
(non-inferiority). All metrics must pass, so no correction for many tests is due: that only makes
passing harder. Too few pairs decide nothing. Files that only the challenger cannot process, or for
which only its score is missing, count against it: leaving them out would flatter it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hcodec_core.config import GateConfig, MetricMargin
from hcodec_core.evaluation.documents import (
    AGAINST,
    CODEC,
    FileScores,
    MetricVerdict,
    SideSummary,
    Status,
    Verdict,
)
from hcodec_core.evaluation.metrics import METRICS, Metric, check_names
from hcodec_core.evaluation.statistics import Interval, bootstrap_mean, group_of, num_groups


def judge(
    files: Sequence[FileScores],
    sides: Mapping[str, SideSummary],
    not_run: Mapping[str, str],
    gate: GateConfig,
) -> Verdict:
    """Verdict on side ``codec`` against side ``against``, or against bounds alone without one.

    Raises ``ConfigError`` when the gate names a metric that does not exist.
    """
    check_names(list(gate.metrics))
    has_champion = AGAINST in sides
    judged = [
        verdict
        for name, metric in METRICS.items()
        if name in gate.metrics
        and (
            verdict := _judge_metric(metric, gate.metrics[name], files, not_run, gate, has_champion)
        )
    ]
    usable = [scores for scores in files if CODEC not in scores.failures]
    pairs = [scores for scores in usable if AGAINST not in scores.failures]
    only_ours = _only_challenger_fails(files) if has_champion else len(files) - len(usable)
    status, sentence = _overall(judged, len(pairs), only_ours, gate, has_champion)
    sentence += _left_out(judged, gate) if has_champion else ""
    return Verdict(status=status, sentence=sentence, num_pairs=len(pairs), metrics=judged)


def _left_out(judged: Sequence[MetricVerdict], gate: GateConfig) -> str:
    """Which metrics of the gate had no say; of the two kinds of PESQ one is enough."""
    names = {verdict.metric for verdict in judged}
    twins = {"pesq_wb", "pesq_nb"} if names & {"pesq_wb", "pesq_nb"} else set()
    titles = [
        metric.title
        for name, metric in METRICS.items()
        if name in gate.metrics and name not in names | twins
    ]
    return f" Not measured, so not judged: {', '.join(titles)}." if titles else ""


def _only_challenger_fails(files: Sequence[FileScores]) -> int:
    return sum(CODEC in f.failures and AGAINST not in f.failures for f in files)


def _overall(
    judged: Sequence[MetricVerdict],
    num_pairs: int,
    only_ours: int,
    gate: GateConfig,
    has_champion: bool,
) -> tuple[Status, str]:
    failed = [METRICS[v.metric].title for v in judged if v.status == "fail"]
    unsure = [METRICS[v.metric].title for v in judged if v.status == "not enough files"]
    if only_ours > gate.max_challenger_failures:
        also = " that the champion can" if has_champion else ""
        return "fail", (
            f"Fail: the challenger cannot process {_files(only_ours)}{also}; "
            f"{gate.max_challenger_failures} are allowed."
        )
    if failed:
        return "fail", f"Fail: {', '.join(failed)} did not hold."
    if num_pairs < gate.min_files:
        return "not enough files", (
            f"Not enough files: {_files(num_pairs)} could be used, the gate asks for "
            f"{gate.min_files}."
        )
    if unsure:
        return "not enough files", f"Not enough files to judge {', '.join(unsure)}."
    if not has_champion:
        return "pass", f"Pass: there is no champion; {_count(len(judged), 'bound')} held."
    return "pass", (
        f"Pass: no worse than the champion within the margins, in {_count(len(judged), 'metric')} "
        f"over {_files(num_pairs)}."
    )


def _judge_metric(
    metric: Metric,
    rule: MetricMargin,
    files: Sequence[FileScores],
    not_run: Mapping[str, str],
    gate: GateConfig,
    has_champion: bool,
) -> MetricVerdict | None:
    """None where there is nothing to judge and nothing is asked for."""
    values = [_value(scores, CODEC, metric.name) for scores in files]
    others = [_value(scores, AGAINST, metric.name) for scores in files]
    if not any(value is not None for value in values):
        return _missing(metric, rule, not_run)
    if not has_champion or rule.margin is None:
        return _against_bound(metric, rule, [v for v in values if v is not None], gate)
    lost = sum(
        mine is None and other is not None for mine, other in zip(values, others, strict=True)
    )
    pairs = [
        (scores.name, mine, other)
        for scores, mine, other in zip(files, values, others, strict=True)
        if mine is not None and other is not None
    ]
    return _against_champion(metric, rule, pairs, lost, gate)


def _value(scores: FileScores, side: str, metric: str) -> float | None:
    return scores.scores.get(side, {}).get(metric)


def _missing(
    metric: Metric, rule: MetricMargin, not_run: Mapping[str, str]
) -> MetricVerdict | None:
    if not rule.is_required:
        return None
    why = not_run.get(metric.name, "it could be measured for no file")
    return MetricVerdict(
        metric=metric.name,
        status="fail",
        sentence=f"{metric.title} is required and was not measured: {why}.",
        is_required=True,
        num_pairs=0,
        margin=rule.margin,
        worst=rule.worst,
    )


def _against_bound(
    metric: Metric, rule: MetricMargin, values: Sequence[float], gate: GateConfig
) -> MetricVerdict | None:
    if rule.worst is None:
        return None
    mean = sum(values) / len(values)
    verdict = MetricVerdict(
        metric=metric.name,
        status="pass",
        sentence=_bound_sentence(metric, rule.worst, mean),
        is_required=rule.is_required,
        num_pairs=len(values),
        worst=rule.worst,
        challenger_mean=mean,
    )
    if metric.gain(mean, rule.worst) < 0:
        return verdict.model_copy(update={"status": "fail"})
    enough = len(values) >= gate.min_files
    return verdict if enough else verdict.model_copy(update={"status": "not enough files"})


def _bound_sentence(metric: Metric, worst: float, mean: float) -> str:
    holds = metric.gain(mean, worst) >= 0
    side = "at least" if metric.more_is_better else "at most"
    return (
        f"{metric.title} is {metric.shown(mean)}; {'' if holds else 'not '}{side} "
        f"{metric.shown(worst)} as asked for."
    )


def _against_champion(
    metric: Metric,
    rule: MetricMargin,
    pairs: Sequence[tuple[str, float, float]],
    num_lost: int,
    gate: GateConfig,
) -> MetricVerdict:
    assert rule.margin is not None
    base = MetricVerdict(
        metric=metric.name,
        status="not enough files",
        sentence="",
        is_required=rule.is_required,
        num_pairs=len(pairs),
        margin=rule.margin,
        worst=rule.worst,
    )
    groups = [group_of(name, gate.group_depth) for name, _, _ in pairs]
    if not pairs or num_groups(groups) < 2:
        sentence = f"{metric.title}: {_count(len(pairs), 'pair')} of files: nothing to judge."
        return base.model_copy(update={"sentence": sentence})
    interval = bootstrap_mean(
        [metric.gain(mine, other) for _, mine, other in pairs],
        groups,
        confidence=gate.confidence,
        num_resamples=gate.num_resamples,
        seed=gate.seed,
    )
    means = [sum(side) / len(pairs) for side in zip(*(pair[1:] for pair in pairs), strict=True)]
    status, sentence = _compare(metric, rule, interval, means[0], (len(pairs), num_lost), gate)
    return base.model_copy(
        update={
            "status": status,
            "sentence": sentence,
            "challenger_mean": means[0],
            "champion_mean": means[1],
            "gain": interval.mean,
            "lower": interval.lower,
            "upper": interval.upper,
        }
    )


def _compare(
    metric: Metric,
    rule: MetricMargin,
    interval: Interval,
    mean: float,
    counts: tuple[int, int],
    gate: GateConfig,
) -> tuple[Status, str]:
    assert rule.margin is not None
    num_pairs, num_lost = counts
    margin = metric.shown(rule.margin)
    if num_lost > gate.max_challenger_failures:
        return "fail", (
            f"{metric.title} could not be measured for the challenger in {_files(num_lost)} where "
            "the champion has it."
        )
    if num_pairs < gate.min_files:
        return "not enough files", (
            f"{metric.title}: {_count(num_pairs, 'pair')} of files, the gate asks for "
            f"{gate.min_files}."
        )
    if rule.worst is not None and metric.gain(mean, rule.worst) < 0:
        return "fail", _bound_sentence(metric, rule.worst, mean)
    change = f"{metric.title} is {_change(metric, interval.mean)}"
    if interval.lower >= -rule.margin:
        return "pass", (
            f"{change}; with {gate.confidence:.0%} confidence {_change(metric, interval.lower)} "
            f"at worst, within the margin of {margin}."
        )
    if interval.upper < -rule.margin:
        return "fail", f"{change}, clearly more than the margin of {margin}."
    return "fail", (
        f"{change}, but it may be {_change(metric, interval.lower)}: that the loss stays within "
        f"{margin} is not shown. More files may show it."
    )


def _change(metric: Metric, gain: float) -> str:
    size = metric.shown(abs(gain))
    return f"{size} {'better' if gain >= 0 else 'worse'}"


def _files(number: int) -> str:
    return _count(number, "file")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
