"""Pod templates merged in as Kubernetes merges patches, and what they may not loosen.

Strategic merge: objects are merged field by field, lists that have a merge key entry by entry, all
other lists are replaced; ``null`` removes a field, ``$patch: delete`` an entry. (Kubernetes:
"Update API Objects in Place Using kubectl patch"; the keys are those of the core/v1 types.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from hcodec_core.errors import ConfigError

# Merge keys by the name of the list, as the core/v1 types declare them.
_CONTAINERS = ("containers", "initContainers", "ephemeralContainers")
_MERGE_KEYS = {
    **dict.fromkeys(_CONTAINERS, "name"),
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "resourceClaims": "name",
    "schedulingGates": "name",
}
# Kubernetes replaces tolerations; here they add up, else a template would lose the profile's own.
_UNIONS = frozenset({"tolerations"})
_PATCH = "$patch"

_POD_FLAGS = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
_HOST_VOLUMES = ("hostPath",)


def merge(base: Any, patch: Any, name: str = "") -> Any:
    """``base`` with ``patch`` merged in; neither is changed. ``name``: the field they stand in."""
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        return _merge_objects(base, patch)
    if isinstance(base, list) and isinstance(patch, list):
        if name in _UNIONS:
            return [*deepcopy(base), *(deepcopy(e) for e in patch if e not in base)]
        if name in _MERGE_KEYS:
            return _merge_lists(base, patch, _MERGE_KEYS[name])
    return deepcopy(patch)


def _merge_objects(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    if patch.get(_PATCH) == "replace":
        return {key: deepcopy(value) for key, value in patch.items() if key != _PATCH}
    merged = deepcopy(dict(base))
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value, key)
    return merged


def _merge_lists(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    merged = deepcopy(base)
    for entry in patch:
        if not isinstance(entry, Mapping) or key not in entry:
            raise ConfigError(
                f"An entry of a pod template's list has no {key!r}: such lists are merged by it."
            )
        places = [i for i, known in enumerate(merged) if known.get(key) == entry[key]]
        if entry.get(_PATCH) == "delete":
            merged = [known for known in merged if known.get(key) != entry[key]]
        elif places:
            merged[places[0]] = _merge_objects(merged[places[0]], entry)
        else:
            merged.append(deepcopy(dict(entry)))
    return merged


def refuse_loosened(template: Mapping[str, Any], where: str) -> None:
    """Raise ``ConfigError`` naming the first field that loosens a pod's security.

    Looks at a template before it is merged, or at a whole pod template after.
    """
    for field, why in _loosened(template):
        raise ConfigError(
            f"{where}: {field} {why}: workers run under the Pod Security level 'restricted'; leave "
            "it out."
        )


def _loosened(template: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    spec = template.get("spec") or {}
    yield from (_pod_faults(spec))
    for kind in _CONTAINERS:
        for index, container in enumerate(spec.get(kind) or []):
            label = f"spec.{kind}[{container.get('name', index)}]"
            yield from _container_faults(container, label)


def _pod_faults(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for flag in _POD_FLAGS:
        if spec.get(flag):
            yield f"spec.{flag}", "shares the node's or another process's namespace"
    if spec.get("automountServiceAccountToken"):
        yield "spec.automountServiceAccountToken", "gives workers a token for the API server"
    if spec.get("restartPolicy", "Never") != "Never":
        yield "spec.restartPolicy", "must stay Never, or exit codes are never seen"
    for volume in spec.get("volumes") or []:
        for kind in _HOST_VOLUMES:
            if kind in volume:
                yield f"spec.volumes[{volume.get('name')}].{kind}", "opens the node's file system"
        yield from _token_faults(volume)
    yield from _context_faults(spec.get("securityContext"), "spec.securityContext")


def _token_faults(volume: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = f"spec.volumes[{volume.get('name')}].projected.serviceAccountToken"
    for source in (volume.get("projected") or {}).get("sources") or []:
        token = source.get("serviceAccountToken")
        # A token for a cloud's identity service names another audience than the API server.
        if token is not None and not token.get("audience"):
            yield name, "gives workers a token for the API server"


def _container_faults(container: Mapping[str, Any], label: str) -> Iterator[tuple[str, str]]:
    context = container.get("securityContext") or {}
    where = f"{label}.securityContext"
    yield from _context_faults(context, where)
    if context.get("privileged"):
        yield f"{where}.privileged", "is not allowed"
    if context.get("allowPrivilegeEscalation"):
        yield f"{where}.allowPrivilegeEscalation", "is not allowed"
    if context.get("readOnlyRootFilesystem", True) is not True:
        yield f"{where}.readOnlyRootFilesystem", "must stay true"
    if context.get("procMount", "Default") != "Default":
        yield f"{where}.procMount", "must stay Default"
    capabilities = context.get("capabilities") or {}
    if capabilities.get("add"):
        yield f"{where}.capabilities.add", "is not allowed"
    if "ALL" not in (capabilities.get("drop") or ["ALL"]):
        yield f"{where}.capabilities.drop", "must hold ALL"
    if _PATCH in context:
        yield f"{where}.$patch", "would drop the settings below it"


def _context_faults(context: Any, where: str) -> Iterator[tuple[str, str]]:
    context = context or {}
    if context.get("runAsNonRoot", True) is not True:
        yield f"{where}.runAsNonRoot", "must stay true"
    if context.get("runAsUser", 1) == 0:
        yield f"{where}.runAsUser", "must not be 0"
    profile = (context.get("seccompProfile") or {}).get("type", "RuntimeDefault")
    if profile not in {"RuntimeDefault", "Localhost"}:
        yield f"{where}.seccompProfile", "must be RuntimeDefault or Localhost"
    if context.get("sysctls"):
        yield f"{where}.sysctls", "is not allowed"


def refuse_incomplete(pod: Mapping[str, Any], where: str) -> None:
    """Raise ``ConfigError`` unless a merged pod template still states what ``restricted`` needs.

    A template can also loosen by removing a field (``null``) or by adding a container.
    """
    refuse_loosened(pod, where)
    spec = pod["spec"]
    missing = [f"spec.{name}" for name in _missing_in_pod(spec)]
    for kind in _CONTAINERS:
        for container in spec.get(kind) or []:
            label = f"spec.{kind}[{container.get('name')}].securityContext"
            missing += [f"{label}.{name}" for name in _missing_in_container(container)]
    if missing:
        raise ConfigError(
            f"{where}: {missing[0]} is missing after the merge: the Pod Security level "
            "'restricted' needs it; do not remove it, and give it to containers that you add."
        )


def _missing_in_pod(spec: Mapping[str, Any]) -> Iterator[str]:
    context = spec.get("securityContext") or {}
    if context.get("runAsNonRoot") is not True:
        yield "securityContext.runAsNonRoot"
    if not context.get("seccompProfile"):
        yield "securityContext.seccompProfile"
    if spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken"
    if spec.get("restartPolicy") != "Never":
        yield "restartPolicy"


def _missing_in_container(container: Mapping[str, Any]) -> Iterator[str]:
    context = container.get("securityContext") or {}
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem"
    if "ALL" not in ((context.get("capabilities") or {}).get("drop") or []):
        yield "capabilities.drop"
