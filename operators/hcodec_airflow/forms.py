"""The fields of the trigger form: title, help, section and JSON schema of each parameter.

The schema is what the API refuses wrong values by (400), so that it says all it can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from airflow.sdk import Param

# No two underscores in a row: they part a dataset's name from its encode id in table names.
NAME_PATTERN = r"^[a-z](_?[a-z0-9])*_?$"
NAME_LENGTH = 64
URI_PATTERN = r"^(s3://[^/]+|file:///)"
MAX_WORKERS = 256
MAX_GAIN = 100.0

_WHAT = "What"
_HOW = "How"
_LIMITS = "Limits"
_RUN = "This run"

FIELDS: dict[str, dict[str, Any]] = {
    "source": {
        "type": "string",
        "pattern": URI_PATTERN,
        "title": "Source",
        "description": "Folder of audio files (s3://bucket/prefix/, file:///folder/), or a "
        "manifest (.csv, .jsonl, .parquet) with a column uri. It must lie under an allowed prefix "
        "of the configuration.",
        "section": _WHAT,
    },
    "dataset": {
        "type": "string",
        "pattern": NAME_PATTERN,
        "maxLength": NAME_LENGTH,
        "title": "Dataset",
        "description": "Name of the token dataset: lower-case letters, digits, single "
        "underscores. A new name makes a new dataset; a known one is brought up to date.",
        "section": _WHAT,
    },
    "codec": {
        "type": "string",
        "minLength": 1,
        "default": "hcodec-nano",
        "title": "Codec",
        "description": "A preset with weights (hcodec-nano), a folder (s3://bucket/models/h1, "
        "file:///models/h1), a repository (hf://org/name@revision) or a registered codec "
        "(models:/hcodec-nano@champion).",
        "section": _WHAT,
    },
    "workers": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_WORKERS,
        "default": 2,
        "title": "Workers",
        "description": "Processes that encode at the same time. Tokens do not depend on it.",
        "section": _HOW,
    },
    "backend": {
        "type": ["null", "string"],
        "enum": [None, "local", "kubernetes"],
        "default": None,
        "title": "Backend",
        "description": "Where workers run. Empty: as the installation says.",
        "section": _HOW,
    },
    "profile": {
        "type": ["null", "string"],
        "default": None,
        "title": "GPU profile",
        "description": "How worker pods look, by name in the installation's profiles. It decides "
        "the compute class, which is part of the dataset's identity. Empty: the default profile.",
        "section": _HOW,
    },
    "mode": {
        "type": "string",
        "enum": ["exact", "fast"],
        "default": "exact",
        "title": "Mode",
        "description": "exact: the same tokens for the same audio, however the work is split. "
        "fast: quicker and another dataset; refused where the engine does not have it.",
        "section": _HOW,
    },
    "channel": {
        "type": "string",
        "enum": ["mean", "first"],
        "default": "mean",
        "title": "Channel",
        "description": "What becomes of audio with several channels: their mean, or the first. "
        "Another rule gives other tokens, so it is another dataset table.",
        "section": _HOW,
    },
    "gain": {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": MAX_GAIN,
        "default": 1.0,
        "title": "Gain",
        "description": "Factor on the samples before they are encoded. Another gain gives other "
        "tokens, so it is another dataset table.",
        "section": _HOW,
    },
    "threshold": {
        "type": ["null", "number"],
        "exclusiveMinimum": 0,
        "maximum": 1,
        "default": None,
        "title": "Threshold",
        "description": "Only for codecs whose frame rate adapts (H-Codec 1.5): frames more alike "
        "than this become one token, so a higher one gives more tokens. Empty: the codec's own.",
        "section": _HOW,
    },
    "hours_per_shard": {
        "type": "number",
        "exclusiveMinimum": 0,
        "default": 1.0,
        "title": "Hours of audio per shard",
        "description": "A shard is the unit of work and of retry. Plan many more shards than "
        "workers.",
        "section": _HOW,
    },
    "shards": {
        "type": ["null", "integer"],
        "minimum": 1,
        "default": None,
        "title": "Shards",
        "description": "Their number, in place of hours per shard.",
        "section": _HOW,
    },
    "max_hours_per_version": {
        "type": ["null", "number"],
        "exclusiveMinimum": 0,
        "default": None,
        "title": "Hours of audio per version",
        "description": "Take only the first so many hours; later runs take the rest. Empty: all.",
        "section": _LIMITS,
    },
    "spend_cap": {
        "type": ["null", "number"],
        "minimum": 0,
        "default": None,
        "title": "Spend cap",
        "description": "Highest estimated cost, in the currency of the configuration. Above it "
        "nothing is started. Empty: no cap.",
        "section": _LIMITS,
    },
    "max_bad_share": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.05,
        "title": "Budget for bad files",
        "description": "Share of the files (0.05 is 5 %) that may end in quarantine. Above it "
        "nothing is published.",
        "section": _LIMITS,
    },
    "max_delete_share": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0.2,
        "title": "Largest share of deletions",
        "description": "Share of the dataset's objects that may be gone from the source. Above it "
        "their tokens are kept, and the task plan says so.",
        "section": _LIMITS,
    },
    "allow_many_deletes": {
        "type": "boolean",
        "default": False,
        "title": "Allow many deletions",
        "description": "Remove the tokens of deleted objects even above that share. For one run, "
        "when the objects were really deleted.",
        "section": _RUN,
    },
    "retry_quarantined": {
        "type": "boolean",
        "default": False,
        "title": "Retry quarantined files",
        "description": "Try files again that an earlier run could not use.",
        "section": _RUN,
    },
    "dry_run": {
        "type": "boolean",
        "default": False,
        "title": "Dry run",
        "description": "Only plan: the task plan logs files, hours and cost; nothing is encoded.",
        "section": _RUN,
    },
}

RUN_FIELDS = (
    "workers",
    "max_hours_per_version",
    "spend_cap",
    "max_bad_share",
    "max_delete_share",
    "allow_many_deletes",
    "retry_quarantined",
    "dry_run",
)


def form(names: Iterable[str], defaults: Mapping[str, Any] | None = None) -> dict[str, Param]:
    """Parameters called ``names``; ``defaults`` replace those of the fields."""
    return {name: _param({**FIELDS[name], **_default(name, defaults)}) for name in names}


def _default(name: str, defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"default": defaults[name]} if defaults and name in defaults else {}


def _param(entry: dict[str, Any]) -> Param:
    # A field without a default must be filled in; one with an empty default greys the form.
    default = {"default": entry.pop("default")} if "default" in entry else {}
    return Param(**default, **entry)
