"""Configuration: one TOML file says where data lies, what may be touched, and what it costs.

```toml
format_version = 1

[storage]                        # leave endpoint_url out for AWS
endpoint_url = "http://127.0.0.1:9000"
region = "us-east-1"

[access]                         # nothing outside these prefixes is read or written
source_prefixes = ["s3://audio/"]
destination_prefixes = ["s3://tokens/"]

[catalog]                        # any pyiceberg catalog
uri = "sqlite:////var/lib/hcodec/catalog.db"
warehouse_uri = "s3://tokens/warehouse"

[work]                           # plans, leases, results, reports, logs
work_uri = "s3://tokens/work"

[registry]                       # MLflow; left out: mlflow.db beside a sqlite catalog
uri = "https://mlflow.example.org"

[gate]                           # when a retrained codec may be promoted
min_files = 20
[gate.metrics.stoi]              # naming metrics replaces the built-in margins
margin = 0.01
is_required = true
```
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hcodec_core.errors import AccessError, ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StorageConfig(_Section):
    """S3 endpoint; credentials come from the SDK's own chain, never from here."""

    endpoint_url: str | None = None
    region: str = "us-east-1"


class AccessConfig(_Section):
    """Allow-lists of URI prefixes; each ends with ``/`` so that ``s3://a`` is not ``s3://ab``."""

    source_prefixes: tuple[str, ...] = Field(min_length=1)
    destination_prefixes: tuple[str, ...] = Field(min_length=1)

    @field_validator("source_prefixes", "destination_prefixes")
    @classmethod
    def _end_with_slash(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix if prefix.endswith("/") else prefix + "/" for prefix in prefixes)


class CatalogConfig(_Section):
    """An Iceberg catalog: ``sqlite:///``, ``postgresql+psycopg2://``, ``http(s)://`` (REST).

    ``properties`` are passed on to pyiceberg as they are.
    """

    uri: str
    warehouse_uri: str
    namespace: str = Field(default="hcodec", pattern=r"^[a-z][a-z0-9_]*$")
    properties: dict[str, str] = {}


class WorkConfig(_Section):
    """Where plans, leases, results, reports and logs lie."""

    work_uri: str


class CostConfig(_Section):
    """What an hour of one worker costs, and how fast it runs (times real time) per codec.

    ``training_realtime_factors``: hours of crops that one training process goes through in an hour.
    """

    currency: str = "USD"
    worker_hour: float = Field(default=0.0, ge=0)
    realtime_factors: dict[str, float] = {}
    default_realtime_factor: float = Field(default=20.0, gt=0)
    training_realtime_factors: dict[str, float] = {}
    default_training_realtime_factor: float = Field(default=20.0, gt=0)


class MetricMargin(_Section):
    """What the gate asks of one metric.

    ``margin``: how much worse than the champion a challenger may be, in the metric's unit (None: no
    comparison). ``worst``: absolute bound, lowest mean for metrics where more is better and highest
    where less is. ``is_required``: a challenger without this measurement does not pass.
    """

    margin: float | None = Field(default=None, ge=0)
    worst: float | None = None
    is_required: bool = False

    @model_validator(mode="after")
    def _check_anything(self) -> MetricMargin:
        if self.margin is None and self.worst is None:
            raise ValueError("needs a margin, a worst value, or both")
        return self


DEFAULT_MARGINS = {
    "mel_distance_db": MetricMargin(margin=0.2, is_required=True),
    "stoi": MetricMargin(margin=0.01, is_required=True),
    "pesq_wb": MetricMargin(margin=0.1),
    "pesq_nb": MetricMargin(margin=0.1),
    "dnsmos_ovrl": MetricMargin(margin=0.1),
    "wer": MetricMargin(margin=0.01),
    "speaker_similarity": MetricMargin(margin=0.01),
}


class GateConfig(_Section):
    """When a challenger may take the champion's place: non-inferiority in every metric named.

    ``metrics``: replaces the built-in margins. ``confidence``: of the one-sided bound on the mean
    difference. ``min_files``: pairs of files below which nothing is decided.
    ``max_challenger_failures``: files that the challenger cannot process though the champion can.
    ``group_depth``: files whose names share so many leading folders (a speaker's) are resampled
    together, since they are not independent; 0: each file alone.
    """

    min_files: int = Field(default=20, ge=2)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    num_resamples: int = Field(default=4000, ge=200, le=100_000)
    seed: int = 0
    group_depth: int = Field(default=0, ge=0)
    max_challenger_failures: int = Field(default=0, ge=0)
    metrics: dict[str, MetricMargin] = DEFAULT_MARGINS


class RegistryConfig(_Section):
    """MLflow model registry: ``sqlite:////folder/mlflow.db``, or ``http(s)://`` of a server.

    Left out, it is ``mlflow.db`` beside a catalog that is a sqlite file.
    """

    uri: str | None = None


class Config(_Section):
    """The whole file."""

    format_version: int = Field(default=1, ge=1, le=1)
    storage: StorageConfig = StorageConfig()
    access: AccessConfig
    catalog: CatalogConfig
    work: WorkConfig
    cost: CostConfig = CostConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()

    def check_source(self, uri: str) -> None:
        """Raise ``AccessError`` unless ``uri`` lies under an allowed source prefix."""
        _check_prefix(uri, self.access.source_prefixes, "source", "access.source_prefixes")

    def check_destination(self, uri: str) -> None:
        """Raise ``AccessError`` unless ``uri`` lies under an allowed destination prefix."""
        allowed = self.access.destination_prefixes
        _check_prefix(uri, allowed, "destination", "access.destination_prefixes")


def load_config(path: Path) -> Config:
    """Read and check a configuration file.

    Raises ``ConfigError`` naming the file and each wrong entry; ``AccessError`` when warehouse or
    work folder lie outside the allowed destinations.
    """
    try:
        config = Config.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(
            f"Configuration {path} does not exist: name one with --config."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"Configuration {path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise ConfigError(f"Configuration {path}: {describe(error)}.") from error
    config.check_destination(config.catalog.warehouse_uri)
    config.check_destination(config.work.work_uri)
    return config


def describe(error: ValidationError) -> str:
    """The wrong entries of a document in one line, without their values (they may be secret)."""
    faults = error.errors(include_input=False, include_url=False)
    return "; ".join(f"{'.'.join(map(str, f['loc'])) or 'document'}: {f['msg']}" for f in faults)


def _check_prefix(uri: str, allowed: tuple[str, ...], what: str, setting: str) -> None:
    # A path that climbs out of its prefix is refused, not resolved.
    climbs = any(part in {".", ".."} for part in uri.partition("://")[2].split("/"))
    if not climbs and any((uri.rstrip("/") + "/").startswith(prefix) for prefix in allowed):
        return
    raise AccessError(
        f"The {what} {uri} lies outside the allowed prefixes ({', '.join(allowed)}): "
        f"use one of them or add it to {setting} in the configuration."
    )
