"""Profiles, strategic merge, what a template may not loosen, and which kind trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from hcodec_airflow.backends.base import JobRequest, TaskOrigin
from hcodec_airflow.backends.trainjob import TrainJobBackend
from hcodec_airflow.kubernetes.client import ClusterApi
from hcodec_airflow.kubernetes.connection import opener
from hcodec_airflow.kubernetes.discovery import JOB, JOB_SET, TRAIN_JOB, choose_kind, served_groups
from hcodec_airflow.kubernetes.manifest import job_manifest
from hcodec_airflow.kubernetes.pod_template import merge
from hcodec_airflow.kubernetes.profiles import ClusterConfig, GpuProfile, load_cluster_config
from hcodec_airflow.kubernetes.training import training_manifest
from hcodec_core.config import StorageConfig
from hcodec_core.errors import ConfigError
from hcodec_core.storage import open_storage
from tests.kube import kinds
from tests.kube.server import ALL_GROUPS, KubeServer

REQUEST = JobRequest(
    name="tokenize-p1",
    job_uri="s3://b/plans/p1/job.json",
    plan_uri="s3://b/plans/p1",
    num_workers=4,
    origin=TaskOrigin("dag", "run", "tokenize"),
)
GPU = GpuProfile.model_validate(
    {
        "image": "worker@sha256:0",
        "gpus": 1,
        "gpu_resource": "nvidia.com/mig-1g.10gb",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "node_selector": {"pool": "gpu"},
        "runtime_class": "nvidia",
        "priority_class": "batch",
        "image_pull_secrets": ["registry"],
        "env_from_secrets": ["hcodec-storage"],
        "kueue_queue": "tokens",
    }
)


def _pod(request=REQUEST, profile=GPU):
    return job_manifest(request, profile, "hcodec", "try-1")["spec"]["template"]


def test_the_contract_of_exit_codes_and_counts():
    spec = job_manifest(REQUEST, GPU, "hcodec", "try-1")["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (3, 2)
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["suspend"] is True
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    assert rules[0]["onExitCodes"]["values"] == [43]
    assert rules[1]["onPodConditions"][0]["type"] == "DisruptionTarget"
    codes = [code for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])]
    assert 0 not in codes


def test_the_profile_is_in_the_pod():
    spec = _pod()["spec"]
    container = spec["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == "1"
    assert container["command"][:3] == ["hcodec", "run", "s3://b/plans/p1/job.json"]
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert (spec["runtimeClassName"], spec["priorityClassName"]) == ("nvidia", "batch")
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert container["envFrom"] == [{"secretRef": {"name": "hcodec-storage"}}]
    assert spec["automountServiceAccountToken"] is False


def test_templates_are_merged_by_the_keys_of_lists():
    template = {
        "metadata": {"labels": {"team": "speech", "hcodec.dev/job": "mine"}},
        "spec": {
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "nodeSelector": {"zone": "a"},
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
            "containers": [
                {
                    "name": "worker",
                    "env": [{"name": "HOME", "value": "/scratch"}, {"name": "X", "value": "1"}],
                    "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
                }
            ],
        },
    }
    made = _pod(replace(REQUEST, pod_template=template))
    spec, container = made["spec"], made["spec"]["containers"][0]
    assert {entry["key"] for entry in spec["tolerations"]} == {"nvidia.com/gpu", "spot"}
    assert spec["nodeSelector"] == {"pool": "gpu", "zone": "a"}
    assert {v["name"] for v in spec["volumes"]} == {"tmp", "scratch", "hcodec-config", "shm"}
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert (env["HOME"], env["X"]) == ("/scratch", "1")
    assert "HCODEC_WORKER_ID" in env
    assert len(container["volumeMounts"]) == 4
    # The labels by which pods are found stay.
    assert made["metadata"]["labels"]["team"] == "speech"
    assert made["metadata"]["labels"]["hcodec.dev/job"] != "mine"


def test_null_removes_and_patch_delete_removes_an_entry():
    base = {"a": 1, "env": [{"name": "x"}, {"name": "y"}], "words": [1, 2]}
    patch = {"a": None, "env": [{"name": "x", "$patch": "delete"}], "words": [3]}
    assert merge(base, patch) == {"env": [{"name": "y"}], "words": [3]}
    with pytest.raises(ConfigError, match="has no 'name'"):
        merge(base, {"env": [{"value": "1"}]})


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"hostNetwork": True}, r"spec\.hostNetwork"),
        ({"hostPID": True}, r"spec\.hostPID"),
        ({"automountServiceAccountToken": True}, r"spec\.automountServiceAccountToken"),
        ({"automountServiceAccountToken": None}, r"spec\.automountServiceAccountToken"),
        ({"restartPolicy": "OnFailure"}, r"spec\.restartPolicy"),
        ({"securityContext": {"runAsNonRoot": False}}, r"spec\.securityContext\.runAsNonRoot"),
        ({"securityContext": {"runAsUser": 0}}, r"spec\.securityContext\.runAsUser"),
        ({"securityContext": None}, r"spec\.securityContext\.runAsNonRoot is missing"),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile"),
        ({"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}, r"volumes\[h\]\.hostPath"),
        (
            {"containers": [{"name": "worker", "securityContext": {"privileged": True}}]},
            r"containers\[worker\]\.securityContext\.privileged",
        ),
        (
            {"containers": [{"name": "worker", "securityContext": None}]},
            r"containers\[worker\]\.securityContext\.allowPrivilegeEscalation is missing",
        ),
        (
            {"containers": [{"name": "worker", "securityContext": {"$patch": "replace"}}]},
            r"containers\[worker\]\.securityContext\.\$patch",
        ),
        (
            {
                "containers": [
                    {"name": "worker", "securityContext": {"capabilities": {"add": ["A"]}}}
                ]
            },
            r"capabilities\.add",
        ),
        (
            {"containers": [{"name": "side", "image": "x"}]},
            r"containers\[side\]\.securityContext\.allowPrivilegeEscalation is missing",
        ),
        (
            {
                "containers": [
                    {"name": "worker", "securityContext": {"readOnlyRootFilesystem": False}}
                ]
            },
            "readOnlyRootFilesystem",
        ),
    ],
)
def test_a_template_may_not_loosen_security(spec, field):
    with pytest.raises(ConfigError, match=field):
        _pod(replace(REQUEST, pod_template={"spec": spec}))


def test_a_token_of_a_clouds_identity_is_allowed_and_one_of_the_server_is_not():
    def volume(**token):
        sources = [{"serviceAccountToken": {"path": "t", **token}}]
        return {"spec": {"volumes": [{"name": "id", "projected": {"sources": sources}}]}}

    _pod(replace(REQUEST, pod_template=volume(audience="sts.amazonaws.com")))
    with pytest.raises(ConfigError, match=r"volumes\[id\]\.projected\.serviceAccountToken"):
        _pod(replace(REQUEST, pod_template=volume()))


def test_profiles_are_read_and_wrong_entries_are_named(tmp_path):
    path = tmp_path / "kubernetes.toml"
    path.write_text('[profiles.a]\nimage = "x"\ngpus = 2\n')
    config = load_cluster_config(path)
    assert config.profile("").torch_device == "cuda"
    with pytest.raises(ConfigError, match=r"no GPU profile 'b': use one of a, or add \[profiles"):
        config.profile("b")
    path.write_text('[profiles.a]\nimage = "x"\nmemmory = "1Gi"\ncpu = "lots"\n')
    with pytest.raises(ConfigError, match=r"profiles\.a\.cpu: .*profiles\.a\.memmory: "):
        load_cluster_config(path)
    path.write_text('[profiles.a]\nimage = "x"\n[profiles.a.pod_template.spec]\nhostIPC = true\n')
    with pytest.raises(ConfigError, match=r"profiles\.a\.pod_template: spec\.hostIPC"):
        load_cluster_config(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_cluster_config(tmp_path / "none.toml")


TRAINER, JOBSET = {"trainer.kubeflow.org": {"v1alpha1"}}, {"jobset.x-k8s.io": {"v1alpha2"}}


def test_the_kind_that_trains_follows_from_what_is_served():
    assert choose_kind({**TRAINER, **JOBSET}, 4)[0] is TRAIN_JOB
    kind, why = choose_kind(JOBSET, 4)
    assert kind is JOB_SET
    assert "does not serve trainer.kubeflow.org/v1alpha1 (Kubeflow Trainer v2), but" in why
    kind, why = choose_kind({"trainer.kubeflow.org": {"v2"}}, 1)
    assert kind is JOB
    assert "only as v2, not v1alpha1" in why
    with pytest.raises(ConfigError, match="4 nodes need Kubeflow Trainer or JobSet"):
        choose_kind({}, 4)


async def test_what_is_served_is_asked_of_the_server(tmp_path):
    with KubeServer(groups=kinds.BUILT_IN_GROUPS | {kinds.JOBSET}) as kube:
        path = kube.write_kubeconfig(tmp_path / "config")
        async with ClusterApi(opener({"kube_config_path": str(path)}), "default") as api:
            served = await served_groups(api)
    assert choose_kind(served, 2)[0] is JOB_SET


@pytest.mark.parametrize("kind", [JOB, JOB_SET, TRAIN_JOB], ids=lambda kind: kind.name)
def test_manifests_of_training_are_accepted(kind):
    nodes = 1 if kind is JOB else 2
    request = replace(REQUEST, num_workers=nodes, processes_per_node=8)
    profile = GPU.model_copy(update={"kueue_queue": ""})
    made = training_manifest(kind, request, profile, "default", "try-1", 0, 1)
    with KubeServer(groups=ALL_GROUPS) as kube:
        kube.create(made)
    text = yaml.safe_dump(made)
    assert "hcodec_core.training.launch" in text
    assert "nproc-per-node=8" in text


def test_refused_training_is_not_started_again():
    """A JobSet whose processes end with 43 fails at once, whatever restarts are left."""
    request = replace(REQUEST, num_workers=2, processes_per_node=1, max_restarts=5)
    profile = GpuProfile(image="hcodec-worker", cpu="1", memory="1Gi")
    made = training_manifest(JOB_SET, request, profile, "default", "try-1", 0, 1)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pod["spec"]["containers"][0]["command"] = ["sh", "-c", "exit 43"]
    with KubeServer(groups=ALL_GROUPS) as kube:
        kube.create(made)
        name = made["metadata"]["name"]

        def look() -> dict:
            return kube.registry.get(kinds.JOB_SET, "default", name)

        def has_failed() -> bool:
            found = look().get("status", {}).get("conditions", [])
            return any(c["type"] == "Failed" and c["status"] == "True" for c in found)

        kube.wait_until(has_failed)
        assert not look()["status"].get("restarts")


def test_training_prints_all_it_might_submit():
    config = ClusterConfig(profiles={"gpu": GPU})
    backend = TrainJobBackend(open_storage(StorageConfig()), config, opener({}), "hcodec")
    parts = list(yaml.safe_load_all(backend.manifest(replace(REQUEST, processes_per_node=8))))
    assert [part["kind"] for part in parts] == ["TrainJob", "JobSet"]


def test_plans_for_pods_are_made_for_the_profiles_compute_class(tmp_path, monkeypatch):
    from hcodec_airflow.requests import TokenizeRequest
    from hcodec_airflow.settings import read_settings
    from hcodec_airflow.steps import compute_class_of

    path = tmp_path / "kubernetes.toml"
    path.write_text(
        '[profiles.a]\nimage = "x"\ncompute_class = "cuda-h200-torch2.13.0"\n'
        '[profiles.b]\nimage = "x"\n'
    )
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", "/etc/hcodec.toml")
    monkeypatch.setenv("AIRFLOW__HCODEC__KUBERNETES_FILE", str(path))
    wanted = TokenizeRequest(dataset="d", sources=("s3://a/b/",), backend="kubernetes", profile="a")
    assert compute_class_of(wanted, read_settings()) == "cuda-h200-torch2.13.0"
    unknown = wanted.model_copy(update={"profile": "b"})
    with pytest.raises(ConfigError, match="GPU profile b names no compute_class: run `hcodec env`"):
        compute_class_of(unknown, read_settings())
