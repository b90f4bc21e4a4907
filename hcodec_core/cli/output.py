"""Text or JSON on standard output; progress, notes and errors on standard error."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcodec_core.errors import HCodecError

if TYPE_CHECKING:
    from rich.progress import Progress

Commands = Any  # argparse keeps the type of its sub-parser action private


Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]
"""Title, column heads, rows."""


@dataclass(frozen=True)
class Output:
    """Where a command's results go; with ``is_json`` they are one JSON document."""

    is_json: bool = False

    def result(self, document: Any, text: str = "") -> None:
        """Print the result: ``document`` as JSON, or ``text`` (default: the document's items)."""
        if self.is_json:
            sys.stdout.write(json.dumps(document, indent=1, default=str) + "\n")
            return
        lines = text or "\n".join(f"{key}: {value}" for key, value in dict(document).items())
        sys.stdout.write(lines + "\n")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print rows under column heads; as JSON a list of objects."""
        rows = [tuple(row) for row in rows]
        if self.is_json:
            self.result(_objects(columns, rows))
        else:
            _print_table(title, columns, rows)

    def tables(self, tables: Sequence[Table]) -> None:
        """Print several tables; as JSON one object with a list of objects per title."""
        if self.is_json:
            self.result({title: _objects(columns, rows) for title, columns, rows in tables})
            return
        for title, columns, rows in tables:
            _print_table(title, columns, rows)

    def note(self, text: str) -> None:
        """Say something that is not the result."""
        sys.stderr.write(text + "\n")

    def error(self, error: HCodecError) -> None:
        """Print an error in one sentence, or as JSON."""
        if self.is_json:
            fault = {"error": type(error).__name__, "message": str(error), "exit": error.exit_code}
            sys.stderr.write(json.dumps(fault) + "\n")
        else:
            sys.stderr.write(f"hcodec: {error}\n")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Progress bars with time left, on standard error."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        ) as progress:
            yield progress


def _objects(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = RichTable()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    # A pipe has no width of its own: cut nothing there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(title, markup=False, highlight=False)
    console.print(table)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Let a command print JSON."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Let a command read the configuration file."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(os.environ.get("HCODEC_CONFIG", "hcodec.toml")),
        help="configuration file (default: $HCODEC_CONFIG, else ./hcodec.toml)",
    )


class _JsonLines(logging.Formatter):
    """One JSON object a line; a record's ``fields`` are merged in."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup_logging(*, is_json: bool, is_verbose: bool) -> None:
    """Send this program's log to standard error."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if is_json else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    chosen = logging.INFO if is_verbose or is_json else logging.WARNING
    logging.getLogger("hcodec_core").setLevel(chosen)
