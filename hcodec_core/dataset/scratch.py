"""A DuckDB file for what grows with the number of files: it spills to disk, memory is bounded."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

DEFAULT_MEMORY_BYTES = 1 << 30


def open_scratch(work_path: Path, name: str, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> Any:
    """Open an empty database in a work folder, which the caller removes."""
    import duckdb

    path = work_path / f"{name}.duckdb"
    path.unlink(missing_ok=True)  # left by a try that was killed
    database = duckdb.connect(str(path))
    for option, value in {
        "autoinstall_known_extensions": "false",  # they would be looked for on the network
        "autoload_known_extensions": "false",
        "memory_limit": f"'{memory_bytes // 1000} KB'",
        "preserve_insertion_order": "false",
    }.items():
        database.execute(f"SET {option} = {value}")
    database.execute("SET temp_directory = ?", [str(work_path / "spill")])
    return database


def insert(database: Any, table: str, values: pa.Table, columns: str = "*") -> None:
    """Append ``columns`` (SQL over the values) to a table, by name."""
    if not values.num_rows:
        return
    database.register("incoming", values)
    database.execute(f"INSERT INTO {table} BY NAME SELECT {columns} FROM incoming")
    database.unregister("incoming")


def add_view(database: Any, name: str, path: Path) -> None:
    """Let queries read a local Parquet file as a table."""
    quoted = str(path).replace("'", "''")
    database.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{quoted}')")


class ScratchTable:
    """Rows on their way into a Parquet file, a view on which appears when the block ends.

    For tables that are only ever appended to and then read: much cheaper than ``insert``.
    """

    _HELD_ROWS = 1 << 16

    def __init__(self, database: Any, name: str, work_path: Path, schema: pa.Schema) -> None:
        """Open a file for table ``name`` in ``work_path``."""
        self._database = database
        self._name = name
        self._path = work_path / f"{name}.scratch.parquet"
        self._schema = schema
        self._held: list[pa.Table] = []
        # Names and ids hardly repeat: dictionaries would cost and save nothing.
        self._writer = pq.ParquetWriter(
            self._path, schema, compression="lz4", use_dictionary=False, write_statistics=False
        )

    def add(self, values: pa.Table) -> None:
        """Append rows; columns are taken by name."""
        self._held.append(values.select(self._schema.names).cast(self._schema))
        if sum(map(len, self._held)) >= self._HELD_ROWS:
            self._flush()

    def __enter__(self) -> Self:
        """The table itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file; the view appears unless something went wrong."""
        if error is None:
            self._flush()
        self._writer.close()
        if error is None:
            add_view(self._database, self._name, self._path)

    def _flush(self) -> None:
        if self._held:
            rows = pa.concat_tables(self._held)
            self._writer.write_table(rows, row_group_size=max(1, len(rows)))
            self._held.clear()
