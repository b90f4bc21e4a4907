"""The operators of ``retrain_codec`` and ``rollback_codec``: shells over ``retrain_steps``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.exceptions import HITLRejectException
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import BaseOperator, SkipMixin
from airflow.sdk.exceptions import AirflowFailException, DagRunTriggerException

from hcodec_airflow.failures import task_failures
from hcodec_airflow.links import REPORT_URL_KEY, EvaluationReportLink

if TYPE_CHECKING:
    from airflow.sdk import Context

    from hcodec_airflow.retrain_requests import RetrainRequest

logger = logging.getLogger(__name__)
_COLOUR = "#f0e3f5"
_TALKATIVE = ("alembic", "mlflow", "pyiceberg")


class RetrainOperator(BaseOperator):
    """Base of the operators: one request, from the DAG's form and what the DAG fixes.

    Args:
        request: Entries of ``retrain_requests.RetrainRequest`` that the form does not have.
    """

    ui_color = _COLOUR

    def __init__(self, *, request: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep what is fixed; the rest is in the run's parameters."""
        super().__init__(**kwargs)
        self.request = dict(request or {})

    def execute(self, context: Context) -> Any:
        """Do the step; errors of the product fail the task with their sentence."""
        # Their remarks by the hundred would hide the lines that matter in the task's log.
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with task_failures():
            return self.step(context, _request_of(self.request, context))

    def step(self, context: Context, request: RetrainRequest) -> Any:
        """What the operator does."""
        raise NotImplementedError


class _MayEnd(RetrainOperator, SkipMixin):
    """A step after which there may be nothing left to do: the run then ends with success."""

    inherits_from_skipmixin = True

    def end_if(self, is_over: bool, context: Context) -> None:
        """Skip what follows; the tasks after those are skipped because of that."""
        if is_over:
            self.skip(ti=context["ti"], tasks=self.get_direct_relatives(upstream=False))


class DueOperator(_MayEnd):
    """Lets a scheduled run go on only when enough audio is new; other runs always go on.

    Args:
        min_new_hours: Hours of audio by which the datasets must have grown.
    """

    def __init__(self, *, min_new_hours: float, **kwargs: Any) -> None:
        """Keep the threshold."""
        super().__init__(**kwargs)
        self.min_new_hours = min_new_hours

    def step(self, context: Context, request: RetrainRequest) -> bool:
        """See the class."""
        from hcodec_airflow.retrain_due import is_due

        run_type = context["dag_run"].run_type
        if str(getattr(run_type, "value", run_type)) != "scheduled":
            logger.info("Started by a person or an event: hours are not asked for.")
            return True
        verdict, sentence = is_due(request.codec, request.data, self.min_new_hours)
        logger.info("%s", sentence)
        self.end_if(not verdict, context)
        return verdict


class PinOperator(_MayEnd):
    """Pins base, recipe and data, and writes the training's job; logs what it would take.

    In a dry run all later tasks are skipped and the run succeeds.
    """

    def step(self, context: Context, request: RetrainRequest) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import retrain_steps

        pinned = retrain_steps.pin(request)
        self.end_if(pinned["ends_run"], context)
        return pinned


class ExportOperator(_MayEnd):
    """Checks and registers the trained codec, and writes the evaluation's job.

    With the very weights of the champion all later tasks are skipped and the run succeeds.

    Args:
        pinned: What the pin task returned (templated).
    """

    template_fields: Sequence[str] = ("pinned",)

    def __init__(self, *, pinned: Any, **kwargs: Any) -> None:
        """Keep where the description of the run comes from."""
        super().__init__(**kwargs)
        self.pinned = pinned
        self._exported: dict[str, Any] = {}

    def step(self, context: Context, request: RetrainRequest) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import retrain_steps

        exported = retrain_steps.export(request, self.pinned)
        self.end_if(exported["ends_run"], context)
        self._exported = exported
        return exported

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """For Airflow's OpenLineage provider: data and base in, the trained codec out."""
        if self._exported.get("ends_run", True):
            return None
        from hcodec_airflow.lineage import lineage_of_export

        return lineage_of_export(self.pinned, self._exported)


class GateOperator(RetrainOperator):
    """Decides by the evaluation; returns the decision. A challenger that fails fails the task.

    Args:
        exported: What the export task returned (templated).
    """

    template_fields: Sequence[str] = ("exported",)
    operator_extra_links = (EvaluationReportLink(),)

    def __init__(self, *, exported: Any, **kwargs: Any) -> None:
        """Keep where the description of the challenger comes from."""
        super().__init__(**kwargs)
        self.exported = exported

    def step(self, context: Context, request: RetrainRequest) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import retrain_steps

        decision = retrain_steps.judge(request, self.exported)
        context["ti"].xcom_push(key=REPORT_URL_KEY, value=decision["report_url"])
        if not decision["passed"]:
            raise AirflowFailException(f"Nothing is promoted. {decision['sentence']}")
        return decision


class ApprovePromotionOperator(ApprovalOperator):
    """Asks a person whether the challenger becomes the champion; waits without holding a slot.

    A no is recorded with its reason, so that the decision can never be promoted, and fails the
    task. With approval ``automatic`` nobody is asked. Returns who said yes.

    Args:
        decision: What the gate task returned (templated).
        request: Entries of the request that the form does not have.
        kwargs: Of ``ApprovalOperator``; ``params`` may have a field ``reason``.
    """

    template_fields: Sequence[str] = ("subject", "body", "decision")
    operator_extra_links = (EvaluationReportLink(),)
    ui_color = _COLOUR

    def __init__(
        self, *, decision: Any, request: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keep where the question comes from."""
        super().__init__(fail_on_reject=True, **kwargs)
        self.decision = decision
        self.request = dict(request or {})

    def execute(self, context: Context) -> Any:
        """Ask, unless that is not wanted or the answer is known."""
        context["ti"].xcom_push(key=REPORT_URL_KEY, value=self.decision["report_url"])
        with task_failures():
            from hcodec_airflow import retrain_steps

            request = _request_of(self.request, context)
            refusal = retrain_steps.refusal_of(request.codec, self.decision["decision_id"])
        if refusal:
            raise AirflowFailException(f"Nothing is promoted. {refusal}")
        if request.approval == "automatic":
            logger.info("Approved by the gate alone: approval is automatic.")
            return {"by": "the gate (automatic)", "reason": ""}
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, str]:
        """Take the answer."""
        by = (event.get("responded_by_user") or {}).get("name") or "somebody"
        reason = str((event.get("params_input") or {}).get("reason") or "")
        try:
            super().execute_complete(context, event)
        except HITLRejectException:
            self._reject(context, by, reason)
        return {"by": by, "reason": reason}

    def _reject(self, context: Context, by: str, reason: str) -> None:
        with task_failures():
            from hcodec_airflow import retrain_steps

            codec = _request_of(self.request, context).codec
            sentence = retrain_steps.reject(codec, self.decision["decision_id"], by, reason)
        raise AirflowFailException(f"Nothing is promoted. {sentence}")


class PromoteOperator(RetrainOperator):
    """Makes the challenger the champion; the codec's asset gets an event with what is returned.

    Args:
        decision: What the gate task returned (templated).
        approved: What the approve task returned (templated).
    """

    template_fields: Sequence[str] = ("decision", "approved")

    def __init__(self, *, decision: Any, approved: Any, **kwargs: Any) -> None:
        """Keep where decision and approval come from."""
        super().__init__(**kwargs)
        self.decision = decision
        self.approved = approved

    def step(self, context: Context, request: RetrainRequest) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import retrain_steps

        decision_id, by = self.decision["decision_id"], self.approved["by"]
        champion = retrain_steps.promote(request.codec, decision_id, by)
        _tell(self, context, champion)
        return champion


class PlanTokensOperator(RetrainOperator):
    """Logs what the promotion means for the datasets' tokens; returns the runs to be started.

    The plans are in XCom ``plans``. No run is returned unless the form asks for them.

    Args:
        exported: What the export task returned (templated).
        decision: What the gate task returned (templated).
    """

    template_fields: Sequence[str] = ("exported", "decision")

    def __init__(self, *, exported: Any, decision: Any, **kwargs: Any) -> None:
        """Keep where challenger and decision come from."""
        super().__init__(**kwargs)
        self.exported = exported
        self.decision = decision

    def step(self, context: Context, request: RetrainRequest) -> list[dict[str, Any]]:
        """See the class."""
        from hcodec_airflow import retrain_steps

        decision_id = self.decision["decision_id"]
        plans, runs = retrain_steps.plan_tokens(request, self.exported, decision_id)
        context["ti"].xcom_push(key="plans", value=plans)
        return runs


class StartTokenisingOperator(BaseOperator):
    """Starts a run of ``tokenize_corpus`` and does not wait for it; one that is there stays.

    Args:
        run: Its id and form (mapped).
        dag_id_to_start: The DAG.
    """

    template_fields: Sequence[str] = ("run",)
    ui_color = _COLOUR

    def __init__(self, *, run: Any, dag_id_to_start: str, **kwargs: Any) -> None:
        """Keep what to start."""
        super().__init__(**kwargs)
        self.run = run
        self.dag_id_to_start = dag_id_to_start

    def execute(self, context: Context) -> None:
        """See the class."""
        # TriggerDagRunOperator does the same, but takes 0.4 s to import at every parse.
        raise DagRunTriggerException(
            trigger_dag_id=self.dag_id_to_start,
            dag_run_id=self.run["run_id"],
            conf=self.run["conf"],
            reset_dag_run=False,
            skip_when_already_exists=True,
            wait_for_completion=False,
            allowed_states=[],
            failed_states=[],
            poke_interval=60,
            deferrable=False,
        )


class RollBackOperator(BaseOperator):
    """Makes the champion before this one the champion again; the asset gets an event.

    A repeated run changes nothing: it names the champion that is to leave.
    """

    ui_color = _COLOUR

    def execute(self, context: Context) -> dict[str, Any]:
        """See the class."""
        with task_failures():
            from hcodec_airflow import retrain_steps
            from hcodec_airflow.retrain_requests import read_rollback

            request = read_rollback(dict(context["params"]))
            user = getattr(context["dag_run"], "triggering_user_name", None)
            champion = retrain_steps.roll_back(request, by=user or "airflow")
        _tell(self, context, champion)
        return champion


def _request_of(fixed: Mapping[str, Any], context: Context) -> RetrainRequest:
    from hcodec_airflow.retrain_requests import read_retraining

    values = {**dict(context["params"]), **fixed}
    values.pop("reason", None)  # of the question of the approval alone
    return read_retraining(values)


def _tell(operator: BaseOperator, context: Context, champion: dict[str, Any]) -> None:
    from airflow.sdk import Asset, AssetAlias

    from hcodec_airflow.assets import champion_asset

    for outlet in operator.outlets:
        if isinstance(outlet, AssetAlias):
            asset = champion_asset(champion["codec"])
            context["outlet_events"][outlet].add(asset, extra=champion)
        elif isinstance(outlet, Asset):
            context["outlet_events"][outlet].extra = champion
