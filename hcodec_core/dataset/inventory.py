"""Inventories: which audio objects exist, taken once and kept as Parquet.

An inventory's folder holds

    part-00000.parquet    objects of the first source: uri, etag, size, last_modified, metadata
    inventory.json        ``InventoryInfo``; rewritten after each part, complete only at the end

A source is a folder (``s3://bucket/speech/``), of which every object is taken, or a manifest (see
``manifests``: CSV, Parquet, JSON lines, NeMo, Lhotse), of which the columns that are no facts about
an object become the metadata of its row. Only folders listed to the end tell which objects are
gone.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import Config, describe
from hcodec_core.dataset.manifests import Row, is_manifest, read_manifest
from hcodec_core.dataset.tabular import each, open_table_writer, read_table
from hcodec_core.errors import AccessError, ConfigError, HCodecError, ObjectMissingError
from hcodec_core.storage import ObjectInfo, Storage, file_uri, join_uri, split_uri

logger = logging.getLogger(__name__)

INFO_FILE = "inventory.json"
INVENTORY_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("last_modified", pa.timestamp("us", tz="UTC")),
        pa.field("metadata", pa.map_(pa.string(), pa.string())),
    ]
)
_BATCH_ROWS = 20_000

Progress = Callable[[int], None]


class InventoryPart(BaseModel):
    """Objects of one source. ``num_missing``: rows of a manifest that name no object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    uri: str
    kind: Literal["folder", "manifest"]
    num_files: int
    num_bytes: int
    num_missing: int = 0


class InventoryInfo(BaseModel):
    """What an inventory covers. ``is_complete`` only when every source was read to its end.

    ``num_bytes`` in bytes; times in UTC. ``error`` says why an inventory is not complete.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    inventory_uri: str
    sources: tuple[str, ...]
    is_complete: bool
    parts: tuple[InventoryPart, ...] = ()
    started_at: datetime
    finished_at: datetime | None = None
    error: str = ""

    @property
    def num_files(self) -> int:
        """Objects found."""
        return sum(part.num_files for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Size of all objects found."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def listed_prefixes(self) -> tuple[str, ...]:
        """Folders listed to the end: an object missing below one of them is gone."""
        return tuple(part.source for part in self.parts if part.kind == "folder")


def take_inventory(
    config: Config,
    storage: Storage,
    sources: Sequence[str],
    out_uri: str,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> InventoryInfo:
    """List ``sources`` into the folder ``out_uri``.

    Folders inside other folders of the list are left out. With ``resume``, sources that an
    interrupted run into the same ``out_uri`` read to the end are not read again.
    ``progress`` gets the number of objects found so far.

    Raises ``ConfigError`` for sources that cannot be used together, ``AccessError`` for sources
    outside the allowed prefixes or refused by storage, ``StorageError`` when storage fails. On any
    of these the inventory written so far stays, marked as not complete.
    """
    wanted = normalise_sources(sources)
    for uri in wanted:
        config.check_source(uri)
    config.check_destination(out_uri)
    info = _start(storage, wanted, out_uri, resume)
    if info.is_complete:
        return info
    listing = _Listing(config, storage, wanted, progress)
    try:
        for index in range(len(info.parts), len(wanted)):
            part_uri = join_uri(out_uri, f"part-{index:05d}.parquet")
            part = listing.read(wanted[index], part_uri, info.num_files)
            info = info.model_copy(update={"parts": (*info.parts, part)})
            _write_info(storage, info)
    except HCodecError as error:
        _write_info(storage, info.model_copy(update={"error": str(error)}))
        raise
    done = {"is_complete": True, "finished_at": datetime.now(UTC), "error": ""}
    info = info.model_copy(update=done)
    _write_info(storage, info)
    logger.info("inventory %s: %d files, %d bytes", out_uri, info.num_files, info.num_bytes)
    return info


def read_inventory_info(storage: Storage, inventory_uri: str) -> InventoryInfo:
    """Read an inventory's side document. Raises ``ObjectMissingError`` and ``ConfigError``."""
    try:
        text = storage.read(join_uri(inventory_uri, INFO_FILE))
        return InventoryInfo.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{inventory_uri} is not an inventory: {describe(error)}.") from error


def read_inventory(storage: Storage, info: InventoryInfo) -> pa.Table:
    """All objects of an inventory, each URI once (the first source that has it wins)."""
    parts = each(lambda part: read_table(storage, part.uri), info.parts)
    table = pa.concat_tables([INVENTORY_SCHEMA.empty_table(), *parts])
    return _first_of_each(table, "uri")


def normalise_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """Folders with one slash at their end, none inside another; manifests as they are.

    Raises ``ConfigError`` when there is no source, or a URI has no known scheme.
    """
    if not sources:
        raise ConfigError("An inventory needs at least one source: name a folder or a manifest.")
    manifests = [uri for uri in sources if is_manifest(uri)]
    folders = sorted({_as_folder(uri) for uri in sources if not is_manifest(uri)})
    outer: list[str] = []
    for folder in folders:
        if not any(folder.startswith(known) for known in outer):
            outer.append(folder)
    return (*outer, *dict.fromkeys(manifests))


def _as_folder(uri: str) -> str:
    scheme, _, key = split_uri(uri)
    # A listing gives file URIs in one spelling only; prefixes must be comparable with them.
    spelled = file_uri(unquote(key, errors="surrogateescape")) if scheme == "file" else uri
    return spelled.rstrip("/") + "/"


def _start(storage: Storage, wanted: tuple[str, ...], out_uri: str, resume: bool) -> InventoryInfo:
    fresh = InventoryInfo(
        inventory_uri=out_uri, sources=wanted, is_complete=False, started_at=datetime.now(UTC)
    )
    if resume:
        try:
            known = read_inventory_info(storage, out_uri)
            if known.sources == wanted:
                return known
        except ObjectMissingError:
            pass  # nothing to go on from
    _write_info(storage, fresh)
    return fresh


def _write_info(storage: Storage, info: InventoryInfo) -> None:
    text = info.model_dump_json(indent=1)
    storage.write(join_uri(info.inventory_uri, INFO_FILE), text.encode())


class _Listing:
    """Reads one source after another into Parquet."""

    def __init__(
        self,
        config: Config,
        storage: Storage,
        sources: tuple[str, ...],
        progress: Progress | None,
    ) -> None:
        self._config = config
        self._storage = storage
        self._folders = tuple(uri for uri in sources if not is_manifest(uri))
        self._progress = progress

    def read(self, source: str, part_uri: str, num_before: int) -> InventoryPart:
        """Write one part; ``num_before``: objects found in the parts before it."""
        counts = {"num_files": 0, "num_bytes": 0, "num_missing": 0}
        from_manifest = is_manifest(source)
        batches = self._manifest_batches(source) if from_manifest else self._folder_batches(source)
        with open_table_writer(self._storage, part_uri, INVENTORY_SCHEMA) as writer:
            for rows in batches:
                found = [row for row in rows if row["etag"] is not None]
                writer.write_table(pa.Table.from_pylist(found, INVENTORY_SCHEMA))
                counts["num_files"] += len(found)
                counts["num_bytes"] += sum(row["size"] for row in found)
                counts["num_missing"] += len(rows) - len(found)
                if self._progress is not None:
                    self._progress(num_before + counts["num_files"])
        kind: Literal["folder", "manifest"] = "manifest" if from_manifest else "folder"
        return InventoryPart(source=source, uri=part_uri, kind=kind, **counts)

    def _folder_batches(self, prefix_uri: str) -> Iterator[list[Row]]:
        objects = (o for o in self._storage.list_objects(prefix_uri) if not o.uri.endswith("/"))
        while batch := list(islice(objects, _BATCH_ROWS)):
            yield [_facts(info) for info in batch]

    def _manifest_batches(self, manifest_uri: str) -> Iterator[list[Row]]:
        seen: set[str] = set()
        with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
            path = Path(folder, "manifest")
            self._storage.download(manifest_uri, path)
            for rows in read_manifest(path, manifest_uri):
                fresh = {row["uri"]: row for row in rows if row["uri"] not in seen}
                seen.update(fresh)
                self._check(manifest_uri, fresh)
                yield each(self._with_facts, fresh.values())

    def _check(self, manifest_uri: str, rows: dict[str, Row]) -> None:
        for uri in rows:
            self._config.check_source(uri)
            if uri.startswith(self._folders):
                raise ConfigError(
                    f"Manifest {manifest_uri} names {uri}, which lies in a folder that is a source "
                    "itself: give the folder or the manifest, not both."
                )

    def _with_facts(self, row: Row) -> Row:
        if row["etag"] is not None and row["size"] is not None:
            return row
        info = self._storage.head(row["uri"])
        if info is None:
            return row | {"etag": None}
        return row | _facts(info) | {"uri": row["uri"], "metadata": row["metadata"]}


def _facts(info: ObjectInfo) -> Row:
    return {
        "uri": info.uri,
        "etag": info.etag,
        "size": info.size,
        "last_modified": info.last_modified,
        "metadata": None,
    }


def _first_of_each(table: pa.Table, column: str) -> pa.Table:
    """Rows whose ``column`` did not occur in an earlier row."""
    import numpy as np

    codes = pc.dictionary_encode(table[column].combine_chunks()).indices
    _, first = np.unique(codes.to_numpy(zero_copy_only=False), return_index=True)
    return table if len(first) == len(table) else table.take(pa.array(np.sort(first)))


def check_uris(uris: pa.Array, config: Config) -> None:
    """Raise ``AccessError`` naming the first URI that lies outside the allowed source prefixes."""
    allowed = pc.starts_with(uris, pattern=config.access.source_prefixes[0])
    for prefix in config.access.source_prefixes[1:]:
        allowed = pc.or_(allowed, pc.starts_with(uris, pattern=prefix))
    climbs = pc.match_substring_regex(uris, pattern=r"/\.{1,2}(/|$)")
    refused = pc.filter(uris, pc.or_(pc.invert(allowed), climbs))
    if len(refused):
        config.check_source(refused[0].as_py())
        raise AccessError(f"The source {refused[0].as_py()} is not in plain form.")
