"""Strict structure checks of built-in kinds: the 1.34 schemas of kubernetes-validate.

Stricter than a server by default: unknown fields are refused as ``fieldValidation=Strict`` does,
where the default (``Warn``) drops them and says so in a header that clients do not show.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
from kubernetes_validate import utils as kubernetes_schemas
from referencing import Registry, Resource

from tests.kube.errors import (
    ApiError,
    Cause,
    Object,
    bad_request,
    invalid_object,
    required,
    unsupported,
)
from tests.kube.kinds import JOB, JOB_SET, Kind

VERSION = "1.34.0"
_FOLDER = f"kubernetes-json-schema/v{VERSION}-local-strict"


def check_structure(kind: Kind, item: Object) -> None:
    """Raise 400 for unknown fields and wrong types, 422 for what is missing or out of range."""
    if not kind.has_schema:
        _check_custom(kind, item)
        return
    errors = sorted(_validator(kind).iter_errors(item), key=lambda e: list(map(str, e.path)))
    if errors:
        raise _refusal(kind, item, _leaves(errors))


@functools.cache
def _definitions() -> Any:
    contents = kubernetes_schemas.schema_contents(f"{_FOLDER}/_definitions.json", VERSION)
    return (
        Registry()
        .with_resource("/api/_definitions.json", Resource.from_contents(contents))
        .with_resource(contents.get("$id", "_definitions.json"), Resource.from_contents(contents))
    )


@functools.cache
def _validator(kind: Kind) -> Any:
    group = kind.group.split(".")[0]
    name = f"{kind.kind.lower()}-{group + '-' if group else ''}{kind.version}.json"
    schema = kubernetes_schemas.schema_contents(f"{_FOLDER}/{name}", VERSION)
    return jsonschema.Draft202012Validator(schema, registry=_definitions())


def _leaves(errors: list[Any]) -> list[Any]:
    """Errors below ``oneOf``/``anyOf`` say more than the branch itself."""
    found: list[Any] = []
    for error in errors:
        found.extend(_leaves(list(error.context)) if error.context else [error])
    return found


def _refusal(kind: Kind, item: Object, errors: list[Any]) -> ApiError:
    unknown = [error for error in errors if error.validator == "additionalProperties"]
    if unknown:
        fields = [
            f'unknown field "{_path([*error.path, name])}"'
            for error in unknown
            for name in sorted(set(error.instance) - set(error.schema.get("properties", {})))
        ]
        return bad_request(
            f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: '
            f"strict decoding error: {', '.join(fields)}"
        )
    wrong = [error for error in errors if error.validator in {"type", "format", "oneOf"}]
    if wrong:
        error = wrong[0]
        return bad_request(
            f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: json: '
            f"cannot unmarshal {json.dumps(error.instance)} into field {_path(error.path)}"
        )
    return invalid_object(
        kind, item["metadata"].get("name", ""), [_cause(error) for error in errors]
    )


def _cause(error: Any) -> Cause:
    path = _path(error.path)
    if error.validator == "required":
        name = error.message.split("'")[1]
        return required(f"{path}.{name}" if path else name)
    if error.validator == "enum":
        return unsupported(path, error.instance, [str(v) for v in error.validator_value if v])
    return Cause(path, "FieldValueInvalid", f"Invalid value: {error.message}")


def _path(parts: Any) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


# Custom resources have no published offline schema: only the fields the controllers here know.
_CUSTOM_FIELDS = {
    "JobSet": {
        "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend",
        "coordinator", "managedBy", "ttlSecondsAfterFinished",
    },
    "TrainJob": {
        "runtimeRef", "initializer", "trainer", "labels", "annotations", "podSpecOverrides",
        "podTemplateOverrides", "suspend", "managedBy",
    },
}  # fmt: skip


def _check_custom(kind: Kind, item: Object) -> None:
    unknown = set(item) - {"apiVersion", "kind", "metadata", "spec", "status"}
    spec = item.get("spec") or {}
    if kind.kind in _CUSTOM_FIELDS:
        unknown |= {f"spec.{name}" for name in set(spec) - _CUSTOM_FIELDS[kind.kind]}
    if unknown:
        fields = ", ".join(f'unknown field "{name}"' for name in sorted(unknown))
        raise bad_request(f"{kind.kind} in version {kind.version}: strict decoding error: {fields}")
    if kind == JOB_SET:
        _check_replicated_jobs(kind, item)


def _check_replicated_jobs(kind: Kind, item: Object) -> None:
    """The CRD of JobSet holds the whole schema of a Job's spec."""
    replicated = (item.get("spec") or {}).get("replicatedJobs")
    if not replicated:
        name = item["metadata"].get("name", "")
        raise invalid_object(kind, name, [required("spec.replicatedJobs")])
    for entry in replicated:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": entry["name"]}}
        check_structure(JOB, {**job, "spec": entry["template"]["spec"]})
