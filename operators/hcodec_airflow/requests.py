"""What a tokenise run is asked to do: one value, whether it comes from a form or a declaration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from hcodec_airflow.forms import (
    MAX_GAIN,
    MAX_WORKERS,
    NAME_LENGTH,
    NAME_PATTERN,
    URI_PATTERN,
)
from hcodec_core.config import describe
from hcodec_core.errors import ConfigError

DatasetName = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=NAME_LENGTH)]
Request = TypeVar("Request", bound=BaseModel)
SourceUri = Annotated[str, StringConstraints(pattern=URI_PATTERN)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Work(_Document):
    sources: tuple[SourceUri, ...] = Field(min_length=1)
    codec: str = Field(default="hcodec-nano", min_length=1)
    mode: Literal["exact", "fast"] = "exact"
    channel: Literal["mean", "first"] = "mean"
    gain: float = Field(default=1.0, gt=0, le=MAX_GAIN)
    threshold: float | None = Field(default=None, gt=0, le=1)
    workers: int = Field(default=2, ge=1, le=MAX_WORKERS)
    backend: Literal["local", "kubernetes"] | None = None
    profile: str | None = None
    hours_per_shard: float = Field(default=1.0, gt=0)
    shards: int | None = Field(default=None, ge=1)
    max_hours_per_version: float | None = Field(default=None, gt=0)
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    max_delete_share: float = Field(default=0.2, ge=0, le=1)
    spend_cap: float | None = Field(default=None, ge=0)


class TokenizeRequest(_Work):
    """One run of the pipeline; the entries are those of ``hcodec_core.dataset.plan.PlanRequest``.

    ``max_bad_share``: share of files that may be quarantined. ``shards``: their number, in place of
    ``hours_per_shard``. ``backend``, ``profile``: where workers run and how their pods look; None:
    as the installation says.
    """

    dataset: DatasetName
    allow_many_deletes: bool = False
    retry_quarantined: bool = False
    dry_run: bool = False


class DeclaredDataset(_Work):
    """One table of ``datasets.toml``: a request and when it runs (cron text, preset, or never)."""

    description: str = ""
    schedule: str | None = None

    def request_values(self) -> dict[str, Any]:
        """The part of it that a ``TokenizeRequest`` holds."""
        return self.model_dump(mode="json", exclude={"description", "schedule"})


def read_request(values: Mapping[str, Any]) -> TokenizeRequest:
    """A request from a form's values; ``source`` stands for one of ``sources``.

    Raises ``ConfigError`` naming each wrong entry.
    """
    known = dict(values)
    source = known.pop("source", None)
    if source is not None:
        known["sources"] = [source]
    return read_form(known, TokenizeRequest)


def read_form(values: Mapping[str, Any], request: type[Request]) -> Request:
    """A request from a form's values. Raises ``ConfigError`` naming each wrong entry."""
    try:
        return request.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"This run cannot be started: {describe(error)}.") from error


def read_declarations(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of ``datasets.toml`` by dataset name: see ``read_tables``."""
    return read_tables(path, "datasets", "dataset")


def read_tables(path: Path, section: str, what: str) -> dict[str, dict[str, Any]]:
    """The tables [section.<name>] of a file by name, one per ``what``, not checked one by one.

    Raises ``ConfigError`` when the file is missing, no TOML, or has other tables.
    """
    try:
        document = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist: write it beside the DAG files.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    tables = document.pop(section, {})
    if document or not isinstance(tables, dict):
        others = ", ".join(document) or section
        raise ConfigError(f"{path}: {others}: write one table [{section}.<name>] per {what}.")
    return tables


def check_declaration(path: Path, name: str, table: Any) -> DeclaredDataset:
    """One dataset of ``datasets.toml``. Raises ``ConfigError`` naming file, dataset and entries."""
    place = f"{path.name}, [datasets.{name}]"
    try:
        TokenizeRequest.model_validate({"dataset": name, "sources": ["file:///"]})
    except ValidationError as error:
        raise ConfigError(
            f"{place}: a dataset's name has lower-case letters, digits and underscores."
        ) from error
    try:
        return DeclaredDataset.model_validate(table)
    except ValidationError as error:
        raise ConfigError(f"{place}: {describe(error)}.") from error
