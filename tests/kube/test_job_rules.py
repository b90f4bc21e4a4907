"""Every cross-field rule for Jobs refuses what breaks it, naming the field."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

from tests.kube.errors import ApiError
from tests.kube.kinds import JOB
from tests.kube.manifests import (
    DISRUPTED,
    container,
    exit_rule,
    indexed_job,
    plain_job,
    pod_spec,
    policy,
)
from tests.kube.server import KubeServer


@pytest.fixture(scope="module")
def idle() -> Iterator[KubeServer]:
    """A server whose controllers do not run: only its registry is asked."""
    server = KubeServer()
    yield server
    server.kubelet.close()
    server._folder.cleanup()


def refusal(server: KubeServer, body: dict) -> dict[str, str]:
    """Field -> message of what creating ``body`` is refused for."""
    with pytest.raises(ApiError) as caught:
        server.registry.create(JOB, "default", body)
    assert caught.value.code == 422
    assert caught.value.as_status()["reason"] == "Invalid"
    return {cause["field"]: cause["message"] for cause in caught.value.details["causes"]}


def template(**spec) -> dict:
    return {"template": {"spec": {**pod_spec(), **spec}}}


RULES = "spec.podFailurePolicy.rules"
CASES = {
    "backoffLimitPerIndex needs Indexed": (
        plain_job("a", backoffLimitPerIndex=1),
        "spec.backoffLimitPerIndex",
        "requires indexed completion mode",
    ),
    "maxFailedIndexes needs Indexed": (
        plain_job("a", backoffLimitPerIndex=1, maxFailedIndexes=1),
        "spec.maxFailedIndexes",
        "requires indexed completion mode",
    ),
    "maxFailedIndexes needs backoffLimitPerIndex": (
        indexed_job("a", maxFailedIndexes=1),
        "spec.backoffLimitPerIndex",
        "when maxFailedIndexes is specified",
    ),
    "maxFailedIndexes at most completions": (
        indexed_job("a", backoffLimitPerIndex=1, maxFailedIndexes=3),
        "spec.maxFailedIndexes",
        "less than or equal to completions",
    ),
    "Indexed needs completions": (
        plain_job("a", completionMode="Indexed", parallelism=2),
        "spec.completions",
        "when completion mode is Indexed",
    ),
    "parallelism of Indexed is limited": (
        indexed_job("a", parallelism=100_001),
        "spec.parallelism",
        "less than or equal to 100000",
    ),
    "very many completions need maxFailedIndexes": (
        indexed_job("a", completions=100_001, parallelism=10, backoffLimitPerIndex=1),
        "spec.maxFailedIndexes",
        "must be specified",
    ),
    "very many completions limit parallelism": (
        indexed_job(
            "a", completions=100_001, parallelism=10_001, backoffLimitPerIndex=1, maxFailedIndexes=1
        ),
        "spec.parallelism",
        "less than or equal to 10000",
    ),
    "completionMode is known": (
        plain_job("a", completionMode="indexed"),
        "spec.completionMode",
        'supported values: "Indexed", "NonIndexed"',
    ),
    "host names fit a DNS label": (
        indexed_job("a" * 62),
        "metadata.name",
        "will not able to create pod with invalid DNS label",
    ),
    "names fit the label job-name": (
        plain_job("a" * 64),
        "spec.template.labels",
        "no more than 63 characters",
    ),
    "host names have no dots": (
        indexed_job("a.b"),
        "metadata.name",
        "will not able to create pod with invalid DNS label",
    ),
    "name is a subdomain": (plain_job("A_b"), "metadata.name", "RFC 1123 subdomain"),
    "FailIndex needs backoffLimitPerIndex": (
        indexed_job("a", podFailurePolicy=policy(exit_rule("FailIndex", 3))),
        f"{RULES}[0].action",
        "requires the backoffLimitPerIndex",
    ),
    "actions are known": (
        plain_job("a", podFailurePolicy=policy(exit_rule("Retry", 3))),
        f"{RULES}[0].action",
        "supported values",
    ),
    "In does not take 0": (
        plain_job("a", podFailurePolicy=policy(exit_rule("FailJob", 0, 3))),
        f"{RULES}[0].onExitCodes.values[0]",
        "must not be 0 for the In operator",
    ),
    "operators are known": (
        plain_job("a", podFailurePolicy=policy(exit_rule("FailJob", 3, operator="Is"))),
        f"{RULES}[0].onExitCodes.operator",
        "supported values",
    ),
    "containerName exists": (
        plain_job("a", podFailurePolicy=policy(exit_rule("FailJob", 3, containerName="main"))),
        f"{RULES}[0].onExitCodes.containerName",
        "must be one of the container or initContainer names",
    ),
    "exit codes are ordered": (
        plain_job("a", podFailurePolicy=policy(exit_rule("FailJob", 4, 3))),
        f"{RULES}[0].onExitCodes.values",
        "must be ordered",
    ),
    "exit codes are unique": (
        plain_job("a", podFailurePolicy=policy(exit_rule("FailJob", 3, 3))),
        f"{RULES}[0].onExitCodes.values[1]",
        "Duplicate value",
    ),
    "there are exit codes": (
        plain_job("a", podFailurePolicy=policy(exit_rule("FailJob"))),
        f"{RULES}[0].onExitCodes.values",
        "at least one value is required",
    ),
    "at most 255 exit codes": (
        plain_job("a", podFailurePolicy=policy(exit_rule("FailJob", *range(1, 257)))),
        f"{RULES}[0].onExitCodes.values",
        "must have at most 255 items",
    ),
    "at most 20 rules": (
        plain_job("a", podFailurePolicy=policy(*[exit_rule("FailJob", 3)] * 21)),
        RULES,
        "must have at most 20 items",
    ),
    "at most 20 pod conditions": (
        plain_job(
            "a",
            podFailurePolicy=policy(
                {**DISRUPTED, "onPodConditions": [{"type": "A", "status": "True"}] * 21}
            ),
        ),
        f"{RULES}[0].onPodConditions",
        "must have at most 20 items",
    ),
    "a pod condition's type is a name": (
        plain_job(
            "a",
            podFailurePolicy=policy(
                {**DISRUPTED, "onPodConditions": [{"type": "?", "status": "True"}]}
            ),
        ),
        f"{RULES}[0].onPodConditions[0].type",
        "alphanumeric",
    ),
    "a pod condition's status is known": (
        plain_job(
            "a",
            podFailurePolicy=policy(
                {**DISRUPTED, "onPodConditions": [{"type": "A", "status": "Yes"}]}
            ),
        ),
        f"{RULES}[0].onPodConditions[0].status",
        "supported values",
    ),
    "a rule is about one thing": (
        plain_job("a", podFailurePolicy=policy({**exit_rule("Ignore", 3), **DISRUPTED})),
        f"{RULES}[0]",
        "specifying both OnExitCodes and OnPodConditions is not supported",
    ),
    "a rule is about something": (
        plain_job("a", podFailurePolicy=policy({"action": "Ignore"})),
        f"{RULES}[0]",
        "specifying one of OnExitCodes and OnPodConditions is required",
    ),
    "a failure policy needs Never": (
        plain_job("a", podFailurePolicy=policy(DISRUPTED), **template(restartPolicy="OnFailure")),
        "spec.template.spec.restartPolicy",
        'only "Never" is supported when podFailurePolicy is specified',
    ),
    "Always is refused": (
        plain_job("a", **template(restartPolicy="Always")),
        "spec.template.spec.restartPolicy",
        'valid values: "OnFailure", "Never"',
    ),
    "no restartPolicy means Always": (
        plain_job("a", template={"spec": {"containers": [container()]}}),
        "spec.template.spec.restartPolicy",
        'valid values: "OnFailure", "Never"',
    ),
    "a failure policy replaces failed pods only": (
        plain_job(
            "a", podFailurePolicy=policy(DISRUPTED), podReplacementPolicy="TerminatingOrFailed"
        ),
        "spec.podReplacementPolicy",
        'supported values: "Failed"',
    ),
    "replacement policies are known": (
        plain_job("a", podReplacementPolicy="Never"),
        "spec.podReplacementPolicy",
        'supported values: "Failed", "TerminatingOrFailed"',
    ),
    "a success policy needs Indexed": (
        plain_job("a", successPolicy={"rules": [{"succeededCount": 1}]}),
        "spec.successPolicy",
        "requires indexed completion mode",
    ),
    "a success policy has rules": (
        indexed_job("a", successPolicy={"rules": []}),
        "spec.successPolicy.rules",
        "at least one rules must be specified",
    ),
    "at most 20 success rules": (
        indexed_job("a", successPolicy={"rules": [{"succeededCount": 1}] * 21}),
        "spec.successPolicy.rules",
        "must have at most 20 items",
    ),
    "a success rule is about something": (
        indexed_job("a", successPolicy={"rules": [{}]}),
        "spec.successPolicy.rules[0]",
        "at least one of succeededCount or succeededIndexes",
    ),
    "succeededCount at most completions": (
        indexed_job("a", successPolicy={"rules": [{"succeededCount": 3}]}),
        "spec.successPolicy.rules[0].succeededCount",
        "number of specified completions",
    ),
    "succeededCount at most succeededIndexes": (
        indexed_job("a", successPolicy={"rules": [{"succeededCount": 2, "succeededIndexes": "1"}]}),
        "spec.successPolicy.rules[0].succeededCount",
        "number of indexes",
    ),
    "succeededIndexes below completions": (
        indexed_job("a", successPolicy={"rules": [{"succeededIndexes": "0-2"}]}),
        "spec.successPolicy.rules[0].succeededIndexes",
        "too large index",
    ),
    "succeededIndexes in order": (
        indexed_job("a", successPolicy={"rules": [{"succeededIndexes": "1,0"}]}),
        "spec.successPolicy.rules[0].succeededIndexes",
        "non-increasing order",
    ),
    "the selector is the server's": (
        plain_job("a", selector={"matchLabels": {"app": "x"}}),
        "spec.selector",
        "`selector` not auto-generated",
    ),
    "a selector of one's own selects the pods": (
        plain_job("a", manualSelector=True, selector={"matchLabels": {"app": "x"}}),
        "spec.template.metadata.labels",
        "`selector` does not match template `labels`",
    ),
    "a manual selector is given": (
        plain_job("a", manualSelector=True),
        "spec.selector",
        "Required value",
    ),
    "template labels are label values": (
        plain_job("a", template={"metadata": {"labels": {"a": "b c"}}, "spec": pod_spec()}),
        "spec.template.labels",
        "a valid label",
    ),
    "the template is a pod": (
        plain_job("a", **template(containers=[container(image="")])),
        "spec.template.spec.containers[0].image",
        "Required value",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_refuses_what_breaks_it(idle, name):
    body, field, message = CASES[name]
    found = refusal(idle, body)
    assert message in found.get(field, f"nothing about {field} in {found}")


@pytest.mark.parametrize(
    "name",
    [
        "parallelism", "completions", "activeDeadlineSeconds", "backoffLimit",
        "ttlSecondsAfterFinished", "backoffLimitPerIndex", "maxFailedIndexes",
    ],
)  # fmt: skip
def test_numbers_are_not_negative(idle, name):
    body = indexed_job("a", **{"backoffLimitPerIndex": 1, name: -1})
    assert "greater than or equal to 0" in refusal(idle, body)[f"spec.{name}"]


def test_all_causes_are_told_at_once(idle):
    body = indexed_job("a", maxFailedIndexes=1, ttlSecondsAfterFinished=-1)
    assert {"spec.backoffLimitPerIndex", "spec.ttlSecondsAfterFinished"} <= set(refusal(idle, body))


def test_job_without_labels_takes_those_of_its_pods(idle):
    body = plain_job(
        "unlabelled", template={"metadata": {"labels": {"a": "b"}}, "spec": pod_spec()}
    )
    made = idle.registry.create(JOB, "default", body)
    assert made["metadata"]["labels"] == {"a": "b"}


def test_good_job_is_defaulted_and_labelled(idle):
    rules = policy(exit_rule("FailJob", 43, containerName="worker"), DISRUPTED)
    body = indexed_job("good", backoffLimitPerIndex=3, podFailurePolicy=rules)
    made = idle.registry.create(JOB, "default", body)
    spec, uid = made["spec"], made["metadata"]["uid"]
    assert spec["backoffLimit"] == 2**31 - 1
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["selector"]["matchLabels"] == {"batch.kubernetes.io/controller-uid": uid}
    assert spec["template"]["metadata"]["labels"]["job-name"] == "good"
    assert made["metadata"]["generation"] == 1


CHANGES = {
    "completionMode": lambda spec: spec.update(completionMode="NonIndexed", completions=2),
    "podFailurePolicy": lambda spec: spec.update(podFailurePolicy=policy(DISRUPTED)),
    "backoffLimitPerIndex": lambda spec: spec.update(backoffLimitPerIndex=2),
    "managedBy": lambda spec: spec.update(managedBy="example.com/other"),
    "successPolicy": lambda spec: spec.update(successPolicy={"rules": [{"succeededCount": 1}]}),
    "completions": lambda spec: spec.update(completions=3),
    "template": lambda spec: spec["template"]["spec"]["containers"][0].update(image="other:2"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_field_is_immutable(idle, field):
    name = f"fixed-{field.lower()}"
    old = idle.registry.create(JOB, "default", indexed_job(name, backoffLimitPerIndex=1))
    new = copy.deepcopy(old)
    CHANGES[field](new["spec"])
    with pytest.raises(ApiError) as caught:
        idle.registry.change(JOB, "default", name, "", lambda _: new)
    assert f"spec.{field}" in {cause["field"] for cause in caught.value.details["causes"]}


def test_selector_is_immutable(idle):
    old = idle.registry.create(JOB, "default", plain_job("selected"))
    new = copy.deepcopy(old)
    new["spec"]["selector"]["matchLabels"]["job-name"] = "selected"
    with pytest.raises(ApiError, match=r"spec\.selector.*field is immutable"):
        idle.registry.change(JOB, "default", "selected", "", lambda _: new)


def test_job_that_never_ran_may_be_sent_elsewhere(idle):
    """Mutable scheduling directives: what a queue sets before it resumes a Job."""
    old = idle.registry.create(JOB, "default", indexed_job("waiting", suspend=True))
    new = copy.deepcopy(old)
    new["spec"]["template"]["spec"]["nodeSelector"] = {"zone": "a"}
    new["spec"]["template"]["metadata"]["annotations"] = {"queue": "x"}
    idle.registry.change(JOB, "default", "waiting", "", lambda _: new)
    started = idle.registry.create(JOB, "default", indexed_job("started"))
    started["spec"]["template"]["spec"]["nodeSelector"] = {"zone": "a"}
    with pytest.raises(ApiError, match=r"spec\.template.*field is immutable"):
        idle.registry.change(JOB, "default", "started", "", lambda _: started)


def test_indexed_completions_move_with_parallelism(idle):
    old = idle.registry.create(JOB, "default", indexed_job("elastic"))
    new = copy.deepcopy(old)
    new["spec"].update(completions=3, parallelism=3)
    changed = idle.registry.change(JOB, "default", "elastic", "", lambda _: new)
    assert changed["spec"]["completions"] == 3
    assert changed["metadata"]["generation"] == 2


@pytest.mark.parametrize(
    ("status", "field"),
    [
        ({"active": -1}, "status.active"),
        ({"conditions": ["Complete", "Failed"]}, "status.conditions"),
        ({"conditions": ["Complete", "FailureTarget"]}, "status.conditions"),
        ({"conditions": ["SuccessCriteriaMet", "Failed"]}, "status.conditions"),
        ({"active": 1, "conditions": ["Complete"]}, "status.active"),
    ],
)
def test_status_that_contradicts_itself_is_refused(idle, status, field):
    name = "status-" + str(abs(hash(str(status))))
    old = idle.registry.create(JOB, "default", plain_job(name))
    held = [{"type": t, "status": "True"} for t in status.get("conditions", [])]
    old["status"] = {**status, "conditions": held}
    with pytest.raises(ApiError) as caught:
        idle.registry.change(JOB, "default", name, "status", lambda _: old)
    assert field in {cause["field"] for cause in caught.value.details["causes"]}
