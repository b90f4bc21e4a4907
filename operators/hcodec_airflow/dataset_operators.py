"""The operators around the job: lock, inventory, plan, commit, validate, publish, release.

Each is a thin shell over one function of ``steps``; what it returns is small and plain.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, SkipMixin
from airflow.sdk.exceptions import AirflowFailException

from hcodec_airflow.failures import task_failures
from hcodec_airflow.links import (
    CARD_URL_KEY,
    REPORT_URL_KEY,
    DatasetCardLink,
    ValidationReportLink,
)
from hcodec_airflow.locking import kept_alive

if TYPE_CHECKING:
    from airflow.sdk import Context

    from hcodec_airflow.requests import TokenizeRequest

logger = logging.getLogger(__name__)
_TALKATIVE = ("great_expectations", "pyiceberg")


class DatasetOperator(BaseOperator):
    """Base of the operators: one request, from the DAG's form and what the DAG fixes.

    Args:
        request: Entries of ``requests.TokenizeRequest`` that the form does not have.
        lock: What the lock task returned, kept alive meanwhile (templated).
    """

    template_fields: Sequence[str] = ("lock",)
    ui_color = "#e8f0dd"

    def __init__(
        self, *, request: Mapping[str, Any] | None = None, lock: Any = None, **kwargs: Any
    ) -> None:
        """Keep what is fixed; the rest is in the run's parameters."""
        super().__init__(**kwargs)
        self.request = dict(request or {})
        self.lock = lock

    def execute(self, context: Context) -> Any:
        """Do the step; errors of the product fail the task with their sentence."""
        # Their remarks by the hundred would hide the lines that matter in the task's log.
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with task_failures(), kept_alive(self.lock):
            return self.step(context)

    def step(self, context: Context) -> Any:
        """What the operator does."""
        raise NotImplementedError

    def read_request(self, context: Context) -> TokenizeRequest:
        """The request of this run. Raises ``ConfigError`` naming each wrong entry."""
        from hcodec_airflow.requests import read_request

        return read_request({**self.request, **dict(context["params"])})


class LockDatasetOperator(DatasetOperator):
    """Takes the dataset's lock; while another run holds it, waits deferred and says for whom.

    Returns the lock for the other tasks' ``lock``; a dry run needs none and returns ``{}``.
    """

    ui_color = "#f3e6c8"

    def step(self, context: Context) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow.locking import LockWait

        request = self.read_request(context)
        if request.dry_run:
            logger.info("Dry run: no lock is needed.")
            return {}
        task = context["ti"]
        owner = f"{task.dag_id}/{task.run_id}"
        lock, message = LockWait(request.dataset, owner).ask()
        logger.info("%s", message)
        if lock is None:
            self._wait(request.dataset, owner)
        return lock or {}

    def take_from_trigger(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """The lock that the trigger got. Fails when there was no use in asking on."""
        if "error" in event:
            raise AirflowFailException(event["error"])
        logger.info("%s", event["message"])
        lock: dict[str, Any] = event["lock"]
        return lock

    def _wait(self, dataset: str, owner: str) -> None:
        from hcodec_airflow.triggers import DatasetLockTrigger

        self.defer(trigger=DatasetLockTrigger(dataset, owner), method_name="take_from_trigger")


class ReleaseLockOperator(DatasetOperator):
    """Gives the dataset's lock back, whatever became of the run, and stops workers left by it.

    Args:
        job_tasks: Ids of the run's ``CodecJobOperator``s, whose workers shall not outlive the run.
    """

    ui_color = "#f3e6c8"

    def __init__(self, *, job_tasks: Sequence[str] = (), **kwargs: Any) -> None:
        """Keep the tasks' ids."""
        super().__init__(**kwargs)
        self.job_tasks = tuple(job_tasks)

    def execute(self, context: Context) -> None:
        """See the class."""
        from hcodec_airflow.leftovers import stop_leftovers
        from hcodec_airflow.locking import release_lock

        with task_failures():
            try:
                for task_id in self.job_tasks:
                    stop_leftovers(context["ti"], task_id)
            finally:
                release_lock(self.lock)


class InventoryOperator(DatasetOperator):
    """Lists the source's objects; returns the inventory's URI and size."""

    def step(self, context: Context) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import steps

        task = context["ti"]
        return steps.inventory(self.read_request(context), f"{task.dag_id}/{task.run_id}")


class PlanOperator(DatasetOperator, SkipMixin):
    """Plans the work and logs its size and cost; returns the plan's URIs and counts.

    With nothing to do, or in a dry run, all later tasks are skipped and the run succeeds.

    Args:
        inventory: What the inventory task returned (templated).
    """

    template_fields: Sequence[str] = ("lock", "inventory")
    inherits_from_skipmixin = True

    def __init__(self, *, inventory: Any, **kwargs: Any) -> None:
        """Keep where the inventory's description comes from."""
        super().__init__(**kwargs)
        self.inventory = inventory

    def step(self, context: Context) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import steps

        plan = steps.plan(self.read_request(context), self.inventory["inventory_uri"])
        if plan["ends_run"]:
            context["ti"].xcom_push(key="return_value", value=plan)
            later = self.get_flat_relatives(upstream=False)
            # Teardowns run all the same: the lock is given back.
            self.skip(ti=context["ti"], tasks=[task for task in later if not task.is_teardown])
        return plan


class CommitOperator(DatasetOperator):
    """Registers the plan's results on a branch of their own; returns snapshot and counts.

    Args:
        plan: What the plan task returned (templated).
    """

    template_fields: Sequence[str] = ("lock", "plan")

    def __init__(self, *, plan: Any, **kwargs: Any) -> None:
        """Keep where the plan's description comes from."""
        super().__init__(**kwargs)
        self.plan = plan

    def step(self, context: Context) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import steps

        return steps.commit(self.plan["plan_uri"])


class ValidateOperator(DatasetOperator):
    """Checks the committed snapshot; returns the report's URI.

    A snapshot that fails loses its branch, so nothing of it can be published; the task fails
    naming files and checks, and its button still leads to the report.

    Args:
        committed: What the commit task returned (templated).
    """

    template_fields: Sequence[str] = ("lock", "committed")
    operator_extra_links = (ValidationReportLink(),)

    def __init__(self, *, committed: Any, **kwargs: Any) -> None:
        """Keep where the commit's description comes from."""
        super().__init__(**kwargs)
        self.committed = committed

    def step(self, context: Context) -> str:
        """See the class."""
        from hcodec_airflow import steps

        report = steps.validate(self.committed)
        context["ti"].xcom_push(key=REPORT_URL_KEY, value=report.url)
        if report.failure is not None:
            raise report.failure
        return report.uri


class PublishOperator(DatasetOperator):
    """Lets readers see the validated snapshot; the dataset's asset gets an event.

    Returns dataset, version, numbers of files and rows, snapshot id, URIs of report and card; the
    same is the event's ``extra``. The version's dataset card is written and linked.

    Args:
        committed: What the commit task returned (templated).
        report_uri: What the validate task returned (templated).
    """

    template_fields: Sequence[str] = ("lock", "committed", "report_uri")
    operator_extra_links = (DatasetCardLink(),)

    def __init__(self, *, committed: Any, report_uri: Any, **kwargs: Any) -> None:
        """Keep where the descriptions come from."""
        super().__init__(**kwargs)
        self.committed = committed
        self.report_uri = report_uri
        self._published: dict[str, Any] = {}

    def step(self, context: Context) -> dict[str, Any]:
        """See the class."""
        from hcodec_airflow import steps

        version = steps.publish(self.committed, self.report_uri)
        context["ti"].xcom_push(key=CARD_URL_KEY, value=steps.browser_url(version["card_uri"]))
        self._tell(context, version)
        self._published = version
        return version

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> Any:
        """For Airflow's OpenLineage provider: audio and codec in, the version of tokens out."""
        if not self._published:
            return None
        from hcodec_airflow.lineage import lineage_of_publish

        return lineage_of_publish(self.committed["plan_uri"], self._published)

    def _tell(self, context: Context, version: dict[str, Any]) -> None:
        from airflow.sdk import Asset, AssetAlias

        from hcodec_airflow.assets import dataset_asset

        for outlet in self.outlets:
            if isinstance(outlet, AssetAlias):
                asset = dataset_asset(version["dataset"])
                context["outlet_events"][outlet].add(asset, extra=version)
            elif isinstance(outlet, Asset):
                context["outlet_events"][outlet].extra = version
