"""Refusals as the API server words them: a ``Status`` object with code, reason and causes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.kube.kinds import Kind

Object = dict[str, Any]


@dataclass(frozen=True)
class Cause:
    """One field that is wrong, as in ``field.Error``."""

    field: str
    reason: str
    message: str

    @property
    def sentence(self) -> str:
        return f"{self.field}: {self.message}"

    def as_json(self) -> Object:
        return {"reason": self.reason, "message": self.message, "field": self.field}


def _shown(value: Any) -> str:
    import json

    return json.dumps(value)


def required(field: str, detail: str = "") -> Cause:
    return Cause(field, "FieldValueRequired", "Required value" + (f": {detail}" if detail else ""))


def invalid(field: str, value: Any, detail: str) -> Cause:
    return Cause(field, "FieldValueInvalid", f"Invalid value: {_shown(value)}: {detail}")


def forbidden(field: str, detail: str) -> Cause:
    return Cause(field, "FieldValueForbidden", f"Forbidden: {detail}")


def unsupported(field: str, value: Any, supported: list[str]) -> Cause:
    names = ", ".join(f'"{name}"' for name in sorted(supported))
    message = f"Unsupported value: {_shown(value)}: supported values: {names}"
    return Cause(field, "FieldValueNotSupported", message)


def duplicate(field: str, value: Any) -> Cause:
    return Cause(field, "FieldValueDuplicate", f"Duplicate value: {_shown(value)}")


def too_many(field: str, count: int, limit: int) -> Cause:
    message = f"Too many: {count}: must have at most {limit} items"
    return Cause(field, "FieldValueTooMany", message)


def too_long(field: str, limit: int) -> Cause:
    message = f"Too long: may not be more than {limit} bytes"
    return Cause(field, "FieldValueTooLong", message)


class ApiError(Exception):
    """An answer other than success; ``as_status`` is its body."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details or {}
        self.headers: dict[str, str] = {}
        self.is_plain = False

    def as_status(self) -> Object:
        status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "code": self.code,
        }
        if self.reason:
            status["reason"] = self.reason
        if self.details:
            status["details"] = self.details
        return status


def _details(kind: Kind, name: str) -> Object:
    details = {"name": name, "kind": kind.plural}
    if kind.group:
        details["group"] = kind.group
    return details


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def not_found(kind: Kind, name: str) -> ApiError:
    message = f'{kind.resource} "{name}" not found'
    return ApiError(404, "NotFound", message, _details(kind, name))


def no_such_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def no_such_group() -> ApiError:
    """Outside the groups that are served nobody answers with a ``Status``, only the web server."""
    error = ApiError(404, "", "404 page not found\n")
    error.is_plain = True
    return error


def already_exists(kind: Kind, name: str) -> ApiError:
    message = f'{kind.resource} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, _details(kind, name))


def conflict(kind: Kind, name: str, why: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {kind.resource} "{name}": {why}'
    return ApiError(409, "Conflict", message, _details(kind, name))


def invalid_object(kind: Kind, name: str, causes: list[Cause]) -> ApiError:
    """422 with every cause. Message: one cause as it is, several in brackets."""
    sentences = [cause.sentence for cause in causes]
    what = sentences[0] if len(sentences) == 1 else "[" + ", ".join(sentences) + "]"
    qualified = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
    details: Object = {"kind": kind.kind, "causes": [cause.as_json() for cause in causes]}
    if name:
        details["name"] = name
    if kind.group:
        details["group"] = kind.group
    return ApiError(422, "Invalid", f'{qualified} "{name}" is invalid: {what}', details)


def refused(kind: Kind, name: str, why: str) -> ApiError:
    """403 of the authorizer or of an admission plugin."""
    shown = f'{kind.resource} "{name}"' if name else kind.resource
    return ApiError(403, "Forbidden", f"{shown} is forbidden: {why}", _details(kind, name))


def failed_precondition(kind: Kind, name: str, field: str, wanted: str, found: str) -> ApiError:
    """409 of ``rest.BeforeDelete``, which names the kind and not the resource."""
    qualified = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
    what = "deleted and then recreated" if field == "UID" else "modified"
    message = (
        f'Operation cannot be fulfilled on {qualified} "{name}": the {field} in the precondition '
        f"({wanted}) does not match the {field} in record ({found}). The object might have been "
        f"{what}"
    )
    return ApiError(409, "Conflict", message, {**_details(kind, name), "kind": kind.kind})


def expired(message: str = "The provided continue parameter is too old") -> ApiError:
    return ApiError(410, "Expired", message)


def method_not_allowed() -> ApiError:
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message)


def too_many_requests(message: str, retry_after_seconds: int = 1) -> ApiError:
    details = {"retryAfterSeconds": retry_after_seconds}
    error = ApiError(429, "TooManyRequests", message, details)
    error.headers["Retry-After"] = str(retry_after_seconds)
    return error
