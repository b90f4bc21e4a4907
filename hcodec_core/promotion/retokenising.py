"""What a promotion means for the tokens that are there: nothing, or a plan with its cost."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from hcodec_core.config import Config
from hcodec_core.dataset.plan import Plan, PlanRequest, make_plan, read_plan
from hcodec_core.dataset.table import dataset_names, find_layout
from hcodec_core.dataset.versions import VersionRecord, list_versions, version_record
from hcodec_core.errors import ConfigError
from hcodec_core.promotion.resolving import ResolvedCodec, check_place
from hcodec_core.storage import Storage
from hcodec_core.tokens import CodecManifest, CodecSpec, EncodeSettings


class RetokenisePlan(BaseModel):
    """Whether a dataset's tokens change with a codec, and what making them anew would take.

    Estimates as of ``hcodec plan --dry-run`` over the listing of the dataset's latest version:
    hours of audio and of workers (GPUs, where workers have one), cost in ``currency``. The old
    version stays as it is. All zero when nothing changes. ``settings``: of the dataset's version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    version: str
    codec_uri: str
    codec_digest: str
    old_encode_id: str
    new_encode_id: str
    settings: EncodeSettings
    changes_tokens: bool
    sentence: str
    inventory_uri: str = ""
    num_files: int = 0
    num_bytes: int = 0
    audio_hours: float = 0.0
    worker_hours: float = 0.0
    cost: float = 0.0
    currency: str = ""
    sources: tuple[str, ...] = ()


def plan_retokenising(
    config: Config,
    storage: Storage,
    dataset: str,
    codec: ResolvedCodec,
    inventory_uri: str | None = None,
) -> RetokenisePlan:
    """Compare a dataset's ``encode_id`` with what its settings and a codec make. Writes nothing.

    ``inventory_uri``: the listing to go by; None takes that of the latest version's plan.

    Raises ``ConfigError`` when there is no such dataset, or its settings do not suit the codec.
    """
    manifest = check_place(codec.uri, codec.digest, storage)
    record = _latest(config, storage, dataset)
    new_id = CodecSpec(manifest, record.settings).encode_id
    base = RetokenisePlan(
        dataset=dataset,
        version=record.version,
        codec_uri=codec.uri,
        codec_digest=codec.digest,
        old_encode_id=record.encode_id,
        new_encode_id=new_id,
        settings=record.settings,
        changes_tokens=new_id != record.encode_id,
        sentence=f"No token changes: {dataset} keeps its tokens, the codec only decodes otherwise.",
        sources=record.sources,
    )
    if not base.changes_tokens:
        return base
    plan = _estimate(config, storage, record, manifest, codec, inventory_uri)
    return base.model_copy(
        update={
            "sentence": _sentence(record, plan),
            "inventory_uri": plan.inventory_uri,
            "num_files": plan.num_files,
            "num_bytes": plan.num_bytes,
            "audio_hours": plan.audio_hours,
            "worker_hours": plan.worker_hours,
            "cost": plan.cost,
            "currency": plan.currency,
        }
    )


def datasets_of(config: Config, storage: Storage, codec_name: str) -> list[str]:
    """Names of the datasets whose latest version was made by a codec of that (manifest's) name."""
    found = []
    for dataset in dataset_names(config):
        layout = find_layout(config, dataset)
        current = [version for version in list_versions(layout) if version.is_current]
        names = [version_record(storage, layout, v.version).codec_name for v in current]
        if codec_name in names:
            found.append(dataset)
    return found


def _latest(config: Config, storage: Storage, dataset: str) -> VersionRecord:
    layout = find_layout(config, dataset)
    current = [version for version in list_versions(layout) if version.is_current]
    if not current:
        raise ConfigError(f"Dataset {dataset} has no published version: there is nothing to redo.")
    return version_record(storage, layout, current[-1].version)


def _estimate(
    config: Config,
    storage: Storage,
    record: VersionRecord,
    manifest: CodecManifest,
    codec: ResolvedCodec,
    inventory_uri: str | None,
) -> Plan:
    request = PlanRequest(
        dataset=record.dataset,
        inventory_uri=inventory_uri or read_plan(storage, record.plan_uri).inventory_uri,
        codec_uri=codec.uri,
        manifest=manifest,
        settings=record.settings,
    )
    return make_plan(config, storage, request, dry_run=True)


def _sentence(record: VersionRecord, plan: Plan) -> str:
    return (
        f"All tokens of {record.dataset} change: {plan.num_files:,} files, "
        f"{plan.audio_hours:,.2f} hours of audio, {plan.num_bytes / 1e9:,.2f} GB, about "
        f"{plan.worker_hours:,.2f} worker hours and {plan.cost:,.2f} {plan.currency}; version "
        f"{record.version} stays as it is."
    )
