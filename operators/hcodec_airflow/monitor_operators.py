"""The operators of ``monitor_tokens``: choose datasets, judge the window of one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import AssetAlias, BaseOperator

from hcodec_airflow.assets import drift_asset
from hcodec_airflow.failures import task_failures
from hcodec_airflow.links import EVIDENCE_URL_KEY, DriftEvidenceLink
from hcodec_airflow.monitor import read_monitor_request

if TYPE_CHECKING:
    from airflow.sdk import Context

logger = logging.getLogger(__name__)
_COLOUR = "#e3e8f5"


class ChooseWatchedOperator(BaseOperator):
    """Returns the datasets of this run.

    Those that the form names; else those whose new versions started the run; else all declared
    ones. Of the latter two, those that cannot be monitored yet are left out with their reason.

    Args:
        declared: Names of the declared datasets.
    """

    ui_color = _COLOUR

    def __init__(self, *, declared: Sequence[str], **kwargs: Any) -> None:
        """Keep the names."""
        super().__init__(**kwargs)
        self.declared = list(declared)

    def execute(self, context: Context) -> list[str]:
        """See the class. A wrong form fails here."""
        from hcodec_airflow.monitor import watched

        with task_failures():
            request = read_monitor_request(dict(context["params"]))
            if request.datasets:
                return list(dict.fromkeys(request.datasets))
            chosen = []
            for name in _published(context) or self.declared:
                reason = watched(name, request.reference)
                if reason:
                    logger.info("Not monitored: %s.", reason)
                else:
                    chosen.append(name)
        logger.info("To judge: %s", ", ".join(chosen) or "none")
        return chosen


class MonitorDatasetOperator(BaseOperator):
    """Judges the window of one dataset; an alarm is an event of the dataset's drift asset.

    Returns a few facts of the window; an event's ``extra`` is the same, with the evidence's place.

    Args:
        dataset: Name of the dataset (mapped).
    """

    template_fields: Sequence[str] = ("dataset",)
    operator_extra_links = (DriftEvidenceLink(),)
    ui_color = _COLOUR

    def __init__(self, *, dataset: str, **kwargs: Any) -> None:
        """Keep the name."""
        super().__init__(**kwargs)
        self.dataset = dataset

    def execute(self, context: Context) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow.monitor import monitor_dataset

        # Its remarks by the hundred would hide the lines that matter in the task's log.
        logging.getLogger("pyiceberg").setLevel(logging.WARNING)
        task = context["ti"]
        with task_failures():
            request = read_monitor_request(dict(context["params"]))
            facts = monitor_dataset(self.dataset, request, f"{task.dag_id}/{task.run_id}")
        if "evidence_url" in facts:
            task.xcom_push(key=EVIDENCE_URL_KEY, value=facts["evidence_url"])
        if facts["is_alarm"]:
            logger.warning("ALARM: the tokens of %s drifted.", self.dataset)
            for outlet in self.outlets:
                if isinstance(outlet, AssetAlias):
                    asset = drift_asset(self.dataset)
                    context["outlet_events"][outlet].add(asset, extra=facts)
        return facts


def _published(context: Context) -> list[str]:
    """Datasets whose versions started this run, each once."""
    events = context.get("triggering_asset_events") or {}
    found = [event.extra.get("dataset") for listed in events.values() for event in listed]
    return list(dict.fromkeys(name for name in found if name))
