"""Commands that keep a dataset in order: ``hcodec maintain`` and ``hcodec purge``."""

from __future__ import annotations

import argparse
import os
import socket

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import load_config
from hcodec_core.storage import open_storage


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    maintain = commands.add_parser(
        "maintain", help="compact small files, expire snapshots, sweep orphans (dry run first)"
    )
    maintain.add_argument("dataset")
    maintain.add_argument("--encode-id", default=None, help="first digits, among several codecs")
    maintain.add_argument("--apply", action="store_true", help="do it (default: say what it does)")
    maintain.add_argument("--expire-after-days", type=float, default=7.0)
    maintain.add_argument("--orphan-age-days", type=float, default=3.0)
    maintain.add_argument("--small-file-mib", type=float, default=32.0, help="0: no compaction")
    add_config(maintain)
    add_json(maintain)
    maintain.set_defaults(handler=_maintain)


def _owner() -> str:
    return f"cli/{socket.gethostname()}-{os.getpid()}"


def _maintain(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.maintenance import Upkeep, maintain
    from hcodec_core.dataset.table import find_layout

    config = load_config(options.config)
    layout = find_layout(config, options.dataset, options.encode_id)
    terms = Upkeep(
        expire_after_days=options.expire_after_days,
        orphan_age_days=options.orphan_age_days,
        small_file_mib=options.small_file_mib,
    )
    storage = open_storage(config.storage)
    report = maintain(config, storage, layout, _owner(), terms, dry_run=not options.apply)
    compaction, sweep = report.compaction, report.sweep
    lines = [
        f"compaction  {compaction.num_files_before} small files -> {compaction.num_files_after}",
        f"snapshots   {report.num_expired_snapshots} that no version, branch or tag names",
        f"orphans     {sweep.num_orphans} objects, {sweep.num_bytes} bytes; {sweep.num_kept} kept",
    ]
    if report.is_dry_run:
        lines.append("Dry run: nothing was changed; do it with --apply.")
    output.result(report.model_dump(mode="json"), "\n".join(lines))
