"""What a snapshot must fulfil, and what deserves a look.

An ``error`` blocks the publish. What may be right for unusual audio (silence, clipping, a corpus
that moves, few codes in use) is a ``warning``; so is a codebook with a single code in use when the
codec is untrained, since random weights do that.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from hcodec_core.dataset.expectations import Rule
from hcodec_core.dataset.facts import fault_names
from hcodec_core.dataset.plan_documents import BadFileBudget
from hcodec_core.jobs import TokenizeJob

_FAULT_TITLES = {
    "plan_lists_file_once": "The plan lists every file once",
    "shard_done": "Every shard of the plan is done",
    "file_accounted_once": "Every file of the plan has exactly one outcome",
    "outcome_in_plan": "Every outcome is of a file of its shard",
    "tokens_have_one_row": "Every file with tokens has exactly one row",
    "row_has_tokens_outcome": "Every row is of a file that was reported to have tokens",
    "row_in_plan": "Every row is of a file and content that the plan lists",
    "audio_id_matches": "audio_id is the digest of uri and etag",
    "duration_agrees": "Samples, decoded length and reported length agree to one frame",
    "audio_id_unique": "No two rows of the snapshot have the same audio_id",
    "uri_unique": "No two rows of the snapshot have the same uri",
    "outdated_rows_gone": "Rows of objects that are gone or changed have left the snapshot",
    "required_values": "No required value is missing",
    "sample_rate_agrees": "sample_rate is the codec's",
    "frames_match_samples": "The number of frames follows from the number of samples",
}

# Judged where an audit was run; the codes of mode fast are free to differ.
AUDIT_TITLES = {
    "audit_codes_equal": "Sampled files, encoded again in mode exact, give the codes of their rows",
    "audit_lengths_equal": "Sampled rows decode to audio as long as their sources",
    "audit_audio_finite": "Sampled rows decode to finite samples",
}


class Thresholds(BaseModel):
    """Where warnings begin; all are shares in 0..1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_silent_share: float = Field(default=0.2, ge=0, le=1)
    max_clipped_share: float = Field(default=0.01, ge=0, le=1)
    max_moved_share: float = Field(default=0.1, ge=0, le=1)
    min_codebook_use: float = Field(default=0.5, ge=0, le=1)


def rules_of(job: TokenizeJob, budget: BadFileBudget, thresholds: Thresholds) -> list[Rule]:
    """All rules that a snapshot is judged by."""
    return [
        *(Rule(name, title, "shards", maximum=0) for name, title in _fault_titles(job).items()),
        Rule("plan_is_whole", "The plan lists as many files as its job says", "version", maximum=0),
        Rule(
            "snapshot_is_whole",
            "The snapshot has as many rows as its commit counted",
            "version",
            maximum=0,
        ),
        Rule("accounts_add_up", "As many outcomes as files in the plan", "version", "error", 0, 0),
        *(Rule(name, title, "version", maximum=0) for name, title in AUDIT_TITLES.items()),
        *_budget_rules(budget),
        *_warning_rules(thresholds),
        Rule(
            "codebook_alive",
            "Every codebook has more than one code in use",
            "codebooks",
            "error" if job.manifest.is_trained else "warning",
            minimum=2,
        ),
    ]


def _fault_titles(job: TokenizeJob) -> dict[str, str]:
    titles = dict(_FAULT_TITLES)
    for stream in job.manifest.streams:
        titles[f"codes_in_range_{stream.name}"] = (
            f"Codes of stream {stream.name} lie in 0..{stream.codebook_size - 1}"
        )
        titles[f"codes_length_{stream.name}"] = (
            f"Rows hold {stream.num_codebooks} codes of stream {stream.name} per frame"
        )
    return {name: titles[name] for name in fault_names(job)}


def _budget_rules(budget: BadFileBudget) -> list[Rule]:
    share = Rule(
        "bad_file_share",
        "The share of unusable files is within the budget",
        "version",
        maximum=budget.max_share,
    )
    if budget.max_files is None:
        return [share]
    count = Rule(
        "bad_file_count",
        "The number of unusable files is within the budget",
        "version",
        maximum=budget.max_files,
    )
    return [share, count]


def _warning_rules(thresholds: Thresholds) -> list[Rule]:
    limits = {
        "silent_share": ("Little of the audio is in silent files", thresholds.max_silent_share),
        "clipped_share": ("Few samples are clipped", thresholds.max_clipped_share),
        "moved_share": (
            "Few files changed or went away while the plan ran",
            thresholds.max_moved_share,
        ),
    }
    shares = [
        Rule(name, title, "version", "warning", maximum=limit)
        for name, (title, limit) in limits.items()
    ]
    use = Rule(
        "codebook_use",
        "A good share of every codebook is in use",
        "codebooks",
        "warning",
        minimum=thresholds.min_codebook_use,
    )
    return [*shares, use]
