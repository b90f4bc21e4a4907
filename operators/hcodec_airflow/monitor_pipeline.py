"""DAG factory: do new tokens still look like those of the reference version?

choose -> monitor (one mapped task per dataset)
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, AssetAlias, AssetAny, AssetOrTimeSchedule, CronTriggerTimetable, Param

from hcodec_airflow.assets import dataset_asset
from hcodec_airflow.forms import NAME_LENGTH, NAME_PATTERN
from hcodec_airflow.monitor_operators import ChooseWatchedOperator, MonitorDatasetOperator
from hcodec_airflow.pipelines import MANUAL_ALIAS

DAG_ID = "monitor_tokens"
DRIFT_ALIAS = "monitor_tokens"
_AT_ONCE = 2
_WHAT = "What"
_ALARM = "Alarm"
_JUDGE = "Judging"

FIELDS: dict[str, dict[str, Any]] = {
    "datasets": {
        "type": ["null", "array"],
        "items": {"type": "string", "pattern": NAME_PATTERN, "maxLength": NAME_LENGTH},
        "default": None,
        "title": "Datasets",
        "description": "Names of datasets, one per line. Empty: those whose new versions started "
        "the run, else all that are declared in datasets.toml.",
        "section": _WHAT,
    },
    "reference": {
        "type": "string",
        "minLength": 1,
        "default": "pinned",
        "title": "Reference",
        "description": "What tokens should look like: a version (v3), another tag, or pinned for "
        "the newest pinned version (hcodec versions pin DATASET V).",
        "section": _WHAT,
    },
    "window": {
        "type": "string",
        "enum": ["added", "version"],
        "default": "added",
        "title": "Window",
        "description": "added: files that came since the last window that was judged. version: all "
        "files of the latest version.",
        "section": _WHAT,
    },
    "windows_in_a_row": {
        "type": "integer",
        "minimum": 1,
        "default": 2,
        "title": "Windows in a row",
        "description": "So many drifted windows one after the other raise an alarm.",
        "section": _ALARM,
    },
    "cool_down_days": {
        "type": "number",
        "minimum": 0,
        "default": 7.0,
        "title": "Cool-down in days",
        "description": "After an alarm no window counts for so long: a codec needs time to be "
        "trained anew.",
        "section": _ALARM,
    },
    "false_alarm_rate": {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 0.5,
        "default": 0.01,
        "title": "False alarm rate",
        "description": "How often a window in which nothing changed may be called drifted, over "
        "all codebooks and statistics of the audio together.",
        "section": _JUDGE,
    },
    "least_psi": {
        "type": "number",
        "minimum": 0,
        "default": 0.05,
        "title": "Smallest PSI that matters",
        "description": "Large windows show differences that are real and too small to matter; a "
        "PSI below this never counts.",
        "section": _JUDGE,
    },
    "min_files": {
        "type": "integer",
        "minimum": 20,
        "default": 50,
        "title": "Fewest files",
        "description": "A window with fewer files is not judged; its files are judged with those "
        "of the next one.",
        "section": _JUDGE,
    },
}


def monitor_dag(declarations: Path) -> DAG:
    """``monitor_tokens``: after each published version, and daily for what was missed.

    Raises ``ConfigError`` when the file of declared datasets is missing or no TOML.
    """
    from hcodec_airflow.requests import read_declarations

    declared = sorted(read_declarations(declarations))
    published = AssetAny(AssetAlias(MANUAL_ALIAS), *map(dataset_asset, declared))
    with DAG(
        DAG_ID,
        description="Compare new tokens with a reference version; alarm when they drift",
        schedule=AssetOrTimeSchedule(
            timetable=CronTriggerTimetable("0 5 * * *", timezone="UTC"), assets=published
        ),
        start_date=datetime(2026, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=1,
        params={name: Param(**entry) for name, entry in FIELDS.items()},
        render_template_as_native_obj=True,
        default_args={"retries": 2, "retry_delay": timedelta(seconds=60)},
        doc_md=_PAGE,
        tags=["hcodec", "monitor"],
    ) as dag:
        choose = ChooseWatchedOperator(task_id="choose", declared=declared)
        MonitorDatasetOperator.partial(
            task_id="monitor",
            map_index_template="{{ task.dataset }}",
            max_active_tis_per_dagrun=_AT_ONCE,
            outlets=[AssetAlias(DRIFT_ALIAS)],
        ).expand(dataset=choose.output)
    return dag


_PAGE = """
### What happens
1. **choose**: the datasets of this run. A dataset without a pinned version is left out.
2. **monitor**, once per dataset: codes and statistics of the audio of the new files beside those of
   the reference version; button *Drift evidence* on the task. So many drifted windows in a row
   raise an alarm: an event of the asset `hcodec-drift-<dataset>`, which `retrain_codec` can be
   scheduled on. Then nothing counts until the cool-down is over.

A window is counted once, whatever is tried again or cleared. A drifted window does not fail its
task.
"""
