"""Clean-up controllers: garbage collection by owner, pod garbage, ttl of finished Jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.kube import kinds, pods
from tests.kube.errors import ApiError, Object
from tests.kube.job_controller import is_finished
from tests.kube.kinds import Kind

if TYPE_CHECKING:
    from tests.kube.server import KubeServer

_OWNED = tuple(kind for kind in kinds.KINDS if kind.has_name and kind is not kinds.EVENT)


class Collector:
    """Deletes what nobody owns any more."""

    def __init__(self, api: KubeServer) -> None:
        self._api = api
        self._store = api.store

    def sync(self) -> None:
        items = [(kind, item) for kind in _OWNED for item in self._store.list(kind)]
        known = {item["metadata"]["uid"] for _, item in items}
        for kind, item in items:
            self._let_go(kind, item, items)
            owners = item["metadata"].get("ownerReferences") or []
            if owners and not pods.is_terminating(item):
                if all(owner["uid"] not in known for owner in owners):
                    self._delete(kind, item, "Background")
        self._expire_jobs()

    def _let_go(self, kind: Kind, owner: Object, items: list[tuple[Kind, Object]]) -> None:
        """Do what the finalizers of a propagation policy wait for."""
        finalizers = owner["metadata"].get("finalizers") or []
        if not pods.is_terminating(owner):
            return
        uid = owner["metadata"]["uid"]
        dependents = [(k, i) for k, i in items if _owns(uid, i)]
        if "orphan" in finalizers:
            for child_kind, child in dependents:
                self._disown(child_kind, child, uid)
            self._drop(kind, owner, "orphan")
        elif "foregroundDeletion" in finalizers:
            for child_kind, child in dependents:
                if not pods.is_terminating(child):
                    self._delete(child_kind, child, "Foreground")
            if not any(_blocks(uid, child) for _, child in dependents):
                self._drop(kind, owner, "foregroundDeletion")

    def _disown(self, kind: Kind, item: Object, uid: str) -> None:
        def edit(child: Object) -> None:
            kept = [o for o in child["metadata"]["ownerReferences"] if o["uid"] != uid]
            child["metadata"]["ownerReferences"] = kept
            if not kept:
                child["metadata"].pop("ownerReferences")

        self._update(kind, item, edit)

    def _drop(self, kind: Kind, item: Object, finalizer: str) -> None:
        def edit(one: Object) -> None:
            kept = [f for f in one["metadata"].get("finalizers") or [] if f != finalizer]
            one["metadata"]["finalizers"] = kept

        self._update(kind, item, edit)

    def _update(self, kind: Kind, item: Object, edit: object) -> None:
        metadata = item["metadata"]
        try:
            self._store.update(kind, metadata.get("namespace", ""), metadata["name"], edit)  # type: ignore[arg-type]
        except ApiError:
            pass  # gone meanwhile

    def _delete(self, kind: Kind, item: Object, policy: str) -> None:
        metadata = item["metadata"]
        options = {"propagationPolicy": policy, "preconditions": {"uid": metadata["uid"]}}
        try:
            self._api.registry.delete(
                kind, metadata.get("namespace", ""), metadata["name"], options
            )
        except ApiError:
            pass  # gone meanwhile

    def _expire_jobs(self) -> None:
        for job in self._store.list(kinds.JOB):
            ttl = job["spec"].get("ttlSecondsAfterFinished")
            if ttl is None or not is_finished(job) or pods.is_terminating(job):
                continue
            ended = max(
                condition["lastTransitionTime"]
                for condition in job["status"]["conditions"]
                if condition["type"] in ("Complete", "Failed")
            )
            if self._store.clock.seconds_since(ended) >= ttl:
                self._delete(kinds.JOB, job, "Foreground")


def _owns(uid: str, item: Object) -> bool:
    return any(owner["uid"] == uid for owner in item["metadata"].get("ownerReferences") or [])


def _blocks(uid: str, item: Object) -> bool:
    return any(
        owner["uid"] == uid and owner.get("blockOwnerDeletion")
        for owner in item["metadata"].get("ownerReferences") or []
    )
