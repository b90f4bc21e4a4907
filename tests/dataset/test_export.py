from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from hcodec_core.cli import main
from hcodec_core.dataset.export import ExportInfo, Kind, export_dataset
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.errors import ConfigError
from hcodec_core.storage import file_uri
from tests.dataset.factories import World

NUM_ROWS = 7


@pytest.fixture
def filled(local_world: World) -> World:
    local_world.put(*(f"{index}.wav" for index in range(NUM_ROWS)))
    local_world.version()
    return local_world


def export(world: World, kind: Kind, **changes: object) -> ExportInfo:
    out_uri = file_uri(world.local_path / kind)
    return export_dataset(
        world.config, world.storage, "demo", kind, out_uri, rows_per_file=3, **changes
    )


def test_webdataset_reads_the_same_codes(filled: World) -> None:
    info = export(filled, "webdataset")
    assert info.files == ("tokens-000000.tar", "tokens-000001.tar", "tokens-000002.tar")
    paths = [str(filled.local_path / "webdataset" / name) for name in info.files]
    truth = {row.audio_id: row for row in open_dataset(filled.config, "demo")}
    for sample in webdataset.WebDataset(paths, shardshuffle=False).decode():
        row = truth.pop(sample["__key__"])
        assert sample["json"]["uri"] == row.uri
        for name in ("semantic", "acoustic"):
            assert sample[f"{name}.npy"].dtype == np.int16
            assert np.array_equal(sample[f"{name}.npy"], row.codes[name])
    assert truth == {}


def test_equal_versions_give_equal_bytes(filled: World) -> None:
    export(filled, "webdataset")
    first = {p.name: p.read_bytes() for p in (filled.local_path / "webdataset").glob("*.tar")}
    again = file_uri(filled.local_path / "again")
    export_dataset(filled.config, filled.storage, "demo", "webdataset", again, rows_per_file=3)
    second = {p.name: p.read_bytes() for p in (filled.local_path / "again").glob("*.tar")}
    assert second == first


def test_huggingface_files_hold_the_rows(filled: World) -> None:
    info = export(filled, "huggingface", row_filter="num_frames > 0")
    folder = filled.local_path / "huggingface"
    assert info.files[0] == "data/train-00000-of-00003.parquet"
    truth = {row.audio_id: row for row in open_dataset(filled.config, "demo")}
    rows = [row for name in info.files for row in pq.read_table(folder / name).to_pylist()]
    assert len(rows) == NUM_ROWS
    for row in rows:
        assert row["acoustic"] == truth[row["audio_id"]].codes["acoustic"].tolist()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nconfigs:")
    assert "random weights" in card
    assert json.loads((folder / "export.json").read_text())["num_rows"] == NUM_ROWS


def test_mds_says_what_it_needs(filled: World) -> None:
    if importlib.util.find_spec("streaming"):
        assert export(filled, "mds").num_rows == NUM_ROWS
    else:
        with pytest.raises(ConfigError, match="mosaicml-streaming"):
            export(filled, "mds")


def test_a_folder_that_holds_something_is_refused(filled: World) -> None:
    export(filled, "webdataset")
    with pytest.raises(ConfigError, match="not empty"):
        export(filled, "webdataset")


def test_the_command(filled: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, root = filled.config, filled.root_uri
    path = tmp_path / "hcodec.toml"
    path.write_text(
        f'[access]\nsource_prefixes = ["{root}/audio/"]\ndestination_prefixes = ["{root}/out/"]\n'
        f'[catalog]\nuri = "{config.catalog.uri}"\n'
        f'warehouse_uri = "{config.catalog.warehouse_uri}"\n[work]\nwork_uri = "{root}/out/work"\n'
    )
    fixed = ["export", "demo", "--to", "webdataset", "--config", str(path), "--json"]
    assert main([*fixed, "--out", str(tmp_path / "tars")]) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == NUM_ROWS
    assert (tmp_path / "tars" / "tokens-000000.tar").is_file()
    assert main([*fixed, "--out", f"{root}/elsewhere"]) == 43
    assert "destination" in capsys.readouterr().err
