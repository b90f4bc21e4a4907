"""Making a lost catalog again from what lies in object storage.

A catalog holds one pointer per table: which metadata file is the present one. The files themselves
lie beside the data and name their predecessors, so a lost or outdated pointer can be found again.
The newest is told by content: a file that another one names as predecessor is not it, and of those
left the one furthest from the table's beginning is. Times of objects say nothing: a copied or
restored bucket has new ones, and a writer that lost a race may have written last.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import Config
from hcodec_core.dataset.ledger import VersionEntry
from hcodec_core.dataset.table import catalog_errors, open_catalog
from hcodec_core.dataset.tabular import each, list_folder
from hcodec_core.errors import ConfigError, ObjectMissingError
from hcodec_core.storage import Storage, join_uri

logger = logging.getLogger(__name__)

_END = ".metadata.json"
_VERSION = "hcodec.version."


class TableRestore(BaseModel):
    """A table as found in storage. ``previous_uri``: what the catalog pointed to, "" if nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str
    metadata_uri: str
    previous_uri: str
    versions: list[str]
    is_changed: bool


@dataclass(frozen=True)
class Metadata:
    """One metadata file. ``number``: how many changes of the table came before it."""

    uri: str
    number: int
    table_uuid: str
    predecessors: frozenset[str]
    refs: dict[str, int]
    versions: dict[str, int]
    work_folder: tuple[str, str]


def restore_from_storage(
    config: Config, storage: Storage, chosen: Iterable[str] = (), *, dry_run: bool = True
) -> list[TableRestore]:
    """Point the catalog to the newest metadata file of every table below the warehouse.

    A pointer that is no file's predecessor stays as it is: the catalog is in use. ``chosen``:
    metadata files to take where there is no telling. While it runs nobody else may write.

    Raises ``ConfigError`` naming the files where two could be the newest, ``StorageError``.
    """
    by_hand = set(chosen)
    found = []
    for name, files in sorted(_metadata_of(config, storage).items()):
        newest = next((file for file in files if file.uri in by_hand), None)
        found.append(_restore(config, storage, name, files, newest, dry_run=dry_run))
    return found


def _restore(
    config: Config,
    storage: Storage,
    name: str,
    files: list[Metadata],
    newest: Metadata | None,
    *,
    dry_run: bool,
) -> TableRestore:
    previous_uri = _pointer(config, name)
    tips = _tips(files)
    if newest is None and previous_uri in {tip.uri for tip in tips}:
        newest = next(tip for tip in tips if tip.uri == previous_uri)
    newest = newest or newest_of(config, storage, tips)
    is_changed = newest.uri != previous_uri
    if is_changed and not dry_run:
        _register(config, name, newest.uri, is_known=bool(previous_uri))
        logger.info("%s is at %s", name, newest.uri)
    return TableRestore(
        table=name,
        metadata_uri=newest.uri,
        previous_uri=previous_uri,
        versions=list(newest.versions),
        is_changed=is_changed,
    )


def newest_of(config: Config, storage: Storage, tips: list[Metadata]) -> Metadata:
    """Of metadata files that none names as predecessor, the present one.

    Raises ``ConfigError`` naming those between which nothing decides.
    """
    furthest = max(tip.number for tip in tips)
    best = [tip for tip in tips if tip.number == furthest]
    if len(best) > 1:
        records = _recorded_versions(config, storage, best[0])
        agreeing = {tip.uri: len(records & set(tip.versions.items())) for tip in best}
        best = [tip for tip in best if agreeing[tip.uri] == max(agreeing.values())]
    if len({tuple(sorted(_published(tip).items())) for tip in best}) > 1:
        names = ", ".join(tip.uri for tip in best)
        raise ConfigError(
            f"Either of these may be the newest state of one table: {names}: look which versions "
            "readers had, and name that file with --metadata-uri."
        )
    # They differ in branches of unpublished plans at most, which are committed again.
    return min(best, key=lambda tip: tip.uri)


def _published(tip: Metadata) -> dict[str, int]:
    names = {name for name in tip.refs if name == "main" or name in tip.versions}
    return {name: tip.refs[name] for name in names} | tip.versions


def _recorded_versions(config: Config, storage: Storage, tip: Metadata) -> set[tuple[str, int]]:
    """(version, snapshot id) of the version records of a table's dataset."""
    folder_uri = join_uri(config.work.work_uri, "datasets", *tip.work_folder, "versions")
    found = set()
    for info in list_folder(storage, folder_uri):
        try:
            record = json.loads(storage.read(info.uri))
            found.add((str(record["version"]), int(record["snapshot_id"])))
        except (json.JSONDecodeError, KeyError, TypeError, ObjectMissingError):
            logger.warning("%s is no version record", info.uri)
    return found


def _tips(files: list[Metadata]) -> list[Metadata]:
    named = {uri for file in files for uri in file.predecessors}
    return [file for file in files if file.uri not in named]


def _metadata_of(config: Config, storage: Storage) -> dict[str, list[Metadata]]:
    """All readable metadata files by name of the table, which is that of its folder."""
    root_uri = join_uri(config.catalog.warehouse_uri, config.catalog.namespace)
    uris = [i.uri for i in list_folder(storage, root_uri) if i.uri.endswith(_END)]
    found: dict[str, list[Metadata]] = {}
    for uri, file in zip(uris, each(lambda uri: _read(storage, uri), uris), strict=True):
        if file is not None:
            name = uri.removeprefix(root_uri.rstrip("/") + "/").partition("/")[0]
            found.setdefault(name, []).append(file)
    return {name: _of_one_table(files) for name, files in found.items()}


def _of_one_table(files: list[Metadata]) -> list[Metadata]:
    """Those of the table that came furthest: whoever lost the race to make it left others."""
    furthest = max(files, key=lambda file: (file.number, len(file.refs)))
    return [file for file in files if file.table_uuid == furthest.table_uuid]


def _read(storage: Storage, uri: str) -> Metadata | None:
    try:
        document = json.loads(storage.read(uri))
        properties = document.get("properties", {})
        log = document.get("metadata-log", [])
        return Metadata(
            uri=uri,
            number=_number(uri, len(log)),
            table_uuid=document["table-uuid"],
            predecessors=frozenset(entry["metadata-file"] for entry in log),
            refs={name: ref["snapshot-id"] for name, ref in document.get("refs", {}).items()},
            versions=_versions(properties),
            work_folder=(
                properties.get("hcodec.dataset", ""),
                properties.get("hcodec.encode-id", "")[:12],
            ),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, ValidationError) as error:
        logger.warning("%s is no metadata file (%s): left out", uri, type(error).__name__)
    except ObjectMissingError:
        logger.warning("%s is gone: left out", uri)
    return None


def _number(uri: str, num_predecessors: int) -> int:
    # The log is cut after a hundred entries; catalogs count on in the name.
    name = uri.rpartition("/")[2].partition("-")[0]
    return max(int(name) if name.isdecimal() else 0, num_predecessors)


def _versions(properties: dict[str, Any]) -> dict[str, int]:
    return {
        name.removeprefix(_VERSION): VersionEntry.model_validate_json(text).snapshot_id
        for name, text in properties.items()
        if name.startswith(_VERSION)
    }


def _pointer(config: Config, name: str) -> str:
    """Metadata file that the catalog points to, "" when it does not know the table."""
    from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

    catalog = open_catalog(config)
    with catalog_errors(f"asking for {name}"):
        try:
            return str(catalog.load_table((config.catalog.namespace, name)).metadata_location)
        except (NoSuchTableError, NoSuchNamespaceError):
            return ""
        except FileNotFoundError:
            return "(a metadata file that is gone)"


def _register(config: Config, name: str, metadata_uri: str, *, is_known: bool) -> None:
    identifier = (config.catalog.namespace, name)
    catalog = open_catalog(config)
    with catalog_errors(f"registering {name}"):
        catalog.create_namespace_if_not_exists(config.catalog.namespace)
        if is_known:
            # Only the catalog's entry; killed here, the next restore finds no pointer and goes on.
            catalog.drop_table(identifier)
        catalog.register_table(identifier, metadata_uri)
