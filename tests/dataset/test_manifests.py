from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from hcodec_core.dataset.inventory import read_inventory
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.errors import ConfigError
from tests.dataset.factories import World


def write(world: World, name: str, rows: list[dict[str, Any]]) -> str:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    world.storage.write(world.uri(name), gzip.compress(text) if name.endswith(".gz") else text)
    return world.uri(name)


def recording(path: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": "rec-1",
        "sources": [{"type": "file", "channels": [0], "source": path}],
        "sampling_rate": 16000,
        "num_samples": 48000,
        "duration": 3.0,
        **changes,
    }


def found(world: World, manifest_uri: str) -> dict[str, dict[str, str]]:
    table = read_inventory(world.storage, world.inventory(manifest_uri))
    return {row["uri"]: dict(row["metadata"] or []) for row in table.to_pylist()}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.jsonl.gz"])
def test_nemo_manifests_bring_text_into_the_table(world: World, name: str) -> None:
    world.put("wavs/a b.wav", "wavs/c.wav")
    rows = [
        {"audio_filepath": "wavs/a b.wav", "duration": 1.5, "text": "grüß dich", "size": 3},
        {"audio_filepath": world.uri("wavs/c.wav"), "duration": 2, "text": "", "offset": 0.0},
    ]
    manifest_uri = write(world, name, rows)
    listed = found(world, manifest_uri)
    assert set(map(len, listed.values())) == {2, 3}
    assert listed[world.uri("wavs/c.wav")] == {"duration": "2", "text": ""}
    world.version(inventory_uri=world.inventory(manifest_uri).inventory_uri)
    texts = {row.metadata["text"] for row in open_dataset(world.config, "demo")}
    assert texts == {"grüß dich", ""}


def test_lhotse_recordings_and_cuts(world: World) -> None:
    world.put("a.wav", "b.wav")
    supervision = {"id": "s", "text": "hello", "language": "en", "custom": {"room": "small"}}
    cuts = [
        {
            "id": "cut-1",
            "type": "MonoCut",
            "start": 0.0,
            "duration": 3.0,
            "channel": 0,
            "recording": recording("a.wav"),
            "supervisions": [supervision],
        },
        {
            "id": "cut-2",
            "start": 0,
            "duration": 3.0,
            "recording": recording(world.uri("b.wav")),
            "supervisions": [supervision, supervision],
        },
    ]
    listed = found(world, write(world, "cuts.jsonl.gz", cuts))
    one = listed[world.uri("a.wav")]
    assert (one["text"], one["language"], one["room"]) == ("hello", "en", "small")
    assert (one["id"], one["num_samples"]) == ("rec-1", "48000")
    assert json.loads(listed[world.uri("b.wav")]["supervisions"])[1]["text"] == "hello"
    url = recording("", sources=[{"type": "url", "channels": [0], "source": world.uri("b.wav")}])
    assert set(found(world, write(world, "recordings.jsonl", [url]))) == {world.uri("b.wav")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio_filepath": "a.wav", "offset": 2.5}, "a part of a.wav"),
        ({"start": 1, "duration": 2, "recording": recording("a.wav")}, "a part of a.wav"),
        ({"start": 0, "duration": 2, "recording": recording("a.wav")}, "a part of a.wav"),
        (recording("", sources=[{"type": "command", "source": "rm"}]), "not one file or URL"),
        (recording("", sources=[]), "not one file or URL"),
        ({"audio": "a.wav"}, "audio_filepath"),
        ([], "not an object"),
    ],
)
def test_what_cannot_be_used_is_named(local_world: World, row: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        local_world.inventory(write(local_world, "m.jsonl", [row]))


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_junk_is_named(local_world: World, name: str) -> None:
    local_world.storage.write(local_world.uri(name), b"{junk")
    with pytest.raises(ConfigError, match="cannot be read"):
        local_world.inventory(local_world.uri(name))
