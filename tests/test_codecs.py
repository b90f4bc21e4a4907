import json
import subprocess
import sys

import pytest

from hcodec_core.codecs import SHIPPED, load_manifest, local_file
from hcodec_core.errors import CheckpointError, ConfigError


def test_a_manifest_is_read_without_torch():
    code = (
        "import sys; from hcodec_core.codecs import load_manifest;"
        "print(load_manifest('hcodec-nano').hop_length, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["640", "False"]


def test_forms_of_uris(tmp_path):
    assert local_file("hcodec-nano", "codec.json") == SHIPPED["hcodec-nano"] / "codec.json"
    assert local_file(f"file://{tmp_path}", "a") == tmp_path / "a"
    assert local_file(str(tmp_path), "a") == tmp_path / "a"
    assert local_file("s3://bucket/prefix", "a") is None


@pytest.mark.parametrize(
    "uri", ["nothing", "models:/hcodec@champion", "gs://b/c", "file://rel", ""]
)
def test_unknown_forms_are_refused(uri):
    with pytest.raises(ConfigError):
        load_manifest(uri)


def test_fetch_is_asked_for_the_manifest():
    data = (SHIPPED["hcodec-nano"] / "codec.json").read_bytes()
    asked = []

    def fetch(uri):
        asked.append(uri)
        return data

    assert load_manifest("s3://bucket/x/", fetch=fetch) == load_manifest("hcodec-nano")
    assert asked == ["s3://bucket/x/codec.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"format_version": 2})])
def test_damaged_manifests(text):
    with pytest.raises(CheckpointError, match="damaged"):
        load_manifest("s3://bucket/x", fetch=lambda uri: text.encode())


def test_an_unexpected_digest_is_refused():
    with pytest.raises(CheckpointError, match="was replaced"):
        load_manifest("hcodec-nano", expected_digest="0" * 32)


def test_hub_files_come_from_the_cache(tmp_path, monkeypatch):
    """The hub's own client is real; only its cache is filled by hand, and the network is off."""
    import huggingface_hub.constants as constants

    commit = "a" * 40
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    (snapshot / "codec.json").write_bytes((SHIPPED["hcodec-nano"] / "codec.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_manifest("hf://org/name@v1") == load_manifest("hcodec-nano")
    with pytest.raises(CheckpointError, match="from the hub"):
        load_manifest("hf://org/name@v2")
