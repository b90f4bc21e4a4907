"""Command ``hcodec audit``: choose rows of a finished plan to be audited by a worker."""

from __future__ import annotations

import argparse

from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import load_config
from hcodec_core.storage import open_storage


def add_commands(commands: Commands) -> None:
    """Register the command."""
    audit = commands.add_parser(
        "audit", help="write the job of a plan's round-trip audit, before commit and publish"
    )
    audit.add_argument("plan_uri", metavar="PLAN_URI", help="folder of a plan that is done")
    audit.add_argument("--files", type=int, default=8, help="how many at most (default: 8)")
    audit.add_argument("--max-seconds", type=float, default=300.0, help="of audio in all")
    add_config(audit)
    add_json(audit)
    audit.set_defaults(handler=_audit)


def _audit(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.audit import make_audit_job

    config = load_config(options.config)
    plan_uri = options.plan_uri.rstrip("/")
    config.check_destination(plan_uri)
    storage = open_storage(config.storage)
    job_uri = make_audit_job(storage, plan_uri, options.files, options.max_seconds)
    if job_uri is None:
        output.result({"job_uri": None}, "This plan has no rows: there is nothing to audit.")
        return
    text = f"job   {job_uri}\nnext  hcodec run {job_uri}; hcodec publish {plan_uri}"
    output.result({"job_uri": job_uri}, text)
