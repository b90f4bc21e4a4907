"""A proxy in front of an S3 server that does something at a named request.

One proxy belongs to one process of the pipeline, so that a trap knows whom to kill: faults are made
where a request passes, and the product needs no hooks for them.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EMPTY_LISTING = (
    b'<?xml version="1.0"?><ListBucketResult><Name>%s</Name>'
    b"<IsTruncated>false</IsTruncated></ListBucketResult>"
)
SKEWED = (
    b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference between the request time and "
    b"the current time is too large.</Message></Error>"
)
_MAX_SKEW = timedelta(minutes=15)
_HOLD_SECONDS = 1200.0


@dataclass
class Trap:
    """What happens at a request ``"METHOD path?query"`` that matches ``pattern``.

    deed: ``kill`` / ``stop`` / ``term`` (signals to the owner), ``status`` (answer with ``status``,
    not passed on), ``drop`` (connection closed, not passed on), ``lose`` (passed on, answer lost),
    ``cut`` (half of the body), ``late`` (after ``seconds``), ``hold`` (until ``gate`` opens, then
    passed on), ``empty`` (a listing without objects).
    is_after: signals come once storage has done the request, before the owner hears of it.
    skip: matches to let through first. times: how often it acts at most.
    """

    pattern: str
    deed: str
    is_after: bool = False
    status: int = 500
    seconds: float = 0.0
    skip: int = 0
    times: int = 1
    gate: threading.Event = field(default_factory=threading.Event)
    hit: threading.Event = field(default_factory=threading.Event)
    hits: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __str__(self) -> str:
        often = f" x{self.hits}" if self.hits > 1 else ""
        return f"{self.deed}{often} {'after' if self.is_after else 'at'} {self.pattern}"

    def takes(self, line: str) -> bool:
        """Whether it acts on this request."""
        if not re.search(self.pattern, line):
            return False
        with self._lock:
            if self.skip > 0:
                self.skip -= 1
                return False
            if self.hits >= self.times:
                return False
            self.hits += 1
        return True


class TrapProxy:
    """Passes requests on to ``target_url``, but for those that a trap takes.

    checks_clock: refuse requests signed more than 15 minutes off, as S3 does and moto does not.
    """

    def __init__(
        self, target_url: str, traps: tuple[Trap, ...] = (), checks_clock: bool = False
    ) -> None:
        self.traps = traps
        self.checks_clock = checks_clock
        self.num_requests = 0
        self.owner_pid: int | None = None
        self._target = target_url.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                with contextlib.suppress(OSError):
                    proxy.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        for trap in self.traps:
            trap.gate.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = _body_of(request)
        self.num_requests += 1
        if self.checks_clock and _is_skewed(request):
            self._reply(request, 403, [("Content-Type", "application/xml")], SKEWED)
            return
        line = f"{request.command} {request.path}"
        trap = next((trap for trap in self.traps if trap.takes(line)), None)
        if trap is None:
            self._reply(request, *self._pass_on(request, body))
            return
        if not trap.is_after:
            self._strike(trap)
        if trap.deed == "status":
            self._reply(request, trap.status, [], b"")
        elif trap.deed == "drop" or (trap.deed == "kill" and not trap.is_after):
            request.close_connection = True
        else:
            status, headers, content = self._pass_on(request, body)
            if trap.is_after:
                self._strike(trap)
            if trap.deed == "empty":
                headers = [(n, v) for n, v in headers if n.lower() != "content-length"]
                bucket = request.path.strip("/").partition("?")[0].partition("/")[0]
                content = EMPTY_LISTING % bucket.encode()
            if trap.deed == "lose" or trap.deed == "kill":
                request.close_connection = True
            else:
                self._reply(request, status, headers, content, is_cut=trap.deed == "cut")
        trap.hit.set()

    def _strike(self, trap: Trap) -> None:
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
        if trap.deed in signals and self.owner_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.owner_pid, signals[trap.deed])
            trap.hit.set()
        elif trap.deed == "late":
            time.sleep(trap.seconds)
        elif trap.deed == "hold":
            trap.hit.set()
            trap.gate.wait(_HOLD_SECONDS)

    def _pass_on(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        link = http.client.HTTPConnection(self._target, timeout=_HOLD_SECONDS)
        dropped = {"host", "transfer-encoding", "content-length", "expect"}
        headers = {n: value for n, value in request.headers.items() if n.lower() not in dropped}
        headers["Host"] = self._target
        link.request(request.command, request.path, body=body, headers=headers)
        answer = link.getresponse()
        content = answer.read()
        link.close()
        return answer.status, answer.getheaders(), content

    @staticmethod
    def _reply(
        request: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        is_cut: bool = False,
    ) -> None:
        request.send_response(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in {"transfer-encoding", "connection", "server", "date"}:
                request.send_header(name, value)
        if "content-length" not in names:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            request.close_connection = True


def _is_skewed(request: BaseHTTPRequestHandler) -> bool:
    signed = request.headers.get("x-amz-date", "")
    if not signed:
        return False
    at = datetime.strptime(signed, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return abs(datetime.now(UTC) - at) > _MAX_SKEW


def _body_of(request: BaseHTTPRequestHandler) -> bytes:
    """The body of a request; Arrow's client sends its own in chunks."""
    if "chunked" not in request.headers.get("Transfer-Encoding", "").lower():
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline().split(b";")[0], 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass
    return body
