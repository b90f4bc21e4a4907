"""What the tasks do, free of Airflow: each calls the product and returns a few plain values."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcodec_airflow.requests import TokenizeRequest
from hcodec_airflow.settings import Settings, read_settings
from hcodec_core.errors import (
    CommitConflictError,
    ConfigError,
    HCodecError,
    ObjectMissingError,
)

if TYPE_CHECKING:
    from hcodec_core.config import Config
    from hcodec_core.dataset.plan import Plan, PlanRequest
    from hcodec_core.dataset.versions import VersionRecord
    from hcodec_core.storage import Storage

logger = logging.getLogger(__name__)
_PROBE_SECONDS = 300
_PUBLISH_TRIES = 3


def inventory(request: TokenizeRequest, run: str) -> dict[str, Any]:
    """List the sources into a folder of this run.

    A listing that an earlier try did not finish is gone on with; one that is complete is taken
    anew, since it is asked for again.
    """
    from hcodec_core.dataset.inventory import take_inventory
    from hcodec_core.storage import join_uri
    from hcodec_core.tokens import digest_of

    config, storage = _open(read_settings())
    out_uri = join_uri(config.work.work_uri, "inventories", request.dataset, digest_of(run)[:16])
    info = take_inventory(
        config,
        storage,
        request.sources,
        out_uri,
        resume=_is_unfinished(storage, out_uri),
        progress=lambda number: logger.info("%d objects listed", number),
    )
    logger.info(
        "%d objects, %s, in %s",
        info.num_files,
        size_text(info.num_bytes),
        ", ".join(request.sources),
    )
    return {
        "inventory_uri": info.inventory_uri,
        "num_files": info.num_files,
        "num_bytes": info.num_bytes,
    }


def plan(request: TokenizeRequest, inventory_uri: str) -> dict[str, Any]:
    """Plan the work and log it; ``ends_run`` when there is nothing to do or it is a dry run."""
    from hcodec_core.dataset.plan import make_plan
    from hcodec_core.jobs import JOB_FILE
    from hcodec_core.storage import join_uri

    settings = read_settings()
    config, storage = _open(settings)
    wanted = _plan_request(request, inventory_uri, settings, storage)
    made = make_plan(config, storage, wanted, dry_run=request.dry_run)
    for line in describe_plan(made):
        logger.info("%s", line)
    if made.is_empty:
        logger.info("Nothing new: dataset %s is up to date.", made.dataset)
    elif request.dry_run:
        logger.info("Dry run: nothing is encoded.")
    ends_run = made.is_empty or request.dry_run
    return {
        "plan_id": made.plan_id,
        "plan_uri": made.plan_uri,
        # Nothing was written for a plan that ends the run.
        "job_uri": "" if ends_run else join_uri(made.plan_uri, JOB_FILE),
        "dataset": made.dataset,
        "outcome": _plan_outcome(made, request),
        "ends_run": ends_run,
        "num_files": made.num_files,
        "num_tombstones": made.num_tombstones,
        "num_shards": made.num_shards,
        "audio_hours": round(made.audio_hours, 4),
        "cost": round(made.cost, 4),
        "currency": made.currency,
    }


def describe_plan(made: Plan) -> list[str]:
    """What a plan means, for people."""
    trained = "" if made.codec_is_trained else " (random weights, for tests only)"
    lines = [
        f"Dataset {made.dataset}, now at {made.base_version or 'no version yet'}; "
        f"codec {made.codec_name}{trained}, encode id {made.encode_id[:12]}",
        f"Listed {made.num_listed_files} files: {made.num_new_files} new, "
        f"{made.num_changed_files} changed, {made.num_unchanged_files} unchanged, "
        f"{made.num_quarantined_files} in quarantine; {made.num_tombstones} deleted",
        f"To encode: {made.num_files} files, {size_text(made.num_bytes)}, about "
        f"{made.audio_hours:.2f} h of audio in {made.num_shards} shards",
        f"Estimate: {made.worker_hours:.2f} worker hours, {made.cost:.2f} {made.currency} "
        f"({made.rate_text})",
    ]
    if made.num_excluded_files:
        lines.append(f"Erased from the dataset, so left out: {made.num_excluded_files} files")
    if made.num_remaining_files:
        lines.append(
            f"Left for later runs: {made.num_remaining_files} files, {made.remaining_hours:.2f} h"
        )
    if made.withheld_tombstones:
        lines.append(
            f"Kept though their objects seem gone: {made.withheld_tombstones} rows, because "
            f"{made.withheld_reason}"
        )
    if made.exceeds_spend_cap:
        lines.append(f"This is above the spend cap of {made.spend_cap} {made.currency}.")
    return lines


def size_text(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _plan_outcome(made: Plan, request: TokenizeRequest) -> str:
    if made.is_empty:
        return "nothing new"
    return "dry run" if request.dry_run else "planned"


def _plan_request(
    request: TokenizeRequest, inventory_uri: str, settings: Settings, storage: Storage
) -> PlanRequest:
    from hcodec_core.dataset.plan import BadFileBudget, PlanRequest
    from hcodec_core.promotion.resolving import check_place, resolve_codec
    from hcodec_core.tokens import EncodeSettings

    codec = resolve_codec(settings.load_config(), request.codec, storage)
    return PlanRequest(
        dataset=request.dataset,
        inventory_uri=inventory_uri,
        codec_uri=codec.uri,
        manifest=check_place(codec.uri, codec.digest, storage),
        settings=EncodeSettings(
            mode=request.mode,
            channel=request.channel,
            gain=request.gain,
            threshold=request.threshold,
            compute_class=compute_class_of(request, settings),
        ),
        hours_per_shard=request.hours_per_shard,
        num_shards=request.shards,
        max_hours_per_version=request.max_hours_per_version,
        max_delete_share=request.max_delete_share,
        allow_many_deletes=request.allow_many_deletes,
        retry_quarantined=request.retry_quarantined,
        spend_cap=request.spend_cap,
        bad_files=BadFileBudget(max_share=request.max_bad_share),
    )


def commit(plan_uri: str) -> dict[str, Any]:
    """Register the results of a plan on a branch of their own."""
    from hcodec_core.dataset.commit import commit_plan

    config, storage = _open(read_settings())
    info = commit_plan(config, storage, plan_uri)
    counts = info.counts
    logger.info(
        "Snapshot %d on branch %s: %d files with tokens, %d rows removed, %d rows in all; %s",
        info.snapshot_id,
        info.branch,
        counts.num_rows,
        counts.num_rows_removed,
        counts.num_total_rows,
        ", ".join(f"{number} {name}" for name, number in sorted(counts.outcomes.items())),
    )
    return info.model_dump(mode="json")


def make_audit(plan_uri: str) -> str:
    """Write the job of a plan's round-trip audit; its URI, empty when the plan has no row."""
    from hcodec_core.dataset.audit import make_audit_job

    _, storage = _open(read_settings())
    return make_audit_job(storage, plan_uri) or ""


@dataclass(frozen=True)
class Report:
    """Where a validation's report lies, and the error it amounts to (None: it passed)."""

    uri: str
    url: str
    failure: HCodecError | None


def validate(committed: dict[str, Any]) -> Report:
    """Check a committed snapshot; one that fails loses its branch, the evidence stays."""
    from hcodec_core.dataset.checks import failure_of, validate_plan
    from hcodec_core.dataset.commit import CommitInfo
    from hcodec_core.dataset.versions import drop_branch

    settings = read_settings()
    config, storage = _open(settings)
    info = CommitInfo.model_validate(committed)
    with tempfile.TemporaryDirectory(prefix="hcodec-validate-") as folder:
        result = validate_plan(config, storage, info, Path(folder))
    for check in [*result.failed("error"), *result.failed("warning")]:
        logger.warning("%s: does not hold: %s", check.severity, check.title)
        for example in check.examples:
            logger.warning("    %s", example)
    failure = failure_of(result)
    if failure is not None and not info.version:
        rejection = drop_branch(config, storage, info.plan_uri, str(failure))
        logger.info("Branch %s is dropped; tag %s keeps its rows.", info.branch, rejection.tag)
    url = settings.browser_url(result.report_uri)
    logger.info("%d checks; report: %s", len(result.checks), url)
    return Report(result.report_uri, url, failure)


def publish(committed: dict[str, Any], report_uri: str) -> dict[str, Any]:
    """Make the validated snapshot the next version.

    When another version came first, the plan is committed on top of it and validated once more.
    """
    from hcodec_core.dataset import versions

    config, storage = _open(read_settings())
    for _ in range(_PUBLISH_TRIES):
        plan_uri, snapshot_id = committed["plan_uri"], committed["snapshot_id"]
        try:
            record = versions.publish(config, storage, plan_uri, snapshot_id, report_uri)
        except CommitConflictError as error:
            logger.warning("%s Doing so now.", error)
            committed = commit(plan_uri)
            report = validate(committed)
            if report.failure is not None:
                raise report.failure from error
            report_uri = report.uri
            continue
        logger.info("Dataset %s is now at version %s.", record.dataset, record.version)
        return {**_facts_of(record), "card_uri": _write_card(config, storage, record)}
    raise CommitConflictError("Other versions were published first again and again; try again.")


def _write_card(config: Config, storage: Storage, record: VersionRecord) -> str:
    from hcodec_core.dataset.card import card_page_uri, write_card
    from hcodec_core.dataset.layout import DatasetLayout

    layout = DatasetLayout(config, record.dataset, record.encode_id)
    write_card(storage, layout, record.version)
    return card_page_uri(layout, record.version)


def browser_url(uri: str) -> str:
    """Address of a stored object for a browser, as the installation says."""
    return read_settings().browser_url(uri)


def _facts_of(record: VersionRecord) -> dict[str, Any]:
    """What users of a dataset want to know of its new version."""
    return {
        "dataset": record.dataset,
        "version": record.version,
        "previous_version": record.previous_version,
        "table": record.table,
        "snapshot_id": record.snapshot_id,
        "encode_id": record.encode_id,
        "plan_id": record.plan_id,
        "num_files": record.counts.num_rows,
        "num_rows": record.counts.num_total_rows,
        "audio_hours": round(record.counts.audio_seconds / 3600, 4),
        "outcomes": record.counts.outcomes,
        "num_remaining_files": record.num_remaining_files,
        "report_uri": record.report_uri,
    }


def compute_class_of(request: TokenizeRequest, settings: Settings) -> str:
    """Compute class of the workers that a request is for.

    Raises ``ConfigError`` when it is not known: tokens could then not be told apart from others.
    """
    if (request.backend or settings.backend) == "local":
        return compute_class(settings)
    profile = settings.load_cluster_config().profile(request.profile or "")
    if not profile.compute_class:
        raise ConfigError(
            f"GPU profile {request.profile or 'default'} names no compute_class: run `hcodec env` "
            "in its image on its device, and write what it prints into the profile."
        )
    return profile.compute_class


def compute_class(settings: Settings) -> str:
    """Compute class of local workers, asked of a process of its own: torch stays out of this one.

    Raises ``ConfigError`` when the workers' libraries are not installed here.
    """
    from hcodec_airflow.backends.local import worker_environment

    options = {"--device": settings.local_device, "--threads": str(settings.local_threads)}
    command = ["env", "--json", *(word for option in options.items() for word in option)]
    done = subprocess.run(
        [sys.executable, "-m", "hcodec_core.cli", *command],
        env=worker_environment(os.environ),
        capture_output=True,
        text=True,
        timeout=_PROBE_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(
            f"Local workers cannot run here ({last}): install the extra 'worker' beside Airflow, "
            "and check option local_device of section [hcodec]."
        )
    return str(json.loads(done.stdout)["compute_class"])


def _open(settings: Settings) -> tuple[Config, Storage]:
    return settings.load_config(), settings.open_storage()


def _is_unfinished(storage: Storage, inventory_uri: str) -> bool:
    from hcodec_core.dataset.inventory import read_inventory_info

    try:
        return not read_inventory_info(storage, inventory_uri).is_complete
    except ObjectMissingError:
        return False
