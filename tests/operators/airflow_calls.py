"""What people do to runs and tasks in Airflow's pages, as calls of its REST API."""

from __future__ import annotations

import contextlib

from hcodec_airflow.demo.airflow_api import AirflowApi


class Calls(AirflowApi):
    """Calls beyond those of the demo."""

    def mark_failed(self, dag_id: str, run_id: str, task_id: str) -> None:
        """A task's button *Mark as failed*."""
        path = f"{_run(dag_id, run_id)}/taskInstances/{task_id}"
        self.call("PATCH", path, {"new_state": "failed"})

    def mark_run_failed(self, dag_id: str, run_id: str) -> None:
        """The same of a run."""
        self.call("PATCH", _run(dag_id, run_id), {"state": "failed"})

    def delete_run(self, dag_id: str, run_id: str) -> None:
        """Delete a run with all its rows."""
        with contextlib.suppress(ValueError):  # its answer has no body
            self.call("DELETE", _run(dag_id, run_id))

    def clear(self, dag_id: str, run_id: str, task_id: str) -> None:
        """Clear one task, which runs again."""
        body = {
            "dry_run": False,
            "only_failed": False,
            "dag_run_id": run_id,
            "task_ids": [task_id],
        }
        self.call("POST", f"/api/v2/dags/{dag_id}/clearTaskInstances", body)


def _run(dag_id: str, run_id: str) -> str:
    return f"/api/v2/dags/{dag_id}/dagRuns/{run_id}"
