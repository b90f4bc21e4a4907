"""Configuration files that come with released checkpoints, held to the checkpoint's tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hcodec_core.errors import CheckpointError, ConfigError


def read_config(path: Path) -> Mapping[str, Any]:
    """Content of a JSON configuration. Raises ``ConfigError`` when it is not an object."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"The configuration {path} cannot be read as JSON.") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"The configuration {path} holds no JSON object.")
    return values


def section(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The object found by following ``names``. Raises ``ConfigError`` when there is none."""
    found: Any = values
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise ConfigError(f"The configuration has no section {'.'.join(names)}.")
    return found


def check_agreement(name: str, values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Hold section ``name`` to what the tensors say, or to the one value that is supported.

    Raises:
        CheckpointError: A field is given and differs.
    """
    for field, value in expected.items():
        if field in values and values[field] != value:
            raise CheckpointError(
                f"The configuration's {name} says {field} = {values[field]!r}; the checkpoint, or "
                f"what is supported, says {value!r}: the file belongs to other weights."
            )


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of tensor ``key``, or of its direction where it has a weight norm.

    Raises:
        CheckpointError: It is missing.
    """
    for name in (key, f"{key}_v"):
        if name in state:
            return tuple(state[name].shape)
    raise CheckpointError(f"The checkpoint lacks the tensor {key!r}.")


def count_like(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of keys that match the whole regular expression ``pattern``."""
    return sum(re.fullmatch(pattern, key) is not None for key in state)
