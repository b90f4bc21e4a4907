"""The three kinds of PATCH a client may send: merge, strategic merge and JSON patch."""

from __future__ import annotations

import copy
from typing import Any

from tests.kube.errors import ApiError, Object, bad_request

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON = "application/json-patch+json"

# patchMergeKey of the list fields (apimachinery struct tags); lists of other names are replaced.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "ownerReferences": "uid",
    "conditions": "type",
    "topologySpreadConstraints": "topologyKey",
}


def patched(item: Object, body: Any, content_type: str, is_built_in: bool) -> Object:
    """The object after the patch. Raises 415 for strategic merge on custom resources."""
    kind = content_type.split(";")[0].strip()
    if kind == JSON:
        return _json_patched(item, body)
    if not isinstance(body, dict):
        raise bad_request("the patch must be an object")
    if kind == MERGE:
        return _merged(item, body)
    if kind == STRATEGIC and is_built_in:
        return _strategic(item, body)
    supported = [JSON, MERGE, *([STRATEGIC] if is_built_in else [])]
    message = (
        "the body of the request was in an unknown format - accepted media types include: "
        + ", ".join(supported)
    )
    raise ApiError(415, "UnsupportedMediaType", message)


def _merged(target: Any, patch: Any) -> Any:
    """RFC 7386: null removes, objects merge, everything else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _strategic(target: Any, patch: Object) -> Any:
    if patch.get("$patch") == "delete":
        return {}
    result = {} if patch.get("$patch") == "replace" else copy.deepcopy(target or {})
    for key, value in patch.items():
        if key == "$patch" or key.startswith("$setElementOrder/"):
            continue
        if key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            result[name] = [entry for entry in result.get(name, []) if entry not in value]
        elif key.startswith("$retainKeys"):
            result = {name: entry for name, entry in result.items() if name in value}
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = _strategic(result.get(key), value)
        elif isinstance(value, list):
            result[key] = _merged_list(key, result.get(key) or [], value)
        else:
            result[key] = value
    return result


def _merged_list(name: str, target: list[Any], patch: list[Any]) -> list[Any]:
    if name == "finalizers":  # a list of values with patchStrategy merge
        return [*target, *(entry for entry in patch if entry not in target)]
    key = _MERGE_KEYS.get(name)
    if key is None:
        return copy.deepcopy(patch)
    result = copy.deepcopy(target)
    for entry in patch:
        if entry.get("$patch") == "replace":
            return [e for e in copy.deepcopy(patch) if "$patch" not in e]
        if key not in entry:
            raise bad_request(f"map: {entry} does not contain declared merge key: {key}")
        found = next((i for i, old in enumerate(result) if old.get(key) == entry[key]), None)
        if entry.get("$patch") == "delete":
            result = [old for old in result if old.get(key) != entry[key]]
        elif found is None:
            result.append(copy.deepcopy(entry))
        else:
            result[found] = _strategic(result[found], entry)
    return result


def _json_patched(item: Object, operations: Any) -> Object:
    """RFC 6902 but for ``move`` and ``copy``. A failing ``test`` is 422, as the server answers."""
    result = copy.deepcopy(item)
    if not isinstance(operations, list):
        raise bad_request("a JSON patch must be a list of operations")
    for operation in operations:
        path = [_unescaped(part) for part in operation["path"].split("/")[1:]]
        try:
            parent = _walk(result, path[:-1])
            _apply(operation["op"], parent, path[-1], operation.get("value"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            message = f"the server rejected our request due to an error in our request: {error!r}"
            raise ApiError(422, "Invalid", message) from error
    return result


def _apply(op: str, parent: Any, last: str, value: Any) -> None:
    if op not in {"add", "remove", "replace", "test"}:
        raise ValueError(f"operation {op} is not simulated")
    if isinstance(parent, list):
        _apply_to_list(op, parent, last, value)
    elif op == "add":
        parent[last] = value
    elif op == "test":
        if parent.get(last) != value:
            raise ValueError(f"testing value {last} failed")
    else:
        parent.pop(last)
        if op == "replace":
            parent[last] = value


def _apply_to_list(op: str, parent: list[Any], last: str, value: Any) -> None:
    if op == "add":
        parent.insert(len(parent) if last == "-" else int(last), value)
    elif op == "remove":
        del parent[int(last)]
    elif op == "replace":
        parent[int(last)] = value
    elif parent[int(last)] != value:
        raise ValueError(f"testing value {last} failed")


def _walk(value: Any, path: list[str]) -> Any:
    for part in path:
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _unescaped(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
