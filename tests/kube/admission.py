"""Admission that looks beyond one object: Pod Security ``restricted`` and resource quotas."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from tests.kube import kinds, pods, quantities
from tests.kube.errors import Object, refused
from tests.kube.kinds import Kind
from tests.kube.scheduler import requests_of

if TYPE_CHECKING:
    from tests.kube.store import Store

ENFORCE = "pod-security.kubernetes.io/enforce"
_RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip


class PodSecurity:
    """Refuses pods that break the standard ``restricted`` where the namespace enforces it.

    Only pods: a Job whose template breaks it is created, and then gets no pods (``FailedCreate``),
    as on a real cluster.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, kind: Kind, item: Object) -> None:
        if kind is not kinds.POD:
            return
        namespace = self._store.get(kinds.NAMESPACE, "", item["metadata"]["namespace"]) or {}
        labels = (namespace.get("metadata") or {}).get("labels") or {}
        if labels.get(ENFORCE) != "restricted":
            return
        violations = restricted_violations(item["spec"])
        if violations:
            why = f'violates PodSecurity "restricted:latest": {", ".join(violations)}'
            raise refused(kind, item["metadata"]["name"], why)


def restricted_violations(spec: Object) -> list[str]:
    """What a pod spec breaks of the Pod Security Standard ``restricted``."""
    pod = spec.get("securityContext") or {}
    found = []
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            found.append(f"host namespaces ({name}=true)")
    for volume in spec.get("volumes") or []:
        if not (set(volume) - {"name"}) & _RESTRICTED_VOLUMES:
            found.append(f'restricted volume types (volume "{volume["name"]}")')
    if pod.get("runAsUser") == 0:
        found.append("runAsUser=0 (pod must not set runAsUser=0)")
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        found += _container_violations(container, pod)
    return found


def _container_violations(container: Object, pod: Object) -> list[str]:
    own, name = container.get("securityContext") or {}, container["name"]
    capabilities = own.get("capabilities") or {}
    found = []
    if own.get("privileged"):
        found.append(f'privileged (container "{name}" must not set it)')
    if own.get("allowPrivilegeEscalation") is not False:
        found.append(
            f'allowPrivilegeEscalation != false (container "{name}" must set '
            "securityContext.allowPrivilegeEscalation=false)"
        )
    if "ALL" not in (capabilities.get("drop") or []) or set(capabilities.get("add") or []) - {
        "NET_BIND_SERVICE"
    }:
        found.append(
            f'unrestricted capabilities (container "{name}" must set '
            'securityContext.capabilities.drop=["ALL"])'
        )
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        found.append(
            f'runAsNonRoot != true (pod or container "{name}" must set '
            "securityContext.runAsNonRoot=true)"
        )
    if own.get("runAsUser") == 0:
        found.append(f'runAsUser=0 (container "{name}" must not set runAsUser=0)')
    profile = own.get("seccompProfile") or pod.get("seccompProfile") or {}
    if profile.get("type") not in ("RuntimeDefault", "Localhost"):
        found.append(
            f'seccompProfile (pod or container "{name}" must set '
            'securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")'
        )
    return found


class Quota:
    """Refuses what is over a ResourceQuota: ``pods``, ``requests.*``, ``count/jobs.batch``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, kind: Kind, item: Object) -> None:
        if kind not in (kinds.POD, kinds.JOB):
            return
        namespace = item["metadata"]["namespace"]
        wanted = _usage(kind, item)
        for quota in self._store.list(kinds.QUOTA, namespace):
            hard = quota["spec"].get("hard") or {}
            used = self._used(namespace, hard)
            over = [
                name
                for name, limit in hard.items()
                if used[name] + wanted.get(name, Decimal(0)) > quantities.value(limit)
                and wanted.get(name)
            ]
            if over:
                raise refused(
                    kind,
                    item["metadata"]["name"],
                    f"exceeded quota: {quota['metadata']['name']}, requested: "
                    f"{_shown(over, wanted)}, used: {_shown(over, used)}, limited: "
                    + ",".join(f"{name}={hard[name]}" for name in over),
                )

    def _used(self, namespace: str, hard: Object) -> dict[str, Decimal]:
        """What pods that have not ended and all Jobs take."""
        total = {name: Decimal(0) for name in hard}
        for kind in (kinds.POD, kinds.JOB):
            for item in self._store.list(kind, namespace):
                if kind is kinds.POD and pods.is_finished(item):
                    continue
                for name, amount in _usage(kind, item).items():
                    if name in total:
                        total[name] += amount
        return total

    def sync(self) -> None:
        """Write what is used into the quotas' statuses, as the quota controller does."""
        for quota in self._store.list(kinds.QUOTA):
            metadata, hard = quota["metadata"], quota["spec"].get("hard") or {}
            used = {k: _plain(v) for k, v in self._used(metadata["namespace"], hard).items()}
            status = {"hard": hard, "used": used}
            self._store.update(
                kinds.QUOTA,
                metadata["namespace"],
                metadata["name"],
                lambda item, status=status: item.update(status=status),  # type: ignore[misc]
            )


def _usage(kind: Kind, item: Object) -> dict[str, Decimal]:
    if kind is kinds.JOB:
        return {"count/jobs.batch": Decimal(1)}
    requests = requests_of(item["spec"])
    found = {"pods": Decimal(1), "count/pods": Decimal(1)}
    for name, amount in requests.items():
        if name != "pods":
            found[f"requests.{name}"] = amount
            found[name] = amount
    return found


def _shown(names: list[str], amounts: dict[str, Decimal]) -> str:
    return ",".join(f"{name}={_plain(amounts.get(name, Decimal(0)))}" for name in names)


def _plain(amount: Decimal) -> str:
    return format(amount.normalize(), "f")
