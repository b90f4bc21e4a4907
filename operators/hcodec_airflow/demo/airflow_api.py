"""The little of Airflow's REST API (v2) that starting and following one run takes."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from hcodec_airflow.demo.services import DemoError, Services

FINISHED = {"success", "failed"}


@dataclass
class AirflowApi:
    """A client for one Airflow; ``base_url`` without a trailing slash."""

    base_url: str
    token: str = ""

    def login(self) -> None:
        """Get a token; this Airflow knows only administrators."""
        self.token = self.call("GET", "/auth/token")["access_token"]

    def wait_for_dag(self, dag_id: str, services: Services, seconds: float) -> None:
        """Wait until a DAG is parsed and all components are healthy; report import errors."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            services.check()
            if self._is_healthy() and self._has_dag(dag_id):
                return
            time.sleep(1.0)
        errors = self.call("GET", "/api/v2/importErrors").get("import_errors", [])
        shown = "; ".join(f"{e['filename']}: {e['stack_trace'][-300:]}" for e in errors)
        raise DemoError(
            f"Airflow did not load DAG {dag_id} within {seconds:.0f} s. {shown or 'See its logs.'}"
        )

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Unpause a DAG and start a run; the run's id."""
        self.call("PATCH", f"/api/v2/dags/{dag_id}", {"is_paused": False})
        body = {"logical_date": None, "conf": conf}
        return str(self.call("POST", f"/api/v2/dags/{dag_id}/dagRuns", body)["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """State of a run: queued, running, success, failed."""
        return str(self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str]:
        """State of each task of a run, in no special order."""
        answer = self.call("GET", f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances")
        return {t["task_id"]: t["state"] or "none" for t in answer["task_instances"]}

    def xcom(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """What a task returned, or None."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        try:
            return self.call("GET", f"{path}/xcomEntries/return_value?deserialize=true")["value"]
        except DemoError:
            return None

    def log_tail(self, dag_id: str, run_id: str, task_id: str, lines: int = 15) -> list[str]:
        """Last lines of the log of a task's latest try."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        number = max(1, int(self.call("GET", path)["try_number"]))
        content = self.call("GET", f"{path}/logs/{number}?full_content=true")["content"]
        return [line for entry in content for line in _lines_of(entry)][-lines:]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to one request. Raises ``DemoError`` for any other answer."""
        request = urllib.request.Request(
            self.base_url + path,
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={
                "Content-Type": "application/json",
                "Accept": "application/json",
                **({"Authorization": f"Bearer {self.token}"} if self.token else {}),
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:500]
            raise DemoError(
                f"Airflow answered {error.code} to {method} {path}: {detail}"
            ) from error
        except OSError as error:
            raise DemoError(f"Airflow did not answer {method} {path}: {error}.") from error

    def _is_healthy(self) -> bool:
        health = self.call("GET", "/api/v2/monitor/health")
        wanted = ("scheduler", "dag_processor", "triggerer")
        return all((health.get(name) or {}).get("status") == "healthy" for name in wanted)

    def _has_dag(self, dag_id: str) -> bool:
        dags = self.call("GET", "/api/v2/dags?limit=100")["dags"]
        return any(dag["dag_id"] == dag_id for dag in dags)


def _lines_of(entry: Any) -> list[str]:
    """A log entry and, where it has them, its errors; without Airflow's own framing."""
    if not isinstance(entry, dict):
        return [str(entry)]
    event = str(entry.get("event", ""))
    errors = entry.get("error_detail") or []
    found = [f"{error.get('exc_type')}: {error.get('exc_value')}" for error in errors]
    is_framing = event.startswith("::") or not event.strip()
    return found if is_framing else [event, *found]
