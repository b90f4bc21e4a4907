"""Fixtures that several folders need: a real S3 server (moto) and a proxy that breaks answers."""

from __future__ import annotations

import http.client
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.storage import Storage, open_storage


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command line sets up logging for its own process; here it shares one with other tests."""
    root, ours = logging.getLogger(), logging.getLogger("hcodec_core")
    # Libraries that configure logging (Alembic, Airflow) disable the loggers that they find, and
    # fixtures of a whole module that use the command line leave its levels behind.
    logging.disable(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("hcodec") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server on the loopback interface; credentials are in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def s3_storage(s3_endpoint: str) -> Storage:
    return open_storage(StorageConfig(endpoint_url=s3_endpoint))


@pytest.fixture
def bucket_uri(s3_endpoint: str) -> str:
    """A new, empty bucket, as ``s3://name``."""
    import boto3

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


Rule = Callable[[str, str, dict[str, str]], str | int | None]
"""(method, path, headers) -> None: pass on; "lose": act, drop the answer; a number: that status."""


class FaultProxy:
    """Passes requests on to an S3 server, but for those that ``rule`` picks."""

    def __init__(self, target_url: str) -> None:
        self.target = target_url.removeprefix("http://")
        self.rule: Rule = lambda *_: None
        self.requests: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(f"{request.command} {request.path}")
        fault = self.rule(request.command, request.path, headers)
        if isinstance(fault, int):
            request.send_response(fault)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        link = http.client.HTTPConnection(self.target, timeout=30)
        headers["host"] = self.target
        link.request(request.command, request.path, body=body, headers=headers)
        answer = link.getresponse()
        content = answer.read()
        if fault == "lose":
            request.close_connection = True
            request.connection.close()
            return
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"transfer-encoding", "connection"}:
                request.send_header(name, value)
        if "content-length" not in {name.lower() for name, _ in answer.getheaders()}:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            request.close_connection = True


@pytest.fixture
def fault_proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_endpoint)
    yield proxy
    proxy.server.shutdown()
    proxy.server.server_close()
