"""Rules for pods and pod templates, after pkg/apis/core/validation/validation.go."""

# ruff: noqa: E501  The messages are the server's own words, kept whole.
from __future__ import annotations

import re
from typing import Any

from tests.kube import quantities
from tests.kube.errors import (
    Cause,
    Object,
    bad_request,
    duplicate,
    forbidden,
    invalid,
    required,
    unsupported,
)
from tests.kube.metadata_rules import (
    check_labels,
    is_dns_label,
    is_label_value,
    is_qualified_name,
    is_subdomain,
)

# The rule up to 1.33; 1.34 takes any printable character but "=".
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_FIELD_PATHS = {
    "metadata.name", "metadata.namespace", "metadata.uid", "metadata.labels",
    "metadata.annotations", "spec.nodeName", "spec.serviceAccountName", "status.hostIP",
    "status.hostIPs", "status.podIP", "status.podIPs",
}  # fmt: skip
_FIELD_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_RESOURCE_FIELDS = re.compile(r"(limits|requests)\.(cpu|memory|ephemeral-storage|hugepages-\w+)")
_DNS_LABEL = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and "
    "must start and end with an alphanumeric character"
)


def check_spec(spec: Object, path: str, is_template: bool = False) -> list[Cause]:
    """ValidatePodSpec: everything wrong with a defaulted pod spec."""
    causes = _check_volumes(spec, path)
    volumes = {volume["name"] for volume in spec.get("volumes") or []}
    causes += _check_containers(spec, path, volumes)
    causes += _check_choices(spec, path)
    causes += _check_names(spec, path)
    for key, value in (spec.get("nodeSelector") or {}).items():
        if not is_qualified_name(key) or not is_label_value(value):
            causes.append(
                invalid(
                    f"{path}.nodeSelector",
                    value,
                    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.'",
                )
            )
    for index, toleration in enumerate(spec.get("tolerations") or []):
        causes += _check_toleration(toleration, f"{path}.tolerations[{index}]")
    grace = spec.get("terminationGracePeriodSeconds", 30)
    if grace < 0:
        causes.append(
            invalid(
                f"{path}.terminationGracePeriodSeconds", grace, "must be greater than or equal to 0"
            )
        )
    deadline = spec.get("activeDeadlineSeconds")
    if deadline is not None and not 1 <= deadline <= 2**31 - 1:
        causes.append(
            invalid(
                f"{path}.activeDeadlineSeconds",
                deadline,
                "must be between 1 and 2147483647, inclusive",
            )
        )
    if is_template and spec.get("ephemeralContainers"):
        causes.append(
            forbidden(
                f"{path}.ephemeralContainers", "ephemeral containers not allowed in pod template"
            )
        )
    return causes


def _check_choices(spec: Object, path: str) -> list[Cause]:
    choices = {
        "restartPolicy": ["Always", "OnFailure", "Never"],
        "dnsPolicy": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
        "preemptionPolicy": ["PreemptLowerPriority", "Never"],
    }
    return [
        unsupported(f"{path}.{name}", spec[name], allowed)
        for name, allowed in choices.items()
        if spec.get(name) is not None and spec[name] not in allowed
    ]


def _check_names(spec: Object, path: str) -> list[Cause]:
    causes = []
    for name in ("serviceAccountName", "priorityClassName", "runtimeClassName", "nodeName"):
        if spec.get(name) and not is_subdomain(spec[name]):
            causes.append(
                invalid(
                    f"{path}.{name}",
                    spec[name],
                    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'",
                )
            )
    for name in ("hostname", "subdomain"):
        if spec.get(name) and not is_dns_label(spec[name]):
            causes.append(invalid(f"{path}.{name}", spec[name], _DNS_LABEL))
    return causes


def _check_toleration(toleration: Object, path: str) -> list[Cause]:
    causes = []
    operator, effect = toleration.get("operator", "Equal"), toleration.get("effect")
    if toleration.get("key") and not is_qualified_name(toleration["key"]):
        causes.append(
            invalid(
                f"{path}.key",
                toleration["key"],
                "name part must consist of alphanumeric characters, '-', '_' or '.'",
            )
        )
    if not toleration.get("key") and operator != "Exists":
        causes.append(
            invalid(
                f"{path}.operator",
                operator,
                'operator must be Exists when `key` is empty, which means "match all values and all keys"',
            )
        )
    if operator not in ("Exists", "Equal"):
        causes.append(unsupported(f"{path}.operator", operator, ["Equal", "Exists"]))
    if operator == "Exists" and toleration.get("value"):
        causes.append(
            invalid(
                f"{path}.operator",
                toleration["value"],
                "value must be empty when `operator` is 'Exists'",
            )
        )
    if toleration.get("tolerationSeconds") is not None and effect != "NoExecute":
        causes.append(
            invalid(
                f"{path}.effect",
                effect,
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            )
        )
    if effect not in (None, "", "NoSchedule", "PreferNoSchedule", "NoExecute"):
        causes.append(
            unsupported(f"{path}.effect", effect, ["NoExecute", "NoSchedule", "PreferNoSchedule"])
        )
    return causes


def _check_volumes(spec: Object, path: str) -> list[Cause]:
    causes, seen = [], set()
    for index, volume in enumerate(spec.get("volumes") or []):
        where, name = f"{path}.volumes[{index}]", volume["name"]
        if not is_dns_label(name):
            causes.append(invalid(f"{where}.name", name, _DNS_LABEL))
        if name in seen:
            causes.append(duplicate(f"{where}.name", name))
        seen.add(name)
        sources = [key for key in volume if key != "name"]
        if len(sources) > 1:
            causes.append(
                forbidden(f"{where}.{sources[1]}", "may not specify more than 1 volume type")
            )
        limit = (volume.get("emptyDir") or {}).get("sizeLimit")
        if limit is not None and quantities.value(limit) < 0:
            causes.append(
                forbidden(
                    f"{where}.emptyDir.sizeLimit",
                    "SizeLimit field must be a valid resource quantity",
                )
            )
    return causes


def _check_containers(spec: Object, path: str, volumes: set[str]) -> list[Cause]:
    causes, seen = [], set()
    if not spec.get("containers"):
        causes.append(required(f"{path}.containers"))
    for group in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(group) or []):
            where, name = f"{path}.{group}[{index}]", container["name"]
            if not is_dns_label(name):
                causes.append(invalid(f"{where}.name", name, _DNS_LABEL))
            if name in seen:
                causes.append(duplicate(f"{where}.name", name))
            seen.add(name)
            causes += _check_container(container, where, volumes)
    return causes


def _check_container(container: Object, path: str, volumes: set[str]) -> list[Cause]:
    causes = []
    image = container.get("image") or ""
    if not image:
        causes.append(required(f"{path}.image"))
    elif image != image.strip():
        causes.append(
            invalid(f"{path}.image", image, "must not have leading or trailing whitespace")
        )
    if container["imagePullPolicy"] not in ("Always", "IfNotPresent", "Never"):
        causes.append(
            unsupported(
                f"{path}.imagePullPolicy",
                container["imagePullPolicy"],
                ["Always", "IfNotPresent", "Never"],
            )
        )
    for index, variable in enumerate(container.get("env") or []):
        causes += _check_variable(variable, f"{path}.env[{index}]")
    mounts: set[str] = set()
    for index, mount in enumerate(container.get("volumeMounts") or []):
        causes += _check_mount(mount, f"{path}.volumeMounts[{index}]", volumes, mounts)
    causes += _check_resources(container["resources"], f"{path}.resources")
    security = container.get("securityContext") or {}
    if security.get("allowPrivilegeEscalation") is False and security.get("privileged"):
        causes.append(
            invalid(
                f"{path}.securityContext",
                security,
                "cannot set `allowPrivilegeEscalation` to false and `privileged` to true",
            )
        )
    return causes


def _check_variable(variable: Object, path: str) -> list[Cause]:
    causes, name, source = [], variable["name"], variable.get("valueFrom")
    if not name:
        causes.append(required(f"{path}.name"))
    elif not _ENV_NAME.fullmatch(name):
        causes.append(
            invalid(
                f"{path}.name",
                name,
                "a valid environment variable name must consist of alphabetic characters, digits, '_', '-', or '.', and must not start with a digit",
            )
        )
    if source is None:
        return causes
    if variable.get("value"):
        causes.append(
            invalid(f"{path}.valueFrom", "", "may not be specified when `value` is not empty")
        )
    if len(source) != 1:
        detail = (
            "may not have more than one field specified at a time"
            if source
            else "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`"
        )
        causes.append(invalid(f"{path}.valueFrom", "", detail))
    if "fieldRef" in source:
        causes += _check_field_path(
            source["fieldRef"].get("fieldPath", ""), f"{path}.valueFrom.fieldRef"
        )
    if "resourceFieldRef" in source:
        resource = source["resourceFieldRef"].get("resource", "")
        if not _RESOURCE_FIELDS.fullmatch(resource):
            causes.append(
                unsupported(
                    f"{path}.valueFrom.resourceFieldRef.resource",
                    resource,
                    ["limits.cpu", "limits.memory", "requests.cpu", "requests.memory"],
                )
            )
    return causes


def _check_field_path(field: str, path: str) -> list[Cause]:
    if not field:
        return [required(f"{path}.fieldPath")]
    if match := _FIELD_SUBSCRIPT.fullmatch(field):
        return (
            []
            if is_qualified_name(match.group(2).lower())
            else [invalid(f"{path}.fieldPath", field, "invalid key")]
        )
    if field not in _FIELD_PATHS:
        return [
            invalid(
                f"{path}.fieldPath",
                field,
                f"error converting fieldPath: field label not supported: {field}",
            )
        ]
    return []


def _check_mount(mount: Object, path: str, volumes: set[str], seen: set[str]) -> list[Cause]:
    causes = []
    if mount["name"] not in volumes:
        causes.append(Cause(f"{path}.name", "FieldValueNotFound", f'Not found: "{mount["name"]}"'))
    if mount["mountPath"] in seen:
        causes.append(invalid(f"{path}.mountPath", mount["mountPath"], "must be unique"))
    seen.add(mount["mountPath"])
    if ".." in str(mount.get("subPath", "")).split("/"):
        causes.append(invalid(f"{path}.subPath", mount["subPath"], "must not contain '..'"))
    return causes


def is_extended(resource: str) -> bool:
    """``nvidia.com/gpu`` and the like: counted whole, never overcommitted."""
    domain, slash, _ = resource.rpartition("/")
    return bool(slash) and "kubernetes.io" not in domain


def _check_resources(resources: Object, path: str) -> list[Cause]:
    causes = []
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for group, amounts in (("limits", limits), ("requests", requests)):
        for name, amount in amounts.items():
            causes += _check_amount(name, amount, f"{path}.{group}")
    for name, amount in requests.items():
        most = quantities.parse(limits.get(name))
        wanted = quantities.parse(amount)
        if is_extended(name) and most is None:
            causes.append(
                required(f"{path}.limits", "Limit must be set for non overcommitable resources")
            )
        elif is_extended(name) and wanted != most:
            causes.append(
                invalid(
                    f"{path}.requests",
                    str(amount),
                    f"must be equal to {name} limit of {limits[name]}",
                )
            )
        elif most is not None and wanted is not None and wanted > most:
            causes.append(
                invalid(
                    f"{path}.requests",
                    str(amount),
                    f"must be less than or equal to {name} limit of {limits[name]}",
                )
            )
    return causes


def _check_amount(name: str, amount: Any, path: str) -> list[Cause]:
    number = quantities.parse(amount)
    if number is None:
        return []  # refused when it was decoded
    if number < 0:
        return [invalid(f"{path}[{name}]", str(amount), "must be greater than or equal to 0")]
    if not is_qualified_name(name):
        return [
            invalid(f"{path}[{name}]", name, "must be a standard resource type or fully qualified")
        ]
    is_standard = name in ("cpu", "memory", "ephemeral-storage") or name.startswith("hugepages-")
    if "/" not in name and not is_standard:
        return [invalid(f"{path}[{name}]", name, "must be a standard resource for containers")]
    if is_extended(name) and number != number.to_integral_value():
        return [invalid(f"{path}[{name}]", str(amount), "must be an integer")]
    return []


def refuse_bad_quantities(spec: Object) -> None:
    """Raise 400 for the first amount that is no quantity."""
    amounts = [(v.get("emptyDir") or {}).get("sizeLimit") for v in spec.get("volumes") or []]
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        for group in ("limits", "requests"):
            amounts += ((container.get("resources") or {}).get(group) or {}).values()
    for amount in amounts:
        if amount is not None and quantities.parse(amount) is None:
            raise bad_request(
                f"cannot unmarshal {amount!r}: quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
            )


_CHANGEABLE = ("activeDeadlineSeconds", "terminationGracePeriodSeconds", "tolerations")


def check_change(old: Object, new: Object) -> list[Cause]:
    """ValidatePodUpdate: a pod's spec is fixed but for images, deadline and added tolerations."""

    def fixed(pod: Object) -> Object:
        kept = {k: v for k, v in pod["spec"].items() if k not in _CHANGEABLE}
        kept["containers"] = [{**c, "image": ""} for c in kept["containers"]]
        return kept

    causes = check_labels(new["metadata"], "metadata")
    if fixed(old) != fixed(new):
        causes.append(
            forbidden(
                "spec",
                "pod updates may not change fields other than `spec.containers[*].image`, `spec.initContainers[*].image`, `spec.activeDeadlineSeconds`, `spec.tolerations` (only additions to existing tolerations), `spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
            )
        )
    return causes
