"""Registering codecs, aliases, resolving ``models:/`` names; a registry that is away."""

from __future__ import annotations

import os
import shutil

import pytest

from hcodec_core.codecs import load_manifest
from hcodec_core.config import RegistryConfig
from hcodec_core.errors import CheckpointError, ConfigError, RegistryError
from hcodec_core.promotion.codec_versions import CodecVersions, registry_uri
from hcodec_core.promotion.resolving import RegisterRequest, register_codec, resolve_codec

NAME = "hcodec-tiny"


def test_a_registered_codec_is_the_challenger_with_its_fingerprint(bench):
    codec = bench.register("one", data_version="v3", git_revision="abc123")
    manifest = load_manifest(str(bench.codecs["one"]))
    assert codec.uri == f"models:/{NAME}/1"
    assert (codec.digest, codec.parts) == (manifest.digest, manifest.parts)
    assert codec.weights_sha256 == manifest.weights_sha256
    assert codec.codec_uri == f"file://{bench.codecs['one']}"
    assert bench.versions.aliases(NAME) == {"challenger": 1}
    assert bench.versions.get(NAME, 1) == codec
    assert (codec.data_version, codec.git_revision) == ("v3", "abc123")


def test_registering_again_changes_nothing(bench):
    first = bench.register("one", data_version="v3")
    second = bench.register("two", data_version="v3")
    assert bench.register("one", data_version="v3") == first
    assert [codec.version for codec in bench.versions.versions(NAME)] == [1, 2]
    assert bench.versions.aliases(NAME) == {"challenger": first.version}
    assert second.version == 2
    assert bench.versions.names() == [NAME]


def test_names_are_resolved_to_a_place_with_a_digest(bench):
    codec = bench.register("one")
    bench.versions.set_alias(NAME, "champion", 1)
    for uri in (f"models:/{NAME}@champion", f"models:/{NAME}/1"):
        found = resolve_codec(bench.config, uri)
        assert (found.uri, found.digest, found.version) == (
            codec.codec_uri,
            codec.digest,
            f"models:/{NAME}/1",
        )
        assert found.pin().digest == codec.digest
        assert load_manifest(found.uri, expected_digest=found.digest).name == NAME


def test_what_is_in_no_registry_stays_as_it_is(bench):
    found = resolve_codec(bench.config, "hcodec-nano")
    assert (found.uri, found.version) == ("hcodec-nano", "")
    assert found.digest == load_manifest("hcodec-nano").digest


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("models:/nobody@champion", "models:/nobody is not in the registry"),
        (f"models:/{NAME}@champion", "has no 'champion' in the registry; its aliases are: chall"),
        (f"models:/{NAME}/7", f"models:/{NAME}/7 is not in the registry"),
        ("models:/a/b/c", "names no codec"),
        ("models:/ill named@champion", "is no name for a registered codec"),
    ],
)
def test_names_that_lead_nowhere_are_refused(bench, uri, sentence):
    bench.register("one")
    with pytest.raises(ConfigError, match=sentence):
        resolve_codec(bench.config, uri)


def test_weights_that_are_not_those_of_the_manifest_are_not_registered(bench, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(bench.codecs["one"], damaged)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="its manifest says"):
        register_codec(bench.config, bench.storage, RegisterRequest(NAME, str(damaged)))
    assert bench.versions.versions(NAME) == []


def test_a_replaced_codec_is_noticed_when_it_is_loaded(bench, tmp_path):
    folder = tmp_path / "codec"
    shutil.copytree(bench.codecs["one"], folder)
    register_codec(bench.config, bench.storage, RegisterRequest(NAME, str(folder)))
    shutil.rmtree(folder)
    shutil.copytree(bench.codecs["two"], folder)
    found = resolve_codec(bench.config, f"models:/{NAME}@challenger")
    with pytest.raises(CheckpointError, match="it was replaced"):
        load_manifest(found.uri, expected_digest=found.digest)


def with_registry(bench, uri: str | None, catalog: str | None = None):
    update: dict[str, object] = {"registry": RegistryConfig(uri=uri)}
    if catalog is not None:
        update["catalog"] = bench.config.catalog.model_copy(update={"uri": catalog})
    return bench.config.model_copy(update=update)


def test_the_registry_lies_beside_a_sqlite_catalog_unless_configured(bench, tmp_path):
    assert registry_uri(bench.config) == f"sqlite:///{tmp_path}/mlflow.db"
    assert registry_uri(with_registry(bench, "https://mlflow.test")) == "https://mlflow.test"
    with pytest.raises(ConfigError, match=r"registry\.uri"):
        registry_uri(with_registry(bench, None, "postgresql+psycopg2://db/catalog"))
    with pytest.raises(ConfigError, match="file store"):
        registry_uri(with_registry(bench, "file:///mlruns"))


@pytest.mark.parametrize(
    "uri", ["http://user:secret@127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db"]
)
def test_a_registry_that_is_away_is_a_clear_error_without_secrets(bench, uri):
    config = with_registry(bench, uri)
    with pytest.raises(RegistryError, match="nothing was changed") as caught:
        resolve_codec(config, f"models:/{NAME}@champion")
    assert "secret" not in str(caught.value)
    assert caught.value.retryable


def test_usage_reporting_is_off(bench):
    from mlflow.telemetry.client import get_telemetry_client

    CodecVersions(bench.config).names()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert get_telemetry_client() is None
