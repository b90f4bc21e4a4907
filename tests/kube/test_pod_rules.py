"""Every rule for pods, names and structure refuses what breaks it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

from tests.kube.errors import ApiError
from tests.kube.kinds import CONFIG_MAP, JOB, NAMESPACE, POD
from tests.kube.manifests import container, indexed_job, plain_job, pod
from tests.kube.server import KubeServer


@pytest.fixture(scope="module")
def idle() -> Iterator[KubeServer]:
    server = KubeServer()
    yield server
    server.kubelet.close()
    server._folder.cleanup()


def env(**variable) -> dict:
    return pod("a", containers=[container(env=[variable])])


def resources(**groups) -> dict:
    return pod("a", containers=[container(resources=groups)])


def mounted(volumes: list, *mounts: dict) -> dict:
    return pod("a", volumes=volumes, containers=[container(volumeMounts=list(mounts))])


CONTAINER = "spec.containers[0]"
SCRATCH = {"name": "scratch", "emptyDir": {}}
CASES = {
    "environment names": (env(name="1A", value="x"), f"{CONTAINER}.env[0].name", "must not start"),
    "environment names are given": (
        env(name="", value="x"),
        f"{CONTAINER}.env[0].name",
        "Required",
    ),
    "value or valueFrom": (
        env(name="A", value="x", valueFrom={"fieldRef": {"fieldPath": "metadata.name"}}),
        f"{CONTAINER}.env[0].valueFrom",
        "may not be specified when `value` is not empty",
    ),
    "one source of a value": (
        env(
            name="A",
            valueFrom={
                "fieldRef": {"fieldPath": "metadata.name"},
                "secretKeyRef": {"name": "a", "key": "b"},
            },
        ),
        f"{CONTAINER}.env[0].valueFrom",
        "more than one field",
    ),
    "some source of a value": (
        env(name="A", valueFrom={}),
        f"{CONTAINER}.env[0].valueFrom",
        "must specify one of",
    ),
    "field paths": (
        env(name="A", valueFrom={"fieldRef": {"fieldPath": "metadata.generation"}}),
        f"{CONTAINER}.env[0].valueFrom.fieldRef.fieldPath",
        "field label not supported",
    ),
    "resource fields": (
        env(name="A", valueFrom={"resourceFieldRef": {"resource": "limits.gpu"}}),
        f"{CONTAINER}.env[0].valueFrom.resourceFieldRef.resource",
        "supported values",
    ),
    "quantities are not negative": (
        resources(limits={"memory": "-1Gi"}),
        f"{CONTAINER}.resources.limits[memory]",
        "greater than or equal to 0",
    ),
    "resource names": (
        resources(limits={"gpu": "1"}),
        f"{CONTAINER}.resources.limits[gpu]",
        "must be a standard resource for containers",
    ),
    "requests within limits": (
        resources(limits={"cpu": "1"}, requests={"cpu": "1500m"}),
        f"{CONTAINER}.resources.requests",
        "less than or equal to cpu limit",
    ),
    "GPUs need a limit": (
        resources(requests={"nvidia.com/gpu": "1"}),
        f"{CONTAINER}.resources.limits",
        "Limit must be set for non overcommitable resources",
    ),
    "GPUs are not overcommitted": (
        resources(limits={"nvidia.com/gpu": "2"}, requests={"nvidia.com/gpu": "1"}),
        f"{CONTAINER}.resources.requests",
        "must be equal to nvidia.com/gpu limit",
    ),
    "GPUs are whole": (
        resources(limits={"nvidia.com/gpu": "500m"}),
        f"{CONTAINER}.resources.limits[nvidia.com/gpu]",
        "must be an integer",
    ),
    "mounts have a volume": (
        mounted([SCRATCH], {"name": "tmp", "mountPath": "/tmp"}),
        f"{CONTAINER}.volumeMounts[0].name",
        "Not found",
    ),
    "mount paths are unique": (
        mounted([SCRATCH], *[{"name": "scratch", "mountPath": "/tmp"}] * 2),
        f"{CONTAINER}.volumeMounts[1].mountPath",
        "must be unique",
    ),
    "subPath stays inside": (
        mounted([SCRATCH], {"name": "scratch", "mountPath": "/tmp", "subPath": "../a"}),
        f"{CONTAINER}.volumeMounts[0].subPath",
        "must not contain '..'",
    ),
    "volumes are unique": (pod("a", volumes=[SCRATCH] * 2), "spec.volumes[1].name", "Duplicate"),
    "volumes are one thing": (
        pod("a", volumes=[{**SCRATCH, "configMap": {"name": "c"}}]),
        "spec.volumes[0].configMap",
        "may not specify more than 1 volume type",
    ),
    "size limits": (
        pod("a", volumes=[{"name": "x", "emptyDir": {"sizeLimit": "-1Gi"}}]),
        "spec.volumes[0].emptyDir.sizeLimit",
        "must be a valid resource quantity",
    ),
    "container names": (
        pod("a", containers=[container(name="Worker")]),
        f"{CONTAINER}.name",
        "RFC 1123 label",
    ),
    "container names are unique": (
        pod("a", containers=[container(), container()]),
        "spec.containers[1].name",
        "Duplicate",
    ),
    "there are containers": (pod("a", containers=[]), "spec.containers", "Required"),
    "images": (pod("a", containers=[container(image="")]), f"{CONTAINER}.image", "Required"),
    "images have no blanks": (
        pod("a", containers=[container(image=" a")]),
        f"{CONTAINER}.image",
        "whitespace",
    ),
    "pull policies": (
        pod("a", containers=[container(imagePullPolicy="Sometimes")]),
        f"{CONTAINER}.imagePullPolicy",
        "supported values",
    ),
    "privileged escalates": (
        pod(
            "a",
            containers=[
                container(securityContext={"privileged": True, "allowPrivilegeEscalation": False})
            ],
        ),
        f"{CONTAINER}.securityContext",
        "cannot set `allowPrivilegeEscalation` to false",
    ),
    "restart policies": (pod("a", restartPolicy="No"), "spec.restartPolicy", "supported values"),
    "DNS policies": (pod("a", dnsPolicy="No"), "spec.dnsPolicy", "supported values"),
    "deadlines": (pod("a", activeDeadlineSeconds=0), "spec.activeDeadlineSeconds", "between 1"),
    "grace periods": (
        pod("a", terminationGracePeriodSeconds=-1),
        "spec.terminationGracePeriodSeconds",
        "greater than or equal to 0",
    ),
    "host names": (pod("a", hostname="a.b"), "spec.hostname", "RFC 1123 label"),
    "priority classes": (
        pod("a", priorityClassName="High!"),
        "spec.priorityClassName",
        "RFC 1123 subdomain",
    ),
    "node selectors": (
        pod("a", nodeSelector={"gpu": "NVIDIA H200"}),
        "spec.nodeSelector",
        "a valid label",
    ),
    "tolerations: Exists has no value": (
        pod("a", tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
        "spec.tolerations[0].operator",
        "value must be empty",
    ),
    "tolerations: operators": (
        pod("a", tolerations=[{"key": "a", "operator": "In"}]),
        "spec.tolerations[0].operator",
        "supported values",
    ),
    "tolerations: effects": (
        pod("a", tolerations=[{"key": "a", "operator": "Exists", "effect": "NoRun"}]),
        "spec.tolerations[0].effect",
        "supported values",
    ),
    "tolerations: all keys": (
        pod("a", tolerations=[{"operator": "Equal", "value": "b"}]),
        "spec.tolerations[0].operator",
        "operator must be Exists",
    ),
    "tolerations: keys": (
        pod("a", tolerations=[{"key": "a b", "operator": "Exists"}]),
        "spec.tolerations[0].key",
        "alphanumeric",
    ),
    "tolerations: seconds": (
        pod("a", tolerations=[{"key": "a", "operator": "Exists", "tolerationSeconds": 1}]),
        "spec.tolerations[0].effect",
        "effect must be 'NoExecute'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_refuses_what_breaks_it(idle, name):
    body, field, message = CASES[name]
    with pytest.raises(ApiError) as caught:
        idle.registry.create(POD, "default", body)
    assert caught.value.code == 422
    found = {cause["field"]: cause["message"] for cause in caught.value.details["causes"]}
    assert message in found.get(field, f"nothing about {field} in {found}")


METADATA = {
    "label values": ({"labels": {"a": "b c"}}, "metadata.labels"),
    "label values of 63 characters": ({"labels": {"a": "b" * 64}}, "metadata.labels"),
    "label names": ({"labels": {"a b": "c"}}, "metadata.labels"),
    "annotation names": ({"annotations": {"a b": "c"}}, "metadata.annotations"),
    "annotation sizes": ({"annotations": {"a": "b" * 262144}}, "metadata.annotations"),
    "finalizers": ({"finalizers": ["mine"]}, "metadata.finalizers[0]"),
    "names": ({"name": "A"}, "metadata.name"),
    "one controller": (
        {
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": u, "controller": True}
                for u in ("1", "2")
            ]
        },
        "metadata.ownerReferences",
    ),
    "owners have a uid": (
        {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": ""}]},
        "metadata.ownerReferences[0].uid",
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_rule_refuses_what_breaks_it(idle, name):
    metadata, field = METADATA[name]
    with pytest.raises(ApiError) as caught:
        idle.registry.create(CONFIG_MAP, "default", {"metadata": {"name": "a", **metadata}})
    assert field in {cause["field"] for cause in caught.value.details["causes"]}


@pytest.mark.parametrize(
    "body",
    [
        resources(limits={"memory": "4 GB"}),
        pod("a", volumes=[{"name": "x", "emptyDir": {"sizeLimit": "a lot"}}]),
    ],
)
def test_quantities_fail_when_they_are_decoded(idle, body):
    with pytest.raises(ApiError, match="quantities must match") as caught:
        idle.registry.create(POD, "default", body)
    assert caught.value.code == 400


def test_name_is_needed(idle):
    with pytest.raises(ApiError, match="name or generateName is required"):
        idle.registry.create(CONFIG_MAP, "default", {"metadata": {}})


def test_namespaces_are_labels(idle):
    with pytest.raises(ApiError, match="RFC 1123 label"):
        idle.registry.create(NAMESPACE, "", {"metadata": {"name": "a.b"}})


def test_no_finalizer_is_added_to_what_is_being_deleted(idle):
    body = {"metadata": {"name": "held", "finalizers": ["example.com/a"]}}
    idle.registry.create(CONFIG_MAP, "default", body)
    marked, is_gone = idle.registry.delete(CONFIG_MAP, "default", "held")
    assert not is_gone
    marked["metadata"]["finalizers"].append("example.com/b")
    with pytest.raises(ApiError, match="no new finalizers can be added"):
        idle.registry.change(CONFIG_MAP, "default", "held", "", lambda _: marked)
    marked["metadata"]["finalizers"] = []
    idle.registry.change(CONFIG_MAP, "default", "held", "", lambda _: marked)
    assert idle.store.get(CONFIG_MAP, "default", "held") is None


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (plain_job("a", backofflimit=3), 400, 'unknown field "spec.backofflimit"'),
        (plain_job("a", backoffLimit="3"), 400, "cannot unmarshal"),
        (plain_job("a", backoffLimit=None, template={}), 422, "spec.template.spec"),
        (indexed_job("a", podFailurePolicy={"rules": [{"action": "FailJob", "x": 1}]}), 400, "x"),
    ],
)
def test_structure_is_strict(idle, body, code, message):
    with pytest.raises(ApiError) as caught:
        idle.registry.create(JOB, "default", body)
    assert caught.value.code == code
    assert message in caught.value.message


ODD = [
    None,
    [],
    "job",
    {},
    {"metadata": None},
    {"metadata": []},
    {"metadata": {"name": "a"}},
    {"metadata": {"name": 1}},
    {"metadata": {"name": "a"}, "spec": None},
    {"metadata": {"name": "a"}, "spec": []},
    {"metadata": {"name": "a", "labels": []}, "spec": {}},
    {"metadata": {"name": "a", "labels": {"x": 1}}, "spec": {}},
    {"metadata": {"name": "a"}, "spec": {"template": None}},
    {"metadata": {"name": "a"}, "spec": {"template": {"spec": {"containers": [None]}}}},
    {"metadata": {"name": "a"}, "spec": {"template": {"spec": {"containers": {}}}}},
    {"metadata": {"name": "a"}, "spec": {"template": {"spec": {"containers": [{}]}}}},
    {"metadata": {"name": "a"}, "spec": {"completions": True}},
    {"metadata": {"name": "a"}, "spec": {"podFailurePolicy": {"rules": [{}]}}},
    {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}},
]


@pytest.mark.parametrize("body", ODD, ids=str)
@pytest.mark.parametrize("kind", [JOB, POD], ids=lambda kind: kind.plural)
def test_odd_bodies_are_refused_and_break_nothing(idle, kind, body):
    with pytest.raises(ApiError) as caught:
        idle.registry.create(kind, "default", body)
    assert caught.value.code in (400, 422)


def test_volume_of_nothing_is_an_empty_folder(idle):
    made = idle.registry.create(POD, "default", pod("volume", volumes=[{"name": "x"}]))
    assert made["spec"]["volumes"] == [{"name": "x", "emptyDir": {}}]


def test_null_is_an_absent_field(idle):
    body = plain_job("nulls", backoffLimit=None, completions=None)
    body["metadata"]["labels"] = None
    made = idle.registry.create(JOB, "default", body)
    assert made["spec"]["backoffLimit"] == 6
    assert "labels" not in made["metadata"]


def test_pod_spec_is_fixed_but_for_image_and_deadline(idle):
    old = idle.registry.create(POD, "default", pod("fixed"))
    new = copy.deepcopy(old)
    new["spec"]["containers"][0]["image"] = "hcodec:2"
    new["spec"]["activeDeadlineSeconds"] = 5
    new = idle.registry.change(POD, "default", "fixed", "", lambda _: new)
    assert new["spec"]["containers"][0]["image"] == "hcodec:2"
    new["spec"]["nodeSelector"] = {"a": "b"}
    with pytest.raises(ApiError, match="pod updates may not change fields other than"):
        idle.registry.change(POD, "default", "fixed", "", lambda _: copy.deepcopy(new))
