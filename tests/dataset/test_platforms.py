"""The table as other engines see it, without this package: DuckDB, Polars, Spark, two catalogs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import polars
import pyarrow.parquet as pq
import pytest

from hcodec_core.config import Config
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.schema import columns_of
from hcodec_core.dataset.table import load_table, open_catalog
from hcodec_core.dataset.versions import list_versions, rollback
from hcodec_core.errors import CommitConflictError
from tests.dataset.factories import World
from tests.dataset.postgres import PostgresWorld
from tests.dataset.spark import VERSION, SparkMissingError, find_spark, read_with_spark

FIELDS = ("uri", "num_frames", "semantic", "acoustic", "metadata")
# Names of column kinds in Spark, where they are others.
SPARK_KINDS = {"long": "bigint", "list<int>": "array<int>"}


@pytest.fixture
def filled(local_world: World) -> World:
    return fill(local_world)


def fill(world: World) -> World:
    """Two versions; in the second one object is gone and another is new."""
    world.put("a.wav", "b.wav", "c.wav")
    world.version()
    world.delete("a.wav")
    world.put("d.wav")
    world.version(max_delete_share=0.9)
    return world


def truth(world: World, version: str = "latest") -> list[dict[str, object]]:
    rows = open_dataset(world.config, "demo", version).to_arrow(list(FIELDS)).to_pylist()
    return sorted(rows, key=lambda row: str(row["uri"]))


def data_paths(world: World, version: str) -> list[str]:
    """Parquet files of a version as pyiceberg lists them."""
    table = load_table(world.layout)
    ref = table.refs()[version]
    tasks = table.scan(snapshot_id=ref.snapshot_id).plan_files()
    return [task.file.file_path.removeprefix("file://") for task in tasks]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_duckdb_reads_the_files_of_a_version(filled: World, version: str) -> None:
    rows = duckdb.execute(
        f"SELECT {', '.join(FIELDS)} FROM read_parquet(?) ORDER BY uri",
        [data_paths(filled, version)],
    ).fetchall()
    expected = truth(filled, version)
    assert len(rows) == 3
    for row, known in zip(rows, expected, strict=True):
        assert row[:4] == tuple(known[name] for name in FIELDS[:4])
    (num_codes,) = duckdb.execute(
        "SELECT sum(len(acoustic)) FROM read_parquet(?)", [data_paths(filled, version)]
    ).fetchall()[0]
    assert num_codes == sum(len(row["acoustic"]) for row in expected)


def test_polars_reads_the_iceberg_table(filled: World) -> None:
    table = load_table(filled.layout)
    for version in ("v1", "v2"):
        snapshot_id = table.refs()[version].snapshot_id
        frame = polars.scan_iceberg(table, snapshot_id=snapshot_id)
        found = frame.select("uri", "num_frames", "acoustic").sort("uri").collect().to_dicts()
        wanted = [
            {name: row[name] for name in ("uri", "num_frames", "acoustic")}
            for row in truth(filled, version)
        ]
        assert found == wanted


def test_polars_finds_the_table_by_its_metadata_alone(filled: World) -> None:
    location = load_table(filled.layout).metadata_location
    frame = polars.scan_iceberg(location).filter(polars.col("num_frames") > 0)
    assert frame.select(polars.len()).collect().item() == 3


def test_arrow_reads_the_files(filled: World) -> None:
    tables = [pq.read_table(path, columns=list(FIELDS)) for path in data_paths(filled, "v2")]
    rows = sorted((row for t in tables for row in t.to_pylist()), key=lambda row: row["uri"])
    assert rows == truth(filled, "v2")


@pytest.mark.slow
def test_spark_reads_the_files_of_a_version(filled: World) -> None:
    try:
        packages = find_spark()
    except SparkMissingError as missing:
        pytest.skip(str(missing))
    paths = {version: data_paths(filled, version) for version in ("v1", "v2")}
    found = read_with_spark(packages, paths, FIELDS)
    assert found["spark"] == VERSION
    for version in paths:
        seen, expected = found["versions"][version], truth(filled, version)
        assert seen["rows"] == expected
        assert [row["uri"] for row in expected] == [
            filled.uri(f"{n}.wav") for n in {"v1": "abc", "v2": "bcd"}[version]
        ]
        codes = [code for row in expected for code in row["acoustic"]]
        assert seen["sums"] == {"rows": 3, "codes": len(codes), "sum_of_codes": sum(codes)}
        kinds = {column.name: column.kind for column in columns_of(filled.manifest)}
        assert seen["schema"] == {name: SPARK_KINDS.get(k, k) for name, k in kinds.items()}


def test_a_new_catalog_may_be_opened_by_many_at_once(local_world: World, tmp_path: Path) -> None:
    """All find a database without tables, and all make them."""
    num_openers = 8
    with ThreadPoolExecutor(num_openers) as pool:
        for round_ in range(5):
            uri = f"sqlite:///{tmp_path}/new-{round_}/catalog.db"
            config = local_world.config.model_copy(
                update={"catalog": local_world.config.catalog.model_copy(update={"uri": uri})}
            )
            barrier = threading.Barrier(num_openers)

            def open_it(config: Config = config, barrier: threading.Barrier = barrier) -> object:
                barrier.wait(timeout=60)
                return open_catalog(config).list_namespaces()

            found = [pool.submit(open_it) for _ in range(num_openers)]
            assert [future.result(timeout=120) for future in found] == [[]] * num_openers


def test_a_postgresql_catalog_keeps_versions(
    local_world: World, postgres_uri: str, tmp_path: Path
) -> None:
    world = PostgresWorld(
        local_world.root_uri, tmp_path, local_world.storage, catalog_uri=postgres_uri
    )
    fill(world)
    assert [v.version for v in list_versions(world.layout)] == ["v1", "v2"]
    assert [row["uri"] for row in truth(world)] == [world.uri(f"{n}.wav") for n in "bcd"]
    rollback(world.layout, "v1", "test")
    assert [row["uri"] for row in truth(world)] == [world.uri(f"{n}.wav") for n in "abc"]
    assert not (tmp_path / "catalog.db").exists()
    _check_race(world)


def _check_race(world: World) -> None:
    """Two publishers from one base: PostgreSQL lets one win, the other is told."""
    world.put("e.wav")
    first = world.plan(num_shards=1)
    world.put("f.wav")
    second = world.plan(num_shards=1)
    committed = []
    for plan in (first, second):
        world.work(plan)
        committed.append(world.commit(plan))
    world.publish(first, committed[0])
    with pytest.raises(CommitConflictError):
        world.publish(second, committed[1])
    world.publish(second, world.commit(second))
    uris = [row["uri"] for row in truth(world)]
    assert uris.count(world.uri("e.wav")) == uris.count(world.uri("f.wav")) == 1
