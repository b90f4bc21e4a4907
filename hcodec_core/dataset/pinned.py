"""Pinning a version: which files a reader will read, and which of their rows, once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hcodec_core.config import Config, load_config
from hcodec_core.dataset.table import catalog_errors, find_layout, load_table
from hcodec_core.dataset.tabular import each
from hcodec_core.dataset.versions import resolve_version
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import CodecManifest

if TYPE_CHECKING:
    from pyiceberg.table import FileScanTask, Table

_ROW_COLUMN = "__row"
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Snapshot:
    """The files of a pinned version. ``matches``: rows that pass the filter, None for all."""

    config: Config
    manifest: CodecManifest
    version: str
    snapshot_id: int
    uris: tuple[str, ...]
    num_rows: tuple[int, ...]
    matches: tuple[Rows, ...] | None


def pin_snapshot(
    config: Config | Path | str,
    name: str,
    version: str = "latest",
    encode_id: str | None = None,
    row_filter: str | None = None,
) -> Snapshot:
    """Find the files of a version, and with a filter the rows of them that match.

    The columns of the filter are read from every file that its statistics do not rule out.
    """
    config = config if isinstance(config, Config) else load_config(Path(config))
    table = load_table(find_layout(config, name, encode_id))
    resolved, snapshot_id = resolve_version(table, version)
    tasks = _tasks(table, snapshot_id, row_filter)
    matches = None if row_filter is None else _matches(table, snapshot_id, tasks, row_filter)
    return Snapshot(
        config=config,
        manifest=CodecManifest.model_validate_json(table.properties["hcodec.codec"]),
        version=resolved,
        snapshot_id=snapshot_id,
        uris=tuple(task.file.file_path for task in tasks),
        num_rows=tuple(task.file.record_count for task in tasks)
        if matches is None
        else tuple(len(rows) for rows in matches),
        matches=matches,
    )


def _tasks(table: Table, snapshot_id: int, row_filter: str | None) -> list[FileScanTask]:
    from pyparsing import ParseException

    with catalog_errors("listing the files of a version"):
        try:
            scan = table.scan(snapshot_id=snapshot_id)
            scan = scan if row_filter is None else scan.filter(row_filter)
            tasks = list(scan.plan_files())
        except (ValueError, TypeError, ParseException) as error:
            raise _bad_filter(row_filter, error) from error
    if any(task.delete_files for task in tasks):
        raise ConfigError(
            f"Snapshot {snapshot_id} has delete files of another writer: rewrite them first."
        )
    return sorted(tasks, key=lambda task: task.file.file_path)


def _bad_filter(row_filter: str | None, error: Exception) -> ConfigError:
    reason = str(error).partition("\n")[0][:200]
    return ConfigError(
        f"The row filter {row_filter!r} cannot be used ({reason}): write a comparison of columns "
        "such as duration_seconds > 1."
    )


def _matches(
    table: Table, snapshot_id: int, tasks: list[FileScanTask], row_filter: str
) -> tuple[Rows, ...]:
    from pyiceberg.expressions.parser import parse
    from pyiceberg.expressions.visitors import bind, extract_field_ids
    from pyiceberg.io.pyarrow import expression_to_pyarrow

    schema = table.scan(snapshot_id=snapshot_id).projection()
    bound = bind(schema, parse(row_filter), case_sensitive=True)
    wanted = expression_to_pyarrow(bound)
    names = tuple(str(schema.find_column_name(i)) for i in sorted(extract_field_ids(bound)))

    def rows_of(task: FileScanTask) -> Rows:
        return _matching_rows(table, snapshot_id, task, names, wanted)

    return tuple(each(rows_of, tasks))


def _matching_rows(
    table: Table, snapshot_id: int, task: FileScanTask, names: tuple[str, ...], wanted: Any
) -> Rows:
    from pyarrow import dataset
    from pyiceberg.expressions import AlwaysTrue
    from pyiceberg.io.pyarrow import ArrowScan
    from pyiceberg.table import FileScanTask

    with catalog_errors("reading the columns of a filter"):
        scan = table.scan(snapshot_id=snapshot_id, selected_fields=names)
        reader = ArrowScan(table.metadata, table.io, scan.projection(), AlwaysTrue())
        task = FileScanTask(task.file, residual=AlwaysTrue())
        values = reader.to_table([task])
    rows = values.append_column(_ROW_COLUMN, pa.array(np.arange(len(values))))
    found = dataset.dataset(rows).to_table(columns=[_ROW_COLUMN], filter=wanted)
    return np.sort(found[_ROW_COLUMN].to_numpy())
