"""The fields of the forms of ``retrain_codec`` and ``rollback_codec``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from airflow.sdk import Param

from hcodec_airflow.forms import MAX_WORKERS, NAME_LENGTH, NAME_PATTERN, URI_PATTERN

CODEC_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DATA_PATTERN = r"^(s3://[^/]+|file:///|dataset:[a-z])"
MAX_NODES = 64
MAX_GPUS = 16

_WHAT = "What"
_HOW = "How"
_GATE = "Who may take the champion's place"
_AFTER = "Afterwards"

CODEC: dict[str, Any] = {
    "type": "string",
    "pattern": CODEC_PATTERN,
    "title": "Codec",
    "description": "Its name in the model registry (hcodec-nano). A new name makes a new codec.",
    "section": _WHAT,
}

FIELDS: dict[str, dict[str, Any]] = {
    "codec": CODEC,
    "base": {
        "type": "string",
        "minLength": 1,
        "default": "champion",
        "title": "Start from",
        "description": "champion: go on from the weights of the present champion. scratch: new "
        "weights in the recipe's shape. Or a codec: hcodec-nano, s3://bucket/models/h1, "
        "models:/hcodec-nano/3.",
        "section": _WHAT,
    },
    "data": {
        "type": "array",
        "items": {"type": "string", "pattern": DATA_PATTERN},
        "minItems": 1,
        "title": "Data",
        "description": "What to train on, one per line: dataset:speech (its latest version) or "
        "dataset:speech@v3, a folder or an inventory (s3://audio/speech/), or a manifest. The list "
        "of files is pinned when the run begins.",
        "section": _WHAT,
    },
    "held_out": {
        "type": "string",
        "pattern": URI_PATTERN,
        "title": "Held-out set",
        "description": "Folder of audio that new codec and champion are compared on. Files in it, "
        "and copies of them in object storage, are left out of the training.",
        "section": _WHAT,
    },
    "recipe": {
        "type": "string",
        "minLength": 1,
        "default": "nano",
        "title": "Recipe",
        "description": "A recipe that ships (nano, hcodec-1.0, tiny) or the path of a TOML file on "
        "Airflow's hosts. It decides everything about the training that is not said below.",
        "section": _HOW,
    },
    "steps": {
        "type": ["null", "integer"],
        "minimum": 1,
        "default": None,
        "title": "Steps",
        "description": "Number of training steps. Empty: as the recipe says.",
        "section": _HOW,
    },
    "learning_rate": {
        "type": ["null", "number"],
        "exclusiveMinimum": 0,
        "default": None,
        "title": "Learning rate",
        "description": "Of the codec itself, at its highest. Empty: as the recipe says.",
        "section": _HOW,
    },
    "discriminator_learning_rate": {
        "type": ["null", "number"],
        "exclusiveMinimum": 0,
        "default": None,
        "title": "Learning rate of the discriminators",
        "description": "Only where the recipe trains against discriminators. Empty: as it says.",
        "section": _HOW,
    },
    "train": {
        "type": "string",
        "enum": ["as the recipe says", "all", "decoder"],
        "default": "as the recipe says",
        "title": "Parts to train",
        "description": "decoder: encoder and codebooks stay as they are, and so does every token "
        "of every dataset. It needs a codec to start from.",
        "section": _HOW,
    },
    "changes": {
        "type": ["null", "object"],
        "default": None,
        "title": "Other entries of the recipe",
        "description": 'As JSON, such as {"batch_size": 64, "losses.mel": 45}. All entries: '
        "hcodec_core/training/recipe.py.",
        "section": _HOW,
    },
    "teacher": {
        "type": ["null", "string"],
        "default": None,
        "title": "SSL model",
        "description": "Folder of the SSL model on the workers; only from scratch, and only for "
        "codecs that learn from one.",
        "section": _HOW,
    },
    "nodes": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_NODES,
        "default": 1,
        "title": "Nodes",
        "description": "Machines that train together. The backend local has one.",
        "section": _HOW,
    },
    "gpus": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_GPUS,
        "default": 1,
        "title": "GPUs per node",
        "description": "Processes on each node, one per GPU (on a CPU: just processes). Nodes "
        "times GPUs must divide the recipe's batch_size.",
        "section": _HOW,
    },
    "backend": {
        "type": ["null", "string"],
        "enum": [None, "local", "kubernetes"],
        "default": None,
        "title": "Backend",
        "description": "Where training and evaluation run. Empty: as the installation says.",
        "section": _HOW,
    },
    "profile": {
        "type": ["null", "string"],
        "default": None,
        "title": "GPU profile",
        "description": "How pods look, by name in the installation's profiles. Empty: the default "
        "profile.",
        "section": _HOW,
    },
    "margins": {
        "type": ["null", "object"],
        "additionalProperties": {"type": "number", "minimum": 0},
        "default": None,
        "title": "Margins",
        "description": "How much worse than the champion the new codec may be, as JSON, such as "
        '{"stoi": 0.01, "mel_distance_db": 0.2}. What is named must be measured; the rest is as '
        "the configuration says.",
        "section": _GATE,
    },
    "min_files": {
        "type": ["null", "integer"],
        "minimum": 2,
        "default": None,
        "title": "Fewest files",
        "description": "Files of the held-out set below which nothing is decided. Empty: as the "
        "configuration says.",
        "section": _GATE,
    },
    "max_files": {
        "type": ["null", "integer"],
        "minimum": 2,
        "default": None,
        "title": "Most files",
        "description": "Evaluate on so many files, spread over the held-out set. Empty: on all.",
        "section": _GATE,
    },
    "approval": {
        "type": "string",
        "enum": ["ask", "automatic"],
        "default": "ask",
        "title": "Approval",
        "description": "ask: a person says yes or no after the gate, in the UI or by the API. "
        "automatic: what passes the gate is promoted.",
        "section": _GATE,
    },
    "datasets": {
        "type": ["null", "array"],
        "items": {"type": "string", "pattern": NAME_PATTERN, "maxLength": NAME_LENGTH},
        "default": None,
        "title": "Datasets",
        "description": "Datasets to plan new tokens for, one per line. Empty: all whose tokens "
        "were made by a codec of this name.",
        "section": _AFTER,
    },
    "tokenise": {
        "type": "boolean",
        "default": False,
        "title": "Tokenise them",
        "description": "Start tokenize_corpus for each of them after the promotion. Off: the plan "
        "with its cost is only printed. Versions that are there stay as they are.",
        "section": _AFTER,
    },
    "tokenise_workers": {
        "type": "integer",
        "minimum": 1,
        "maximum": MAX_WORKERS,
        "default": 1,
        "title": "Workers of those runs",
        "description": "Few, so that they leave room for what is urgent.",
        "section": _AFTER,
    },
    "tokenise_profile": {
        "type": ["null", "string"],
        "default": None,
        "title": "GPU profile of those runs",
        "description": "A profile of low priority (priority_class, kueue_priority_class). Empty: "
        "the default profile.",
        "section": _AFTER,
    },
    "dry_run": {
        "type": "boolean",
        "default": False,
        "title": "Dry run",
        "description": "Only plan: the task pin logs files, steps, GPU hours and cost; nothing is "
        "trained or written.",
        "section": "This run",
    },
}

ROLLBACK_FIELDS: dict[str, dict[str, Any]] = {
    "codec": CODEC,
    "champion": {
        "type": "integer",
        "minimum": 1,
        "title": "Champion that is to leave",
        "description": "Version that is the champion now. If another one is, nothing is changed; "
        "so a run that is repeated goes back once.",
        "section": _WHAT,
    },
    "reason": {
        "type": "string",
        "minLength": 1,
        "title": "Reason",
        "description": "Why; it stays in the history of the codec.",
        "section": _WHAT,
    },
}

ANSWER_FIELDS: dict[str, dict[str, Any]] = {
    "reason": {
        "type": "string",
        "default": "",
        "title": "Reason",
        "description": "Why yes or no; it is kept with the decision.",
        "section": "Answer",
    },
}


def form(
    fields: Mapping[str, Mapping[str, Any]],
    left_out: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Param]:
    """Parameters of the fields but those left out; ``defaults`` replace those of the fields."""
    known = defaults or {}
    chosen = {name: dict(fields[name]) for name in fields if name not in set(left_out)}
    changed = {name: {"default": known[name]} for name in chosen if name in known}
    return {name: Param(**{**chosen[name], **changed.get(name, {})}) for name in chosen}
