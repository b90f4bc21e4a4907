"""Runs shipped DAGs in a real Airflow, as the tests ask.

Arguments: the folder of the DAG files, a JSON list of the forms to run, and the DAG's id (else
``tokenize_corpus``). Facts of the runs are printed after a mark.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from airflow.dag_processing.dagbag import DagBag
from airflow.utils.session import create_session


def main() -> None:
    facts = []
    for form in json.loads(sys.argv[2]):
        # Read anew each time: a run leaves its parameters in the DAG object.
        bag = DagBag(sys.argv[1])
        assert not bag.import_errors, bag.import_errors
        dag = bag.dags[sys.argv[3] if sys.argv[3:] else "tokenize_corpus"]
        run = dag.test(run_conf=form)
        facts.append(_facts_of(dag, run))
    print("FACTS" + json.dumps(facts, default=str))


def _facts_of(dag: Any, run: Any) -> dict[str, Any]:
    from airflow.models.asset import AssetEvent
    from airflow.models.xcom import XComModel
    from sqlalchemy import select

    with create_session() as session:
        xcoms = session.scalars(select(XComModel).where(XComModel.run_id == run.run_id)).all()
        events = session.scalars(
            select(AssetEvent).where(AssetEvent.source_run_id == run.run_id)
        ).all()
        return {
            "state": str(run.state),
            "tasks": {_name(t): str(t.state) for t in run.get_task_instances(session=session)},
            "xcoms": {f"{_name(x)}.{x.key}": XComModel.deserialize_value(x) for x in xcoms},
            "events": [{"uri": e.asset.uri, "extra": e.extra} for e in events],
        }


def _name(row: Any) -> str:
    """Task of a task instance or XCom; mapped ones with their index."""
    return row.task_id if row.map_index < 0 else f"{row.task_id}[{row.map_index}]"


if __name__ == "__main__":
    Path(sys.argv[1]).resolve(strict=True)
    main()
