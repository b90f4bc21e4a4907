"""The operators of ``maintain_datasets``: choose datasets, maintain one, print the table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

from hcodec_airflow.failures import task_failures
from hcodec_airflow.upkeep import UpkeepRequest, read_upkeep

if TYPE_CHECKING:
    from airflow.sdk import Context

logger = logging.getLogger(__name__)
_COLOUR = "#e8f0dd"


class ChooseDatasetsOperator(BaseOperator):
    """Returns the datasets of this run: those that the form names, else all declared ones.

    Args:
        declared: Names of the declared datasets.
    """

    ui_color = _COLOUR

    def __init__(self, *, declared: Sequence[str], **kwargs: Any) -> None:
        """Keep the names."""
        super().__init__(**kwargs)
        self.declared = list(declared)

    def execute(self, context: Context) -> list[str]:
        """See the class. A wrong form fails here, before anything is touched."""
        with task_failures():
            request, is_dry = _request_of(context)
        names = list(dict.fromkeys(request.datasets or self.declared))
        logger.info("%s: %s", "Dry run" if is_dry else "To maintain", ", ".join(names) or "none")
        return names


class MaintainDatasetOperator(BaseOperator):
    """Compacts, expires and sweeps the tables of one dataset on its lock.

    While another run holds the lock it waits deferred and says for whom. A dry run needs no lock
    and changes nothing. Returns a few numbers per table.

    Args:
        dataset: Name of the dataset (mapped).
    """

    template_fields: Sequence[str] = ("dataset",)
    ui_color = _COLOUR

    def __init__(self, *, dataset: str, **kwargs: Any) -> None:
        """Keep the name."""
        super().__init__(**kwargs)
        self.dataset = dataset

    def execute(self, context: Context) -> list[dict[str, Any]]:
        """See the class."""
        with task_failures():
            from hcodec_airflow.locking import LockWait

            request, is_dry = _request_of(context)
            if is_dry:
                return self._maintain(request, is_dry=True)
            owner = f"{context['ti'].dag_id}/{context['ti'].run_id}"
            lock, message = LockWait(self.dataset, owner).ask()
            logger.info("%s", message)
            if lock is not None:
                return self._maintain_on(lock, request)
        self._wait(owner)
        return []

    def take_from_trigger(self, context: Context, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Go on with the lock that the trigger got. Fails when there was no use in asking on."""
        if "error" in event:
            raise AirflowFailException(event["error"])
        logger.info("%s", event["message"])
        with task_failures():
            return self._maintain_on(event["lock"], _request_of(context)[0])

    def _wait(self, owner: str) -> None:
        from hcodec_airflow.triggers import DatasetLockTrigger

        self.defer(trigger=DatasetLockTrigger(self.dataset, owner), method_name="take_from_trigger")

    def _maintain_on(self, lock: dict[str, Any], request: UpkeepRequest) -> list[dict[str, Any]]:
        from hcodec_airflow.locking import kept_alive, release_lock

        try:
            with kept_alive(lock):
                return self._maintain(request, is_dry=False)
        finally:
            release_lock(lock)

    def _maintain(self, request: UpkeepRequest, *, is_dry: bool) -> list[dict[str, Any]]:
        from hcodec_airflow.upkeep import describe_upkeep, maintain_dataset

        # Its remarks by the hundred would hide the lines that matter in the task's log.
        logging.getLogger("pyiceberg").setLevel(logging.WARNING)
        rows = maintain_dataset(self.dataset, request, dry_run=is_dry)
        for line in describe_upkeep(rows, dry_run=is_dry):
            logger.info("%s", line)
        return rows


class UpkeepTableOperator(BaseOperator):
    """Prints one table of what was done to all datasets, or would be.

    Args:
        rows: What the mapped tasks returned (templated).
    """

    template_fields: Sequence[str] = ("rows",)
    ui_color = _COLOUR

    def __init__(self, *, rows: Any, **kwargs: Any) -> None:
        """Keep where the rows come from."""
        super().__init__(**kwargs)
        self.rows = rows

    def execute(self, context: Context) -> None:
        """See the class."""
        from hcodec_airflow.upkeep import describe_upkeep

        rows = [row for part in self.rows or () for row in part]
        for line in describe_upkeep(rows, dry_run=_request_of(context)[1]):
            logger.info("%s", line)


def _request_of(context: Context) -> tuple[UpkeepRequest, bool]:
    """The request of this run, and whether the run changes nothing."""
    request = read_upkeep(dict(context["params"]))
    run_type = context["dag_run"].run_type
    return request, request.is_dry(str(getattr(run_type, "value", run_type)))
