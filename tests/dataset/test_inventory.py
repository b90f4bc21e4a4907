from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hcodec_core.dataset.inventory import (
    normalise_sources,
    read_inventory,
    read_inventory_info,
    take_inventory,
)
from hcodec_core.errors import AccessError, ConfigError, StorageError
from hcodec_core.storage import ObjectInfo, join_uri
from tests.dataset.factories import World


def uris(world: World, inventory_uri: str) -> list[str]:
    info = read_inventory_info(world.storage, inventory_uri)
    found: list[str] = read_inventory(world.storage, info)["uri"].to_pylist()
    return found


def test_lists_every_object_with_its_facts(world: World) -> None:
    world.put("a.wav", "deep/b ü%20.flac", "c")
    info = world.inventory()
    assert info.is_complete
    assert info.listed_prefixes == (world.source_uri,)
    rows = read_inventory(world.storage, info).to_pylist()
    assert len(rows) == info.num_files == 3
    for row in rows:
        facts = world.storage.head(row["uri"])
        assert facts is not None
        assert (row["etag"], row["size"]) == (facts.etag, facts.size)
    assert read_inventory_info(world.storage, info.inventory_uri) == info


def test_folder_marks_are_skipped_and_empty_objects_kept(s3_world: World) -> None:
    s3_world.storage.write(s3_world.source_uri + "folder/", b"")
    s3_world.storage.write(s3_world.source_uri + "folder/empty.wav", b"")
    info = s3_world.inventory()
    assert uris(s3_world, info.inventory_uri) == [s3_world.uri("folder/empty.wav")]


def test_a_neighbour_with_a_longer_name_is_not_listed(s3_world: World) -> None:
    s3_world.put("a/x.wav")
    s3_world.storage.write(s3_world.root_uri + "/audio/ab/y.wav", b"1")
    info = s3_world.inventory(s3_world.source_uri + "a")
    assert uris(s3_world, info.inventory_uri) == [s3_world.uri("a/x.wav")]


def test_overlapping_prefixes_count_once(world: World) -> None:
    world.put("a/x.wav", "a/b/y.wav")
    inner, outer = world.source_uri + "a/b/", world.source_uri + "a"
    info = world.inventory(inner, outer, outer + "/")
    assert info.sources == (outer + "/",)
    assert info.num_files == 2


def test_file_prefixes_are_spelled_as_listings_spell_them(local_world: World) -> None:
    local_world.put("100% é/x.wav")
    for spelled in ("100%25 é", "100%25%20%C3%A9"):
        info = local_world.inventory(local_world.source_uri + spelled)
        assert uris(local_world, info.inventory_uri)[0].startswith(info.listed_prefixes[0])


def test_sources_outside_the_allowed_prefixes_are_refused(world: World) -> None:
    for source in (world.root_uri + "/out/", world.root_uri + "/audio/../out/"):
        with pytest.raises(AccessError):
            world.inventory(source)


def test_no_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one source"):
        normalise_sources([])


class Breaks:
    """Storage whose listing of one prefix stops half-way."""

    def __init__(self, world: World, prefix_uri: str) -> None:
        self._storage = world.storage
        self._prefix_uri = prefix_uri
        self.is_broken = True
        self.listed: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def list_objects(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        self.listed.append(prefix_uri)
        for info in self._storage.list_objects(prefix_uri):
            yield info
            if prefix_uri == self._prefix_uri and self.is_broken:
                raise StorageError("connection lost")


def test_an_interrupted_listing_is_not_complete_and_can_go_on(world: World) -> None:
    world.put("a/1.wav", "a/2.wav", "b/1.wav", "b/2.wav")
    first, second = world.source_uri + "a/", world.source_uri + "b/"
    broken = Breaks(world, second)
    out_uri = join_uri(world.root_uri, "out", "inventory")
    with pytest.raises(StorageError):
        take_inventory(world.config, broken, [first, second], out_uri)
    info = read_inventory_info(world.storage, out_uri)
    assert not info.is_complete
    assert info.error == "connection lost"
    assert info.listed_prefixes == (first,)

    broken.is_broken, broken.listed = False, []
    info = take_inventory(world.config, broken, [first, second], out_uri, resume=True)
    assert broken.listed == [second]
    assert info.is_complete
    assert info.error == ""
    assert len(uris(world, out_uri)) == 4
    again = take_inventory(world.config, broken, [first, second], out_uri, resume=True)
    assert again == info


def test_a_missing_folder_is_refused_and_not_complete(local_world: World) -> None:
    out_uri = join_uri(local_world.root_uri, "out", "inventory")
    missing = local_world.source_uri + "missing/"
    with pytest.raises(AccessError, match="missing"):
        take_inventory(local_world.config, local_world.storage, [missing], out_uri)
    assert not read_inventory_info(local_world.storage, out_uri).is_complete


def test_progress_counts_up(local_world: World) -> None:
    local_world.put("a/1.wav", "b/1.wav")
    counts: list[int] = []
    sources = [local_world.source_uri + name for name in ("a", "b")]
    out_uri = join_uri(local_world.root_uri, "out", "inventory")
    take_inventory(
        local_world.config, local_world.storage, sources, out_uri, progress=counts.append
    )
    assert counts == [1, 2]


def write_manifest(world: World, name: str, rows: list[dict[str, object]]) -> str:
    uri = world.uri(name)
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    if name.endswith(".parquet"):
        pq.write_table(table, sink)
    elif name.endswith(".jsonl"):
        sink.write("\n".join(json.dumps(row) for row in rows).encode())
    else:
        import pyarrow.csv

        pyarrow.csv.write_csv(table, sink)
    world.storage.write(uri, sink.getvalue())
    return uri


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.parquet"])
def test_a_manifest_brings_metadata_and_missing_facts(world: World, name: str) -> None:
    world.put("in/a.wav", "in/b.wav")
    rows = [
        {"uri": world.uri("in/a.wav"), "speaker": "007", "lang": "de"},
        {"uri": world.uri("in/b.wav"), "speaker": "8", "lang": "fi"},
        {"uri": world.uri("in/b.wav"), "speaker": "8", "lang": "fi"},
        {"uri": world.uri("in/gone.wav"), "speaker": "9", "lang": "fi"},
    ]
    info = world.inventory(write_manifest(world, name, rows))
    assert info.is_complete
    assert info.listed_prefixes == ()
    assert info.parts[0].num_missing == 1
    found = read_inventory(world.storage, info).to_pylist()
    assert [row["uri"] for row in found] == [world.uri("in/a.wav"), world.uri("in/b.wav")]
    assert dict(found[0]["metadata"]) == {"speaker": "007", "lang": "de"}
    facts = world.storage.head(world.uri("in/a.wav"))
    assert facts is not None
    assert (found[0]["etag"], found[0]["size"]) == (facts.etag, facts.size)


def test_a_manifest_with_all_facts_asks_storage_nothing(local_world: World) -> None:
    rows = [{"uri": local_world.uri("never-written.wav"), "etag": '"e1"', "size": 12}]
    info = local_world.inventory(write_manifest(local_world, "list.csv", rows))
    row = read_inventory(local_world.storage, info).to_pylist()[0]
    assert (row["etag"], row["size"], row["metadata"]) == ("e1", 12, None)


def test_manifest_faults_are_named(local_world: World, tmp_path: Path) -> None:
    write = write_manifest
    with pytest.raises(ConfigError, match="no column 'uri'"):
        local_world.inventory(write(local_world, "a.csv", [{"path": "x"}]))
    with pytest.raises(ConfigError, match="not a storage URI"):
        local_world.inventory(write(local_world, "b.csv", [{"uri": "x.wav"}]))
    with pytest.raises(AccessError, match="outside the allowed prefixes"):
        local_world.inventory(write(local_world, "c.csv", [{"uri": "s3://other/x.wav"}]))
    local_world.storage.write(local_world.uri("d.parquet"), b"junk")
    with pytest.raises(ConfigError, match="cannot be read"):
        local_world.inventory(local_world.uri("d.parquet"))
    local_world.put("in/a.wav")
    rows = [{"uri": local_world.uri("in/a.wav")}]
    with pytest.raises(ConfigError, match="not both"):
        local_world.inventory(write(local_world, "e.csv", rows), local_world.source_uri + "in/")
