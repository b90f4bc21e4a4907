"""Extra links: buttons on a task's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

REPORT_URL_KEY = "report_url"


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
