"""The same registry as a real MLflow server, with codecs in a real S3 endpoint."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcodec_core.config import RegistryConfig
from hcodec_core.errors import ConfigError
from hcodec_core.promotion.codec_versions import CodecVersions
from hcodec_core.promotion.deciding import decide
from hcodec_core.promotion.promoting import promote
from hcodec_core.promotion.resolving import RegisterRequest, register_codec, resolve_codec

NAME = "hcodec-tiny"
START_SECONDS = 180.0


@pytest.fixture
def server_uri(tmp_path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        end_group(process)
        log.close()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def end_group(process: subprocess.Popen) -> None:
    import os
    import signal

    # The server's workers are its children: all of its own session end together.
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.mark.slow
def test_register_promote_and_resolve_through_a_server(
    bench, server_uri, bucket_uri, s3_endpoint, s3_storage
):
    bench.config = bench.config.model_copy(
        update={
            "registry": RegistryConfig(uri=server_uri),
            "work": bench.config.work.model_copy(update={"work_uri": f"{bucket_uri}/work"}),
        }
    )
    bench.storage = s3_storage
    with pytest.raises(ConfigError, match="put the codec into object storage"):
        bench.register("one")
    for name in ("codec.json", "model.safetensors"):
        s3_storage.upload(bench.codecs["one"] / name, f"{bucket_uri}/one/{name}")
    request = RegisterRequest(NAME, f"{bucket_uri}/one")
    codec = register_codec(bench.config, s3_storage, request)
    assert register_codec(bench.config, s3_storage, request) == codec
    uri = bench.evaluation("one", None)
    decision = decide(bench.config, s3_storage, codec, uri)
    promote(bench.config, s3_storage, NAME, decision.decision_id)
    found = resolve_codec(bench.config, f"models:/{NAME}@champion")
    assert (found.uri, found.digest) == (f"{bucket_uri}/one", codec.digest)
    with pytest.raises(ConfigError, match="has no 'challenger'"):
        resolve_codec(bench.config, f"models:/{NAME}@challenger")
    with pytest.raises(ConfigError, match="models:/nobody is not in the registry"):
        CodecVersions(bench.config).aliases("nobody")
