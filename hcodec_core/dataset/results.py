"""The results of a plan's shards, as its workers left them."""

from __future__ import annotations

from pydantic import ValidationError

from hcodec_core.config import describe
from hcodec_core.dataset.tabular import each, list_folder
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import ShardResult
from hcodec_core.storage import Storage, join_uri


def results_uri(plan_uri: str) -> str:
    """Folder of a plan's shard results."""
    return join_uri(plan_uri, "results")


def result_uri(plan_uri: str, shard_id: str) -> str:
    """Result document of one shard."""
    return join_uri(plan_uri, "results", f"{shard_id}.json")


def read_results(storage: Storage, plan_uri: str) -> dict[str, ShardResult]:
    """Results that are there, by shard id. Raises ``ConfigError`` for one that is not readable."""
    objects = list_folder(storage, results_uri(plan_uri))
    uris = [info.uri for info in objects if info.uri.endswith(".json")]
    results: list[ShardResult] = each(lambda uri: _read(storage, uri), uris)
    return {result.shard_id: result for result in results}


def _read(storage: Storage, uri: str) -> ShardResult:
    try:
        return ShardResult.model_validate_json(storage.read(uri))
    except ValidationError as error:
        raise ConfigError(
            f"The shard result {uri} cannot be used by this version: {describe(error)}."
        ) from error
