"""Pages that open in a browser without a network: one look, one way to write names and numbers.

A page holds its own styles and drawings, loads nothing, and shows names of objects, which anyone
who may upload can choose, only escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any


def render_page(template_file: str, **values: Any) -> str:
    """Fill in a template of this package, or ``package:file``; all ``values`` are escaped.

    Filters: ``count`` (1,234), ``percent`` (of a share), ``hours`` and ``duration`` (of seconds,
    the latter in a unit that fits), ``size`` (of bytes), ``printable``.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        loader=FunctionLoader(_template),
    )
    environment.filters.update(
        count=lambda number: f"{number:,}",
        percent=_percent,
        hours=_hours,
        duration=_duration,
        size=_size,
        printable=printable,
    )
    return environment.get_template(template_file).render(values)


def bars_of(counts: Sequence[int]) -> list[tuple[float, float, int]]:
    """Left edge and height of each bar of a histogram in 0..100, and its count."""
    highest = max(counts, default=0) or 1
    return [
        (100 * index / len(counts), 100 * count / highest, count)
        for index, count in enumerate(counts)
    ]


def printable(name: str) -> str:
    """A name without characters that would move the cursor or turn the text around."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _template(name: str) -> str:
    package, _, file = name.rpartition(":")
    return resources.files(package or "hcodec_core.dataset").joinpath(file).read_text()


def _percent(share: float | None) -> str:
    if share is None:
        return "not known"
    return f"{100 * share:.3g}\u00a0%"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f}" if seconds < 360_000 else f"{seconds / 3600:,.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{_hours(seconds)}\u00a0h"
    return f"{seconds / 60:.1f}\u00a0min" if seconds >= 60 else f"{seconds:.1f}\u00a0s"


def _size(num_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.3g}\u00a0{unit}"
    return f"{num_bytes:,.0f}\u00a0bytes"
