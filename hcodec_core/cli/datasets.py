"""Commands on datasets."""

from __future__ import annotations

from hcodec_core.cli.output import Commands


def add_commands(commands: Commands) -> None:
    """Register the commands."""
