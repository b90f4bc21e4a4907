"""Commands on the catalog: ``hcodec catalog restore``."""

from __future__ import annotations

import argparse

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import load_config
from hcodec_core.errors import ConfigError
from hcodec_core.storage import open_storage


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    catalog = commands.add_parser("catalog", help="make a lost catalog again")
    actions = catalog.add_subparsers(metavar="ACTION", required=True)
    restore = actions.add_parser(
        "restore", help="point the catalog to the newest metadata in object storage (dry run first)"
    )
    restore.add_argument(
        "--from-storage",
        action="store_true",
        help="look through the warehouse of the configuration",
    )
    restore.add_argument(
        "--metadata-uri", action="append", default=[], help="take this file (where two could be it)"
    )
    restore.add_argument("--apply", action="store_true", help="do it (default: say what is found)")
    add_config(restore)
    add_json(restore)
    restore.set_defaults(handler=_restore)


def _restore(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.backup import restore_from_storage

    if not options.from_storage:
        raise ConfigError(
            "Say --from-storage; a dump of the catalog's database is restored by the database's "
            "own tools, see docs/backup.md."
        )
    config = load_config(options.config)
    found = restore_from_storage(
        config, open_storage(config.storage), options.metadata_uri, dry_run=not options.apply
    )
    changed = "restored" if options.apply else "to restore"
    output.table(
        f"Tables below {config.catalog.warehouse_uri}",
        ("table", "versions", "metadata", "state"),
        [
            (
                table.table,
                ", ".join(table.versions) or "none",
                table.metadata_uri.rpartition("/")[2],
                changed if table.is_changed else "as it was",
            )
            for table in found
        ],
    )
    if not options.apply:
        output.note("Dry run: nothing was changed; do it with --apply.")
