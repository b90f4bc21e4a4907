"""Extra links: buttons on a task's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

REPORT_URL_KEY = "report_url"
CARD_URL_KEY = "card_url"
EVIDENCE_URL_KEY = "evidence_url"
LOGS_URL_KEY = "logs_url"
MANIFEST_URL_KEY = "manifest_url"


class ValidationReportLink(BaseOperatorLink):
    """Leads to the Data Docs page of a validation, also of one that failed."""

    @property
    def name(self) -> str:
        """Text of the button."""
        return "Validation report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Address of the page that this try wrote, empty when it wrote none."""
        from airflow.sdk.execution_time.xcom import XCom

        return str(XCom.get_value(key=REPORT_URL_KEY, ti_key=ti_key) or "")


class WorkerLogsLink(BaseOperatorLink):
    """Leads to the page of all workers' logs, written when the job is over."""

    @property
    def name(self) -> str:
        """Text of the button."""
        return "Worker logs"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Address of the page, empty when no worker was started."""
        return _pushed(LOGS_URL_KEY, ti_key)


class JobManifestLink(BaseOperatorLink):
    """Leads to what was submitted to Kubernetes, as YAML."""

    @property
    def name(self) -> str:
        """Text of the button."""
        return "Job manifest"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Address of the manifest, empty for workers elsewhere."""
        return _pushed(MANIFEST_URL_KEY, ti_key)


def _pushed(key: str, ti_key: TaskInstanceKey) -> str:
    from airflow.sdk.execution_time.xcom import XCom

    return str(XCom.get_value(key=key, ti_key=ti_key) or "")


class DatasetCardLink(BaseOperatorLink):
    """Leads to the dataset card of the version that was published."""

    @property
    def name(self) -> str:
        """Text of the button."""
        return "Dataset card"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Address of the page, empty when nothing was published."""
        from airflow.sdk.execution_time.xcom import XCom

        return str(XCom.get_value(key=CARD_URL_KEY, ti_key=ti_key) or "")


class DriftEvidenceLink(BaseOperatorLink):
    """Leads to the evidence page of a window that was judged."""

    @property
    def name(self) -> str:
        """Text of the button."""
        return "Drift evidence"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Address of the page, empty when nothing was judged."""
        return _pushed(EVIDENCE_URL_KEY, ti_key)


class EvaluationReportLink(BaseOperatorLink):
    """Leads to the report of an evaluation, with recordings to listen to."""

    @property
    def name(self) -> str:
        """Text of the button."""
        return "Evaluation report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Address of the page, empty when nothing was evaluated."""
        return _pushed(REPORT_URL_KEY, ti_key)
