"""What a purge writes down, and how it goes through plans, results, listings and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.dataset.mentions import (
    Targets,
    count_in_document,
    count_in_parquet,
    keys_in,
    redact_document,
    redact_rows,
)
from hcodec_core.dataset.tabular import each, list_folder, read_table, write_table
from hcodec_core.errors import ObjectMissingError, StorageError
from hcodec_core.jobs import FILES_FILE, JOB_FILE, DataFile, Outcome, ShardResult
from hcodec_core.storage import ObjectInfo, Storage, join_uri

_KEYS = ("uri", "etag")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileSwap(_Document):
    """What took the place of a data file (None: no row of it stayed), and what left with it."""

    new: DataFile | None
    num_rows: int
    audio_seconds: float
    num_tokens: int


class TableState(_Document):
    """A purge's work on one table. ``versions``: rows that leave each version."""

    swaps: dict[str, FileSwap] = {}
    versions: dict[str, int] = {}


class PurgeState(_Document):
    """A purge that has begun; gone when it is over, since it tells more than may stay."""

    format_version: Literal[1] = 1
    purge_id: str
    started_at: datetime
    audio_ids: tuple[str, ...] = ()
    tables: dict[str, TableState] = {}


class Proof(_Document):
    """What was read after a purge to the last object, and how often a name was found."""

    num_parquet: int
    num_avro: int
    num_documents: int
    num_bytes: int
    num_mentions: int
    named_in: list[str] = []

    @property
    def num_objects(self) -> int:
        """All objects that were read."""
        return self.num_parquet + self.num_avro + self.num_documents


@dataclass(frozen=True)
class Searcher:
    """Reads objects of ours and looks for names. ``open_file``: random access to one by its URI."""

    storage: Storage
    open_file: Any

    def keys_in_tables(self, infos: list[ObjectInfo], targets: Targets) -> set[tuple[str, str]]:
        """(uri, etag) of targets in all Parquet objects that have such columns."""

        def keys(info: ObjectInfo) -> list[tuple[str, str]]:
            with self.open_file(info.uri) as source:
                file = pq.ParquetFile(source)
                if not set(_KEYS) <= set(file.schema_arrow.names):
                    return []
                groups = range(file.num_row_groups)
                parts = (file.read_row_group(index, columns=list(_KEYS)) for index in groups)
                return [key for rows in parts for key in keys_in(rows, targets)]

        tables = [info for info in infos if info.uri.endswith(".parquet")]
        return {key for found in each(lambda i: _sound(keys, i, []), tables) for key in found}

    def count(self, info: ObjectInfo, targets: Targets) -> int:
        """Mentions in one object; 0 when it is gone meanwhile.

        Raises ``StorageError`` for one that cannot be read as what its name says.
        """
        try:
            if not info.uri.endswith(".parquet"):
                return count_in_document(info.uri, self.storage.read(info.uri), targets)
            with self.open_file(info.uri) as source:
                return count_in_parquet(pq.ParquetFile(source), targets)
        except ObjectMissingError:
            return 0
        except pa.ArrowInvalid as error:
            raise StorageError(
                f"{info.uri} is not readable as Parquet, so nobody knows what it names: restore or "
                "delete it, then purge again."
            ) from error

    def prove(self, infos: list[ObjectInfo], targets: Targets) -> Proof:
        """Read every object and count mentions."""
        counts = each(lambda info: self.count(info, targets), infos)
        kinds = Counter(info.uri.rpartition(".")[2] for info in infos)
        num_tables, num_avro = kinds["parquet"], kinds["avro"]
        return Proof(
            num_parquet=num_tables,
            num_avro=num_avro,
            num_documents=len(infos) - num_tables - num_avro,
            num_bytes=sum(info.size for info in infos),
            num_mentions=sum(counts),
            named_in=[i.uri for i, count in zip(infos, counts, strict=True) if count][:10],
        )


def _sound(call: Any, info: ObjectInfo, otherwise: Any) -> Any:
    """What ``call`` says of a Parquet object, ``otherwise`` for one that is none or gone."""
    try:
        return call(info)
    except (pa.ArrowInvalid, ObjectMissingError, FileNotFoundError):
        return otherwise


def clean_documents(
    storage: Storage, infos: list[ObjectInfo], targets: Targets, swaps: Mapping[str, FileSwap]
) -> int:
    """Take names out of documents, one atomic write each; returns how many were changed."""
    cleaner = _Cleaner(storage, targets, swaps)
    # File lists first: the documents beside them take their counts from them.
    tables = [info for info in infos if info.uri.endswith(".parquet")]
    others = [info for info in infos if not info.uri.endswith(".parquet")]
    changed = sum(each(cleaner.clean_table, tables))
    return int(changed + sum(each(cleaner.clean_document, others)))


@dataclass(frozen=True)
class _Cleaner:
    storage: Storage
    targets: Targets
    swaps: Mapping[str, FileSwap]

    def clean_table(self, info: ObjectInfo) -> bool:
        try:
            rows = read_table(self.storage, info.uri)
        except (ObjectMissingError, StorageError):
            return False  # cut off: what it names is found by the proof, which then says so
        cleaned = redact_rows(rows, self.targets)
        if cleaned is rows or cleaned.equals(rows):
            return False
        write_table(self.storage, info.uri, cleaned)
        return True

    def clean_document(self, info: ObjectInfo) -> bool:
        try:
            data = self.storage.read(info.uri)
        except ObjectMissingError:
            return False
        cleaned = self._cleaned(info.uri, data)
        if cleaned == data:
            return False
        self.storage.write(info.uri, cleaned)
        return True

    def _cleaned(self, uri: str, data: bytes) -> bytes:
        if "/results/" in uri and (result := self._cleaned_result(data)) is not None:
            return result
        if count_in_document(uri, data, self.targets):
            data = redact_document(uri, data, self.targets)
        if uri.endswith(f"/{JOB_FILE}"):
            return self._recounted(uri, data)
        return data

    def _cleaned_result(self, data: bytes) -> bytes | None:
        """A shard's result without the files of targets, naming the data file that stands now."""
        try:
            result = ShardResult.model_validate_json(data)
        except ValidationError:
            return None
        swap = self.swaps.get(result.data_file.uri) if result.data_file is not None else None
        kept = [o for o in result.outcomes if not self.targets.holds(o.uri)]
        if swap is None and len(kept) == len(result.outcomes):
            return None
        update: dict[str, Any] = {"outcomes": kept}
        seconds = [o.audio_seconds for o in kept if o.outcome is Outcome.TOKENS]
        update["audio_seconds"] = sum(seconds) if result.data_file else result.audio_seconds
        if swap is not None:
            update["data_file"] = swap.new
            update["num_tokens"] = max(0, result.num_tokens - swap.num_tokens)
        text = result.model_copy(update=update).model_dump_json(indent=1)
        return redact_document("result.json", text.encode(), self.targets)

    def _recounted(self, uri: str, data: bytes) -> bytes:
        """A job document whose counts are those of the file list beside it."""
        import json

        try:
            job = json.loads(data)
            files_uri = join_uri(uri.rpartition("/")[0], FILES_FILE)
            files = read_table(self.storage, files_uri, ["shard_id", "size"])
        except (json.JSONDecodeError, ObjectMissingError, StorageError):
            return data
        counts = {
            "num_files": len(files),
            "num_shards": len(files["shard_id"].unique()),
            "num_bytes": sum(files["size"].to_pylist()),
        }
        if all(job.get(name) == count for name, count in counts.items()):
            return data
        return json.dumps(job | counts, indent=1).encode()


def list_all(storage: Storage, folder_uris: list[str]) -> list[ObjectInfo]:
    """Objects below several folders, each once."""
    found: dict[str, ObjectInfo] = {}
    for folder_uri in folder_uris:
        found.update({info.uri: info for info in list_folder(storage, folder_uri)})
    return list(found.values())


def merged(state: TableState, swaps: Mapping[str, FileSwap], versions: Mapping[str, int]) -> Any:
    """The state with more swaps and versions."""
    return state.model_copy(
        update={"swaps": state.swaps | dict(swaps), "versions": state.versions | dict(versions)}
    )
