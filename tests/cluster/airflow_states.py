"""Answers of Airflow's REST API about task instances, as the janitor asks for them.

A DAG run that was deleted, a task marked failed behind the operator's back: in a real Airflow these
take minutes to make, and the janitor sees nothing of it but these answers (read off Airflow 3.3:
a task instance as JSON with its ``state``; 404 with a ``detail`` for what is not there).
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote

TOKEN = "open sesame"


class AirflowStates:
    """``states``: (dag, run, task) -> state; a DAG of which a run is known is known itself."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.states: dict[tuple[str, str, str], str | None] = {}
        self.known_dags: set[str] = set()
        self.status = 200
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                status, body = outer.answer(self.path, self.headers.get("Authorization"))
                self._send(status, body)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length))
                if body == {"username": "janitor", "password": "broom"}:
                    self._send(201, {"access_token": TOKEN})
                else:
                    self._send(401, {"detail": "Invalid credentials"})

            def _send(self, status: int, body: object) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self.url = f"http://{address}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, authorization: str | None) -> tuple[int, object]:
        """Status and body for a GET."""
        if self.status != 200:
            return self.status, {"detail": "no"}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"detail": "Not authenticated"}
        parts = [unquote(part) for part in path.removeprefix("/api/v2/").split("/")]
        if parts[:1] == ["dags"] and len(parts) == 2 and parts[1] in self.known_dags:
            return 200, {"dag_id": parts[1]}
        if len(parts) >= 6 and parts[2] == "dagRuns" and parts[4] == "taskInstances":
            key = (parts[1], parts[3], parts[5])
            if key in self.states:
                return 200, {"state": self.states[key], "task_id": key[2]}
        return 404, {"detail": f"{path} was not found"}
