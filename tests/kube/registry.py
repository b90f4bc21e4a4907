"""What happens to an object between a request and the store: defaults, checks, admission.

Controllers of the server go through it too, so a pod that they make can be refused like any other.
"""

from __future__ import annotations

import copy
import secrets
import string
import uuid
from collections.abc import Callable
from typing import Any

from tests.kube import defaults, kinds, rules
from tests.kube.errors import (
    ApiError,
    Object,
    bad_request,
    conflict,
    failed_precondition,
    invalid,
    invalid_object,
    not_found,
    required,
    unsupported,
)
from tests.kube.kinds import Kind
from tests.kube.schema import check_structure
from tests.kube.store import Store, is_ready_to_go

Admission = Callable[[Kind, Object], None]
_GENERATED = (
    string.digits.replace("0", "").replace("1", "").replace("3", "") + "bcdfghjklmnpqrstvwxz"
)
_DELETE_OPTIONS = Kind("meta.k8s.io", "v1", "DeleteOptions", "deleteoptions")
_READ_ONLY = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "selfLink")


class Registry:
    """Creates, changes and deletes objects as the API server's storage strategies do."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.mutating: list[Admission] = []
        self.validating: list[Admission] = []

    def create(self, kind: Kind, namespace: str, body: Object, dry_run: bool = False) -> Object:
        """Store a new object. Raises 400, 403, 404 (no namespace), 409, 422."""
        if not isinstance(body, dict):
            raise bad_request("the body of the request must be an object")
        item = _without_nulls(body)
        self._check_identity(kind, namespace, item)
        check_structure(kind, item)
        rules.refuse_undecodable(kind, item)
        metadata = item["metadata"]
        if metadata.get("resourceVersion"):
            message = "resourceVersion should not be set on objects to be created"
            raise ApiError(500, "", message)
        for name in (*_READ_ONLY, "deletionGracePeriodSeconds"):
            metadata.pop(name, None)
        if kind.is_namespaced:
            metadata["namespace"] = namespace
        metadata["uid"] = str(uuid.uuid4())
        self._prepare(kind, item)
        with self.store.lock:
            if kind.is_namespaced and not self.store.get(kinds.NAMESPACE, "", namespace):
                raise not_found(kinds.NAMESPACE, namespace)
            for admit in self.mutating:
                admit(kind, item)
            causes = rules.check_new(kind, item)
            if causes:
                raise invalid_object(kind, metadata["name"], causes)
            for admit in self.validating:
                admit(kind, item)
            if dry_run:
                return item
            return self.store.create(kind, namespace, item)

    def _check_identity(self, kind: Kind, namespace: str, item: Object) -> None:
        given = item.setdefault("apiVersion", kind.api_version), item.setdefault("kind", kind.kind)
        if given != (kind.api_version, kind.kind):
            raise bad_request(
                f"{given[1]} in version {given[0]!r} cannot be handled as a {kind.kind}"
            )
        metadata = item.setdefault("metadata", {})
        if not isinstance(metadata, dict):
            raise bad_request("metadata must be an object")
        if metadata.get("namespace", namespace) != namespace:
            raise bad_request(
                "the namespace of the provided object does not match the namespace sent on the "
                "request"
            )
        prefix = metadata.get("generateName")
        if not metadata.get("name") and prefix:
            # names.SimpleNameGenerator: at most 63 characters, five of them random.
            suffix = "".join(secrets.choice(_GENERATED) for _ in range(5))
            metadata["name"] = prefix[:58] + suffix
        if not metadata.get("name") and kind.has_name:
            raise invalid_object(
                kind, "", [required("metadata.name", "name or generateName is required")]
            )

    @staticmethod
    def _prepare(kind: Kind, item: Object) -> None:
        if kind == kinds.JOB:
            item["status"] = {}
            defaults.default_job(item)
            defaults.label_job(item)
        elif kind == kinds.POD:
            item["status"] = {"phase": "Pending", "qosClass": "BestEffort"}
            defaults.default_pod(item)
        elif kind == kinds.NAMESPACE:
            item["status"] = {"phase": "Active"}
            name = item["metadata"]["name"]
            item["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = name

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        item = self.store.get(kind, namespace, name)
        if item is None:
            raise not_found(kind, name)
        return item

    def change(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        subresource: str,
        edit: Callable[[Object], Object],
        dry_run: bool = False,
        is_replacement: bool = False,
    ) -> Object:
        """PUT or PATCH: ``edit`` gives the wanted object from the stored one.

        Raises 409 when it names another resourceVersion or uid than the stored one has.
        """
        with self.store.lock:
            old = self.get(kind, namespace, name)
            new = edit(copy.deepcopy(old))
            if not isinstance(new, dict):
                raise bad_request("the body of the request must be an object")
            new = _without_nulls(new)
            if is_replacement and not kind.has_schema:
                _require_version(kind, new)
            self._check_update_identity(kind, namespace, old, new)
            new = _with_kept_parts(old, new, subresource)
            check_structure(kind, new)
            if subresource != "status":
                if kind == kinds.JOB:
                    defaults.default_job(new)
                causes = rules.check_change(kind, old, new)
                if causes:
                    raise invalid_object(kind, name, causes)
            else:
                causes = rules.check_status(kind, new)
                if causes:
                    raise invalid_object(kind, name, causes)
            if dry_run:
                return new
            return self.store.update(kind, namespace, name, lambda item: _replace(item, new))

    @staticmethod
    def _check_update_identity(kind: Kind, namespace: str, old: Object, new: Object) -> None:
        metadata, name = new.setdefault("metadata", {}), old["metadata"]["name"]
        if metadata.get("name", name) != name:
            raise bad_request(
                f"the name of the object ({metadata.get('name')}) does not match the name on the "
                f"URL ({name})"
            )
        version = metadata.get("resourceVersion") or old["metadata"]["resourceVersion"]
        if version != old["metadata"]["resourceVersion"]:
            raise conflict(
                kind,
                name,
                "the object has been modified; please apply your changes to the latest version "
                "and try again",
            )
        if metadata.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            raise conflict(
                kind,
                name,
                f"Precondition failed: UID in precondition: {metadata['uid']}, UID in object meta: "
                f"{old['metadata']['uid']}",
            )

    def delete(
        self, kind: Kind, namespace: str, name: str, options: Object | None = None
    ) -> tuple[Object, bool]:
        """Begin or finish a deletion: the object and whether it is gone.

        Raises 409 when ``preconditions`` name another uid or resourceVersion.
        """
        options = options or {}
        finalizer = _finalizer(kind, options)
        with self.store.lock:
            old = self.get(kind, namespace, name)
            _check_preconditions(kind, old, options.get("preconditions") or {})
            if (options.get("dryRun") or []) == ["All"]:
                return old, True
            grace = _grace_seconds(kind, old, options.get("gracePeriodSeconds"))
            marked = self.store.update(
                kind, namespace, name, lambda item: self._mark(item, grace, finalizer)
            )
            if self.store.get(kind, namespace, name) is None:
                return marked, True
            if is_ready_to_go(marked):
                return self.store.remove(kind, namespace, name), True
            return marked, False

    def _mark(self, item: Object, grace_seconds: int, finalizer: str) -> None:
        """Set what a deletion sets; a second one can only shorten the grace period."""
        metadata = item["metadata"]
        is_first = "deletionTimestamp" not in metadata
        if is_first and finalizer:
            held = metadata.setdefault("finalizers", [])
            if finalizer not in held:
                held.append(finalizer)
        if is_first or grace_seconds < metadata.get("deletionGracePeriodSeconds", 0):
            clock = self.store.clock
            from tests.kube.clock import shifted

            metadata["deletionTimestamp"] = shifted(clock.timestamp(), grace_seconds)
            metadata["deletionGracePeriodSeconds"] = grace_seconds


def _without_nulls(value: Any) -> Any:
    """A deep copy in which a field of null is an absent one, as Go decodes it."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        if None in value:
            raise bad_request("a list holds null")
        return [_without_nulls(entry) for entry in value]
    return value


def _require_version(kind: Kind, new: Object) -> None:
    """Custom resources are never replaced blindly (AllowUnconditionalUpdate is false)."""
    metadata = new.get("metadata") or {}
    if not metadata.get("resourceVersion"):
        cause = invalid("metadata.resourceVersion", 0, "must be specified for an update")
        raise invalid_object(kind, metadata.get("name", ""), [cause])


def _replace(item: Object, new: Object) -> None:
    version = item["metadata"]["resourceVersion"]
    item.clear()
    item.update(copy.deepcopy(new))
    item["metadata"]["resourceVersion"] = version


def _with_kept_parts(old: Object, new: Object, subresource: str) -> Object:
    """Only ``status`` may change through ``/status``, all but it elsewhere."""
    new = copy.deepcopy(new)
    new.setdefault("apiVersion", old["apiVersion"])
    new.setdefault("kind", old["kind"])
    if subresource == "status":
        kept = copy.deepcopy(old)
        kept["status"] = new.get("status", {})
        return kept
    if "status" in old:
        new["status"] = copy.deepcopy(old["status"])
    for name in (*_READ_ONLY, "deletionGracePeriodSeconds", "name", "namespace"):
        if name in old["metadata"]:
            new["metadata"][name] = old["metadata"][name]
        else:
            new["metadata"].pop(name, None)
    new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
    return new


def _check_preconditions(kind: Kind, item: Object, preconditions: Object) -> None:
    metadata = item["metadata"]
    for field, label in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
        wanted = preconditions.get(field)
        if wanted is not None and wanted != metadata[field]:
            raise failed_precondition(kind, metadata["name"], label, wanted, metadata[field])


def _grace_seconds(kind: Kind, item: Object, wanted: Any) -> int:
    """Only pods have a grace period (podStrategy.CheckGracefulDelete)."""
    if kind != kinds.POD:
        return 0
    if not item["spec"].get("nodeName") or item["status"]["phase"] in ("Succeeded", "Failed"):
        return 0
    seconds = item["spec"]["terminationGracePeriodSeconds"] if wanted is None else int(wanted)
    if seconds < 0:
        raise ApiError(422, "Invalid", "gracePeriodSeconds: must be non-negative")
    return seconds


def _finalizer(kind: Kind, options: Object) -> str:
    """What the propagation policy leaves to the garbage collector before the object may go.

    A Job deleted through batch/v1 without a policy ORPHANS its pods
    (jobStrategy.DefaultGarbageCollectionPolicy), unlike every other kind here.
    """
    policy = options.get("propagationPolicy")
    if policy is None and options.get("orphanDependents") is not None:
        policy = "Orphan" if options["orphanDependents"] else "Background"
    if policy is None and kind == kinds.JOB:
        policy = "Orphan"
    if policy not in (None, "Orphan", "Background", "Foreground"):
        cause = unsupported(
            "propagationPolicy", policy, ["Background", "Foreground", "Orphan", "nil"]
        )
        raise invalid_object(_DELETE_OPTIONS, "", [cause])
    return {"Orphan": "orphan", "Foreground": "foregroundDeletion"}.get(policy or "", "")
