"""What the tasks of ``monitor_tokens`` do, free of Airflow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hcodec_airflow.requests import DatasetName, read_form

logger = logging.getLogger(__name__)


class MonitorRequest(BaseModel):
    """One run of ``monitor_tokens``; but for ``datasets``, see ``MonitorTerms`` of the product.

    ``datasets``: empty for those whose new versions started the run, else all declared ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: tuple[DatasetName, ...] = ()
    reference: str = Field(default="pinned", min_length=1)
    window: Literal["added", "version"] = "added"
    windows_in_a_row: int = Field(default=2, ge=1)
    cool_down_days: float = Field(default=7.0, ge=0)
    false_alarm_rate: float = Field(default=0.01, gt=0, lt=0.5)
    least_psi: float = Field(default=0.05, ge=0)
    min_files: int = Field(default=50, ge=20)


def read_monitor_request(values: Mapping[str, Any]) -> MonitorRequest:
    """A request from a form's values. Raises ``ConfigError`` naming each wrong entry."""
    known = dict(values)
    known["datasets"] = known.get("datasets") or ()
    return read_form(known, MonitorRequest)


def watched(dataset: str, reference: str) -> str:
    """Why a dataset cannot be monitored yet; "" when it can."""
    from hcodec_airflow.settings import read_settings
    from hcodec_core.dataset.table import dataset_names, find_layout
    from hcodec_core.dataset.versions import list_versions

    config = read_settings().load_config()
    if dataset not in dataset_names(config):
        return f"{dataset} has no version yet"
    versions = list_versions(find_layout(config, dataset))
    if reference == "pinned" and not any(version.is_pinned for version in versions):
        return f"{dataset} has no pinned version (hcodec versions pin {dataset} V)"
    return ""


def monitor_dataset(dataset: str, request: MonitorRequest, owner: str) -> dict[str, Any]:
    """Judge the window that is due; plain values for the log, the next task and the asset event.

    ``owner`` names the run: its retry finds the window counted, and still tells of its alarm.
    """
    from hcodec_airflow.settings import read_settings
    from hcodec_core.dataset.table import find_layout
    from hcodec_core.monitoring.documents import MonitorTerms
    from hcodec_core.monitoring.watching import monitor

    settings = read_settings()
    storage = settings.open_storage()
    layout = find_layout(settings.load_config(), dataset)
    terms = MonitorTerms(**request.model_dump(exclude={"datasets"}))
    result = monitor(storage, layout, terms, owner=owner)
    logger.info("%s: %s", dataset, result.text)
    facts: dict[str, Any] = {
        "dataset": dataset,
        "state": result.state.value,
        "is_alarm": result.is_alarm,
        "text": result.text,
    }
    if result.step is not None:
        kept = (
            "version",
            "base_version",
            "reference",
            "num_window_files",
            "moved",
            "num_in_a_row",
            "evidence_uri",
        )
        facts |= {name: getattr(result.step, name) for name in kept}
        facts["encode_id"] = layout.encode_id
        facts["evidence_url"] = settings.browser_url(result.step.evidence_uri)
        logger.info("Evidence: %s", facts["evidence_url"])
    return facts
