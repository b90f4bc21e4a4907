"""What a plan is asked for, and what it says about itself."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hcodec_core.config import describe
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import DecodeLimits
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecManifest, EncodeSettings

PLAN_FILE = "plan.json"
TOMBSTONES_FILE = "tombstones.parquet"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BadFileBudget(_Document):
    """How many files of a plan may end in quarantine before the plan is refused."""

    max_share: float = Field(default=0.05, ge=0, le=1)
    max_files: int | None = Field(default=None, ge=0)


class PlanRequest(_Document):
    """What a plan is asked to do.

    ``codec_uri``: the resolved place of the codec that ``manifest`` describes. Shards hold about
    ``hours_per_shard`` of audio, and there are at least ``min_shards`` (as far as there are files);
    ``num_shards`` sets their number. ``max_hours_per_version`` bounds the plan to the first so many
    hours. ``max_delete_share``: share of the rows below the listed folders that may be removed
    without ``allow_many_deletes``. ``spend_cap``: highest cost in the configured currency.
    ``bytes_per_second``: better guesses of the length of files, by lower-case extension.
    """

    dataset: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)
    inventory_uri: str
    codec_uri: str
    manifest: CodecManifest
    settings: EncodeSettings
    hours_per_shard: float = Field(default=1.0, gt=0)
    min_shards: int = Field(default=8, ge=1)
    num_shards: int | None = Field(default=None, ge=1)
    max_hours_per_version: float | None = Field(default=None, gt=0)
    max_delete_share: float = Field(default=0.2, ge=0, le=1)
    allow_many_deletes: bool = False
    retry_quarantined: bool = False
    spend_cap: float | None = Field(default=None, ge=0)
    bytes_per_second: dict[str, float] = {}
    bad_files: BadFileBudget = BadFileBudget()
    limits: DecodeLimits = DecodeLimits()
    lease_seconds: float = Field(default=60.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _check_dataset(self) -> PlanRequest:
        if "__" in self.dataset:
            raise ValueError("a dataset's name may not hold '__'")
        return self


class Plan(_Document):
    """Summary of a plan. Hours are estimates from file sizes; cost in ``currency``.

    ``base_snapshot_id`` is None when the dataset has no version yet. ``num_remaining_files``: left
    for later versions by ``max_hours_per_version``. ``withheld_tombstones``: rows whose objects
    seem to be gone and that the plan keeps nevertheless, for the reason in ``withheld_reason``.
    ``num_excluded_files``: listed, but erased from the dataset (see ``exclusions``).
    ``realtime_factor``: of one worker, from ``rate_source``; ``worker_hours`` follow from it.
    """

    format_version: Literal[1] = 1
    plan_id: str
    generation: int
    dataset: str
    encode_id: str
    plan_uri: str
    data_uri: str
    base_snapshot_id: int | None
    base_version: str | None
    inventory_uri: str
    sources: tuple[str, ...]
    inventory_is_complete: bool
    codec_name: str
    codec_digest: str
    codec_is_trained: bool
    settings: EncodeSettings
    bad_files: BadFileBudget
    num_listed_files: int
    num_files: int
    num_new_files: int
    num_changed_files: int
    num_unchanged_files: int
    num_quarantined_files: int
    num_tombstones: int
    num_remaining_files: int
    num_shards: int
    num_bytes: int
    audio_hours: float
    remaining_hours: float
    worker_hours: float
    cost: float
    currency: str
    spend_cap: float | None
    withheld_tombstones: int = 0
    withheld_reason: str = ""
    num_excluded_files: int = 0
    realtime_factor: float | None = None
    rate_source: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.num_files == 0 and self.num_tombstones == 0

    @property
    def exceeds_spend_cap(self) -> bool:
        """Whether the plan would cost more than it may."""
        return self.spend_cap is not None and self.cost > self.spend_cap

    @property
    def rate_text(self) -> str:
        """How fast one worker is thought to be, and why."""
        if self.realtime_factor is None:
            return "rate not recorded"
        return f"{self.realtime_factor:.4g} x real time per worker, {self.rate_source}"


def read_plan(storage: Storage, plan_uri: str) -> Plan:
    """Read a plan's summary. Raises ``ObjectMissingError`` and ``ConfigError``."""
    try:
        return Plan.model_validate_json(storage.read(join_uri(plan_uri, PLAN_FILE)))
    except ValidationError as error:
        raise ConfigError(f"{plan_uri} cannot be used as a plan: {describe(error)}.") from error
