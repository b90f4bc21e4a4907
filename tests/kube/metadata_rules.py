"""Names, labels, annotations, owners and finalizers (apimachinery validation)."""

# ruff: noqa: E501  The messages are the server's own words, kept whole.
from __future__ import annotations

import re
from typing import Any

from tests.kube import kinds
from tests.kube.errors import Cause, Object, forbidden, invalid, required
from tests.kube.kinds import Kind

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_ANNOTATION_LIMIT_BYTES = 256 * 1024
_SUBDOMAIN_WORDS = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
QUALIFIED_WORDS = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"


def _value_words(value: Any) -> str:
    if isinstance(value, str) and len(value) > 63:
        return "must be no more than 63 characters"
    return "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"


def is_dns_label(text: str) -> bool:
    return len(text) <= 63 and _LABEL.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    return len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None


def is_qualified_name(text: str) -> bool:
    prefix, slash, name = text.rpartition("/")
    if slash and not is_subdomain(prefix):
        return False
    return 0 < len(name) <= 63 and _QUALIFIED.fullmatch(name) is not None


def is_label_value(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= 63 and _VALUE.fullmatch(text) is not None


def check(kind: Kind, item: Object, path: str = "metadata") -> list[Cause]:
    metadata = item["metadata"]
    causes = []
    name = metadata.get("name", "")
    if kind in (kinds.NAMESPACE, kinds.SERVICE):
        if not is_dns_label(name):
            causes.append(
                invalid(
                    f"{path}.name",
                    name,
                    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'",
                )
            )
    elif kind.has_name and not is_subdomain(name):
        causes.append(invalid(f"{path}.name", name, _SUBDOMAIN_WORDS))
    return causes + check_labels(metadata, path) + _check_owners(metadata, path)


def check_labels(metadata: Object, path: str) -> list[Cause]:
    """Labels and annotations, of objects and of pod templates."""
    causes = []
    for key, value in (metadata.get("labels") or {}).items():
        if not is_qualified_name(key):
            causes.append(
                invalid(
                    f"{path}.labels",
                    key,
                    QUALIFIED_WORDS,
                )
            )
        if not is_label_value(value):
            causes.append(
                invalid(
                    f"{path}.labels",
                    value,
                    _value_words(value),
                )
            )
    annotations = metadata.get("annotations") or {}
    for key in annotations:
        if not is_qualified_name(key.lower()):
            causes.append(
                invalid(
                    f"{path}.annotations",
                    key,
                    QUALIFIED_WORDS,
                )
            )
    size = sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())
    if size > _ANNOTATION_LIMIT_BYTES:
        message = f"Too long: may not be more than {_ANNOTATION_LIMIT_BYTES} bytes"
        causes.append(Cause(f"{path}.annotations", "FieldValueTooLong", message))
    return causes


def _check_owners(metadata: Object, path: str) -> list[Cause]:
    causes = []
    owners = metadata.get("ownerReferences") or []
    for index, owner in enumerate(owners):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                causes.append(
                    required(f"{path}.ownerReferences[{index}].{field}", "must not be empty")
                )
    if sum(bool(owner.get("controller")) for owner in owners) > 1:
        causes.append(
            invalid(
                f"{path}.ownerReferences",
                len(owners),
                "Only one reference can have Controller set to true.",
            )
        )
    for index, finalizer in enumerate(metadata.get("finalizers") or []):
        if "/" not in finalizer and finalizer not in ("foregroundDeletion", "orphan", "kubernetes"):
            causes.append(
                invalid(
                    f"{path}.finalizers[{index}]",
                    finalizer,
                    "name is neither a standard finalizer name nor is it fully qualified",
                )
            )
    return causes


def check_change(kind: Kind, old: Object, new: Object, path: str = "metadata") -> list[Cause]:
    """No finalizer may be added once a deletion has begun."""
    causes = check_labels(new["metadata"], path) + _check_owners(new["metadata"], path)
    if "deletionTimestamp" in old["metadata"]:
        before = old["metadata"].get("finalizers") or []
        added = [f for f in new["metadata"].get("finalizers") or [] if f not in before]
        if added:
            causes.append(
                forbidden(
                    f"{path}.finalizers",
                    f"no new finalizers can be added if the object is being deleted, found new finalizers {added}",
                )
            )
    return causes
