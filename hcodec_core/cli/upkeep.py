"""Commands that keep a dataset in order: ``hcodec maintain`` and ``hcodec purge``."""

from __future__ import annotations

import argparse
import os
import socket
from typing import TYPE_CHECKING

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import load_config
from hcodec_core.errors import ConfigError
from hcodec_core.storage import open_storage

if TYPE_CHECKING:
    from hcodec_core.dataset.purge import PurgeRecord, PurgeSurvey


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
    maintain.add_argument(
        "--keep-versions", type=int, default=None, help="newest ones that stay (default: all)"
    )
    maintain.add_argument("--small-file-mib", type=float, default=32.0, help="0: no compaction")
    add_config(maintain)
    add_json(maintain)
    maintain.set_defaults(handler=_maintain)
    _add_purge(commands)


def _add_purge(commands: Commands) -> None:
    purge = commands.add_parser(
        "purge", help="erase objects from every version, file and document of a dataset, with proof"
    )
    purge.add_argument("dataset")
    purge.add_argument("uris", nargs="+", metavar="URI", help="source objects, as they were listed")
    purge.add_argument("--prefix", action="store_true", help="all objects whose URI begins so")
    purge.add_argument("--dry-run", action="store_true", help="say what would go")
    purge.add_argument("--yes", action="store_true", help="do it: what is erased is gone for good")
    purge.add_argument(
        "--drop-open-plans",
        action="store_true",
        help="delete unfinished plans that name an object, with what their workers did",
    )
    purge.add_argument(
        "--readmit", action="store_true", help="erase nothing: let later plans take them again"
    )
    add_config(purge)
    add_json(purge)
    purge.set_defaults(handler=_purge)


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
        keep_versions=options.keep_versions,
    )
    storage = open_storage(config.storage)
    report = maintain(config, storage, layout, _owner(), terms, dry_run=not options.apply)
    compaction, sweep = report.compaction, report.sweep
    lines = [
        f"compaction  {compaction.num_files_before} small files -> {compaction.num_files_after}",
        f"versions    {', '.join(report.expired_versions) or 'none'} given up",
        f"snapshots   {report.num_expired_snapshots} that no version, branch or tag names",
        f"orphans     {sweep.num_orphans} objects, {sweep.num_bytes} bytes; {sweep.num_kept} kept",
    ]
    if report.is_dry_run:
        lines.append("Dry run: nothing was changed; do it with --apply.")
    output.result(report.model_dump(mode="json"), "\n".join(lines))


def _purge(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.purge import PurgeRequest, purge, readmit_objects, survey_purge

    config = load_config(options.config)
    storage = open_storage(config.storage)
    request = PurgeRequest(
        dataset=options.dataset,
        uris=tuple(options.uris),
        is_prefix=options.prefix,
        drop_open_plans=options.drop_open_plans,
    )
    if options.readmit:
        number = readmit_objects(config, storage, request)
        output.result({"readmitted": number}, f"{number} entries lifted: the next plan takes them.")
    elif options.dry_run:
        survey = survey_purge(config, storage, request)
        output.result(survey.model_dump(mode="json"), _survey_text(survey))
    elif not options.yes:
        raise ConfigError(
            "A purge cannot be undone: look at it with --dry-run, then do it with --yes."
        )
    else:
        record = purge(config, storage, request)
        output.result(record.model_dump(mode="json"), _record_text(record))


def _survey_text(survey: PurgeSurvey) -> str:
    lines = [
        f"rows       {survey.num_rows} in {survey.num_files} data files",
        *_version_lines(survey.versions),
        f"documents  {survey.num_documents} name it (plans, results, listings, reports, logs)",
        *(f"open plan  {uri}: finish it first, or --drop-open-plans" for uri in survey.open_plans),
        "Dry run: nothing was changed; do it with --yes.",
    ]
    return "\n".join(lines)


def _record_text(record: PurgeRecord) -> str:
    proof = record.proof
    lines = [
        f"erased     {record.num_rows} rows from {record.num_files} data files, "
        f"{record.num_documents} documents changed",
        *_version_lines(record.versions),
        f"proof      {proof.num_objects} objects read again ({proof.num_parquet} Parquet files, "
        f"{proof.num_avro} manifests, {proof.num_documents} documents; {proof.num_bytes} bytes): "
        f"{proof.num_mentions} mentions",
        f"purge id   {record.purge_id}",
    ]
    return "\n".join(lines)


def _version_lines(versions: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"versions   {table}: " + ", ".join(f"{v} -{count}" for v, count in counts.items())
        for table, counts in versions.items()
        if counts
    ]
