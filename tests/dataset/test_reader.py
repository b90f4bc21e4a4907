from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.schema import unflatten_codes
from hcodec_core.dataset.versions import drop_branch, rollback
from hcodec_core.errors import ConfigError
from tests.dataset.factories import World, job_of, toy_manifest, toy_row


def names(count: int) -> list[str]:
    return [f"{index:03d}.wav" for index in range(count)]


def test_rows_come_back_as_arrays(world: World) -> None:
    world.put(*names(7))
    plan = world.plan(num_shards=3)
    world.work(plan)
    world.publish(plan, world.commit(plan))
    ds = open_dataset(world.config, "demo")
    assert len(ds) == 7
    job = job_of(world.storage, plan.plan_uri)
    expected = {file["uri"]: toy_row(job, file["shard_id"], file) for file in world.files(plan)}
    for row in ds:
        truth = expected.pop(row.uri)
        assert row.codes["acoustic"].shape == (4, row.num_frames)
        assert row.codes["acoustic"].dtype == np.int32
        for name, books in (("semantic", 1), ("acoustic", 4)):
            flat = np.array(truth[name], dtype=np.int32)
            assert np.array_equal(row.codes[name], unflatten_codes(flat, books))
        assert (row.num_samples, row.duration_seconds) == (
            truth["num_samples"],
            truth["duration_seconds"],
        )
        assert row.columns["worker_build"] == {"device": "cpu"}
        assert row.frame_spans is None
    assert expected == {}


def test_indexing_follows_the_order_of_iteration(local_world: World) -> None:
    local_world.put(*names(9))
    local_world.version(num_shards=4)
    ds = open_dataset(local_world.config, "demo")
    order = [row.uri for row in ds]
    assert [ds[index].uri for index in range(9)] == order
    assert ds[-1].uri == order[-1]
    assert [row.uri for row in ds[2:5]] == order[2:5]
    assert ds.to_arrow(["uri"])["uri"].to_pylist() == order
    for index in (9, -10):
        with pytest.raises(IndexError, match="of 9 rows"):
            ds[index]


def test_info_says_what_it_is(world: World) -> None:
    world.put(*names(3))
    record = world.version(num_shards=2)
    info = open_dataset(world.config, "demo").info
    assert (info.version, info.snapshot_id, info.num_rows) == ("v1", record.snapshot_id, 3)
    assert (info.encode_id, info.codebook_id) == (record.encode_id, "c" * 32)
    assert (info.sample_rate, info.frame_rate, info.codec_is_trained) == (16000, 50.0, False)
    assert info.published_at == record.published_at
    assert info.num_files == 2


def test_versions_and_rejected_commits_can_be_opened(local_world: World) -> None:
    local_world.put("a.wav")
    local_world.version()
    local_world.put("b.wav")
    local_world.version()
    assert [len(open_dataset(local_world.config, "demo", v)) for v in ("v1", "latest")] == [1, 2]
    local_world.put("c.wav")
    plan = local_world.plan()
    local_world.work(plan)
    info = local_world.commit(plan)
    assert len(open_dataset(local_world.config, "demo", info.branch)) == 3
    tag = drop_branch(local_world.config, local_world.storage, plan.plan_uri).tag
    assert len(open_dataset(local_world.config, "demo", tag)) == 3
    rollback(local_world.layout, "v1")
    assert len(open_dataset(local_world.config, "demo")) == 1


def test_an_open_view_does_not_move(local_world: World) -> None:
    local_world.put("a.wav")
    local_world.version()
    ds = open_dataset(local_world.config, "demo")
    local_world.put("b.wav")
    local_world.version()
    assert [row.uri for row in ds] == [local_world.uri("a.wav")]


def test_before_the_first_publish_there_is_nothing_to_read(local_world: World) -> None:
    with pytest.raises(ConfigError, match="no dataset 'demo' in this catalog; datasets: none yet"):
        open_dataset(local_world.config, "demo")
    local_world.put("a.wav")
    plan = local_world.plan()
    local_world.work(plan)
    local_world.commit(plan)
    with pytest.raises(ConfigError, match="versions: none yet"):
        open_dataset(local_world.config, "demo")


def test_of_two_codecs_the_last_published_is_taken(local_world: World) -> None:
    local_world.put("a.wav", "b.wav")
    first = local_world.version()
    local_world.manifest = toy_manifest("other", encoder="f", streams={"fused": 8})
    second = local_world.version()
    assert first.encode_id != second.encode_id
    ds = open_dataset(local_world.config, "demo")
    assert ds.info.codec_name == "other"
    assert ds[0].codes["fused"].shape == (8, ds[0].num_frames)
    older = open_dataset(local_world.config, "demo", encode_id=first.encode_id[:8])
    assert older.info.codec_name == "toy"
    with pytest.raises(ConfigError, match=first.encode_id[:12]):
        open_dataset(local_world.config, "demo", encode_id="zzzz")


def test_spans_and_metadata_come_along(local_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.dataset import factories

    def adaptive(*args: object) -> dict[str, object]:
        row = toy_row(*args)  # type: ignore[arg-type]
        return row | {"frame_spans": [2] * row["num_frames"]}

    monkeypatch.setattr(factories, "toy_row", adaptive)
    local_world.put("in/a.wav")
    text = f"uri,speaker\n{local_world.uri('in/a.wav')},7\n"
    local_world.storage.write(local_world.uri("list.csv"), text.encode())
    info = local_world.inventory(local_world.uri("list.csv"))
    local_world.version(inventory_uri=info.inventory_uri)
    row = open_dataset(local_world.config, "demo")[0]
    assert row.metadata == {"speaker": "7"}
    assert row.frame_spans is not None
    assert row.frame_spans.tolist() == [2] * row.num_frames


def test_unknown_columns_are_refused(local_world: World) -> None:
    local_world.put("a.wav")
    local_world.version()
    ds = open_dataset(local_world.config, "demo")
    assert ds.to_arrow(["etag", "uri"]).column_names == ["etag", "uri"]
    assert "acoustic" in ds.to_arrow().column_names
    with pytest.raises(ConfigError, match="no column 'text'"):
        ds.to_arrow(["text"])


def test_a_configuration_file_is_enough(local_world: World, tmp_path: Path) -> None:
    local_world.put("a.wav")
    local_world.version()
    root = local_world.root_uri
    path = tmp_path / "hcodec.toml"
    path.write_text(
        f'[access]\nsource_prefixes = ["{root}/audio"]\ndestination_prefixes = ["{root}/out"]\n'
        f'[catalog]\nuri = "{local_world.config.catalog.uri}"\n'
        f'warehouse_uri = "{root}/out/warehouse"\n[work]\nwork_uri = "{root}/out/work"\n'
    )
    assert len(open_dataset(str(path), "demo")) == 1


def test_codes_keep_their_size_on_disk(local_world: World) -> None:
    """Guard 7: 16-bit codes are int32 in the table; dictionaries keep them small on disk."""
    local_world.put(*names(60))
    local_world.version(num_shards=1)
    ds = open_dataset(local_world.config, "demo")
    (task,) = ds._tasks
    ids = {column.name: index for index, column in enumerate(ds._table.schema().fields)}
    assert ids["acoustic"] > 0
    element = ds._table.schema().find_field("acoustic.element").field_id
    num_codes = sum(row.codes["acoustic"].size for row in ds)
    bits = 8 * task.file.column_sizes[element] / num_codes
    assert 6.0 <= bits < 7.5
