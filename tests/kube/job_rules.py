"""Rules for Jobs, after pkg/apis/batch/validation/validation.go of Kubernetes 1.34."""

# ruff: noqa: E501  The messages are the server's own words, kept whole.
from __future__ import annotations

import copy
from typing import Any

from tests.kube import metadata_rules, pod_rules
from tests.kube.errors import (
    Cause,
    Object,
    duplicate,
    invalid,
    required,
    too_many,
    unsupported,
)
from tests.kube.metadata_rules import is_dns_label, is_qualified_name
from tests.kube.selectors import matches_label_selector

MAX_RULES = 20
MAX_EXIT_CODES = 255
MAX_PATTERNS = 20
MAX_PARALLELISM_INDEXED = 100_000
COMPLETIONS_SOFT_LIMIT = 100_000
MAX_PARALLELISM_HIGH = 10_000
_ACTIONS = ["Count", "FailIndex", "FailJob", "Ignore"]
_NON_NEGATIVE = (
    "parallelism", "completions", "activeDeadlineSeconds", "backoffLimit",
    "ttlSecondsAfterFinished", "backoffLimitPerIndex", "maxFailedIndexes",
)  # fmt: skip
_IMMUTABLE = (
    "selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy",
    "successPolicy",
)  # fmt: skip


def is_indexed(spec: Object) -> bool:
    return spec.get("completionMode") == "Indexed"


def check(job: Object) -> list[Cause]:
    """ValidateJob: everything wrong with a defaulted Job."""
    spec = job["spec"]
    return (
        _check_host_names(job)
        + _check_selector(job)
        + _check_numbers(spec)
        + _check_completion_mode(spec)
        + _check_failure_policy(spec)
        + _check_success_policy(spec)
        + _check_replacement_policy(spec)
        + metadata_rules.check_labels(spec["template"].get("metadata") or {}, "spec.template")
        + pod_rules.check_spec(spec["template"]["spec"], "spec.template.spec", is_template=True)
        + _check_restart_policy(spec)
    )


def _check_host_names(job: Object) -> list[Cause]:
    """Pods of an Indexed Job are hosts ``name-index``: a DNS label, 63 characters at most."""
    spec, name = job["spec"], job["metadata"]["name"]
    if not is_indexed(spec) or not spec.get("completions"):
        return []
    longest = f"{name}-{spec['completions'] - 1}"
    if is_dns_label(longest):
        return []
    detail = f"will not able to create pod with invalid DNS label: {longest}"
    return [invalid("metadata.name", name, detail)]


def _check_selector(job: Object) -> list[Cause]:
    spec = job["spec"]
    labels = (spec["template"].get("metadata") or {}).get("labels") or {}
    selector = spec.get("selector")
    if not selector:
        # No selector selects nothing, so it does not select the pods either.
        return [
            required("spec.selector"),
            invalid(
                "spec.template.metadata.labels",
                labels,
                "`selector` does not match template `labels`",
            ),
        ]
    causes = []
    if not spec.get("manualSelector"):
        uid, name = job["metadata"].get("uid"), job["metadata"]["name"]
        generated = {
            "batch.kubernetes.io/controller-uid": uid,
            "controller-uid": uid,
            "batch.kubernetes.io/job-name": name,
            "job-name": name,
        }
        if not matches_label_selector(selector, generated):
            causes.append(invalid("spec.selector", selector, "`selector` not auto-generated"))
    if not matches_label_selector(selector, labels):
        causes.append(
            invalid(
                "spec.template.metadata.labels",
                labels,
                "`selector` does not match template `labels`",
            )
        )
    return causes


def _check_numbers(spec: Object) -> list[Cause]:
    causes = [
        invalid(f"spec.{name}", spec[name], "must be greater than or equal to 0")
        for name in _NON_NEGATIVE
        if spec.get(name) is not None and spec[name] < 0
    ]
    if spec.get("maxFailedIndexes") is not None and spec.get("backoffLimitPerIndex") is None:
        causes.append(required("spec.backoffLimitPerIndex", "when maxFailedIndexes is specified"))
    return causes


def _check_completion_mode(spec: Object) -> list[Cause]:
    mode = spec.get("completionMode")
    if mode not in ("Indexed", "NonIndexed"):
        return [unsupported("spec.completionMode", mode, ["Indexed", "NonIndexed"])]
    if is_indexed(spec):
        return _check_indexed(spec)
    return [
        invalid(f"spec.{name}", spec[name], "requires indexed completion mode")
        for name in ("backoffLimitPerIndex", "maxFailedIndexes")
        if spec.get(name) is not None
    ]


def _check_indexed(spec: Object) -> list[Cause]:
    completions, most = spec.get("completions"), spec.get("maxFailedIndexes")
    causes = []
    if completions is None:
        return [required("spec.completions", "when completion mode is Indexed")]
    if spec["parallelism"] > MAX_PARALLELISM_INDEXED:
        detail = f"must be less than or equal to {MAX_PARALLELISM_INDEXED} when completion mode is Indexed"
        causes.append(invalid("spec.parallelism", spec["parallelism"], detail))
    if most is not None and most > completions:
        causes.append(
            invalid("spec.maxFailedIndexes", most, "must be less than or equal to completions")
        )
    if completions > COMPLETIONS_SOFT_LIMIT and spec.get("backoffLimitPerIndex") is not None:
        if most is None:
            causes.append(
                required(
                    "spec.maxFailedIndexes",
                    f"must be specified when completions is above {COMPLETIONS_SOFT_LIMIT}",
                )
            )
        if spec["parallelism"] > MAX_PARALLELISM_HIGH:
            causes.append(
                invalid(
                    "spec.parallelism",
                    spec["parallelism"],
                    f"must be less than or equal to {MAX_PARALLELISM_HIGH} when completions are above {COMPLETIONS_SOFT_LIMIT} and used with backoff limit per index",
                )
            )
    return causes


def _check_failure_policy(spec: Object) -> list[Cause]:
    policy = spec.get("podFailurePolicy")
    if policy is None:
        return []
    path, failure_rules = "spec.podFailurePolicy.rules", policy.get("rules") or []
    causes = []
    if len(failure_rules) > MAX_RULES:
        causes.append(too_many(path, len(failure_rules), MAX_RULES))
    for index, rule in enumerate(failure_rules):
        causes += _check_rule(spec, rule, f"{path}[{index}]")
    return causes


def _check_rule(spec: Object, rule: Object, path: str) -> list[Cause]:
    causes = []
    action, codes, patterns = rule["action"], rule.get("onExitCodes"), rule.get("onPodConditions")
    if action not in _ACTIONS:
        causes.append(unsupported(f"{path}.action", action, _ACTIONS))
    elif action == "FailIndex" and spec.get("backoffLimitPerIndex") is None:
        causes.append(
            invalid(f"{path}.action", action, "requires the backoffLimitPerIndex to be set")
        )
    if codes is not None:
        causes += _check_exit_codes(spec, codes, f"{path}.onExitCodes")
    causes += _check_patterns(patterns or [], f"{path}.onPodConditions")
    if codes is not None and patterns:
        causes.append(
            _invalid_rule(path, "specifying both OnExitCodes and OnPodConditions is not supported")
        )
    if codes is None and not patterns:
        causes.append(
            _invalid_rule(path, "specifying one of OnExitCodes and OnPodConditions is required")
        )
    return causes


def _invalid_rule(path: str, detail: str) -> Cause:
    return Cause(path, "FieldValueInvalid", f"Invalid value: {detail}")


def _check_exit_codes(spec: Object, codes: Object, path: str) -> list[Cause]:
    pod = spec["template"]["spec"]
    names = {
        c["name"] for c in [*(pod.get("containers") or []), *(pod.get("initContainers") or [])]
    }
    causes = []
    operator, values = codes["operator"], codes.get("values") or []
    if operator not in ("In", "NotIn"):
        causes.append(unsupported(f"{path}.operator", operator, ["In", "NotIn"]))
    name = codes.get("containerName")
    if name is not None and name not in names:
        causes.append(
            invalid(
                f"{path}.containerName",
                name,
                "must be one of the container or initContainer names in the pod template",
            )
        )
    if not values:
        causes.append(invalid(f"{path}.values", values, "at least one value is required"))
    elif len(values) > MAX_EXIT_CODES:
        causes.append(too_many(f"{path}.values", len(values), MAX_EXIT_CODES))
    for index, code in enumerate(values):
        if operator == "In" and code == 0:
            causes.append(
                invalid(f"{path}.values[{index}]", code, "must not be 0 for the In operator")
            )
        if code in values[:index]:
            causes.append(duplicate(f"{path}.values[{index}]", code))
    if values != sorted(values):
        causes.append(invalid(f"{path}.values", values, "must be ordered"))
    return causes


def _check_patterns(patterns: list[Object], path: str) -> list[Cause]:
    causes = []
    if len(patterns) > MAX_PATTERNS:
        causes.append(too_many(path, len(patterns), MAX_PATTERNS))
    for index, pattern in enumerate(patterns):
        if not is_qualified_name(pattern["type"]):
            causes.append(
                invalid(
                    f"{path}[{index}].type",
                    pattern["type"],
                    "name part must consist of alphanumeric characters, '-', '_' or '.'",
                )
            )
        if pattern["status"] not in ("True", "False", "Unknown"):
            causes.append(
                unsupported(
                    f"{path}[{index}].status", pattern["status"], ["False", "True", "Unknown"]
                )
            )
    return causes


def _check_success_policy(spec: Object) -> list[Cause]:
    policy, path = spec.get("successPolicy"), "spec.successPolicy"
    if policy is None:
        return []
    if not is_indexed(spec):
        return [invalid(path, policy, "requires indexed completion mode")]
    success_rules = policy.get("rules") or []
    if not success_rules:
        return [
            required(
                f"{path}.rules",
                "at least one rules must be specified when the successPolicy is specified",
            )
        ]
    causes = []
    if len(success_rules) > MAX_RULES:
        causes.append(too_many(f"{path}.rules", len(success_rules), MAX_RULES))
    for index, rule in enumerate(success_rules):
        causes += _check_success_rule(spec, rule, f"{path}.rules[{index}]")
    return causes


def _check_success_rule(spec: Object, rule: Object, path: str) -> list[Cause]:
    count, text = rule.get("succeededCount"), rule.get("succeededIndexes")
    if count is None and text is None:
        return [
            required(path, "at least one of succeededCount or succeededIndexes must be specified")
        ]
    causes, completions = [], spec.get("completions") or 0
    if text is not None:
        try:
            indexes = parse_indexes(text)
        except ValueError as error:
            indexes = []
            causes.append(
                invalid(
                    f"{path}.succeededIndexes", text, f"error parsing succeededIndexes: {error}"
                )
            )
        if any(index >= completions for index in indexes):
            causes.append(
                invalid(
                    f"{path}.succeededIndexes",
                    text,
                    "error parsing succeededIndexes: too large index",
                )
            )
        if count is not None and count > len(indexes):
            causes.append(
                invalid(
                    f"{path}.succeededCount",
                    count,
                    f"must be less than or equal to {len(indexes)} (the number of indexes in the specified succeededIndexes field)",
                )
            )
    if count is not None and count > completions:
        causes.append(
            invalid(
                f"{path}.succeededCount",
                count,
                f"must be less than or equal to {completions} (the number of specified completions)",
            )
        )
    return causes


def parse_indexes(text: str) -> list[int]:
    """``1,3-5`` as numbers. Raises ``ValueError`` when they are not in order."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers or (found and numbers[0] <= found[-1]):
            raise ValueError(f"non-increasing order in {text!r}")
        found.extend(numbers)
    return found


def format_indexes(indexes: set[int] | list[int]) -> str:
    """Numbers as the status writes them: ``0,2-4``; two neighbours stay ``0,1``."""
    runs: list[list[int]] = []
    for index in sorted(indexes):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = (f"{r[0]}-{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)
    return ",".join(parts)


def _check_replacement_policy(spec: Object) -> list[Cause]:
    policy = spec.get("podReplacementPolicy")
    allowed = ["Failed"]
    if spec.get("podFailurePolicy") is None:
        allowed.append("TerminatingOrFailed")
    if policy in allowed:
        return []
    return [unsupported("spec.podReplacementPolicy", policy, allowed)]


def _check_restart_policy(spec: Object) -> list[Cause]:
    policy, path = spec["template"]["spec"].get("restartPolicy"), "spec.template.spec.restartPolicy"
    if policy == "Always":
        return [required(path, 'valid values: "OnFailure", "Never"')]
    if policy not in ("OnFailure", "Never"):
        return [unsupported(path, policy, ["OnFailure", "Never"])]
    if policy != "Never" and spec.get("podFailurePolicy") is not None:
        return [
            invalid(path, policy, 'only "Never" is supported when podFailurePolicy is specified')
        ]
    return []


def check_change(old: Object, new: Object) -> list[Cause]:
    """ValidateJobSpecUpdate: most of a Job can never change."""
    before, after = old["spec"], new["spec"]
    causes = [
        invalid(f"spec.{name}", after.get(name), "field is immutable")
        for name in _IMMUTABLE
        if before.get(name) != after.get(name)
    ]
    causes += _check_completions_change(before, after)
    # Only a Job that is suspended and never started may move to other nodes.
    may_move = before.get("suspend") and not (old.get("status") or {}).get("startTime")
    template = _with_directives_of(before, after) if may_move else before["template"]
    if template != after["template"]:
        causes.append(invalid("spec.template", {}, "field is immutable"))
    return causes


def _check_completions_change(before: Object, after: Object) -> list[Cause]:
    if before.get("completions") == after.get("completions"):
        return []
    if not is_indexed(after):
        return [invalid("spec.completions", after.get("completions"), "field is immutable")]
    if after.get("completions") != after["parallelism"]:
        return [
            invalid(
                "spec.completions",
                after.get("completions"),
                "can only be modified in tandem with spec.parallelism",
            )
        ]
    return []


def _with_directives_of(before: Object, after: Object) -> Object:
    """The old template with the parts taken over that a queue may set: where pods may run."""
    template, wanted = copy.deepcopy(before["template"]), after["template"]
    for name in ("nodeSelector", "tolerations", "schedulingGates"):
        _take(template["spec"], wanted["spec"], name)
    for name in ("labels", "annotations"):
        _take(template.setdefault("metadata", {}), wanted.get("metadata") or {}, name)
    affinity = copy.deepcopy(template["spec"].get("affinity") or {})
    _take(affinity, wanted["spec"].get("affinity") or {}, "nodeAffinity")
    template["spec"].pop("affinity", None)
    if affinity or wanted["spec"].get("affinity") is not None:
        template["spec"]["affinity"] = affinity
    return template


def _take(target: Object, source: Object, name: str) -> None:
    target.pop(name, None)
    if name in source:
        target[name] = copy.deepcopy(source[name])


def check_status(job: Object) -> list[Cause]:
    """ValidateJobStatus, as far as other controllers (Kueue, a test) write one."""
    status: dict[str, Any] = job.get("status") or {}
    holds = {c["type"] for c in status.get("conditions") or [] if c["status"] == "True"}
    causes = [
        invalid(f"status.{name}", status[name], "must be greater than or equal to 0")
        for name in ("active", "succeeded", "failed", "ready", "terminating")
        if (status.get(name) or 0) < 0
    ]
    for both, detail in (
        ({"Complete", "Failed"}, "cannot set Complete=True and Failed=true conditions"),
        (
            {"Complete", "FailureTarget"},
            "cannot set Complete=True and FailureTarget=true conditions",
        ),
        (
            {"SuccessCriteriaMet", "Failed"},
            "cannot set SuccessCriteriaMet=True and Failed=true conditions",
        ),
    ):
        if both <= holds:
            causes.append(_invalid_rule("status.conditions", detail))
    if holds & {"Complete", "Failed"} and status.get("active"):
        causes.append(
            invalid("status.active", status["active"], "active>0 is invalid for finished job")
        )
    return causes
