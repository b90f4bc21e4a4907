from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from hcodec_core.cli import main
from hcodec_core.dataset.backup import TableRestore, restore_from_storage
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.table import MAIN, RefChange, load_table
from hcodec_core.dataset.versions import list_versions, version_record
from hcodec_core.errors import ConfigError
from tests.dataset.factories import World
from tests.dataset.postgres import PostgresWorld, programs


def rows(world: World, version: str = "latest") -> list[str]:
    found = open_dataset(world.config, "demo", version).to_arrow(["uri"])["uri"].to_pylist()
    return sorted(uri.removeprefix(world.source_uri) for uri in found)


def versions(world: World) -> list[str]:
    return [version.version for version in list_versions(world.layout)]


def catalog_path(world: World) -> Path:
    return world.local_path / "catalog.db"


def restore(world: World, *chosen: str, dry_run: bool = False) -> TableRestore:
    (table,) = restore_from_storage(world.config, world.storage, chosen, dry_run=dry_run)
    return table


def one_version_and_a_backup(world: World) -> Path:
    """v1, and the catalog as docs/backup.md copies it."""
    world.put("a.wav", "b.wav")
    world.version()
    backup = world.local_path / "backup.db"
    with closing(sqlite3.connect(catalog_path(world))) as source:
        source.execute("VACUUM INTO ?", [str(backup)])
    return backup


def another_version_and_a_loss(world: World, backup: Path) -> None:
    """v2 after the backup, then the catalog is lost and the backup put in its place."""
    world.put("c.wav")
    world.delete("a.wav")
    world.version(max_delete_share=0.9)
    catalog_path(world).unlink()
    shutil.copy(backup, catalog_path(world))
    assert versions(world) == ["v1"]


def test_an_outdated_catalog_is_brought_up_to_date(local_world: World) -> None:
    backup = one_version_and_a_backup(local_world)
    another_version_and_a_loss(local_world, backup)
    planned = restore(local_world, dry_run=True)
    assert (planned.is_changed, planned.versions) == (True, ["v1", "v2"])
    assert versions(local_world) == ["v1"]
    assert restore(local_world) == planned
    assert versions(local_world) == ["v1", "v2"]
    assert (rows(local_world), rows(local_world, "v1")) == (["b.wav", "c.wav"], ["a.wav", "b.wav"])
    assert local_world.plan().is_empty
    assert not restore(local_world).is_changed
    local_world.put("d.wav")
    assert local_world.version().version == "v3"


def test_work_goes_on_from_an_older_catalog(local_world: World) -> None:
    """What the lost version held is planned again, taken over from its results, and held once."""
    backup = one_version_and_a_backup(local_world)
    another_version_and_a_loss(local_world, backup)
    plan = local_world.plan(max_delete_share=0.9)
    assert plan.num_files == 1
    info = local_world.commit(plan)  # its workers' results are still there
    record = local_world.publish(plan, info)
    assert (record.version, record.snapshot_id) == ("v2", info.snapshot_id)
    assert version_record(local_world.storage, local_world.layout, "v2") == record
    assert rows(local_world) == ["b.wav", "c.wav"]
    assert local_world.plan().is_empty
    # The catalog is in use: what it points to is not taken back for the lost one.
    assert not restore(local_world).is_changed


def test_a_catalog_without_a_backup_is_made_again(local_world: World) -> None:
    local_world.put("a.wav")
    local_world.version()
    local_world.put("b.wav")
    local_world.version()
    catalog_path(local_world).unlink()
    assert restore(local_world).previous_uri == ""
    assert versions(local_world) == ["v1", "v2"]
    assert rows(local_world) == ["a.wav", "b.wav"]


def metadata_path(world: World) -> Path:
    return Path(load_table(world.layout).metadata_location.removeprefix("file://"))


def test_the_newest_is_told_by_content(local_world: World) -> None:
    """Neither a loser that wrote later, nor half a file, nor touched old ones are taken."""
    local_world.put("a.wav")
    local_world.version()
    before = metadata_path(local_world)
    local_world.put("b.wav")
    local_world.version()
    newest = metadata_path(local_world)
    loser = before.with_name(before.name.replace(before.name[6:14], "ffffffff"))
    shutil.copy(before, loser)
    half = newest.with_name("99999-half.metadata.json")
    half.write_bytes(newest.read_bytes()[:300])
    for number, path in enumerate((newest, half, before, loser)):
        os.utime(path, (2_000_000_000 + number, 2_000_000_000 + number))
    catalog_path(local_world).unlink()
    assert restore(local_world).metadata_uri == f"file://{newest}"
    assert versions(local_world) == ["v1", "v2"]


def forged_sibling(path: Path, change: dict[str, object]) -> Path:
    """Another file with the same predecessor, as the loser of the very last race leaves it."""
    document = json.loads(path.read_text())
    document["refs"] = {**document["refs"], **change}
    sibling = path.with_name(path.name.replace(path.name[6:14], "00000000"))
    sibling.write_text(json.dumps(document))
    return sibling


def test_where_nothing_decides_a_person_does(local_world: World) -> None:
    local_world.put("a.wav")
    first = local_world.version()
    local_world.put("b.wav")
    local_world.version()
    table = load_table(local_world.layout)
    RefChange(table).set_branch(MAIN, first.snapshot_id).commit()  # by somebody else's tool
    newest = metadata_path(local_world)
    sibling = forged_sibling(
        newest, {"main": {"snapshot-id": table.refs()["v2"].snapshot_id, "type": "branch"}}
    )
    catalog_path(local_world).unlink()
    with pytest.raises(ConfigError, match=rf"{sibling.name}.*--metadata-uri"):
        restore(local_world)
    restore(local_world, f"file://{newest}")
    assert metadata_path(local_world) == newest


def test_a_race_over_an_unpublished_branch_needs_nobody(local_world: World) -> None:
    local_world.put("a.wav")
    record = local_world.version()
    forged_sibling(
        metadata_path(local_world),
        {"audit_x": {"snapshot-id": record.snapshot_id, "type": "branch"}},
    )
    catalog_path(local_world).unlink()
    restore(local_world)
    assert versions(local_world) == ["v1"]


def test_a_postgresql_catalog_is_dumped_and_restored(
    local_world: World, postgres_uri: str, tmp_path: Path
) -> None:
    world = PostgresWorld(
        local_world.root_uri, tmp_path, local_world.storage, catalog_uri=postgres_uri
    )
    server = "postgresql://" + postgres_uri.partition("://")[2]
    found = programs()
    world.put("a.wav")
    world.version()
    dump = tmp_path / "catalog.sql"
    command = [found["pg_dump"], "--clean", "--if-exists", "--file", str(dump), server]
    subprocess.run(command, check=True, timeout=120)
    world.put("b.wav")
    world.version()
    psql = [found["psql"], "--quiet", "--set", "ON_ERROR_STOP=1", server]
    lose = "DROP TABLE iceberg_tables; DROP TABLE iceberg_namespace_properties;"
    subprocess.run([*psql, "--command", lose], check=True, timeout=120)
    subprocess.run([*psql, "--file", str(dump)], check=True, timeout=120, capture_output=True)
    assert versions(world) == ["v1"]
    assert restore(world).is_changed
    assert versions(world) == ["v1", "v2"]
    assert rows(world) == ["a.wav", "b.wav"]


def test_the_command_says_first_what_it_then_does(
    local_world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    local_world.put("a.wav")
    local_world.version()
    config_path = local_world.local_path / "hcodec.toml"
    root = local_world.root_uri
    config_path.write_text(
        f'[access]\nsource_prefixes = ["{root}/audio/"]\ndestination_prefixes = ["{root}/out/"]\n'
        f'[catalog]\nuri = "{local_world.config.catalog.uri}"\n'
        f'warehouse_uri = "{root}/out/warehouse"\n[work]\nwork_uri = "{root}/out/work"\n'
    )
    catalog_path(local_world).unlink()
    command = ["catalog", "restore", "--config", str(config_path)]
    assert main(command) == 43
    assert "docs/backup.md" in capsys.readouterr().err
    assert main([*command, "--from-storage"]) == 0
    assert "to restore" in capsys.readouterr().out
    assert main([*command, "--from-storage", "--apply"]) == 0
    assert "v1" in capsys.readouterr().out
    assert versions(local_world) == ["v1"]
