"""What a container finds around itself: variables, expanded commands, folders for its volumes.

There is no mount: a folder stands in for each volume, and a path below its ``mountPath`` is
replaced by the path below that folder wherever it begins an argument or a variable, or follows
``=``, ``:``, ``,`` or ``file://`` in one.
"""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kube import kinds, quantities
from tests.kube.errors import Object

if TYPE_CHECKING:
    from tests.kube.store import Store

_REFERENCE = re.compile(r"\$(\$|\(([^)]+)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


class ConfigurationError(Exception):
    """A ConfigMap or Secret is missing: CreateContainerConfigError."""


class Surroundings:
    """Resolves one pod's containers against the store."""

    def __init__(self, store: Store, pod: Object, folder: Path, base: dict[str, str]) -> None:
        self._store = store
        self._pod = pod
        self._folder = folder
        self._base = base
        self._namespace = pod["metadata"]["namespace"]

    def variables(self, container: Object) -> dict[str, str]:
        """The base, then ``envFrom``, then ``env`` in order, with ``$(NAME)`` expanded."""
        found: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            found.update(self._all_of(source))
        for variable in container.get("env") or []:
            if "valueFrom" in variable:
                value = self._value_from(container, variable["valueFrom"])
                if value is None:
                    continue
            else:
                value = expanded(variable.get("value", ""), found)
            found[variable["name"]] = value
        folders = self._mounts(container)
        mapped = {name: self._local(value, folders) for name, value in found.items()}
        return {**self._base, "TMPDIR": str(self._temporary(folders)), **mapped}

    def command(self, container: Object, entrypoint: list[str]) -> list[str]:
        """``command`` and ``args`` as the runtime starts them."""
        words = [*(container.get("command") or entrypoint), *(container.get("args") or [])]
        if not words:
            raise ConfigurationError("no command specified")
        variables = self.variables(container)
        folders = self._mounts(container)
        return [self._local(expanded(word, variables), folders) for word in words]

    def working_folder(self, container: Object) -> Path:
        wanted = _mapped(container.get("workingDir") or "", self._mounts(container))
        folder = Path(wanted) if wanted and Path(wanted).is_dir() else self._folder / "root"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _local(self, text: str, folders: dict[str, Path]) -> str:
        """Paths and host names of the pod as they are on this machine."""
        subdomain = self._pod["spec"].get("subdomain")
        if subdomain:
            # Pods of one headless service all run here.
            host = rf"[a-z0-9-]+\.{re.escape(subdomain)}(\.{self._namespace}(\.svc[a-z.]*)?)?"
            text = re.sub(rf"(?<![\w.-]){host}(?![\w.-])", "127.0.0.1", text)
        return _mapped(text, folders)

    def _temporary(self, folders: dict[str, Path]) -> Path:
        folder = folders.get("/tmp", self._folder / "tmp")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _mounts(self, container: Object) -> dict[str, Path]:
        """mountPath -> folder, the longest paths first."""
        volumes = {volume["name"]: volume for volume in self._pod["spec"].get("volumes") or []}
        found = {}
        for mount in container.get("volumeMounts") or []:
            folder = self._volume(volumes[mount["name"]])
            if mount.get("subPath"):
                folder = folder / mount["subPath"]
            found[mount["mountPath"].rstrip("/")] = folder
        return dict(sorted(found.items(), key=lambda entry: -len(entry[0])))

    def _volume(self, volume: Object) -> Path:
        folder = self._folder / "volumes" / volume["name"]
        is_new = not folder.exists()
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:
            sources = [volume, *(volume.get("projected") or {}).get("sources", [])]
            for source in sources:
                self._fill(folder, source)
        return folder

    def _fill(self, folder: Path, source: Object) -> None:
        for name, value in self._files(source).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value)

    def _files(self, source: Object) -> dict[str, str]:
        if "downwardAPI" in source:
            items = source["downwardAPI"].get("items") or []
            return {i["path"]: self._field(i["fieldRef"]["fieldPath"]) for i in items}
        for key, kind in (("configMap", kinds.CONFIG_MAP), ("secret", kinds.SECRET)):
            if key in source:
                reference = source[key]
                name = reference.get("name") or reference["secretName"]
                data = self._data(kind, name, reference.get("optional"))
                items = reference.get("items")
                if items is None:
                    return data
                return {item["path"]: data[item["key"]] for item in items}
        return {}

    def _all_of(self, source: Object) -> dict[str, str]:
        prefix = source.get("prefix") or ""
        for key, kind in (("configMapRef", kinds.CONFIG_MAP), ("secretRef", kinds.SECRET)):
            if key in source:
                data = self._data(kind, source[key]["name"], source[key].get("optional"))
                return {prefix + name: value for name, value in data.items()}
        return {}

    def _value_from(self, container: Object, source: Object) -> str | None:
        if "fieldRef" in source:
            return self._field(source["fieldRef"]["fieldPath"])
        if "resourceFieldRef" in source:
            return _resource(container, source["resourceFieldRef"])
        for key, kind in (("configMapKeyRef", kinds.CONFIG_MAP), ("secretKeyRef", kinds.SECRET)):
            if key in source:
                reference = source[key]
                data = self._data(kind, reference["name"], reference.get("optional"))
                if reference["key"] in data:
                    return data[reference["key"]]
                if reference.get("optional"):
                    return None
                raise ConfigurationError(
                    f"couldn't find key {reference['key']} in {kind.kind} "
                    f"{self._namespace}/{reference['name']}"
                )
        return None

    def _data(self, kind: kinds.Kind, name: str, is_optional: bool | None) -> dict[str, str]:
        item = self._store.get(kind, self._namespace, name)
        if item is None:
            if is_optional:
                return {}
            raise ConfigurationError(f'{kind.plural[:-1]} "{name}" not found')
        data = dict(item.get("data") or {})
        if kind is kinds.SECRET:
            data = {k: base64.b64decode(v).decode() for k, v in data.items()}
            data.update(item.get("stringData") or {})
        return data

    def _field(self, path: str) -> str:
        if match := _SUBSCRIPT.fullmatch(path):
            return str((self._pod["metadata"].get(match[1]) or {}).get(match[2], ""))
        value: object = self._pod
        for name in path.split("."):
            value = value.get(name, "") if isinstance(value, dict) else ""
        if isinstance(value, dict):
            return "\n".join(f'{k}="{v}"' for k, v in sorted(value.items()))
        return str(value)


def _resource(container: Object, reference: Object) -> str:
    group, _, name = reference["resource"].partition(".")
    amount = quantities.value((container["resources"].get(group) or {}).get(name, "1"))
    divisor = quantities.value(reference.get("divisor") or "1") or 1
    return str(math.ceil(amount / divisor))


def expanded(text: str, variables: dict[str, str]) -> str:
    """``$(NAME)`` replaced, ``$$(NAME)`` left as ``$(NAME)``, unknown names left alone."""

    def replace(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return variables.get(match[2], match[0])

    return _REFERENCE.sub(replace, text)


def _mapped(text: str, folders: dict[str, Path]) -> str:
    """Paths below mounts as paths below folders, but for what lies on this machine.

    A test's interpreter or bucket may be in ``/tmp`` where the pod mounts a volume.
    """
    for path, folder in folders.items():
        pattern = rf"(^|[=:,]|file://)({re.escape(path)}(?:/[^:,]*)?)(?=$|[:,])"

        def replace(match: re.Match[str], path: str = path, folder: Path = folder) -> str:
            below = match[2][len(path) :]
            if below and _is_here(Path(match[2]), Path(path)):
                return match[0]
            return match[1] + str(folder) + below

        text = re.sub(pattern, replace, text)
    return text


def _is_here(path: Path, mount: Path) -> bool:
    return path.exists() or (path.parent != mount and path.parent.exists())
