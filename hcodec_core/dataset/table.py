"""The Iceberg table of one dataset: opening, making and changing it.

A new table starts with an empty root snapshot, so that ``main`` always exists: pyiceberg makes a
branch of a table without snapshots from nothing, and cannot commit to one.

All changes go through ``commit_snapshot`` and ``commit_refs``, which never retry by themselves:
pyiceberg's own retry would write the same files again on top of a commit that it did not see, and
its transactions keep only the first of several requirements on refs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hcodec_core.config import Config
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.ledger import last_change
from hcodec_core.dataset.schema import METRICS_PROPERTIES, token_schema
from hcodec_core.errors import CommitConflictError, ConfigError, HCodecError, StorageError
from hcodec_core.jobs import TokenizeJob

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table
    from pyiceberg.table.refs import SnapshotRef

logger = logging.getLogger(__name__)

MAIN = "main"
ROOT_PROPERTY = "hcodec.root-snapshot-id"
_CATALOG_NAME = "hcodec"
_TRIES = 20
# What sqlite and PostgreSQL say when somebody else made a table first.
_MADE_MEANWHILE = ("already exists", "duplicate key")


def open_catalog(config: Config) -> Catalog:
    """Connect to the configured catalog.

    Raises ``ConfigError`` for a URI that pyiceberg has no catalog for, ``StorageError`` when the
    catalog does not answer.
    """
    from pyiceberg.catalog import load_catalog

    uri = config.catalog.uri
    scheme = uri.partition("://")[0]
    kinds = {"sqlite": "sql", "postgresql": "sql", "http": "rest", "https": "rest"}
    kind = kinds.get(scheme.partition("+")[0])
    if kind is None:
        raise ConfigError(
            f"No catalog for a URI that starts with {scheme!r}: use sqlite, postgresql, http or "
            "https in catalog.uri of the configuration."
        )
    if scheme == "sqlite" and uri.startswith("sqlite:////"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with catalog_errors("opening the catalog"):
        return _connect(
            lambda: load_catalog(_CATALOG_NAME, type=kind, uri=uri, **_properties(config))
        )


def _connect(load: Callable[[], Catalog]) -> Catalog:
    """Open it; a new database may get its tables from another process at the same instant."""
    from sqlalchemy.exc import DBAPIError

    for _ in range(_TRIES):
        try:
            return load()
        except DBAPIError as error:
            if not any(words in str(error.orig) for words in _MADE_MEANWHILE):
                raise
    return load()


def load_file_io(config: Config) -> Any:
    """Random access to objects, with the catalog's settings (a ``pyiceberg.io.FileIO``)."""
    from pyiceberg.io import load_file_io as load

    return load(_properties(config))


def _properties(config: Config) -> dict[str, str]:
    properties = {
        "warehouse": config.catalog.warehouse_uri,
        "py-io-impl": "pyiceberg.io.pyarrow.PyArrowFileIO",
        "s3.region": config.storage.region,
        # As patient as the other clients; Arrow by itself gives a request 3 seconds.
        "s3.connect-timeout": "10",
        "s3.request-timeout": "60",
    }
    if config.storage.endpoint_url is not None:
        properties["s3.endpoint"] = config.storage.endpoint_url
    return properties | config.catalog.properties


@contextmanager
def catalog_errors(action: str) -> Iterator[None]:
    """Turn errors of pyiceberg, its database and its file access into ours."""
    from pyiceberg.exceptions import CommitFailedException, NoSuchTableError, RESTError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except HCodecError:
        raise
    except CommitFailedException as error:
        raise CommitConflictError(f"Another writer was first while {action}: {error}.") from error
    except NoSuchTableError as error:
        raise ConfigError(f"There is no such table while {action}: {error}.") from error
    except (RESTError, SQLAlchemyError, OSError) as error:
        raise StorageError(
            f"The catalog or its storage failed while {action}: {type(error).__name__}; try again."
        ) from error


def find_table(layout: DatasetLayout) -> Table | None:
    """The dataset's table as it is now, or None when nothing was ever committed to it."""
    from pyiceberg.exceptions import NoSuchTableError

    catalog = open_catalog(layout.config)
    with catalog_errors(f"loading {layout.table_name}"):
        try:
            table = catalog.load_table(layout.table_identifier)
        except NoSuchTableError:
            return None
    _check_identity(table, layout)
    return table if main_snapshot_id(table) is not None else None


def find_layout(config: Config, dataset: str, encode_id: str | None = None) -> DatasetLayout:
    """The one table of a dataset, of several the one whose ``encode_id`` begins so.

    Without ``encode_id``, of several the one that was published last. Raises ``ConfigError`` when
    there is none, or more than one begins so.
    """
    found = _tables_of(config, dataset)
    if not found:
        names = ", ".join(dataset_names(config)) or "none yet"
        raise ConfigError(f"There is no dataset {dataset!r} in this catalog; datasets: {names}.")
    known = {table.properties["hcodec.encode-id"]: table for table in found}
    fitting = [name for name in sorted(known) if name.startswith(encode_id or "")]
    if not fitting or (encode_id and len(fitting) > 1):
        names = ", ".join(name[:12] for name in sorted(known))
        raise ConfigError(
            f"No single encode id of dataset {dataset!r} begins with {encode_id!r}: its encode ids "
            f"are {names}."
        )
    return DatasetLayout(config, dataset, max(fitting, key=lambda n: last_change(known[n])))


def find_layouts(config: Config, dataset: str) -> list[DatasetLayout]:
    """All tables of a dataset, one per encode id."""
    ids = [table.properties["hcodec.encode-id"] for table in _tables_of(config, dataset)]
    return [DatasetLayout(config, dataset, encode_id) for encode_id in sorted(ids)]


def dataset_names(config: Config) -> list[str]:
    """Names of all datasets that have a table."""
    return sorted(
        {name[-1].partition("__")[0] for name in _table_names(open_catalog(config), config)}
    )


def _tables_of(config: Config, dataset: str) -> list[Table]:
    catalog = open_catalog(config)
    wanted = [n for n in _table_names(catalog, config) if n[-1].startswith(f"{dataset}__")]
    with catalog_errors("listing tables"):
        tables = [catalog.load_table(name) for name in wanted]
    return [table for table in tables if "hcodec.encode-id" in table.properties]


def _table_names(catalog: Catalog, config: Config) -> list[tuple[str, ...]]:
    from pyiceberg.exceptions import NoSuchNamespaceError

    with catalog_errors("listing tables"):
        try:
            return list(catalog.list_tables(config.catalog.namespace))
        except NoSuchNamespaceError:
            return []


def load_table(layout: DatasetLayout) -> Table:
    """Like ``find_table``. Raises ``ConfigError`` when there is no table."""
    table = find_table(layout)
    if table is None:
        raise ConfigError(
            f"Dataset {layout.dataset} has no tokens of encode id {layout.encode_id[:12]} yet: "
            "check the name, or tokenise it first."
        )
    return table


def _check_identity(table: Table, layout: DatasetLayout) -> None:
    held = table.properties.get("hcodec.encode-id")
    if held != layout.encode_id:
        raise ConfigError(
            f"Table {layout.table_name} holds encode id {held}, not {layout.encode_id}: it is not "
            "this dataset's table."
        )


def ensure_table(layout: DatasetLayout, job: TokenizeJob) -> Table:
    """The dataset's table, made with an empty root snapshot when there is none."""
    for _ in range(_TRIES):
        table = find_table(layout)
        if table is not None:
            return table
        try:
            _make_table(layout, job)
        except CommitConflictError:
            logger.info("another process made table %s", layout.table_name)
    raise CommitConflictError(f"Table {layout.table_name} could not be made; try again.")


def _make_table(layout: DatasetLayout, job: TokenizeJob) -> None:
    from pyiceberg.exceptions import TableAlreadyExistsError

    catalog = open_catalog(layout.config)
    with catalog_errors(f"making table {layout.table_name}"):
        _ensure_namespace(catalog, layout.config.catalog.namespace)
        try:
            table = catalog.create_table(
                layout.table_identifier,
                schema=token_schema(job.manifest),
                location=layout.table_uri,
                properties=_table_properties(job),
            )
        except TableAlreadyExistsError:
            table = catalog.load_table(layout.table_identifier)
        if main_snapshot_id(table) is not None:
            return
        transaction = table.transaction()
        root = transaction.update_snapshot().fast_append()
        root.commit()
        transaction.set_properties({ROOT_PROPERTY: str(root.snapshot_id)})
        transaction.commit_transaction()


def _ensure_namespace(catalog: Catalog, namespace: str) -> None:
    """Make the namespace; another process may make it after the catalog has looked for it."""
    from sqlalchemy.exc import IntegrityError

    try:
        catalog.create_namespace_if_not_exists(namespace)
    except IntegrityError:
        if not catalog.namespace_exists(namespace):
            raise


def _table_properties(job: TokenizeJob) -> dict[str, str]:
    return {
        "format-version": "2",
        "write.parquet.compression-codec": "zstd",
        **METRICS_PROPERTIES,
        # See the module's docstring; foreign writers of this table inherit it.
        "commit.retry.num-retries": "0",
        "hcodec.dataset": job.dataset,
        "hcodec.encode-id": job.encode_id,
        "hcodec.codebook-id": job.manifest.parts.codebooks,
        "hcodec.codec-digest": job.manifest.digest,
        "hcodec.codec": json.dumps(job.manifest.model_dump(mode="json")),
        "hcodec.settings": json.dumps(job.settings.model_dump(mode="json")),
    }


def main_snapshot_id(table: Table) -> int | None:
    """Snapshot that readers see."""
    ref = table.refs().get(MAIN)
    return None if ref is None else int(ref.snapshot_id)


def root_snapshot_id(table: Table) -> int:
    """The empty snapshot that the table began with."""
    return int(table.properties[ROOT_PROPERTY])


def refs_of(table: Table) -> dict[str, SnapshotRef]:
    """Branches and tags by name."""
    return dict(table.refs())


def held_objects(table: Table, snapshot_id: int) -> pa.Table:
    """``uri`` and ``etag`` of every row of a snapshot."""
    with catalog_errors("reading the objects of a snapshot"):
        scan = table.scan(snapshot_id=snapshot_id, selected_fields=("uri", "etag"))
        return scan.to_arrow().select(["uri", "etag"])


def data_files(table: Table, snapshot_id: int) -> list[DataFile]:
    """Live data files of a snapshot."""
    with catalog_errors("reading the files of a snapshot"):
        scan = table.scan(snapshot_id=snapshot_id)
        return [task.file for task in scan.plan_files()]


class SnapshotChange:
    """One new snapshot on a new branch, together with table properties.

    ``base_snapshot_id`` is where the branch starts. Nothing is visible before ``commit``.
    """

    def __init__(self, table: Table, branch: str, base_snapshot_id: int) -> None:
        """Stage the branch; commit will require that it does not exist."""
        from pyiceberg.table.update.snapshot import ManageSnapshots

        self._table = table
        self._transaction = table.transaction()
        ManageSnapshots(self._transaction).create_branch(base_snapshot_id, branch).commit()
        self._branch = branch

    def stage(
        self, added: Sequence[DataFile], removed: Sequence[DataFile], summary: Mapping[str, str]
    ) -> int:
        """Stage the snapshot and return its id. ``removed`` files are swapped out whole."""
        update = self._transaction.update_snapshot(dict(summary), self._branch)
        producer: Any = update.overwrite() if removed else update.fast_append()
        for file in added:
            producer.append_data_file(file)
        for file in removed:
            producer.delete_data_file(file)
        producer.commit()
        return int(producer.snapshot_id)

    def remove_branch(self, branch: str) -> None:
        """Stage the removal of another branch."""
        from pyiceberg.table.update.snapshot import ManageSnapshots

        ManageSnapshots(self._transaction).remove_branch(branch).commit()

    def commit(self, properties: Mapping[str, str]) -> None:
        """Commit branch, snapshot and ``properties`` as one. Raises ``CommitConflictError``."""
        with catalog_errors(f"committing to branch {self._branch}"):
            self._transaction.set_properties(dict(properties))
            self._transaction.commit_transaction()


def write_detached(
    table: Table, snapshots: Mapping[str, Sequence[DataFile]], summary: Mapping[str, str]
) -> None:
    """Write snapshots without a past, each on a new branch with just these files.

    Their manifests name no other file, not even as deleted. Raises ``CommitConflictError`` when a
    branch of that name exists.
    """
    with catalog_errors("writing snapshots without a past"):
        transaction = table.transaction()
        for branch, files in snapshots.items():
            # A branch that does not exist begins with nothing: for once that is what is wanted.
            producer: Any = transaction.update_snapshot(dict(summary), branch).fast_append()
            for file in files:
                producer.append_data_file(file)
            producer.commit()
        transaction.commit_transaction()


class RefChange:
    """Changes of refs and properties in one metadata commit, each under its own requirement."""

    def __init__(self, table: Table) -> None:
        """Start with nothing but the requirement that it is the same table."""
        from pyiceberg.table.update import AssertTableUUID

        self._table = table
        self._updates: list[Any] = []
        self._requirements: list[Any] = [AssertTableUUID(uuid=table.metadata.table_uuid)]

    def require(self, ref: str, snapshot_id: int | None) -> RefChange:
        """Require that ``ref`` is at ``snapshot_id`` (None: that it does not exist)."""
        from pyiceberg.table.update import AssertRefSnapshotId

        self._requirements.append(
            AssertRefSnapshotId.model_validate({"ref": ref, "snapshot-id": snapshot_id})
        )
        return self

    def set_branch(self, name: str, snapshot_id: int) -> RefChange:
        """Move or make a branch."""
        return self._set(name, snapshot_id, "branch")

    def move(self, name: str, snapshot_id: int) -> RefChange:
        """Move an existing branch or tag, required to be where it is now; its kind stays."""
        ref = self._table.refs()[name]
        self.require(name, ref.snapshot_id)
        return self._set(name, snapshot_id, str(ref.snapshot_ref_type.value))

    def create_tag(self, name: str, snapshot_id: int) -> RefChange:
        """Make a tag; an existing one is never moved."""
        return self.require(name, None)._set(name, snapshot_id, "tag")

    def remove(self, name: str) -> RefChange:
        """Remove a ref, if there is one."""
        from pyiceberg.table.update import RemoveSnapshotRefUpdate

        if name in self._table.refs():
            self._updates.append(RemoveSnapshotRefUpdate.model_validate({"ref-name": name}))
        return self

    def set_properties(self, properties: Mapping[str, str]) -> RefChange:
        """Set table properties."""
        from pyiceberg.table.update import SetPropertiesUpdate

        if properties:
            self._updates.append(SetPropertiesUpdate(updates=dict(properties)))
        return self

    def remove_properties(self, names: Sequence[str]) -> RefChange:
        """Remove table properties."""
        from pyiceberg.table.update import RemovePropertiesUpdate

        if names:
            self._updates.append(RemovePropertiesUpdate(removals=list(names)))
        return self

    def forget(self, snapshot_ids: Sequence[int]) -> RefChange:
        """Remove snapshots, which no ref may name then."""
        from pyiceberg.table.update import RemoveSnapshotsUpdate

        if snapshot_ids:
            ids = {"snapshot-ids": list(snapshot_ids)}
            self._updates.append(RemoveSnapshotsUpdate.model_validate(ids))
        return self

    def commit(self) -> None:
        """Commit all of it or nothing. Raises ``CommitConflictError``."""
        with catalog_errors("changing refs"):
            self._table.catalog.commit_table(
                self._table, tuple(self._requirements), tuple(self._updates)
            )

    def _set(self, name: str, snapshot_id: int, kind: str) -> RefChange:
        from pyiceberg.table.update import SetSnapshotRefUpdate

        ref = {"ref-name": name, "type": kind, "snapshot-id": snapshot_id}
        self._updates.append(SetSnapshotRefUpdate.model_validate(ref))
        return self
