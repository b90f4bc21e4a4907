"""DAG factories: the tokenise pipeline, once for the form and once per declared dataset.

lock -> inventory -> plan -> tokenize -> commit -> audit -> validate -> publish -> release

``lock`` and ``release`` are Airflow's setup and teardown: the lock is given back however the run
ends, the run's state is that of ``publish`` and not that of ``release``, and clearing any task
takes the lock again for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, AssetAlias

from hcodec_airflow.assets import dataset_asset
from hcodec_airflow.audit_operator import AuditOperator
from hcodec_airflow.dataset_operators import (
    CommitOperator,
    InventoryOperator,
    LockDatasetOperator,
    PlanOperator,
    PublishOperator,
    ReleaseLockOperator,
    ValidateOperator,
)
from hcodec_airflow.forms import FIELDS, RUN_FIELDS, form
from hcodec_airflow.job_operator import CodecJobOperator
from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from airflow.sdk import Asset, Param

    from hcodec_airflow.requests import DeclaredDataset

MANUAL_DAG_ID = "tokenize_corpus"
MANUAL_ALIAS = "tokenize_corpus"
# Only makes runs possible; nothing is caught up.
_START = datetime(2026, 1, 1, tzinfo=UTC)
_RETRY = {"retries": 2, "retry_delay": timedelta(seconds=30), "retry_exponential_backoff": 2.0}


def tokenize_dag(
    dag_id: str,
    params: Mapping[str, Param],
    *,
    fixed: Mapping[str, Any] | None = None,
    outlet: Asset | AssetAlias,
    schedule: str | None = None,
    description: str = "",
) -> DAG:
    """The pipeline as a DAG.

    Args:
        dag_id: Its name.
        params: The form; entries of ``requests.TokenizeRequest`` or ``source``.
        fixed: Entries of the request that the form does not have.
        outlet: The dataset's asset, or an alias where the form says which dataset it is.
        schedule: Cron text or preset, None for manual runs only.
        description: One line under its name.
    """
    with DAG(
        dag_id,
        description=description,
        schedule=schedule,
        start_date=_START,
        catchup=False,
        # Runs of a declared dataset would only wait for each other's lock.
        max_active_runs=1 if schedule else 16,
        params=dict(params),
        render_template_as_native_obj=True,
        default_args=_RETRY,
        doc_md=_PAGE,
        tags=["hcodec", "tokenize"],
    ) as dag:
        _add_tasks(dict(fixed or {}), outlet)
    return dag


def _add_tasks(fixed: dict[str, Any], outlet: Asset | AssetAlias) -> None:
    # Templates and not XComArgs: those draw an arrow from the lock to every task.
    held = "{{ ti.xcom_pull('lock') }}"
    listed = "{{ ti.xcom_pull('inventory') }}"
    planned = "{{ ti.xcom_pull('plan') }}"
    committed = "{{ ti.xcom_pull('commit') }}"
    place: dict[str, Any] = {
        "backend": _chosen("backend", fixed),
        "profile": _chosen("profile", fixed),
    }
    lock = LockDatasetOperator(task_id="lock", request=fixed)
    inventory = InventoryOperator(task_id="inventory", request=fixed, lock=held)
    plan = PlanOperator(task_id="plan", request=fixed, lock=held, inventory=listed)
    tokenize = CodecJobOperator(
        task_id="tokenize",
        job="{{ ti.xcom_pull('plan')['job_uri'] }}",
        workers="{{ params.workers }}",
        lock=held,
        **place,
    )
    commit = CommitOperator(task_id="commit", lock=held, plan=planned)
    audit = AuditOperator(task_id="audit", plan=planned, lock=held, **place)
    validate = ValidateOperator(task_id="validate", lock=held, committed=committed)
    publish = PublishOperator(
        task_id="publish",
        lock=held,
        committed=committed,
        report_uri="{{ ti.xcom_pull('validate') }}",
        outlets=[outlet],
    )
    jobs = (tokenize.task_id, audit.task_id)
    release = ReleaseLockOperator(task_id="release", lock=held, job_tasks=jobs)
    release.as_teardown(setups=lock)
    lock >> inventory >> plan >> tokenize >> commit >> audit >> validate >> publish >> release


def _chosen(name: str, fixed: Mapping[str, Any]) -> str:
    """An entry that a declaration fixes, or else the form's; empty for the installation's."""
    return str(fixed[name] or "") if name in fixed else f"{{{{ params.{name} or '' }}}}"


def corpus_dag() -> DAG:
    """The manual DAG ``tokenize_corpus``: any source, any dataset, from the form."""
    return tokenize_dag(
        MANUAL_DAG_ID,
        form(FIELDS),
        outlet=AssetAlias(MANUAL_ALIAS),
        description="Turn a folder of audio into a versioned, checked token dataset",
    )


def declared_dag(name: str, dataset: DeclaredDataset) -> DAG:
    """``tokenize__<name>``: one declared dataset, on its schedule or by hand."""
    values = dataset.request_values()
    return tokenize_dag(
        f"tokenize__{name}",
        form(RUN_FIELDS, defaults=values),
        fixed={"dataset": name, **values},
        outlet=dataset_asset(name),
        schedule=dataset.schedule,
        description=dataset.description or f"Keep token dataset {name} up to date",
    )


def declared_dags(path: Path) -> dict[str, DAG]:
    """DAGs by id for those datasets of a TOML file that are declared well.

    A wrong entry must not stop the schedules of the others, so it is left out here, and shown as an
    import error by the file that calls ``refuse_wrong_declarations``. Raises ``ConfigError`` when
    the file is missing or no TOML.
    """
    from hcodec_airflow.requests import check_declaration, read_declarations

    dags = {}
    for name, table in read_declarations(path).items():
        try:
            dag = declared_dag(name, check_declaration(path, name, table))
        except ConfigError:
            continue
        dags[dag.dag_id] = dag
    return dags


def refuse_wrong_declarations(path: Path) -> None:
    """Raise ``ConfigError`` naming file, dataset and entry of every dataset that has no DAG."""
    from hcodec_airflow.requests import check_declaration, read_declarations

    faults = []
    for name, table in read_declarations(path).items():
        try:
            check_declaration(path, name, table)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(" ".join(faults))


_PAGE = """
### What happens
1. **lock**: one run at a time works on a dataset; another waits here and says for whom.
2. **inventory**: which audio objects exist now.
3. **plan**: which of them have no tokens yet, how many hours that is and what it may cost. Nothing
   new: the run ends here with success. Dry run: it ends here in any case.
4. **tokenize**: workers encode shard by shard; progress is in this task's log.
5. **commit**: the tokens go to a branch that readers do not see.
6. **audit**: a worker encodes a few of the files again and decodes their tokens.
7. **validate**: the whole version is checked; button *Validation report* on the task.
8. **publish**: readers see the new version; the dataset's asset gets an event.
9. **release**: workers that are left are stopped and the lock is given back, however the run ended.

A failed validation publishes nothing and names the files. To go on with a run, clear its failed
task: the lock is taken again, finished shards stay finished.
"""
