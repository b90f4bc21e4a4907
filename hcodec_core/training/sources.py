"""The files that a run trains on: listed once, pinned, and split by speaker.

The pinned list lies beside the run (``files.parquet``) and is what a resumed run reads. A file is
known by URI and etag; one that changed meanwhile is left out, by name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from hcodec_core.config import Config
from hcodec_core.dataset.inventory import INFO_FILE, read_inventory, read_inventory_info
from hcodec_core.dataset.manifests import Row, is_manifest, read_manifest
from hcodec_core.dataset.pinned import pin_snapshot
from hcodec_core.dataset.table import find_layout, held_objects, load_table
from hcodec_core.dataset.tabular import each, read_table, write_table
from hcodec_core.errors import ConfigError
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import digest_of
from hcodec_core.training.recipe import DataRecipe

_VERSION_PREFIX = "dataset:"
_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("speaker", pa.string()),
    ]
)


@dataclass(frozen=True)
class SourceFile:
    """One audio object. ``speaker``: what is known of whom it is, for the split."""

    uri: str
    etag: str
    size: int | None = None
    speaker: str | None = None


@dataclass(frozen=True)
class Sources:
    """Files of a run in the order of their URIs. No group of files is on both sides."""

    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]

    @property
    def digest(self) -> str:
        """Digest over URIs and etags of both sides."""
        sides = (self.training, self.held_out)
        return digest_of([[[file.uri, file.etag] for file in side] for side in sides])


@dataclass(frozen=True)
class DataVersion:
    """A dataset version that is trained on. ``sample_rate`` in Hz."""

    dataset: str
    version: str
    encode_id: str
    table_uri: str
    snapshot_id: int
    sample_rate: int

    @property
    def uri(self) -> str:
        """How it is named among the data."""
        return f"{_VERSION_PREFIX}{self.dataset}@{self.version}"


def pin_versions(
    config: Config, uris: Sequence[str]
) -> tuple[tuple[str, ...], tuple[DataVersion, ...]]:
    """``uris`` with each dataset at the version that it has now, and these versions.

    Raises ``ConfigError`` for a dataset or version that does not exist.
    """
    pinned, versions = [], []
    for uri in uris:
        if uri.startswith(_VERSION_PREFIX):
            versions.append(_version_of(uri.removeprefix(_VERSION_PREFIX), config))
            uri = versions[-1].uri
        pinned.append(uri)
    return tuple(pinned), tuple(versions)


def _version_of(name_and_version: str, config: Config) -> DataVersion:
    name, _, version = name_and_version.partition("@")
    layout = find_layout(config, name)
    snapshot = pin_snapshot(config, name, version or "latest", layout.encode_id)
    return DataVersion(
        dataset=name,
        version=snapshot.version,
        encode_id=layout.encode_id,
        table_uri=layout.table_uri,
        snapshot_id=snapshot.snapshot_id,
        sample_rate=snapshot.manifest.sample_rate,
    )


def list_sources(
    storage: Storage, uris: Sequence[str], sample_rate: int | None, config: Config | None = None
) -> list[SourceFile]:
    """All files behind ``uris``, each once, sorted by URI.

    Each is a folder, a manifest (see ``dataset.manifests``), the folder of an inventory, or
    ``dataset:NAME`` / ``dataset:NAME@VERSION``, the objects whose tokens a dataset version holds
    (needs ``config``). With ``config``, every file must lie under the allowed source prefixes.

    Raises:
        ConfigError: A source cannot be used; a dataset version was made at another sample rate
            than ``sample_rate`` (Hz; None: any); there is no file.
        AccessError: A file lies outside the allowed prefixes.
    """
    found: dict[str, SourceFile] = {}
    for uri in uris:
        for file in _files_of(storage, uri, sample_rate, config):
            if config is not None:
                config.check_source(file.uri)
            found.setdefault(file.uri, file)
    if not found:
        raise ConfigError(f"There is no file under {', '.join(uris)}: name a folder with audio.")
    return [found[uri] for uri in sorted(found)]


def _files_of(
    storage: Storage, uri: str, sample_rate: int | None, config: Config | None
) -> Iterable[SourceFile]:
    if uri.startswith(_VERSION_PREFIX):
        return _version_files(uri.removeprefix(_VERSION_PREFIX), sample_rate, config)
    if is_manifest(uri):
        return _manifest_files(storage, uri)
    folder_uri = uri.rstrip("/") + "/"
    if storage.head(join_uri(folder_uri, INFO_FILE)) is not None:
        return _inventory_files(storage, folder_uri.rstrip("/"))
    objects = storage.list_objects(folder_uri)
    return (SourceFile(o.uri, o.etag, o.size) for o in objects if not o.uri.endswith("/"))


def _version_files(
    name_and_version: str, sample_rate: int | None, config: Config | None
) -> Iterator[SourceFile]:
    if config is None:
        raise ConfigError("Training on a dataset version needs the configuration file: --config.")
    name, _, version = name_and_version.partition("@")
    snapshot = pin_snapshot(config, name, version or "latest")
    if sample_rate not in {None, snapshot.manifest.sample_rate}:
        raise ConfigError(
            f"Dataset {name} {snapshot.version} was made at {snapshot.manifest.sample_rate} Hz; "
            f"the codec to be trained works at {sample_rate} Hz: train on its source folders, or "
            "another codec."
        )
    held = held_objects(load_table(find_layout(config, name)), snapshot.snapshot_id)
    for row in held.to_pylist():
        yield SourceFile(row["uri"], row["etag"])


def _inventory_files(storage: Storage, inventory_uri: str) -> Iterator[SourceFile]:
    info = read_inventory_info(storage, inventory_uri)
    if not info.is_complete:
        raise ConfigError(f"The inventory {inventory_uri} is not complete: take it to its end.")
    for row in read_inventory(storage, info).to_pylist():
        metadata = dict(row["metadata"] or ())
        yield SourceFile(row["uri"], row["etag"], row["size"], metadata.get("speaker"))


def _manifest_files(storage: Storage, manifest_uri: str) -> Iterator[SourceFile]:
    with TemporaryDirectory(prefix="hcodec-") as folder:
        path = Path(folder, "manifest")
        storage.download(manifest_uri, path)
        for rows in read_manifest(path, manifest_uri):
            yield from each(lambda row: _manifest_file(storage, manifest_uri, row), rows)


def _manifest_file(storage: Storage, manifest_uri: str, row: Row) -> SourceFile:
    etag, size = row["etag"], row["size"]
    if etag is None:
        facts = storage.head(row["uri"])
        if facts is None:
            raise ConfigError(f"Manifest {manifest_uri} names {row['uri']}, which does not exist.")
        etag, size = facts.etag, facts.size
    return SourceFile(row["uri"], etag, size, dict(row["metadata"] or ()).get("speaker"))


def split_sources(files: Sequence[SourceFile], recipe: DataRecipe) -> Sources:
    """Keep back ``held_out_share`` of the groups, by a digest of the group's name alone.

    Other files, another order or another seed never move a group to the other side.

    Raises:
        ConfigError: One of the sides would be empty, or the pattern is no regular expression.
    """
    sides: tuple[list[SourceFile], list[SourceFile]] = ([], [])
    for file in files:
        sides[_place_of(_group_of(file, recipe)) < recipe.held_out_share].append(file)
    training, held_out = sides
    if not held_out:
        raise ConfigError(
            f"None of {len(files)} files would be held out with data.held_out_share = "
            f"{recipe.held_out_share:g}: give more files or raise the share."
        )
    if not training:
        raise ConfigError(
            f"All {len(files)} files would be held out with data.held_out_share = "
            f"{recipe.held_out_share:g}: give more files or lower the share."
        )
    return Sources(tuple(training), tuple(held_out))


def _group_of(file: SourceFile, recipe: DataRecipe) -> str:
    if recipe.speaker_pattern is not None:
        try:
            match = re.search(recipe.speaker_pattern, file.uri)
        except re.error as error:
            raise ConfigError(
                f"data.speaker_pattern {recipe.speaker_pattern!r} is no regular expression: "
                f"{error}."
            ) from error
        if match is not None:
            return match.group(match.re.groups and 1)
    # A folder that moved must split as before: only the name counts.
    return file.speaker or file.uri.rpartition("/")[2]


def _place_of(group: str) -> float:
    digest = hashlib.sha256(f"held-out\n{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def write_sources(storage: Storage, uri: str, files: Sequence[SourceFile]) -> None:
    """Pin a list of files."""
    rows = [file.__dict__ for file in files]
    write_table(storage, uri, pa.Table.from_pylist(rows, _SCHEMA))


def read_sources(storage: Storage, uri: str) -> list[SourceFile]:
    """A pinned list of files. Raises ``ObjectMissingError``."""
    return [SourceFile(**row) for row in read_table(storage, uri).to_pylist()]
