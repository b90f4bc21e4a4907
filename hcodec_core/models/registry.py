"""The table of codec families. Adding a codec is one folder and one line here.

A family's package holds three modules:

``config.py`` (no torch): a frozen dataclass with the properties of ``FamilyConfig``; presets as
    functions without arguments, listed in ``PRESETS`` by codec name; those with ``tiny`` in their
    name (at least one) run through ``tests/models/test_behaviour.py``; ``FACTS``, what is known of
    each preset beside its shape. Names are unique across families.
``model.py``: ``build(architecture) -> Codec`` with random weights.
``convert.py``: ``convert_checkpoint``, ``recognises_golden`` and ``golden_cases`` (see
    ``FamilyConversion``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from hcodec_core.errors import ConfigError
from hcodec_core.tokens import CodecManifest, StreamSpec

if TYPE_CHECKING:
    from hcodec_core.models.base import Codec
    from hcodec_core.models.conversion import ConvertRequest, GoldenCase
    from hcodec_core.models.facts import CodecFacts

FAMILIES: Mapping[str, str] = {
    "hcodec": "hcodec_core.models.hcodec",
    "hhcodec": "hcodec_core.models.hhcodec",
    "library": "hcodec_core.models.library",
    "ucodec": "hcodec_core.models.ucodec",
    "xcodec": "hcodec_core.models.xcodec",
}


class FamilyConfig(Protocol):
    """What every family's configuration answers."""

    @property
    def sample_rate(self) -> int:
        """Sample rate of audio in and out, Hz."""

    @property
    def hop_length(self) -> int:
        """Samples per base token frame."""

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """Streams in the order in which they are stored."""

    @property
    def is_variable_rate(self) -> bool:
        """Whether one token may span several base frames."""

    def architecture(self) -> dict[str, Any]:
        """The configuration as JSON, for ``CodecManifest.architecture`` and ``build``."""


class FamilyConversion(Protocol):
    """What every family's ``convert.py`` offers."""

    def convert_checkpoint(self, request: ConvertRequest) -> CodecManifest:
        """Write a released checkpoint as a codec folder."""

    def recognises_golden(self, config: Mapping[str, Any]) -> bool:
        """Whether the ``config.json`` of a golden folder is of this family."""

    def golden_cases(self, folder_path: Path, work_path: Path) -> list[GoldenCase]:
        """Convert a golden folder's checkpoint below ``work_path`` and list its cases."""


def presets(family: str) -> Mapping[str, Callable[[], FamilyConfig]]:
    """Named configurations of a family. Raises ``ConfigError`` for an unknown family."""
    return cast(
        "Mapping[str, Callable[[], FamilyConfig]]", _family_module(family, "config").PRESETS
    )


def facts(family: str) -> Mapping[str, CodecFacts]:
    """What is known of each preset of a family. Raises ``ConfigError`` for an unknown family."""
    return cast("Mapping[str, CodecFacts]", _family_module(family, "config").FACTS)


def family_of(preset: str) -> str:
    """The family that has a preset. Raises ``ConfigError`` naming what there is."""
    for family in FAMILIES:
        if preset in presets(family):
            return family
    names = sorted(name for family in FAMILIES for name in presets(family))
    raise ConfigError(f"There is no preset {preset!r}: presets are {', '.join(names)}.")


def build_codec(family: str, architecture: Mapping[str, Any]) -> Codec:
    """A codec with random weights and no identity yet, on torch's current default device.

    Raises ``ConfigError`` for an unknown family or an architecture that it does not have.
    """
    return cast("Codec", _family_module(family, "model").build(architecture))


def conversion(family: str) -> FamilyConversion:
    """A family's converter. Raises ``ConfigError`` for an unknown family."""
    return cast("FamilyConversion", _family_module(family, "convert"))


def _family_module(family: str, module: str) -> Any:
    if family not in FAMILIES:
        raise ConfigError(
            f"There is no codec family {family!r}: families are {', '.join(sorted(FAMILIES))}."
        )
    return importlib.import_module(f"{FAMILIES[family]}.{module}")
