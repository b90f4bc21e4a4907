"""Stopping the workers of a task that has ended without doing so itself.

A task that is marked failed while it is deferred is stopped by its trigger's ``on_kill``, which
needs a triggerer. A teardown of the same run needs none: it calls ``stop_leftovers``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk.types import RuntimeTaskInstanceProtocol

logger = logging.getLogger(__name__)

ENDED_STATES = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})
WORKERS_KEY = "workers"
"""XCom of a job's task: ``backend``, ``request`` and ``owner`` of the workers that it asked for."""


def stop_leftovers(teardown: RuntimeTaskInstanceProtocol, task_id: str) -> bool:
    """Stop the workers that a task of the teardown's run left; true when there may have been some.

    Only those of a try that has ended for good and did not conclude its job, and only while no
    later try, nor another run, has adopted them. Raises what the backend raises.
    """
    # Read before the state: of a try that begins after this, neither owner nor workers are named.
    noted = teardown.xcom_pull(task_ids=task_id, key=WORKERS_KEY)
    has_concluded = teardown.xcom_pull(task_ids=task_id) is not None
    if not noted or has_concluded:
        return False
    state = task_state(teardown.dag_id, teardown.run_id, task_id)
    if state not in ENDED_STATES:
        logger.info("Task %s is %s: its workers go on.", task_id, state or "to run again")
        return False
    if not stop_workers(**noted):
        logger.info("The workers of task %s belong to a newer try.", task_id)
        return False
    logger.info("Task %s has ended (%s): no worker of it is left.", task_id, state)
    return True


def stop_workers(backend: str, request: dict[str, Any], owner: str) -> bool:
    """Stop workers, named by plain values, if ``owner`` still owns them; true when it did."""
    from hcodec_airflow.backends import open_backend
    from hcodec_airflow.settings import read_settings
    from hcodec_airflow.triggers import request_from

    return open_backend(backend, read_settings()).kill(request_from(request), owner)


def task_state(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str | None:
    """State of a task in Airflow's database; None once it was cleared, or its run deleted."""
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

    states = RuntimeTaskInstance.get_task_states(
        dag_id=dag_id, task_ids=[task_id], run_ids=[run_id], map_index=map_index
    )
    name = task_id if map_index < 0 else f"{task_id}_{map_index}"
    state = states.get(run_id, {}).get(name)
    return None if state is None else str(getattr(state, "value", state))
