"""Command ``hcodec monitor``: does a dataset still look like its reference version?

Exit codes: 0, nothing moved beyond chance; 3, it drifted; 4, there was too little to judge, or
nothing new; 1 and 43 as of every command.
"""

from __future__ import annotations

import argparse
import getpass
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import describe, load_config
from hcodec_core.errors import EXIT_OK, ConfigError
from hcodec_core.storage import open_storage

if TYPE_CHECKING:
    from hcodec_core.monitoring.documents import MonitorResult, MonitorTerms

EXIT_DRIFTED = 3
EXIT_NOT_JUDGED = 4

_TERMS = {
    "reference": (str, "v3, another tag, or pinned: the newest pinned version (default)"),
    "window": (str, "added: files since the last window (default); version: all files"),
    "false_alarm_rate": (float, "of a window in which nothing changed (default: 0.01)"),
    "least_psi": (float, "a PSI below it is too small to matter (default: 0.05)"),
    "min_files": (int, "with fewer nothing is judged (default: 50)"),
    "windows_in_a_row": (int, "drifted windows that make an alarm (default: 2)"),
    "cool_down_days": (float, "after an alarm, days in which no window counts (default: 7)"),
}


def add_commands(commands: Commands) -> None:
    """Register the command."""
    monitor = commands.add_parser(
        "monitor",
        help="compare a dataset's new tokens with a reference version (exit code 3: drifted)",
        description="Exit codes: 0 nothing moved beyond chance, 3 drifted, 4 too little to judge.",
    )
    monitor.add_argument("--dataset", required=True)
    monitor.add_argument("--encode-id", default=None, help="first digits, among several codecs")
    for name, (kind, text) in _TERMS.items():
        option = f"--{name.replace('_', '-')}"
        monitor.add_argument(option, type=kind, default=argparse.SUPPRESS, help=text)
    monitor.add_argument("--version", default="latest", help="judge this one (not with --record)")
    monitor.add_argument("--record", action="store_true", help="count the window towards an alarm")
    monitor.add_argument("--out", type=Path, default=None, help="folder for the evidence")
    add_config(monitor)
    add_json(monitor)
    monitor.set_defaults(handler=_monitor)


def _monitor(options: argparse.Namespace, output: Output) -> int:
    from hcodec_core.dataset.table import find_layout
    from hcodec_core.monitoring.documents import WindowState
    from hcodec_core.monitoring.watching import look, monitor

    if options.record and options.version != "latest":
        raise ConfigError("Only the latest version can be recorded: leave out --version.")
    config = load_config(options.config)
    storage = open_storage(config.storage)
    layout = find_layout(config, options.dataset, options.encode_id)
    terms = _terms(options)
    if options.record:
        owner = f"{getpass.getuser()}@{socket.gethostname()}"
        result = monitor(storage, layout, terms, owner=owner)
    else:
        version = options.version
        version = f"v{version}" if version.isdecimal() else version
        result = look(storage, layout, terms, version)
    lines = [result.text, *_lines(result), *_written(result, options.out)]
    output.result(result.model_dump(mode="json"), "\n".join(lines))
    codes = {WindowState.SAME: EXIT_OK, WindowState.DRIFTED: EXIT_DRIFTED}
    return codes.get(result.state, EXIT_NOT_JUDGED)


def _terms(options: argparse.Namespace) -> MonitorTerms:
    from pydantic import ValidationError

    from hcodec_core.monitoring.documents import MonitorTerms

    given = {name: getattr(options, name) for name in _TERMS if hasattr(options, name)}
    try:
        return MonitorTerms.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"These options cannot be used: {describe(error)}.") from error


def _lines(result: MonitorResult) -> list[str]:
    """One line per statistic, the largest excess first."""
    if result.report is None:
        return []
    ordered = sorted(result.report.statistics, key=lambda statistic: -statistic.excess)
    return [
        f"{statistic.name:24} JS {statistic.js_bits:.4f} of {statistic.js_threshold:.4f} bits, "
        f"PSI {statistic.psi:.4f} of {statistic.psi_threshold:.4f}"
        + ("  moved" if statistic.is_drifted else "")
        for statistic in ordered
    ]


def _written(result: MonitorResult, folder: Path | None) -> list[str]:
    if result.step is not None:
        return [f"evidence {result.step.evidence_uri}"]
    if folder is None or result.report is None or not result.report.statistics:
        return []
    from hcodec_core.monitoring.evidence import PAGE_FILE, evidence_files

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in evidence_files(result.report, []).items():
        (folder / name).write_bytes(data)
    return [f"evidence {folder / PAGE_FILE}"]
