"""Commands on datasets: the pipeline's steps by hand, and looking at what was published."""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hcodec_core.cli.codecs import manifest_facts
from hcodec_core.cli.output import Commands, Output, add_config, add_json
from hcodec_core.config import Config, load_config
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import JOB_FILE
from hcodec_core.storage import Storage, join_uri, open_storage
from hcodec_core.tokens import EncodeSettings

if TYPE_CHECKING:
    from hcodec_core.dataset.plan_documents import Plan, PlanRequest


def add_commands(commands: Commands) -> None:
    """Register the commands."""
    _add_plan(commands)
    for name, handler, text in (
        ("commit", _commit, "register a plan's results on a branch of their own"),
        ("validate", _validate, "commit a plan if need be, check it, write the report"),
        ("publish", _publish, "commit, validate and publish a plan as the next version"),
    ):
        step = commands.add_parser(name, help=text)
        step.add_argument("plan_uri", metavar="PLAN_URI", help="folder of the plan")
        add_config(step)
        add_json(step)
        step.set_defaults(handler=handler)
    _add_versions(commands)
    inspect = commands.add_parser(
        "inspect", help="say what a codec, a job or plan, a token file or a dataset is"
    )
    inspect.add_argument("thing", metavar="CODEC|URI|FILE|DATASET")
    add_config(inspect)
    add_json(inspect)
    inspect.set_defaults(handler=_inspect)


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser("plan", help="list a source and plan what has no tokens yet")
    plan.add_argument("source", nargs="+", help="folders (s3://..., file:///...) or manifests")
    plan.add_argument("--dataset", required=True)
    plan.add_argument(
        "--codec", default="hcodec-nano", help="codec URI or models:/NAME@champion (hcodec-nano)"
    )
    plan.add_argument("--mode", choices=("exact", "fast"), default="exact")
    plan.add_argument("--channel", choices=("mean", "first"), default="mean")
    plan.add_argument("--gain", type=float, default=1.0)
    plan.add_argument("--threshold", type=float, default=None)
    plan.add_argument(
        "--compute-class", default=None, help="of the workers (default: that of this machine)"
    )
    plan.add_argument("--hours-per-shard", type=float, default=1.0)
    plan.add_argument("--shards", type=int, default=None)
    plan.add_argument("--max-hours", type=float, default=None, help="of audio in this version")
    plan.add_argument("--max-bad-share", type=float, default=0.05)
    plan.add_argument("--max-delete-share", type=float, default=0.2)
    plan.add_argument("--spend-cap", type=float, default=None)
    plan.add_argument("--retry-quarantined", action="store_true")
    plan.add_argument("--dry-run", action="store_true", help="write nothing but the listing")
    add_config(plan)
    add_json(plan)
    plan.set_defaults(handler=_plan)


def _add_versions(commands: Commands) -> None:
    versions = commands.add_parser("versions", help="list versions, compare two, go back to one")
    actions = versions.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="all versions of a dataset")
    diff = actions.add_parser("diff", help="objects added, changed, removed between two versions")
    back = actions.add_parser("rollback", help="let readers see an older version again")
    pin = actions.add_parser("pin", help="keep a version from retention")
    unpin = actions.add_parser("unpin", help="leave a version to retention again")
    for action, handler in (
        (listing, _versions),
        (diff, _diff),
        (back, _rollback),
        (pin, _pin),
        (unpin, _unpin),
    ):
        action.add_argument("dataset")
        action.add_argument("--encode-id", default=None, help="first digits, among several codecs")
        add_config(action)
        add_json(action)
        action.set_defaults(handler=handler)
    diff.add_argument("old")
    diff.add_argument("new")
    for action in (back, pin, unpin):
        action.add_argument("version")
    for action in (back, pin):
        action.add_argument("--reason", default="")


def _open(options: argparse.Namespace) -> tuple[Config, Storage]:
    config = load_config(options.config)
    return config, open_storage(config.storage)


def _plan(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.inventory import take_inventory
    from hcodec_core.dataset.plan import make_plan

    config, storage = _open(options)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    inventory_uri = join_uri(config.work.work_uri, "inventories", options.dataset, stamp)
    request = _request(options, inventory_uri, config, storage)
    with output.progress() as progress:
        bar = progress.add_task("objects listed", total=None)
        take_inventory(
            config,
            storage,
            options.source,
            inventory_uri,
            progress=lambda count: progress.update(bar, completed=count),
        )
    plan = make_plan(config, storage, request, dry_run=options.dry_run)
    output.result(plan.model_dump(mode="json"), _plan_text(plan, options.dry_run))


def _request(
    options: argparse.Namespace, inventory_uri: str, config: Config, storage: Storage
) -> PlanRequest:
    from pydantic import ValidationError

    from hcodec_core.codecs import load_manifest
    from hcodec_core.config import describe
    from hcodec_core.dataset.plan_documents import BadFileBudget, PlanRequest
    from hcodec_core.promotion.resolving import resolve_codec

    # A plan holds a place and a digest, never a name that may mean another codec tomorrow.
    codec = resolve_codec(config, options.codec, storage)
    manifest = load_manifest(codec.uri, expected_digest=codec.digest, fetch=storage.read)
    try:
        settings = EncodeSettings(
            mode=options.mode,
            channel=options.channel,
            gain=options.gain,
            threshold=options.threshold,
            compute_class=options.compute_class or _own_compute_class(),
        )
        return PlanRequest(
            dataset=options.dataset,
            inventory_uri=inventory_uri,
            codec_uri=codec.uri,
            manifest=manifest,
            settings=settings,
            hours_per_shard=options.hours_per_shard,
            num_shards=options.shards,
            max_hours_per_version=options.max_hours,
            max_delete_share=options.max_delete_share,
            retry_quarantined=options.retry_quarantined,
            spend_cap=options.spend_cap,
            bad_files=BadFileBudget(max_share=options.max_bad_share),
        )
    except ValidationError as error:
        raise ConfigError(f"This plan cannot be made: {describe(error)}.") from error


def _own_compute_class() -> str:
    from hcodec_core.inference.engine import compute_class

    return compute_class("cpu")


def _plan_text(plan: Plan, is_dry_run: bool) -> str:
    erased = f", {plan.num_excluded_files} erased: left out" if plan.num_excluded_files else ""
    if plan.is_empty:
        return f"Nothing new: {plan.num_listed_files} files listed{erased}, dataset is up to date."
    trained = "" if plan.codec_is_trained else " (random weights)"
    lines = [
        f"plan     {plan.plan_id}{' (dry run: not written)' if is_dry_run else ''}",
        f"codec    {plan.codec_name}{trained}, encode id {plan.encode_id[:12]}",
        f"files    {plan.num_files} to encode ({plan.num_new_files} new, {plan.num_changed_files} "
        f"changed), {plan.num_tombstones} deleted, {plan.num_unchanged_files} unchanged{erased}",
        f"audio    about {plan.audio_hours:.2f} h in {plan.num_shards} shards",
        f"cost     {plan.worker_hours:.2f} worker hours, {plan.cost:.2f} {plan.currency} "
        f"({plan.rate_text})",
    ]
    if not is_dry_run:
        lines += [
            f"job      {join_uri(plan.plan_uri, JOB_FILE)}",
            f"next     hcodec run {join_uri(plan.plan_uri, JOB_FILE)}; "
            f"hcodec publish {plan.plan_uri}",
        ]
    return "\n".join(lines)


def _commit(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.commit import commit_plan

    config, storage = _open(options)
    info = commit_plan(config, storage, options.plan_uri.rstrip("/"))
    output.result(info.model_dump(mode="json"))


def _validate(options: argparse.Namespace, output: Output) -> None:
    config, storage = _open(options)
    _, report_uri = _commit_and_validate(config, storage, options.plan_uri.rstrip("/"))
    output.result({"passed": True, "report_uri": report_uri})


def _publish(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.card import card_page_uri, write_card
    from hcodec_core.dataset.layout import DatasetLayout
    from hcodec_core.dataset.versions import publish

    config, storage = _open(options)
    plan_uri = options.plan_uri.rstrip("/")
    snapshot_id, report_uri = _commit_and_validate(config, storage, plan_uri)
    record = publish(config, storage, plan_uri, snapshot_id, report_uri)
    layout = DatasetLayout(config, record.dataset, record.encode_id)
    write_card(storage, layout, record.version)
    text = (
        f"Dataset {record.dataset} is now at version {record.version}.\nReport: {report_uri}\n"
        f"Card: {card_page_uri(layout, record.version)}"
    )
    output.result(record.model_dump(mode="json"), text)


def _commit_and_validate(config: Config, storage: Storage, plan_uri: str) -> tuple[int, str]:
    """Snapshot and report of a plan; raises the error that a failed validation amounts to."""
    from hcodec_core.dataset.checks import failure_of, validate_plan
    from hcodec_core.dataset.commit import commit_plan
    from hcodec_core.dataset.versions import drop_branch

    info = commit_plan(config, storage, plan_uri)
    with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
        result = validate_plan(config, storage, info, Path(folder))
    failure = failure_of(result)
    if failure is not None:
        if not info.version:
            drop_branch(config, storage, plan_uri, str(failure))
        raise failure
    return info.snapshot_id, result.report_uri


def _versions(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.table import find_layout
    from hcodec_core.dataset.versions import list_versions

    config, _ = _open(options)
    layout = find_layout(config, options.dataset, options.encode_id)
    output.table(
        f"Versions of {options.dataset}, encode id {layout.encode_id[:12]}",
        ("version", "files", "published", "plan", "current", "pinned"),
        [
            (
                v.version,
                "given up" if v.num_rows is None else v.num_rows,
                f"{v.published_at:%Y-%m-%d %H:%M:%S}",
                v.plan_id,
                v.is_current,
                v.is_pinned,
            )
            for v in list_versions(layout)
        ],
    )


def _diff(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.table import find_layout
    from hcodec_core.dataset.versions import diff_versions

    config, _ = _open(options)
    layout = find_layout(config, options.dataset, options.encode_id)
    diff = diff_versions(layout, options.old, options.new)
    lines = [
        f"{diff.old} -> {diff.new}: {diff.num_added} added, {diff.num_changed} changed, "
        f"{diff.num_removed} removed, {diff.num_kept} the same",
        *(f"+ {uri}" for uri in diff.added),
        *(f"~ {uri}" for uri in diff.changed),
        *(f"- {uri}" for uri in diff.removed),
    ]
    output.result(diff.model_dump(mode="json"), "\n".join(lines))


def _rollback(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.table import find_layout
    from hcodec_core.dataset.versions import rollback

    config, _ = _open(options)
    layout = find_layout(config, options.dataset, options.encode_id)
    entry = rollback(layout, options.version, options.reason)
    if entry is None:
        output.result({"version": options.version}, f"Readers see {options.version} already.")
    else:
        output.result(entry.model_dump(mode="json"), f"Readers see {options.version} again.")


def _pin(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.table import find_layout
    from hcodec_core.dataset.versions import pin

    config, _ = _open(options)
    layout = find_layout(config, options.dataset, options.encode_id)
    pin(layout, options.version, options.reason)
    text = f"{options.version} is pinned: retention leaves it."
    output.result({"version": options.version, "is_pinned": True}, text)


def _unpin(options: argparse.Namespace, output: Output) -> None:
    from hcodec_core.dataset.table import find_layout
    from hcodec_core.dataset.versions import unpin

    config, _ = _open(options)
    layout = find_layout(config, options.dataset, options.encode_id)
    unpin(layout, options.version)
    text = f"{options.version} is not pinned any more."
    output.result({"version": options.version, "is_pinned": False}, text)


def _inspect(options: argparse.Namespace, output: Output) -> None:
    output.result(_describe(options))


def _describe(options: argparse.Namespace) -> dict[str, Any]:
    from hcodec_core.codecs import SHIPPED, load_manifest

    thing: str = options.thing
    if thing.endswith(".parquet"):
        return _describe_tokens(Path(thing))
    if thing in SHIPPED or (Path(thing) / "codec.json").is_file():
        return manifest_facts(load_manifest(thing))
    if urlsplit(thing).scheme in {"s3", "file"}:
        return _describe_uri(thing, options)
    return _describe_dataset(thing, options)


def _describe_tokens(path: Path) -> dict[str, Any]:
    from hcodec_core.inference.files import TokenFile

    file = TokenFile(path)
    return {
        "rows": file.num_rows,
        **manifest_facts(file.manifest),
        "encode_id": file.spec.encode_id,
        "settings": file.settings.model_dump(mode="json"),
    }


def _describe_uri(uri: str, options: argparse.Namespace) -> dict[str, Any]:
    from hcodec_core.dataset.plan_documents import read_plan

    _, storage = _open(options)
    plan_uri = uri.removesuffix(f"/{JOB_FILE}").rstrip("/")
    return read_plan(storage, plan_uri).model_dump(mode="json")


def _describe_dataset(name: str, options: argparse.Namespace) -> dict[str, Any]:
    from hcodec_core.dataset.reader import open_dataset

    view = open_dataset(options.config, name)
    return view.info.model_dump(mode="json") | {"settings": view.settings.model_dump(mode="json")}
