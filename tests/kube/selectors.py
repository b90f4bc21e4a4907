"""Label and field selectors as query strings carry them."""

from __future__ import annotations

import re
from typing import Any

from tests.kube.errors import Object, bad_request

_SET_BASED = re.compile(r"^([\w./-]+)\s+(in|notin)\s*\(([^)]*)\)$")
_EQUALITY = re.compile(r"^([\w./-]+)\s*(==|=|!=)\s*([\w.-]*)$")
_EXISTENCE = re.compile(r"^(!?)\s*([\w./-]+)$")

# A server refuses field selectors but for those that a kind was given conversions for.
_FIELDS = {
    "pods": {
        "spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName",
        "spec.hostNetwork", "status.phase", "status.podIP", "status.nominatedNodeName",
    },
    "jobs.batch": {"status.successful"},
    "events": {
        "involvedObject.kind", "involvedObject.namespace", "involvedObject.name",
        "involvedObject.uid", "involvedObject.apiVersion", "involvedObject.resourceVersion",
        "involvedObject.fieldPath", "reason", "reportingComponent", "source", "type",
    },
    "nodes": {"spec.unschedulable"},
    "namespaces": {"status.phase"},
    "secrets": {"type"},
}  # fmt: skip


class Selector:
    """What a list or watch asks for. Raises 400 on syntax or on a field that is not selectable."""

    def __init__(self, resource: str, labels: str = "", fields: str = "") -> None:
        self._labels = [_label_requirement(part) for part in _split(labels)]
        self._fields = [_field_requirement(resource, part) for part in _split(fields)]

    def matches(self, item: Object) -> bool:
        labels = item["metadata"].get("labels") or {}
        return all(holds(labels) for holds in self._labels) and all(
            (_field(item, path) == value) == is_equal for path, is_equal, value in self._fields
        )


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _label_requirement(part: str) -> Any:
    if match := _SET_BASED.match(part):
        key, operator, values = match.groups()
        wanted = {value.strip() for value in values.split(",")}
        if operator == "in":
            return lambda labels: labels.get(key) in wanted
        return lambda labels: labels.get(key) not in wanted
    if match := _EQUALITY.match(part):
        key, operator, value = match.groups()
        # A label that is not there is not equal: `!=` selects it.
        return lambda labels: (labels.get(key) == value) == (operator != "!=")
    if match := _EXISTENCE.match(part):
        absent, key = match.groups()
        return lambda labels: (key in labels) != bool(absent)
    raise bad_request(f"unable to parse requirement: found '{part}', expected: identifier")


def _field_requirement(resource: str, part: str) -> tuple[str, bool, str]:
    match = re.match(r"^([\w.]+)\s*(==|=|!=)\s*(.*)$", part)
    if not match:
        raise bad_request(f"invalid field selector: '{part}'; can't understand it")
    path, operator, value = match.groups()
    if path not in _FIELDS.get(resource, set()) | {"metadata.name", "metadata.namespace"}:
        if resource in _FIELDS:
            raise bad_request(f"field label not supported: {path}")
        known = 'only "metadata.name", "metadata.namespace"'
        raise bad_request(f'"{path}" is not a known field selector: {known}')
    return path, operator != "!=", value


def _field(item: Object, path: str) -> str:
    if path == "source":
        return str(item.get("source", {}).get("component", ""))
    if path == "status.successful":
        return str(item.get("status", {}).get("succeeded", 0))
    value: Any = item
    for name in path.split("."):
        value = value.get(name, "") if isinstance(value, dict) else ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def matches_label_selector(selector: Object | None, labels: Object) -> bool:
    """A ``metav1.LabelSelector`` in an object; an empty one selects everything."""
    selector = selector or {}
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    checks = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, _: key in labels,
        "DoesNotExist": lambda key, _: key not in labels,
    }
    expressions = selector.get("matchExpressions") or []
    return all(checks[e["operator"]](e["key"], e.get("values") or []) for e in expressions)
