"""HTTP: paths, verbs, lists, watches and logs of the API server."""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.kube import discovery, kinds, patching
from tests.kube.access import Action, unauthorized
from tests.kube.errors import (
    ApiError,
    Object,
    bad_request,
    method_not_allowed,
    no_such_group,
    no_such_path,
)
from tests.kube.kinds import Kind
from tests.kube.logs import is_set
from tests.kube.watching import WatchQuery, stream

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class Target:
    """What a path means."""

    kind: Kind
    namespace: str = ""
    name: str = ""
    subresource: str = ""


class Listener(ThreadingHTTPServer):
    """The listening socket; knows its connections, so that they can be broken."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, api: KubeServer, port: int = 0) -> None:
        self.api = api
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, and connections broken on purpose, are no news."""

    def break_connections(self) -> None:
        """Reset every open connection, as a server that dies does."""
        for connection in list(self.connections):
            reset(connection)


def reset(connection: socket.socket) -> None:
    """No more bytes either way, and RST when it is closed: the client sees a broken connection."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # already closed by the other side


class Handler(BaseHTTPRequestHandler):
    """One connection; HTTP/1.1 with keep-alive."""

    protocol_version = "HTTP/1.1"
    server: Listener
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.api = self.server.api
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        """Requests are in ``KubeServer.requests``."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return self.api.clock.http_date()

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.url_path = unquote(url.path)
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.is_answer_lost = False
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        try:
            self._answer()
        except ApiError as error:
            if error.is_plain:
                self.send_bytes(error.message.encode(), "text/plain; charset=utf-8", error.code)
            else:
                self.send_object(error.as_status(), error.code, error.headers)
        except ConnectionError:
            self.close_connection = True
        except Exception as error:  # noqa: BLE001  A bug of this server fails the test at its end.
            self.api.errors.append(error)
            message = f"this server's own error: {error!r}"
            self.send_object(ApiError(500, "InternalError", message).as_status(), 500)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

    def _answer(self) -> None:
        if not self.api.is_token(self.headers.get("Authorization")):
            raise unauthorized()
        simple = discovery.answer(self.url_path, self.api.groups)
        if simple is not None:
            self.api.record(self.command, self.url_path, None)
            self._meet_faults("get", self.url_path)
            self.send_object(simple)
            return
        target = self._target()
        verb = self._verb(target)
        self.api.record(self.command, self.path, verb)
        resource = target.kind.plural + (f"/{target.subresource}" if target.subresource else "")
        self._meet_faults(verb, resource)
        if target.kind.has_name:
            action = Action(verb, target.kind.group, resource, target.namespace, target.name)
            self.api.permissions.check(target.kind, action)
        self._dispatch(verb, target)

    def _meet_faults(self, verb: str, resource: str) -> None:
        fault = self.api.faults.meet(verb, resource)
        if fault is None:
            return
        if fault.delay_seconds:
            time.sleep(fault.delay_seconds)
        self.is_answer_lost = fault.is_answer_lost
        if fault.is_reset:
            self._break()
        if fault.error is not None:
            raise fault.error

    def _break(self) -> NoReturn:
        reset(self.connection)
        raise ConnectionResetError

    def _target(self) -> Target:
        parts = self.url_path.strip("/").split("/")
        if parts[0] == "api":
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) >= 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            raise no_such_path()
        namespace = ""
        if rest[:1] == ["namespaces"] and len(rest) > 2 and rest[2] != "status":
            namespace, rest = rest[1], rest[2:]
        if not rest or len(rest) > 3:
            raise no_such_path()
        if (f"{group}/{version}" if group else version) not in self.api.groups:
            raise no_such_group()
        kind = kinds.find(group, version, rest[0])
        if kind is None:
            raise no_such_path()
        name = rest[1] if len(rest) > 1 else ""
        subresource = rest[2] if len(rest) > 2 else ""
        if subresource and subresource not in kind.subresources:
            raise no_such_path()
        return Target(kind, namespace, name, subresource)

    def _verb(self, target: Target) -> str:
        verb = _VERBS[self.command]
        if verb == "get" and not target.name:
            verb = "watch" if is_set(self.query, "watch") else "list"
        if verb == "delete" and not target.name:
            verb = "deletecollection"
        if target.name and verb == "create" and not target.subresource:
            raise method_not_allowed()
        if not target.name and verb in ("update", "patch"):
            raise method_not_allowed()
        if not target.subresource and verb not in target.kind.verbs:
            raise method_not_allowed()
        return verb

    def _dispatch(self, verb: str, target: Target) -> None:
        if target.subresource == "log":
            self._send_log(target)
        elif target.subresource == "eviction":
            self.api.evict(target.namespace, target.name)
            self.send_object(_success(), 201)
        elif verb == "watch":
            self._send_watch(target)
        else:
            getattr(self, f"_{verb}")(target)

    def _get(self, target: Target) -> None:
        self.send_object(self.api.registry.get(target.kind, target.namespace, target.name))

    def _list(self, target: Target) -> None:
        self.send_object(self.api.lists.answer(target.kind, target.namespace, self.query))

    def _create(self, target: Target) -> None:
        body = self.json_body()
        if target.kind is kinds.ACCESS_REVIEW:
            body["status"] = self.api.permissions.review(body.get("spec") or {})
            self.send_object(body, 201)
        elif target.kind is kinds.RULES_REVIEW:
            namespace = (body.get("spec") or {}).get("namespace", "")
            body["status"] = self.api.permissions.rules(namespace)
            self.send_object(body, 201)
        else:
            made = self.api.registry.create(target.kind, target.namespace, body, self._is_dry_run)
            self.send_object(made, 201)

    def _update(self, target: Target) -> None:
        body = self.json_body()
        self.send_object(self._changed(target, lambda _: body, is_replacement=True))

    def _patch(self, target: Target) -> None:
        body, kind = self.json_body(), target.kind
        content_type = self.headers.get("Content-Type") or ""
        is_built_in = kind.has_schema
        self.send_object(
            self._changed(
                target, lambda old: patching.patched(old, body, content_type, is_built_in)
            )
        )

    def _changed(self, target: Target, edit: Any, is_replacement: bool = False) -> Object:
        return self.api.registry.change(
            target.kind,
            target.namespace,
            target.name,
            target.subresource,
            edit,
            self._is_dry_run,
            is_replacement,
        )

    def _delete(self, target: Target) -> None:
        options = self._delete_options()
        kind = target.kind
        item, is_gone = self.api.registry.delete(kind, target.namespace, target.name, options)
        warnings = {}
        if kind is kinds.JOB and "propagationPolicy" not in options:
            warnings["Warning"] = (
                '299 - "child pods are preserved by default when jobs are deleted; set '
                "propagationPolicy=Background to remove them or set propagationPolicy=Orphan to "
                'suppress this warning"'
            )
        # Only kinds whose store has ReturnDeletedObject give back what is gone.
        if is_gone and kind not in (kinds.POD, kinds.SERVICE, kinds.SERVICE_ACCOUNT, kinds.QUOTA):
            details = {"name": target.name, "kind": kind.plural, "uid": item["metadata"]["uid"]}
            item = _success({**details, "group": kind.group} if kind.group else details)
        self.send_object(item, headers=warnings)

    def _deletecollection(self, target: Target) -> None:
        options = self._delete_options()
        found = self.api.lists.answer(target.kind, target.namespace, self.query)
        for item in found["items"]:
            metadata = item["metadata"]
            self.api.registry.delete(
                target.kind, metadata.get("namespace", ""), metadata["name"], options
            )
        self.send_object(found)

    def _delete_options(self) -> Object:
        options = self.json_body() if self.body else {}
        for name in ("propagationPolicy", "gracePeriodSeconds", "orphanDependents"):
            if name in self.query:
                is_boolean = name == "orphanDependents"
                options[name] = is_set(self.query, name) if is_boolean else self.query[name]
        return options

    @property
    def _is_dry_run(self) -> bool:
        return self.query.get("dryRun") == "All"

    def _send_log(self, target: Target) -> None:
        chunks = self.api.kubelet.read_log(target.namespace, target.name, self.query)
        if chunks is None:
            self.send_response(204)
            self.end_headers()
            return
        self._begin_stream("text/plain")
        for chunk in chunks:
            if chunk:
                self._send_chunk(chunk)
            elif self._is_hung_up():
                return
        self._end_stream()

    def _send_watch(self, target: Target) -> None:
        query = WatchQuery.parse(target.kind, target.namespace, target.name, self.query)
        lines = stream(self.api, query)
        self._begin_stream("application/json")
        for line in lines:
            if line is None:
                if self._is_hung_up():
                    return
                continue
            if self.api.faults.is_watch_dropped(query.opened):
                break
            self._send_chunk(json.dumps(line).encode() + b"\n")
        if self.api.faults.is_watch_dropped(query.opened):
            reset(self.connection)
            self.close_connection = True
            return
        self._end_stream()

    def _is_hung_up(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            is_closed = self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            is_closed = True
        self.close_connection = self.close_connection or is_closed
        return is_closed

    def _begin_stream(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def json_body(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise bad_request(f"the body of the request is no JSON: {error}") from error

    def send_object(
        self, body: Object, code: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        if self.is_answer_lost:
            self._break()
        self.send_bytes(json.dumps(body).encode(), "application/json", code, headers)

    def send_bytes(
        self, data: bytes, content_type: str, code: int, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _success(details: Object | None = None) -> Object:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    return {**status, "details": details} if details else status
