"""DAG factories: retraining, once for the form and once per declared codec, and rollback.

(due ->) pin -> train -> export -> evaluate -> gate -> approve -> promote -> tokens -> tokenise
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, AssetAlias, AssetOrTimeSchedule, CronTriggerTimetable

from hcodec_airflow.assets import champion_asset, drift_asset
from hcodec_airflow.job_operator import CodecJobOperator
from hcodec_airflow.pipelines import MANUAL_DAG_ID as TOKENIZE_DAG_ID
from hcodec_airflow.retrain_form import ANSWER_FIELDS, FIELDS, ROLLBACK_FIELDS, form
from hcodec_airflow.retrain_operators import (
    ApprovePromotionOperator,
    DueOperator,
    ExportOperator,
    GateOperator,
    PinOperator,
    PlanTokensOperator,
    PromoteOperator,
    RollBackOperator,
    StartTokenisingOperator,
)
from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from airflow.sdk import Asset, Param

    from hcodec_airflow.retrain_requests import DeclaredCodec

RETRAIN_DAG_ID = "retrain_codec"
ROLLBACK_DAG_ID = "rollback_codec"
_RETRY = {"retries": 2, "retry_delay": timedelta(seconds=30), "retry_exponential_backoff": 2.0}
_DAG: dict[str, Any] = {
    # Only makes runs possible; nothing is caught up.
    "start_date": datetime(2026, 1, 1, tzinfo=UTC),
    "catchup": False,
    "render_template_as_native_obj": True,
    "default_args": _RETRY,
    "tags": ["hcodec", "retrain"],
}


def retrain_dag(
    dag_id: str,
    params: Mapping[str, Param],
    *,
    outlet: Asset | AssetAlias,
    fixed: Mapping[str, Any] | None = None,
    schedule: Any = None,
    min_new_hours: float | None = None,
    description: str = "",
) -> DAG:
    """The pipeline as a DAG.

    Args:
        dag_id: Its name.
        params: The form; entries of ``retrain_requests.RetrainRequest``.
        outlet: The codec's asset, or an alias where the form says which codec it is.
        fixed: Entries of the request that the form does not have.
        schedule: Cron text, preset, assets or a timetable; None for manual runs only.
        min_new_hours: Hours of audio that must be new for a scheduled run to go on.
        description: One line under its name.
    """
    with DAG(
        dag_id,
        description=description,
        schedule=schedule,
        max_active_runs=1 if schedule else 16,
        params=dict(params),
        doc_md=_PAGE,
        **_DAG,
    ) as dag:
        pin = _add_tasks(dict(fixed or {}), outlet)
        if min_new_hours is not None:
            request = dict(fixed or {})
            due = DueOperator(task_id="due", request=request, min_new_hours=min_new_hours)
            due >> pin
    return dag


def _add_tasks(request: dict[str, Any], outlet: Asset | AssetAlias) -> PinOperator:
    # Templates and not XComArgs: those draw an arrow from a task to all that read of it.
    pinned = "{{ ti.xcom_pull('pin') }}"
    exported = "{{ ti.xcom_pull('export') }}"
    decision = "{{ ti.xcom_pull('gate') }}"
    profile = "{{ params.profile or '' }}"
    pin = PinOperator(task_id="pin", request=request)
    train = CodecJobOperator(
        task_id="train",
        job="{{ ti.xcom_pull('pin')['job_uri'] }}",
        backend="{{ ti.xcom_pull('pin')['train_backend'] }}",
        workers="{{ params.nodes }}",
        processes_per_node="{{ params.gpus }}",
        profile=profile,
    )
    export = ExportOperator(task_id="export", request=request, pinned=pinned)
    evaluate = CodecJobOperator(
        task_id="evaluate",
        job="{{ ti.xcom_pull('export')['job_uri'] }}",
        backend="{{ ti.xcom_pull('pin')['evaluate_backend'] }}",
        workers=1,
        profile=profile,
    )
    gate = GateOperator(task_id="gate", request=request, exported=exported)
    approve = ApprovePromotionOperator(
        task_id="approve",
        request=request,
        decision=decision,
        params=form(ANSWER_FIELDS),
        subject="{{ ti.xcom_pull('gate')['subject'] }}",
        body="{{ ti.xcom_pull('gate')['body'] }}",
    )
    promote = PromoteOperator(
        task_id="promote",
        request=request,
        decision=decision,
        approved="{{ ti.xcom_pull('approve') }}",
        outlets=[outlet],
    )
    tokens = PlanTokensOperator(
        task_id="tokens", request=request, exported=exported, decision=decision
    )
    tokenise = StartTokenisingOperator.partial(
        task_id="tokenise", dag_id_to_start=TOKENIZE_DAG_ID
    ).expand(run=tokens.output)
    pin >> train >> export >> evaluate >> gate >> approve >> promote >> tokens >> tokenise
    return pin


def codec_dag() -> DAG:
    """The manual DAG ``retrain_codec``: any codec, any data, from the form."""
    return retrain_dag(
        RETRAIN_DAG_ID,
        form(FIELDS),
        outlet=AssetAlias(RETRAIN_DAG_ID),
        description="Train a codec anew, compare it with the champion, promote it",
    )


def declared_codec_dag(name: str, codec: DeclaredCodec) -> DAG:
    """``retrain__<name>``: one declared codec, by its schedule, by drift, or by hand."""
    return retrain_dag(
        f"retrain__{name}",
        form(FIELDS, left_out={"codec"}, defaults=codec.request_values()),
        outlet=champion_asset(name),
        fixed={"codec": name},
        schedule=_schedule(codec),
        min_new_hours=codec.min_new_hours,
        description=codec.description or f"Train codec {name} anew",
    )


def _schedule(codec: DeclaredCodec) -> Any:
    if not codec.on_drift_of:
        return codec.schedule
    assets = reduce(or_, (drift_asset(dataset) for dataset in codec.on_drift_of))
    if codec.schedule is None:
        return assets
    timetable = CronTriggerTimetable(codec.schedule, timezone="UTC")
    return AssetOrTimeSchedule(timetable=timetable, assets=assets)


def declared_codec_dags(path: Path) -> dict[str, DAG]:
    """DAGs by id for those codecs of a TOML file that are declared well.

    A wrong entry must not stop the schedules of the others, so it is left out here, and shown as an
    import error by the file that calls ``refuse_wrong_codecs``. Raises ``ConfigError`` when the
    file is missing or no TOML.
    """
    from hcodec_airflow.retrain_requests import check_codec, read_codecs

    dags = {}
    for name, table in read_codecs(path).items():
        try:
            dag = declared_codec_dag(name, check_codec(path, name, table))
        except ConfigError:
            continue
        dags[dag.dag_id] = dag
    return dags


def refuse_wrong_codecs(path: Path) -> None:
    """Raise ``ConfigError`` naming file, codec and entry of every codec that has no DAG."""
    from hcodec_airflow.retrain_requests import check_codec, read_codecs

    faults = []
    for name, table in read_codecs(path).items():
        try:
            check_codec(path, name, table)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(" ".join(faults))


def rollback_dag() -> DAG:
    """``rollback_codec``: the champion before this one becomes the champion again."""
    with DAG(
        ROLLBACK_DAG_ID,
        description="Go back to the champion before this one",
        schedule=None,
        params=form(ROLLBACK_FIELDS),
        doc_md=_ROLLBACK_PAGE,
        **_DAG,
    ) as dag:
        RollBackOperator(task_id="roll_back", outlets=[AssetAlias(ROLLBACK_DAG_ID)])
    return dag


_PAGE = """
### What happens
1. **pin**: data, recipe and starting weights are pinned; files, GPU hours and cost are in this
   task's log. A dry run ends here.
2. **train**: goes on where it stopped, whatever ends it.
3. **export**: the codec's files are checked and registered as the challenger.
4. **evaluate**: challenger and champion on the same held-out set; button *Evaluation report* on the
   next two tasks.
5. **gate**: the margins decide. A challenger that does not pass fails this task.
6. **approve**: a person says yes or no under *Required actions*. A no is kept with its reason.
7. **promote**: the alias champion moves, the codec's asset gets an event.
8. **tokens**: what that means for datasets, with files, hours, bytes and cost.
9. **tokenise**: only when the form asks for it; one run of tokenize_corpus per dataset.

Before **promote** nothing changes for anybody. To go back afterwards: DAG rollback_codec.
To go on with a run, clear its failed task. Was another codec promoted meanwhile, clear **export**:
it is compared with that one then.
"""

_ROLLBACK_PAGE = """
The champion before this one becomes the champion again; both stay in the history. What was rolled
back comes back only by a new evaluation and decision. Tokens that were made stay as they are.
"""
