"""The round-trip audit as a task: a worker encodes a sample of a plan's rows again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hcodec_airflow.failures import task_failures
from hcodec_airflow.job_operator import CodecJobOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

logger = logging.getLogger(__name__)


class AuditOperator(CodecJobOperator):
    """Chooses rows of a plan that is done and has one worker audit them; ``validate`` judges.

    The worker must be of the plan's compute class: give it the backend and profile of the task
    that made the tokens. A plan without rows is not audited, and the task succeeds.

    Args:
        plan: What the plan task returned (templated).
    """

    template_fields: Sequence[str] = (*CodecJobOperator.template_fields, "plan")

    def __init__(self, *, plan: Any, **kwargs: Any) -> None:
        """Keep where the plan's description comes from; ``kwargs`` are those of the base."""
        super().__init__(job="", workers=1, **kwargs)
        self.plan = plan

    def execute(self, context: Context) -> Any:
        """Write the audit's job, then run it."""
        from hcodec_airflow import steps

        with task_failures():
            self.job = steps.make_audit(self.plan["plan_uri"])
        if not self.job:
            logger.info("No file of this plan has tokens: there is nothing to audit.")
            return None
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """See the base; a resumed task knows its job from the event."""
        self.job = event["request"]["job_uri"]
        return super().execute_complete(context, event)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """None: an audit makes no data."""
        return None
