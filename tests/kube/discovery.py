"""``/version``, ``/api``, ``/apis`` and the lists of resources of each group version."""

from __future__ import annotations

from collections.abc import Iterable

from tests.kube import kinds
from tests.kube.errors import Object, no_such_path

VERSION = {
    "major": "1",
    "minor": "34",
    "gitVersion": "v1.34.0",
    "gitCommit": "0" * 40,
    "gitTreeState": "clean",
    "buildDate": "2025-08-27T10:09:04Z",
    "goVersion": "go1.24.5",
    "compiler": "gc",
    "platform": "linux/amd64",
}


def answer(path: str, groups: Iterable[str]) -> Object | None:
    """The document at ``path``; None when the path leads to objects. Raises 404."""
    parts = path.strip("/").split("/")
    if parts == ["version"]:
        return VERSION
    if parts[0] in ("healthz", "readyz", "livez"):
        return {"status": "ok"}
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if parts == ["apis"]:
        found = [_group(name, groups) for name in _group_names(groups)]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}
    if parts[0] == "apis" and len(parts) == 2:
        if parts[1] not in _group_names(groups):
            raise no_such_path()
        return {"kind": "APIGroup", "apiVersion": "v1", **_group(parts[1], groups)}
    if parts == ["api", "v1"] or (parts[0] == "apis" and len(parts) == 3):
        return _resources("/".join(parts[1:]), groups)
    return None


def _group_names(groups: Iterable[str]) -> list[str]:
    return sorted({version.partition("/")[0] for version in groups if "/" in version})


def _group(name: str, groups: Iterable[str]) -> Object:
    versions = [
        {"groupVersion": version, "version": version.partition("/")[2]}
        for version in sorted(groups)
        if version.partition("/")[0] == name
    ]
    return {"name": name, "versions": versions, "preferredVersion": versions[0]}


def _resources(group_version: str, groups: Iterable[str]) -> Object:
    if group_version not in groups:
        raise no_such_path()
    found: list[Object] = []
    for kind in kinds.served([group_version]):
        entry = {
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "namespaced": kind.is_namespaced,
            "kind": kind.kind,
            "verbs": list(kind.verbs),
        }
        if kind.short_names:
            entry["shortNames"] = list(kind.short_names)
        found.append(entry)
        for name in kind.subresources:
            verbs = {"log": ["get"], "eviction": ["create"]}.get(name, ["get", "patch", "update"])
            found.append({**entry, "name": f"{kind.plural}/{name}", "verbs": verbs})
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group_version,
        "resources": found,
    }
