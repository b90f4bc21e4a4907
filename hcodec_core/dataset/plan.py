"""Plans: what has to be done to bring a dataset up to date, decided before anything is spent.

A plan's folder holds what ``jobs`` describes, and

    tombstones.parquet    uri, etag of rows to remove: their objects are gone
    plan.json             ``Plan``: counts, hours, cost, base snapshot, settings

A plan's id is a digest of what it does: the same inventory on the same base gives the same plan,
so making it twice does no harm. A plan of which shards failed for good, or left results that
cannot be used, gets a new generation, which takes over the results of all other shards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hcodec_core.config import Config
from hcodec_core.dataset.accounts import find_faults
from hcodec_core.dataset.difference import Base, Work, count_true, find_work, first_wave, read_base
from hcodec_core.dataset.inventory import (
    InventoryInfo,
    check_uris,
    read_inventory,
    read_inventory_info,
)
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.plan_documents import (
    PLAN_FILE,
    TOMBSTONES_FILE,
    BadFileBudget,
    Plan,
    PlanRequest,
    read_plan,
)
from hcodec_core.dataset.rates import expected_rate
from hcodec_core.dataset.results import result_uri, try_read_results
from hcodec_core.dataset.sharding import Indices, deal_out, shard_digest
from hcodec_core.dataset.tabular import keys_of, write_table
from hcodec_core.errors import BudgetExceededError, ConfigError
from hcodec_core.jobs import FILES_FILE, JOB_FILE, ShardResult, TokenizeJob
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecSpec, digest_of

__all__ = ["FILES_SCHEMA", "BadFileBudget", "Plan", "PlanRequest", "make_plan", "read_plan"]

logger = logging.getLogger(__name__)

FILES_SCHEMA = pa.schema(
    [
        pa.field("shard_index", pa.int32(), nullable=False),
        pa.field("shard_id", pa.string(), nullable=False),
        pa.field("file_index", pa.int32(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("metadata", pa.map_(pa.string(), pa.string())),
    ]
)
_MAX_GENERATIONS = 100


@dataclass(frozen=True)
class _Draft:
    """A plan without a name.

    ``shard_of``: shard of each file; ``digests``: one per shard; ``rate``: see ``expected_rate``.
    """

    layout: DatasetLayout
    request: PlanRequest
    info: InventoryInfo
    num_listed: int
    base: Base
    work: Work
    shard_of: Indices
    digests: tuple[str, ...]
    rate: tuple[float, str]


def make_plan(
    config: Config, storage: Storage, request: PlanRequest, *, dry_run: bool = False
) -> Plan:
    """Compare an inventory with what ``main`` holds, and write the plan of the difference.

    Nothing is written in a dry run, or when the plan is empty.

    Raises ``ConfigError`` for an unusable request, ``AccessError`` when the inventory names objects
    outside the allowed sources, ``BudgetExceededError`` when the estimate is above the spend cap
    (a dry run only says so in ``Plan.exceeds_spend_cap``).
    """
    draft = _draft(config, storage, request)
    plan_id, generation, previous = _name(storage, draft)
    plan = _summary(draft, plan_id, generation)
    if dry_run:
        return plan
    if plan.exceeds_spend_cap:
        raise BudgetExceededError(
            f"The plan for {plan.dataset} would cost about {plan.cost:.2f} {plan.currency}, more "
            f"than the cap of {plan.spend_cap}: raise the cap or set max_hours_per_version."
        )
    if not plan.is_empty:
        _write_plan(storage, draft, plan, previous)
    return plan


def _draft(config: Config, storage: Storage, request: PlanRequest) -> _Draft:
    encode_id = CodecSpec(request.manifest, request.settings).encode_id
    layout = DatasetLayout(config, request.dataset, encode_id)
    info = read_inventory_info(storage, request.inventory_uri)
    listed = read_inventory(storage, info)
    check_uris(listed["uri"], config)
    base = read_base(layout)
    work = find_work(storage, layout, request, info, listed, base)
    work = first_wave(work, request.max_hours_per_version)
    shard_of, digests = _deal(encode_id, work, request)
    rate = expected_rate(config, storage, request.manifest, request.settings)
    return _Draft(layout, request, info, len(listed), base, work, shard_of, digests, rate)


def _deal(encode_id: str, work: Work, request: PlanRequest) -> tuple[Indices, tuple[str, ...]]:
    wanted = request.num_shards or max(
        request.min_shards, int(np.ceil(work.seconds.sum() / 3600 / request.hours_per_shard))
    )
    num_shards = min(wanted, len(work.files))
    shard_of = deal_out(keys_of(work.files, "uri"), work.seconds, num_shards)
    order = np.argsort(shard_of, kind="stable")
    bounds = np.searchsorted(shard_of[order], np.arange(num_shards + 1))
    digests = (
        shard_digest(encode_id, work.files.take(pa.array(order[start:end])))
        for start, end in itertools.pairwise(bounds)
    )
    return shard_of, tuple(digests)


@dataclass(frozen=True)
class _Previous:
    """A generation of which shards failed, or left results that cannot be used: ``bad`` ones."""

    plan_uri: str
    bad: frozenset[str]


def _name(storage: Storage, draft: _Draft) -> tuple[str, int, _Previous | None]:
    """Plan id, generation, and the generation before, if there was one."""
    content = _content_of(draft)
    previous = None
    for generation in range(_MAX_GENERATIONS):
        plan_id = digest_of(content | {"generation": generation})[:24]
        plan_uri = draft.layout.plan_uri(plan_id)
        faults = find_faults(storage, plan_uri)
        if not faults:
            return plan_id, generation, previous
        for shard_id, reason in sorted(faults.items()):
            # What it left stays where it is, as evidence.
            logger.warning("Shard %s of plan %s is done again: %s", shard_id, plan_id, reason)
        previous = _Previous(plan_uri, frozenset(faults))
    raise ConfigError(
        f"The plan for {draft.request.dataset} failed {_MAX_GENERATIONS} times: the workers' logs "
        f"below {draft.layout.plans_uri} say why."
    )


def _content_of(draft: _Draft) -> dict[str, Any]:
    """All that decides what the plan does and how its workers do it."""
    request = draft.request
    metadata = pc.drop_null(draft.work.files["metadata"]).to_pylist()
    return {
        "dataset": request.dataset,
        "codec": request.manifest.digest,
        "codec_uri": request.codec_uri,
        "settings": request.settings.model_dump(mode="json"),
        "limits": request.limits.model_dump(mode="json"),
        "max_attempts": request.max_attempts,
        "lease_seconds": request.lease_seconds,
        "base": draft.base.snapshot_id,
        "num_rollbacks": draft.base.num_rollbacks,
        "shards": draft.digests,
        "tombstones": shard_digest("", draft.work.tombstones),
        "metadata": hashlib.sha256(json.dumps(metadata).encode()).hexdigest(),
    }


def _summary(draft: _Draft, plan_id: str, generation: int) -> Plan:
    request, work, layout = draft.request, draft.work, draft.layout
    num_changed = count_true(work.files["is_changed"])
    return Plan(
        plan_id=plan_id,
        generation=generation,
        dataset=request.dataset,
        encode_id=layout.encode_id,
        plan_uri=layout.plan_uri(plan_id),
        data_uri=layout.plan_data_uri(plan_id),
        base_snapshot_id=draft.base.snapshot_id,
        base_version=draft.base.version,
        inventory_uri=draft.info.inventory_uri,
        sources=draft.info.sources,
        inventory_is_complete=draft.info.is_complete,
        codec_name=request.manifest.name,
        codec_digest=request.manifest.digest,
        codec_is_trained=request.manifest.is_trained,
        settings=request.settings,
        bad_files=request.bad_files,
        num_listed_files=draft.num_listed,
        num_files=len(work.files),
        num_new_files=len(work.files) - num_changed,
        num_changed_files=num_changed,
        num_unchanged_files=work.num_unchanged,
        num_quarantined_files=work.num_quarantined,
        num_tombstones=len(work.tombstones),
        num_remaining_files=work.num_remaining,
        num_shards=len(draft.digests),
        num_bytes=int(pc.sum(work.files["size"]).as_py() or 0),
        remaining_hours=work.remaining_seconds / 3600,
        withheld_tombstones=work.withheld[0],
        withheld_reason=work.withheld[1],
        num_excluded_files=work.num_excluded,
        spend_cap=request.spend_cap,
        **_cost_of(draft),
    )


def _cost_of(draft: _Draft) -> dict[str, Any]:
    cost = draft.layout.config.cost
    audio_hours = float(draft.work.seconds.sum()) / 3600
    rate, rate_source = draft.rate
    worker_hours = audio_hours / rate
    return {
        "audio_hours": audio_hours,
        "worker_hours": worker_hours,
        "realtime_factor": rate,
        "rate_source": rate_source,
        "cost": worker_hours * cost.worker_hour,
        "currency": cost.currency,
    }


def _write_plan(storage: Storage, draft: _Draft, plan: Plan, previous: _Previous | None) -> None:
    """Write all of a plan; the job comes last, so that no worker sees half a plan."""
    shard_ids = [f"{digest}-g{plan.generation}" for digest in draft.digests]
    files = _files_table(draft.work, draft.shard_of, shard_ids)
    write_table(storage, join_uri(plan.plan_uri, FILES_FILE), files)
    write_table(storage, join_uri(plan.plan_uri, TOMBSTONES_FILE), draft.work.tombstones)
    if previous is not None:
        _take_over(storage, plan, shard_ids, previous)
    storage.write(join_uri(plan.plan_uri, PLAN_FILE), plan.model_dump_json(indent=1).encode())
    job = _job_of(draft.request, plan)
    storage.write(join_uri(plan.plan_uri, JOB_FILE), job.model_dump_json(indent=1).encode())


def _files_table(work: Work, shard_of: Indices, shard_ids: list[str]) -> pa.Table:
    order = pc.sort_indices(
        pa.table({"shard": shard_of, "uri": work.files["uri"]}),
        [("shard", "ascending"), ("uri", "ascending")],
    )
    files = work.files.take(order)
    shard_of = shard_of[order.to_numpy()]
    starts = np.searchsorted(shard_of, np.arange(len(shard_ids)))
    columns = {
        "shard_index": pa.array(shard_of, pa.int32()),
        "shard_id": pa.array([shard_ids[shard] for shard in shard_of], pa.string()),
        "file_index": pa.array(np.arange(len(files)) - starts[shard_of], pa.int32()),
        **{name: files[name] for name in ("uri", "etag", "size", "metadata")},
    }
    return pa.table(columns, schema=FILES_SCHEMA)


def _take_over(storage: Storage, plan: Plan, shard_ids: list[str], previous: _Previous) -> None:
    """Copy the results of shards that the failed generation finished: their files stay valid."""
    index_of = {shard_id.partition("-g")[0]: index for index, shard_id in enumerate(shard_ids)}

    def copy(result: ShardResult) -> None:
        if result.shard_id not in previous.bad:
            index = index_of[result.shard_id.partition("-g")[0]]
            names = {
                "plan_id": plan.plan_id,
                "shard_id": shard_ids[index],
                "shard_index": index,
            }
            text = result.model_copy(update=names).model_dump_json(indent=1)
            storage.create(result_uri(plan.plan_uri, shard_ids[index]), text.encode())

    try_read_results(storage, previous.plan_uri, copy)


def _job_of(request: PlanRequest, plan: Plan) -> TokenizeJob:
    return TokenizeJob(
        plan_id=plan.plan_id,
        dataset=plan.dataset,
        plan_uri=plan.plan_uri,
        data_uri=plan.data_uri,
        codec_uri=request.codec_uri,
        manifest=request.manifest,
        settings=request.settings,
        encode_id=plan.encode_id,
        num_shards=plan.num_shards,
        num_files=plan.num_files,
        num_bytes=plan.num_bytes,
        limits=request.limits,
        lease_seconds=request.lease_seconds,
        max_attempts=request.max_attempts,
    )
