"""Cross-field rules of the API server that no schema states: which checks a kind goes through."""

from __future__ import annotations

from tests.kube import job_rules, kinds, metadata_rules, pod_rules
from tests.kube.errors import Cause, Object, invalid
from tests.kube.kinds import Kind


def refuse_undecodable(kind: Kind, item: Object) -> None:
    """Raise 400 for quantities that are none: they fail when the body is decoded."""
    if kind == kinds.POD:
        pod_rules.refuse_bad_quantities(item.get("spec") or {})
    elif kind == kinds.JOB:
        template = (item.get("spec") or {}).get("template") or {}
        pod_rules.refuse_bad_quantities(template.get("spec") or {})


def check_new(kind: Kind, item: Object) -> list[Cause]:
    """Everything that is wrong with a new object, after defaulting."""
    causes = metadata_rules.check(kind, item)
    if kind == kinds.JOB:
        causes += job_rules.check(item)
    elif kind == kinds.POD:
        causes += pod_rules.check_spec(item["spec"], "spec")
    return causes


def check_change(kind: Kind, old: Object, new: Object) -> list[Cause]:
    """Everything that is wrong with a changed object, or was not to be changed."""
    causes = metadata_rules.check_change(kind, old, new)
    if kind == kinds.JOB:
        causes += job_rules.check(new) + job_rules.check_change(old, new)
    elif kind == kinds.POD:
        causes += pod_rules.check_change(old, new)
    elif kind in (kinds.JOB_SET, kinds.TRAIN_JOB):
        causes += _check_training_change(old["spec"], new["spec"])
    return causes


def _check_training_change(before: Object, after: Object) -> list[Cause]:
    """Webhooks of JobSet and Trainer: while it runs only ``suspend`` may change."""
    if before.get("suspend"):
        return []
    names = sorted((before.keys() | after.keys()) - {"suspend", "ttlSecondsAfterFinished"})
    return [
        invalid(f"spec.{name}", "", "field is immutable")
        for name in names
        if before.get(name) != after.get(name)
    ]


def check_status(kind: Kind, new: Object) -> list[Cause]:
    return job_rules.check_status(new) if kind == kinds.JOB else []
