"""What a retraining is asked to do: one value, whether it comes from a form or a declaration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from hcodec_airflow.forms import MAX_WORKERS, URI_PATTERN
from hcodec_airflow.requests import DatasetName, read_form, read_tables
from hcodec_airflow.retrain_form import CODEC_PATTERN, DATA_PATTERN, MAX_GPUS, MAX_NODES
from hcodec_core.config import GateConfig, MetricMargin, describe
from hcodec_core.errors import ConfigError

CHAMPION, SCRATCH = "champion", "scratch"
CodecName = Annotated[str, StringConstraints(pattern=CODEC_PATTERN)]
DataUri = Annotated[str, StringConstraints(pattern=DATA_PATTERN)]
FolderUri = Annotated[str, StringConstraints(pattern=URI_PATTERN)]
Margin = Annotated[float, Field(ge=0)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Training(_Document):
    base: str = Field(default=CHAMPION, min_length=1)
    data: tuple[DataUri, ...] = Field(min_length=1)
    held_out: FolderUri
    recipe: str = Field(default="nano", min_length=1)
    steps: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    discriminator_learning_rate: float | None = Field(default=None, gt=0)
    train: Literal["as the recipe says", "all", "decoder"] = "as the recipe says"
    changes: dict[str, Any] | None = None
    teacher: str | None = None
    nodes: int = Field(default=1, ge=1, le=MAX_NODES)
    gpus: int = Field(default=1, ge=1, le=MAX_GPUS)
    backend: Literal["local", "kubernetes"] | None = None
    profile: str | None = None
    margins: dict[str, Margin] | None = None
    min_files: int | None = Field(default=None, ge=2)
    max_files: int | None = Field(default=None, ge=2)
    approval: Literal["ask", "automatic"] = "ask"
    datasets: tuple[DatasetName, ...] | None = None
    tokenise: bool = False
    tokenise_workers: int = Field(default=1, ge=1, le=MAX_WORKERS)
    tokenise_profile: str | None = None


class RetrainRequest(_Training):
    """One run of ``retrain_codec``; the entries are those of ``retrain_form.FIELDS``."""

    codec: CodecName
    dry_run: bool = False

    @property
    def num_ranks(self) -> int:
        """Processes that train together."""
        return self.nodes * self.gpus

    def recipe_changes(self) -> dict[str, Any]:
        """Entries of the recipe that this request replaces."""
        named = {
            "steps": self.steps,
            "optimizer.learning_rate": self.learning_rate,
            "optimizer.discriminator_learning_rate": self.discriminator_learning_rate,
            "train": None if self.train == "as the recipe says" else self.train,
        }
        said = {name: value for name, value in named.items() if value is not None}
        return {**(self.changes or {}), **said}

    def gate(self, configured: GateConfig) -> GateConfig:
        """The configured gate with this request's margins. A metric that is named is required."""
        metrics = dict(configured.metrics)
        for name, margin in (self.margins or {}).items():
            worst = metrics[name].worst if name in metrics else None
            metrics[name] = MetricMargin(margin=margin, worst=worst, is_required=True)
        return configured.model_copy(
            update={"metrics": metrics, "min_files": self.min_files or configured.min_files}
        )


class DeclaredCodec(_Training):
    """One table of ``codecs.toml``: a request, and when it runs.

    ``schedule``: cron text or preset. ``min_new_hours``: a scheduled run goes on only when the
    datasets of ``data`` grew by so many hours of audio since a codec was last trained on them.
    ``on_drift_of``: datasets whose drift starts a run.
    """

    description: str = ""
    schedule: str | None = None
    min_new_hours: float | None = Field(default=None, gt=0)
    on_drift_of: tuple[DatasetName, ...] = ()

    def request_values(self) -> dict[str, Any]:
        """The part of it that a ``RetrainRequest`` holds."""
        own = {"description", "schedule", "min_new_hours", "on_drift_of"}
        return self.model_dump(mode="json", exclude=own)


class RollbackRequest(_Document):
    """One run of ``rollback_codec``. ``champion``: the version that is to leave."""

    codec: CodecName
    champion: int = Field(ge=1)
    reason: str = Field(min_length=1)


def read_retraining(values: Mapping[str, Any]) -> RetrainRequest:
    """A request from a form's values. Raises ``ConfigError`` naming each wrong entry."""
    return read_form(values, RetrainRequest)


def read_rollback(values: Mapping[str, Any]) -> RollbackRequest:
    """A request from a form's values. Raises ``ConfigError`` naming each wrong entry."""
    return read_form(values, RollbackRequest)


def read_codecs(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of ``codecs.toml`` by codec: see ``read_tables``."""
    return read_tables(path, "codecs", "codec")


def check_codec(path: Path, name: str, table: Any) -> DeclaredCodec:
    """One codec of ``codecs.toml``. Raises ``ConfigError`` naming file, codec and entries."""
    place = f"{path.name}, [codecs.{name}]"
    try:
        declared = DeclaredCodec.model_validate(table)
        RetrainRequest.model_validate({"codec": name, **declared.request_values()})
    except ValidationError as error:
        raise ConfigError(f"{place}: {describe(error)}.") from error
    if declared.min_new_hours is not None and declared.schedule is None:
        raise ConfigError(f"{place}: min_new_hours needs a schedule, at which it is looked at.")
    return declared
