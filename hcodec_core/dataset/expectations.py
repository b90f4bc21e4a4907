"""Great Expectations as the judge: rules over small frames, verdicts by rule, pages for people.

Works without a network: the context lives in memory, usage statistics are off, and the pages,
which Great Expectations fills with scripts and styles from the network, are freed of them.
Importing the library takes several seconds, so call this in a task, never while parsing a DAG.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import pyarrow as pa

Severity = Literal["error", "warning"]

_PAGE_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 }
td, th { border: 1px solid #8886; padding: .3rem .6rem; text-align: left; vertical-align: top }
ul, ol { list-style: none; padding-left: 0 }
.sticky, .modal, [hidden], a[data-toggle=collapse], .navbar-brand { display: none }
.alert { margin-top: 1.5rem } h5 { font-size: 1rem; margin: 0 }
.fa-times::before { content: "\\2717" } .fa-check-circle::before { content: "\\2713" }
.fa-exclamation-triangle::before { content: "\\26a0" }
"""
# The pages' scripts, styles and pictures come from the network or serve those that do.
_LOADS = re.compile(
    r"<(script|style|iframe|footer)\b.*?</\1\s*>|<(link|img)\b[^>]*>", re.IGNORECASE | re.DOTALL
)
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


@dataclass(frozen=True)
class Rule:
    """Column ``name`` of frame ``frame`` lies in ``minimum``..``maximum`` in every row.

    ``title`` says what holds when the rule does. Rows without a value are not judged.
    """

    name: str
    title: str
    frame: str
    severity: Severity = "error"
    minimum: float | None = None
    maximum: float | None = None


def judge(
    frames: Mapping[str, pa.Table], rules: Sequence[Rule], pages_path: Path, run_name: str
) -> dict[str, bool]:
    """Judge ``frames`` by ``rules``: verdict by name of the rule.

    Puts one page per frame below ``pages_path`` (see ``page_of``); they link to an ``index.html``
    there, which the caller writes. A rule that has no verdict does not hold.
    """
    import great_expectations as gx
    from great_expectations.core import RunIdentifier

    context = _context(pages_path)
    source = context.data_sources.add_pandas("token_table")
    verdicts = {rule.name: False for rule in rules}
    for frame, table in frames.items():
        chosen = [rule for rule in rules if rule.frame == frame]
        suite = context.suites.add(
            gx.ExpectationSuite(name=frame, expectations=[_expectation(rule) for rule in chosen])
        )
        batch = source.add_dataframe_asset(frame).add_batch_definition_whole_dataframe("all")
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=frame, data=batch, suite=suite)
        )
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(name=frame, validation_definitions=[definition])
        )
        outcome = checkpoint.run(
            batch_parameters={"dataframe": table.to_pandas()},
            run_id=RunIdentifier(run_name=run_name),
        )
        verdicts.update(_verdicts(outcome))
    context.build_data_docs()
    _free_of_network(pages_path)
    return verdicts


def page_of(frame: str, pages_path: Path) -> str:
    """Path of a frame's page, relative to ``pages_path``."""
    (page,) = (pages_path / "validations" / frame).rglob("*.html")
    return page.relative_to(pages_path).as_posix()


def _context(pages_path: Path) -> Any:
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    site = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str(pages_path),
        },
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        data_docs_sites={"report": site},
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def _expectation(rule: Rule) -> Any:
    from great_expectations.expectations.core.expect_column_values_to_be_between import (
        ExpectColumnValuesToBeBetween,
    )
    from great_expectations.expectations.metadata_types import FailureSeverity

    is_error = rule.severity == "error"
    return ExpectColumnValuesToBeBetween(
        column=rule.name,
        min_value=rule.minimum,
        max_value=rule.maximum,
        severity=FailureSeverity.CRITICAL if is_error else FailureSeverity.WARNING,
        description=rule.title,
        meta={"rule": rule.name},
    )


def _verdicts(outcome: Any) -> Iterator[tuple[str, bool]]:
    for validation in outcome.run_results.values():
        for result in validation.results:
            yield result.expectation_config.meta["rule"], bool(result.success)


def _free_of_network(pages_path: Path) -> None:
    for path in pages_path.rglob("*.html"):
        page = _LOADS.sub("", path.read_text())
        head = f"<head>{_POLICY}<style>{_PAGE_STYLE}</style>"
        path.write_text(page.replace("<head>", head, 1))
    rmtree(pages_path / "static", ignore_errors=True)
