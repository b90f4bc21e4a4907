"""DAG factory: the weekly upkeep of the declared datasets.

choose -> maintain (one mapped task per dataset) -> table
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Param

from hcodec_airflow.forms import NAME_LENGTH, NAME_PATTERN
from hcodec_airflow.upkeep import LEAST_AGE_DAYS
from hcodec_airflow.upkeep_operators import (
    ChooseDatasetsOperator,
    MaintainDatasetOperator,
    UpkeepTableOperator,
)

DAG_ID = "maintain_datasets"
_AT_ONCE = 4
_WHAT = "What"
_HOW = "How"

FIELDS: dict[str, dict[str, Any]] = {
    "datasets": {
        "type": ["null", "array"],
        "items": {"type": "string", "pattern": NAME_PATTERN, "maxLength": NAME_LENGTH},
        "default": None,
        "title": "Datasets",
        "description": "Names of datasets, one per line. Empty: all that are declared in "
        "datasets.toml.",
        "section": _WHAT,
    },
    "dry_run": {
        "type": "string",
        "enum": ["by hand", "always", "never"],
        "default": "by hand",
        "title": "Dry run",
        "description": "A dry run prints what would be done and changes nothing. by hand: runs "
        "that a person starts are dry, scheduled ones are not. never: do it now.",
        "section": _WHAT,
    },
    "compact": {
        "type": "boolean",
        "default": True,
        "title": "Compaction",
        "description": "Write small data files of the latest version together; no row changes.",
        "section": _HOW,
    },
    "small_file_mib": {
        "type": "number",
        "exclusiveMinimum": 0,
        "default": 32.0,
        "title": "Small files",
        "description": "Data files below so many MiB are put together.",
        "section": _HOW,
    },
    "expire_after_days": {
        "type": "number",
        "minimum": 0,
        "default": 7.0,
        "title": "Keep snapshots for days",
        "description": "Snapshots older than this that no version, branch or tag names are "
        "forgotten. Versions are kept, whatever their age.",
        "section": _HOW,
    },
    "orphan_age_days": {
        "type": "number",
        "minimum": LEAST_AGE_DAYS,
        "default": 3.0,
        "title": "Age of orphans in days",
        "description": "Objects of the table's folder that nothing refers to are deleted when "
        "they are older than this: younger ones may belong to a running job.",
        "section": _HOW,
    },
    "open_plan_days": {
        "type": "number",
        "exclusiveMinimum": 0,
        "default": 30.0,
        "title": "Keep open plans for days",
        "description": "What a plan wrote that was neither published nor rejected is spared for "
        "so long, so that its run can go on.",
        "section": _HOW,
    },
}


def maintain_dag(declarations: Path) -> DAG:
    """``maintain_datasets``: weekly, over the datasets declared in a TOML file.

    Raises ``ConfigError`` when the file is missing or no TOML.
    """
    from hcodec_airflow.requests import read_declarations

    with DAG(
        DAG_ID,
        description="Compact small files, expire snapshots, sweep orphans of token datasets",
        schedule="@weekly",
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=1,
        params={name: Param(**entry) for name, entry in FIELDS.items()},
        render_template_as_native_obj=True,
        default_args={"retries": 2, "retry_delay": timedelta(seconds=60)},
        doc_md=_PAGE,
        tags=["hcodec", "maintain"],
    ) as dag:
        choose = ChooseDatasetsOperator(
            task_id="choose", declared=sorted(read_declarations(declarations))
        )
        maintain = MaintainDatasetOperator.partial(
            task_id="maintain",
            map_index_template="{{ task.dataset }}",
            max_active_tis_per_dagrun=_AT_ONCE,
        ).expand(dataset=choose.output)
        UpkeepTableOperator(
            task_id="table",
            rows=maintain.output,
            # Without any dataset the mapped task is skipped: the table says so.
            trigger_rule="none_failed",
        )
    return dag


_PAGE = """
### What happens
1. **choose**: the datasets of this run.
2. **maintain**, once per dataset, on its lock (a running tokenise run is waited for): small
   data files of the latest version are written together, snapshots that nothing names are
   forgotten, objects that nothing refers to are deleted.
3. **table**: what was done, or would be.

A run that is started by hand is a dry run: it prints the table and changes nothing. What expired
snapshots alone refer to is found by the real run only. Start it again with *Dry run* = never to do
it. Every version stays readable, row for row.
"""
