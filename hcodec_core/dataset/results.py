"""The results of a plan's shards, as its workers left them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from hcodec_core.config import describe
from hcodec_core.dataset.tabular import each, list_folder
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import ShardResult
from hcodec_core.storage import Storage, join_uri

Extract = TypeVar("Extract")


def results_uri(plan_uri: str) -> str:
    """Folder of a plan's shard results."""
    return join_uri(plan_uri, "results")


def result_uri(plan_uri: str, shard_id: str) -> str:
    """Result document of one shard."""
    return join_uri(plan_uri, "results", f"{shard_id}.json")


def read_result(storage: Storage, uri: str) -> ShardResult:
    """One result document. Raises ``ObjectMissingError`` and ``ConfigError``."""
    try:
        return ShardResult.model_validate_json(storage.read(uri))
    except ValidationError as error:
        raise ConfigError(
            f"The shard result {uri} cannot be used by this version: {describe(error)}."
        ) from error


def read_results(
    storage: Storage, plan_uri: str, extract: Callable[[ShardResult], Extract]
) -> list[Extract]:
    """What ``extract`` keeps of each result that is there: a plan may have millions of outcomes."""
    objects = list_folder(storage, results_uri(plan_uri))
    uris = [info.uri for info in objects if info.uri.endswith(".json")]
    return each(lambda uri: extract(read_result(storage, uri)), uris)
