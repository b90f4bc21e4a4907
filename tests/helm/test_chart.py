"""The chart, through the real helm: what it renders, what it refuses, what it grants.

Installing it into a real API server is part of ``make test-cluster``.
"""

from __future__ import annotations

import functools
import json
import re
import tarfile
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.kubernetes.connection import KUEUE_RIGHTS, RIGHTS, TRAINING_RIGHTS
from hcodec_airflow.kubernetes.manifest import job_manifest
from hcodec_airflow.kubernetes.profiles import ClusterConfig, GpuProfile, load_cluster_config
from hcodec_core.config import load_config
from tests.helm.package import add_airflow, package
from tests.helm.render import CASES, CHART, GOLDEN, SITE, helm, render, template

VERSIONS = ("1.33", "1.34", "1.35")
# Custom resources: their schemas are not Kubernetes' own.
CUSTOM = {"kueue.x-k8s.io", "monitoring.coreos.com"}
Objects = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """The library reads megabytes of definitions for each object."""
    with pytest.MonkeyPatch.context() as patch:
        contents = functools.cache(kubernetes_validate.utils.schema_contents)
        patch.setattr(kubernetes_validate.utils, "schema_contents", contents)
        yield


@pytest.fixture(scope="module")
def rendered() -> dict[str, Objects]:
    return {name: render(values) for name, values in CASES.items()}


def one(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    (found,) = (o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def pods(objects: Objects) -> list[dict[str, Any]]:
    specs = [o["spec"] for o in objects if o["kind"] == "Pod"]
    jobs = [o["spec"]["jobTemplate"]["spec"] for o in objects if o["kind"] == "CronJob"]
    return specs + [job["template"]["spec"] for job in jobs]


@pytest.mark.parametrize("name", [*CASES, "defaults"])
def test_lint_is_strict_and_silent(name):
    files = [word for path in CASES.get(name, []) for word in ("--values", str(path))]
    done = helm("lint", "--strict", str(CHART), *files)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("name", CASES)
def test_golden_files(name):
    """After a change on purpose: python -m tests.helm.render, and look at the difference."""
    assert template(CASES[name]).stdout == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_object_passes_the_strict_schema(rendered, name, version):
    checked = 0
    for document in rendered[name]:
        if document["apiVersion"].partition("/")[0] in CUSTOM:
            continue
        assert kubernetes_validate.validate(document, version, strict=True) == version
        checked += 1
    assert checked >= 15


def test_strict_schema_finds_a_field_too_many(rendered):
    role = {**one(rendered["site"], "Role", "hcodec-launcher"), "rule": []}
    with pytest.raises(kubernetes_validate.ValidationError, match="rule"):
        kubernetes_validate.validate(role, "1.34", strict=True)


def test_custom_objects_are_those_that_were_switched_on(rendered):
    def kinds(name: str) -> set[str]:
        groups = {o["kind"]: o["apiVersion"].partition("/")[0] for o in rendered[name]}
        return {kind for kind, group in groups.items() if group in CUSTOM}

    assert kinds("site") == set()
    queue = {"ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"}
    assert kinds("everything") == queue | {"PrometheusRule"}


def test_quotas_cover_the_same_resources_in_every_flavor(rendered):
    (group,) = one(rendered["everything"], "ClusterQueue", "hcodec")["spec"]["resourceGroups"]
    for flavor in group["flavors"]:
        assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]


@pytest.mark.parametrize("name", CASES)
def test_configuration_is_what_the_product_reads(rendered, name, tmp_path):
    for kind, folder in (("hcodec-config", "hcodec"), ("hcodec-airflow", "airflow")):
        config_map = one(rendered[name], "ConfigMap", kind)
        assert config_map["metadata"]["namespace"] == folder
        path = tmp_path / "hcodec.toml"
        path.write_text(config_map["data"]["hcodec.toml"])
        assert load_config(path).work.work_uri == "s3://tokens/work"
    cluster = cluster_config(rendered[name], tmp_path)
    assert cluster.namespace == "hcodec"
    assert cluster.profile("").gpus == 1


def cluster_config(objects: Objects, folder: Path) -> ClusterConfig:
    path = folder / "kubernetes.toml"
    path.write_text(one(objects, "ConfigMap", "hcodec-airflow")["data"]["kubernetes.toml"])
    return load_cluster_config(path)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_jobs_of_every_profile_are_valid_and_find_what_the_chart_made(
    rendered, name, version, tmp_path
):
    objects = rendered[name]
    made = {(o["kind"], o["metadata"]["name"]) for o in objects}
    request = JobRequest("tokenize-p1", "s3://tokens/work/p1/job.json", "s3://tokens/work/p1", 3)
    for profile in cluster_config(objects, tmp_path).profiles.values():
        job = job_manifest(request, profile, "hcodec", owner="ti")
        kubernetes_validate.validate(job, version, strict=True)
        spec = job["spec"]["template"]["spec"]
        volumes = [v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v]
        assert ("ServiceAccount", spec["serviceAccountName"]) in made
        assert ("PriorityClass", spec["priorityClassName"]) in made
        assert [v for v in volumes if ("ConfigMap", v) not in made] == []
        queue = job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        assert queue is None or ("LocalQueue", queue) in made


def test_whole_numbers_stay_whole_numbers(rendered):
    data = one(rendered["everything"], "ConfigMap", "hcodec-airflow")["data"]
    training = tomllib.loads(data["kubernetes.toml"])["profiles"]["training"]
    context = training["pod_template"]["spec"]["securityContext"]
    assert type(training["gpus"]) is int
    assert type(context["fsGroup"]) is int
    assert {type(group) for group in context["supplementalGroups"]} == {int}


def test_profiles_of_the_values_schema_are_those_of_the_product():
    schema = json.loads((CHART / "values.schema.json").read_text())
    profiles = schema["properties"]["kubernetes"]["properties"]["profiles"]
    assert set(profiles["additionalProperties"]["properties"]) == set(GpuProfile.model_fields)


def test_launcher_may_do_what_the_operator_needs_and_nothing_else(rendered):
    role = one(rendered["site"], "Role", "hcodec-launcher")
    granted = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    needed = (*RIGHTS, *KUEUE_RIGHTS, *TRAINING_RIGHTS.values())
    assert granted == {(right.group, right.resource): set(right.verbs) for right in needed}


def test_no_account_has_rights_in_the_whole_cluster(rendered):
    for objects in rendered.values():
        assert not {o["kind"] for o in objects} & {"ClusterRole", "ClusterRoleBinding"}
        bound = {
            subject["name"]
            for o in objects
            if o["kind"] == "RoleBinding"
            for subject in o["subjects"]
        }
        assert not bound & {"hcodec-worker", "hcodec-trainer", "default"}


def test_accounts_of_an_existing_airflow_are_bound(rendered):
    binding = one(rendered["existing-airflow"], "RoleBinding", "hcodec-launcher")
    names = {(s["name"], s["namespace"]) for s in binding["subjects"]}
    assert ("airflow-triggerer", "airflow") in names
    assert ("hcodec-launcher", "airflow") in names


def test_workers_get_no_token_and_the_identity_of_the_cloud(rendered):
    for name, annotation in (
        ("eks", "eks.amazonaws.com/role-arn"),
        ("gke", "iam.gke.io/gcp-service-account"),
    ):
        for account in ("hcodec-worker", "hcodec-trainer"):
            found = one(rendered[name], "ServiceAccount", account)
            assert found["automountServiceAccountToken"] is False
            assert annotation in found["metadata"]["annotations"]


def test_namespace_is_restricted(rendered):
    labels = one(rendered["site"], "Namespace", "hcodec")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", CASES)
def test_the_charts_own_pods_are_restricted_too(rendered, name):
    found = pods(rendered[name])
    assert len(found) == 2
    for spec in found:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "limits" in container["resources"]


def test_their_commands_exist(rendered):
    for spec in pods(rendered["site"]):
        python, flag, module = spec["containers"][0]["command"]
        assert (python, flag) == ("python", "-m")
        assert find_spec(module) is not None


def test_network_is_closed_but_for_what_is_named(rendered):
    deny = one(rendered["site"], "NetworkPolicy", "hcodec-default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    workers = one(rendered["site"], "NetworkPolicy", "hcodec-workers")["spec"]
    assert "Ingress" not in workers["policyTypes"]
    dns, storage = workers["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert storage["ports"] == [{"protocol": "TCP", "port": 443}]
    assert "169.254.0.0/16" in storage["to"][0]["ipBlock"]["except"]
    peers = one(rendered["site"], "NetworkPolicy", "hcodec-training-peers")["spec"]
    assert peers["podSelector"] == {"matchLabels": {"hcodec.dev/training": "true"}}
    identity = one(rendered["eks"], "NetworkPolicy", "hcodec-workers")["spec"]["egress"][-1]
    assert identity["to"] == [{"ipBlock": {"cidr": "169.254.170.23/32"}}]


def test_network_rules_select_the_pods_that_the_operator_makes():
    request = JobRequest("tokenize-p1", "s3://t/j.json", "s3://t", 1)
    job = job_manifest(request, GpuProfile(image="x"), "hcodec", owner="ti")
    labels = job["spec"]["template"]["metadata"]["labels"]
    workers = one(render([SITE]), "NetworkPolicy", "hcodec-workers")["spec"]
    assert workers["podSelector"]["matchLabels"].items() <= labels.items()


def test_metrics_exist(rendered):
    known = {
        # kube-state-metrics
        "kube_job_failed", "kube_job_status_active", "kube_job_status_failed",
        "kube_pod_status_phase", "kube_pod_container_status_terminated_reason",
        "kube_cronjob_status_last_successful_time",
        # cAdvisor, DCGM exporter
        "container_cpu_usage_seconds_total", "container_memory_working_set_bytes",
        "DCGM_FI_DEV_GPU_UTIL",
    }  # fmt: skip
    rules = one(rendered["everything"], "PrometheusRule", "hcodec-alarms")["spec"]["groups"]
    asked = [rule["expr"] for group in rules for rule in group["rules"]]
    board = json.loads(
        one(rendered["everything"], "ConfigMap", "hcodec-dashboard")["data"]["hcodec.json"]
    )
    asked += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for text in asked for name in re.findall(r"\b(?:[A-Za-z]+_){2,}\w+", text)}
    named -= {name for name in named if name.startswith("job_name")}
    airflow = {name for name in named if name.startswith("airflow_")}
    assert named - airflow == known
    assert airflow <= airflow_metrics()


def airflow_metrics() -> set[str]:
    """Names under which Airflow's StatsD exporter shows what Airflow says that it counts."""
    import airflow

    path = Path(airflow.__file__).parent / "_shared/observability/metrics/metrics_template.yaml"
    metrics = yaml.safe_load(path.read_text())["metrics"]
    return {"airflow_" + metric["name"].replace(".", "_") for metric in metrics}


def test_old_servers_get_the_cron_job_they_know():
    objects = render([SITE], "--kube-version", "1.20.2")
    assert one(objects, "CronJob", "hcodec-janitor")["apiVersion"] == "batch/v1beta1"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("images.worker.tga=1", "tga"),
        ("kubernetes.profiles.gpu.gpu=1", "gpu"),
        ("kubernetes.profiles.gpu.memory=32 GB", "memory"),
        ("config.catalog.uri=postgresql://me:secret@db/x", "config/catalog/uri"),
        ("janitor.minAgeSeconds=5", "minAgeSeconds"),
        ("images.worker.digest=latest", "digest"),
        ("networkPolicy.objectStorage[0].cidr=anywhere", "cidr"),
    ],
)
def test_schema_refuses(setting, words):
    done = template([SITE], "--set", setting)
    assert done.returncode != 0
    assert words in done.stderr
    assert "schema" in done.stderr


def test_missing_buckets_are_asked_for():
    done = template([])
    assert done.returncode != 0
    assert "is required" in done.stderr or "are required" in done.stderr


def test_workers_do_not_share_the_releases_namespace_by_accident():
    done = template([SITE], "--set", "namespace.name=airflow")
    assert done.returncode != 0
    assert "set namespace.create=false" in done.stderr
    shared = render([SITE], "--set", "namespace.name=airflow,namespace.create=false")
    assert "Namespace" not in {o["kind"] for o in shared}


def test_packaged_alone_it_needs_nothing(tmp_path):
    archive = package(tmp_path, with_airflow=False)
    with tarfile.open(archive) as file:
        names = {name.removeprefix("hcodec/") for name in file.getnames()}
    assert {"values.schema.json", "values-eks.yaml", "dashboards/hcodec.json"} <= names
    assert not [name for name in names if name.startswith(("charts/", "airflow-"))]


def test_packaged_with_airflow_its_chart_is_switched_on_and_off(tmp_path):
    """Airflow's own chart cannot be fetched here: one that makes one object stands for it."""
    stand_in = tmp_path / "airflow"
    (stand_in / "templates").mkdir(parents=True)
    (stand_in / "Chart.yaml").write_text("apiVersion: v2\nname: airflow\nversion: 1.18.0\n")
    (stand_in / "templates" / "x.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: of-airflow}\n"
    )
    archive = package(tmp_path, with_airflow=True, repository=f"file://{stand_in}")
    base = ["template", "hcodec", str(archive), "--values", str(SITE)]
    assert "of-airflow" not in helm(*base).stdout
    assert "of-airflow" in helm(*base, "--set", "airflow.enabled=true").stdout


def test_airflows_chart_is_declared_with_a_switch_and_a_source(tmp_path):
    (tmp_path / "Chart.yaml").write_text((CHART / "Chart.yaml").read_text())
    (tmp_path / "airflow-dependency.yaml").write_text(
        (CHART / "airflow-dependency.yaml").read_text()
    )
    add_airflow(tmp_path)
    (airflow,) = yaml.safe_load((tmp_path / "Chart.yaml").read_text())["dependencies"]
    assert airflow["condition"] == "airflow.enabled"
    assert airflow["repository"] == "https://airflow.apache.org"
