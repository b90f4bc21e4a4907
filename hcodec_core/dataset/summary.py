"""What the rows of a plan in a snapshot hold, in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from hcodec_core.dataset.audit import AuditResult
from hcodec_core.dataset.facts import RowReader, SnapshotFacts
from hcodec_core.dataset.rowfacts import CodeCounter, Ints
from hcodec_core.jobs import ModeAgreement, Outcome, TokenizeJob, WorkUse
from hcodec_core.storage import Storage

_HISTOGRAM_BARS = 64
DURATION_EDGES = (0, 1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 1800, 3600)  # seconds
QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
_SILENT_BELOW_DB = -60.0
_CLIPPED_ABOVE = 0.01  # share of samples at full scale that makes a file count as clipped

_ROW_NUMBERS = {
    "num_rows": "count(*)",
    "num_frames": "coalesce(sum(num_frames), 0)::BIGINT",
    "audio_seconds": "coalesce(sum(duration_seconds), 0)",
    "num_clipped_files": f"count(*) FILTER (clipped_share > {_CLIPPED_ABOVE})",
    # A row without a peak carries no statistics: it says nothing of silence.
    "silent_share": "sum(duration_seconds * (coalesce(loudness_db, '-inf'::FLOAT)"
    f" < {_SILENT_BELOW_DB})::INT) FILTER (peak IS NOT NULL)"
    " / nullif(sum(duration_seconds) FILTER (peak IS NOT NULL), 0)",
    "clipped_share": "sum(clipped_share * num_samples)"
    " / nullif(sum(num_samples) FILTER (clipped_share IS NOT NULL), 0)",
    "quantiles": f"quantile_cont(duration_seconds, {list(QUANTILES.values())})",
}


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CodebookUse(_Numbers):
    """How one codebook was used. ``bars``: counts over equal ranges of code indices."""

    stream: str
    codebook: int
    size: int
    num_used: int
    perplexity: float
    num_codes: int
    bars: list[int]

    @property
    def use(self) -> float:
        """Share of the codebook's entries that were used at all."""
        return self.num_used / self.size


class DurationBin(_Numbers):
    """Files from ``lower_seconds`` up to ``upper_seconds`` (None: no upper end)."""

    lower_seconds: float
    upper_seconds: float | None
    num_files: int


class SnapshotSummary(_Numbers):
    """Numbers of one plan's rows in a snapshot; shares are in 0..1, None where not known.

    ``num_files``: files that the plan lists; ``outcomes``: how many of them by outcome;
    ``num_rows``: rows that the plan added; ``num_snapshot_rows``: all rows; ``num_repeated_*``:
    rows beyond the first with the same key. ``silent_share``: of audio seconds, in files below
    -60 dB of full scale. ``clipped_share``: of samples. ``worker_seconds``: over all shards.
    ``agreement``: of mode fast with mode exact. ``work``: where the time of workers went.
    ``audit``: of a sample of the plan's rows, where one was run.
    """

    num_shards: int
    num_shards_done: int
    num_files: int
    outcomes: dict[str, int]
    reasons: dict[str, int]
    num_rows: int
    num_snapshot_rows: int
    num_repeated_audio_ids: int
    num_repeated_uris: int
    num_repeated_contents: int
    num_frames: int
    num_codes: int
    audio_seconds: float
    worker_seconds: float
    seconds_quantiles: dict[str, float]
    durations: list[DurationBin]
    silent_share: float | None
    clipped_share: float | None
    num_clipped_files: int
    codebooks: list[CodebookUse]
    builds: list[str]
    agreement: ModeAgreement | None = None
    work: WorkUse = WorkUse()
    audit: AuditResult | None = None

    @property
    def num_quarantined(self) -> int:
        """Files that gave no tokens because they could not be used."""
        return self.outcomes[Outcome.QUARANTINED]

    @property
    def num_moved(self) -> int:
        """Files that changed or went away while the plan ran."""
        return self.outcomes[Outcome.CHANGED] + self.outcomes[Outcome.DELETED]

    @property
    def num_unaccounted(self) -> int:
        """Files of the plan less all outcomes; negative when there are outcomes too many."""
        return self.num_files - sum(self.outcomes.values())

    @property
    def bad_share(self) -> float:
        """Share of the plan's files that were quarantined."""
        return self.num_quarantined / self.num_files if self.num_files else 0.0

    @property
    def moved_share(self) -> float:
        """Share of the plan's files that changed or went away."""
        return self.num_moved / self.num_files if self.num_files else 0.0


def summarise(
    storage: Storage, job: TokenizeJob, rows: RowReader, work_path: Path
) -> SnapshotSummary:
    """Numbers of a plan's rows in a snapshot, without judging them (see ``checks``)."""
    with SnapshotFacts(job, work_path) as facts:
        facts.gather(storage, rows)
        return summary_of(facts)


def summary_of(facts: SnapshotFacts) -> SnapshotSummary:
    """Numbers of facts that were gathered."""
    codebooks = [use for counter in facts.counters for use in _codebook_uses(counter)]
    return SnapshotSummary(
        **_plan_numbers(facts),
        **_row_numbers(facts),
        num_snapshot_rows=_count(facts, "keys"),
        num_repeated_audio_ids=_num_repeated(facts, "keys", "audio_id"),
        num_repeated_uris=_num_repeated(facts, "keys", "uri"),
        num_repeated_contents=_num_repeated(facts, "new_rows", "content_sha256"),
        durations=_durations(facts),
        codebooks=codebooks,
        num_codes=sum(use.num_codes for use in codebooks),
        builds=sorted(facts.builds),
        agreement=facts.agreement,
        work=facts.work,
        audit=facts.audit,
    )


def _plan_numbers(facts: SnapshotFacts) -> dict[str, Any]:
    ((num_shards,),) = facts.ask("SELECT count(DISTINCT shard_id) FROM plan")
    ((num_done, seconds),) = facts.ask(
        "SELECT count(*) FILTER (status = 'done'), coalesce(sum(worker_seconds), 0) FROM results"
    )
    outcomes = dict(facts.ask("SELECT outcome, count(*) FROM outcomes GROUP BY outcome"))
    reasons = facts.ask(
        "SELECT reason, count(*) FROM outcomes WHERE reason IS NOT NULL"
        " GROUP BY reason ORDER BY count(*) DESC, reason"
    )
    return {
        "num_shards": num_shards,
        "num_shards_done": num_done,
        "num_files": _count(facts, "plan"),
        "worker_seconds": seconds,
        "outcomes": {outcome.value: outcomes.get(outcome.value, 0) for outcome in Outcome},
        "reasons": dict(reasons),
    }


def _row_numbers(facts: SnapshotFacts) -> dict[str, Any]:
    (values,) = facts.ask(f"SELECT {', '.join(_ROW_NUMBERS.values())} FROM new_rows")
    numbers = dict(zip(_ROW_NUMBERS, values, strict=True))
    quantiles = numbers.pop("quantiles")
    found = dict(zip(QUANTILES, quantiles, strict=True)) if numbers["num_rows"] else {}
    return {**numbers, "seconds_quantiles": found}


def _count(facts: SnapshotFacts, table: str) -> int:
    ((count,),) = facts.ask(f"SELECT count(*) FROM {table}")
    return int(count)


def _num_repeated(facts: SnapshotFacts, table: str, column: str) -> int:
    # A grouping spills to disk; count(DISTINCT) holds all keys in memory.
    ((surplus,),) = facts.ask(
        "SELECT coalesce(sum(num - 1), 0)::BIGINT FROM"
        f" (SELECT count(*) AS num FROM {table} GROUP BY {column} HAVING count(*) > 1)"
    )
    return int(surplus)


def _durations(facts: SnapshotFacts) -> list[DurationBin]:
    uppers = [*map(float, DURATION_EDGES[1:]), None]
    counts = ", ".join(
        f"count(*) FILTER (duration_seconds >= {lower} AND duration_seconds < {upper or 'inf'!r})"
        for lower, upper in zip(DURATION_EDGES, uppers, strict=True)
    )
    (values,) = facts.ask(f"SELECT {counts} FROM new_rows")
    return [
        DurationBin(lower_seconds=lower, upper_seconds=upper, num_files=count)
        for lower, upper, count in zip(DURATION_EDGES, uppers, values, strict=True)
    ]


def _codebook_uses(counter: CodeCounter) -> Iterator[CodebookUse]:
    for codebook, counts in enumerate(counter.counts):
        bars = np.array_split(counts, min(_HISTOGRAM_BARS, len(counts)))
        yield CodebookUse(
            stream=counter.stream.name,
            codebook=codebook,
            size=len(counts),
            num_used=int(np.count_nonzero(counts)),
            perplexity=_perplexity(counts),
            num_codes=int(counts.sum()),
            bars=[int(bar.sum()) for bar in bars],
        )


def _perplexity(counts: Ints) -> float:
    """Two to the entropy in bits: how many equally likely codes would be as varied; 0 if none."""
    used = counts[counts > 0]
    if not len(used):
        return 0.0
    shares = used / used.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
