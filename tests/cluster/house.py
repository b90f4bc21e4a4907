"""What stands around a cluster in its test: storage, corpus, the chart, and an Airflow outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import yaml

from hcodec_airflow.demo.airflow_api import FINISHED
from hcodec_airflow.demo.services import AIRFLOW as AIRFLOW_COMMAND
from hcodec_airflow.demo.services import (
    Services,
    airflow_environment,
    free_port,
    start_airflow,
    wait_until_answers,
)
from hcodec_airflow.pipelines import MANUAL_DAG_ID
from hcodec_core.config import StorageConfig
from hcodec_core.storage import Storage, open_storage
from tests.cluster.cluster import wait_for
from tests.cluster.images import AIRFLOW, WORKER
from tests.helm.tools import find_tool
from tests.operators.airflow_calls import Calls

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "hcodec"
CLIPS = ROOT / "tests" / "corpus" / "clips" / "english"
_START_SECONDS, _RUN_SECONDS = 900.0, 1800.0
RELEASE, AIRFLOW_NAMESPACE, WORKERS = "hcodec", "hcodec-test-airflow", "hcodec-test"
BUCKET = "cluster"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}


class Kubernetes(Protocol):
    """A cluster as the test uses it: our own, or one that a kubeconfig names."""

    host_address: str
    kubeconfig: Path

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl as an administrator."""

    def objects(self, *arguments: str) -> list[dict[str, Any]]:
        """``kubectl get`` as objects."""

    def token_kubeconfig(self, account: str, namespace: str, path: Path) -> Path:
        """A kubeconfig for a service account."""


@dataclass
class House:
    """One installation: folder of this host, S3 endpoint that pods reach, compute class of them."""

    cluster: Kubernetes
    folder: Path
    endpoint: str
    compute_class: str
    airflow_url: str
    has_gpus: bool
    worker_image: str = WORKER
    airflow_image: str = AIRFLOW
    port: int = field(default_factory=lambda: free_port(0))

    @property
    def storage(self) -> Storage:
        """Storage as this host reaches it."""
        return open_storage(StorageConfig(endpoint_url=self.endpoint))

    def fill(self, copies: int) -> int:
        """Make the bucket and put the corpus into it, several times; returns the objects."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        clips = sorted(path for path in CLIPS.iterdir() if path.is_file())
        for number in range(copies):
            for clip in clips:
                key = f"audio/{number:03}/{clip.name}"
                client.put_object(Bucket=BUCKET, Key=key, Body=clip.read_bytes())
        return copies * len(clips)

    def values(self) -> dict[str, Any]:
        """The chart's values for this cluster."""
        workers: dict[str, Any] = {
            "compute_class": self.compute_class,
            "device": "cpu",
            "gpus": 1 if self.has_gpus else 0,
            "cpu": "600m",
            "memory": "1500Mi",
            "threads": 1,
            "decoders": 1,
            "scratch_size": "1Gi",
            "env_from_secrets": ["hcodec-storage"],
            "env": {"OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"},
            "termination_grace_seconds": 20,
            "tolerations": [],
        }
        classes = {
            "batch": {"name": "hcodec-test-batch", "value": 10},
            "training": {"name": "hcodec-test-training", "value": 20},
        }
        return {
            "namespace": {"name": WORKERS, "create": True},
            "priorityClasses": {"create": True, **classes},
            "images": {"worker": _image(self.worker_image), "airflow": _image(self.airflow_image)},
            "config": {
                "storage": {"endpoint_url": self.endpoint},
                "access": {
                    "source_prefixes": [f"s3://{BUCKET}/audio/"],
                    "destination_prefixes": [f"s3://{BUCKET}/tokens/"],
                },
                "catalog": {
                    "uri": f"sqlite:///{self.folder}/catalog.db",
                    "warehouse_uri": f"s3://{BUCKET}/tokens/warehouse",
                },
                "work": {"work_uri": f"s3://{BUCKET}/tokens/work"},
            },
            "kubernetes": {
                "connection": "hcodec_kubernetes",
                "default_profile": "gpu",
                "profiles": {"gpu": workers},
            },
            "networkPolicy": {
                "extraEgress": [{"to": [{"ipBlock": {"cidr": f"{self.cluster.host_address}/32"}}]}]
            },
            # Never by the clock here: the test starts it.
            "janitor": {
                "schedule": "0 0 1 1 *",
                "minAgeSeconds": 600,
                "airflow": {"url": self.airflow_url, "tokenSecret": {"name": "hcodec-janitor"}},
            },
        }

    def install(self) -> str:
        """``helm install``, and the secrets that an administrator would make."""
        path = self.folder / "values.yaml"
        path.write_text(yaml.safe_dump(self.values()))
        said = self.helm(
            "install", RELEASE, str(CHART), "--namespace", AIRFLOW_NAMESPACE,
            "--create-namespace", "--values", str(path), "--wait",
        )  # fmt: skip
        self._create_secret(WORKERS, "hcodec-storage", CREDENTIALS)
        self._create_secret(AIRFLOW_NAMESPACE, "hcodec-janitor", {"token": "open sesame"})
        return said

    def uninstall(self) -> None:
        """Remove the release, and what it keeps on purpose."""
        self.helm("uninstall", RELEASE, "--namespace", AIRFLOW_NAMESPACE)
        names = (WORKERS, AIRFLOW_NAMESPACE)
        self.cluster.kubectl("delete", "namespace", *names, "--wait=false")

    def helm(self, *arguments: str) -> str:
        """Run helm against the cluster."""
        command = [str(find_tool("helm")), "--kubeconfig", str(self.cluster.kubeconfig), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _create_secret(self, namespace: str, name: str, values: dict[str, str]) -> None:
        manifest = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "stringData": values,
        }
        self.cluster.kubectl("apply", "-f", "-", text=json.dumps(manifest))

    def airflow_environment(self) -> dict[str, str]:
        """An Airflow on this host: the chart's files, and the launcher's token."""
        files = self._configuration_files()
        token = self.cluster.token_kubeconfig(
            "hcodec-launcher", AIRFLOW_NAMESPACE, self.folder / "launcher.kubeconfig"
        )
        connection = {
            "conn_type": "hcodec_kubernetes",
            "extra": {"kube_config_path": str(token), "namespace": WORKERS},
        }
        return {
            **os.environ,
            **CREDENTIALS,
            **airflow_environment(self.folder, ROOT / "dags", files["hcodec.toml"], self.port),
            "AWS_EC2_METADATA_DISABLED": "true",
            "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
            "AIRFLOW__HCODEC__KUBERNETES_FILE": str(files["kubernetes.toml"]),
            "AIRFLOW__HCODEC__BACKEND": "kubernetes",
            "AIRFLOW_CONN_HCODEC_KUBERNETES": json.dumps(connection),
            "OMP_NUM_THREADS": "1",
        }

    def _configuration_files(self) -> dict[str, Path]:
        """The ConfigMap that the chart made for Airflow, as files."""
        text = self.cluster.kubectl(
            "-n", AIRFLOW_NAMESPACE, "get", "configmap", "hcodec-airflow", "-o", "json"
        )
        files = {}
        for name, content in json.loads(text)["data"].items():
            files[name] = self.folder / name
            files[name].write_text(content)
        return files

    def test_connection(self) -> tuple[bool, str]:
        """What the button *Test* of the connection says."""
        code = (
            "import json; from hcodec_airflow.kubernetes.connection import HCodecKubernetesHook; "
            "print('SAID' + json.dumps(HCodecKubernetesHook().test_connection()))"
        )
        text = self.python("-c", code)
        granted, message = json.loads(text.rpartition("SAID")[2])
        return bool(granted), str(message)

    def python(self, *arguments: str) -> str:
        """Run Python as this Airflow would; returns its output."""
        done = subprocess.run(
            [sys.executable, *arguments], env=self.airflow_environment(), cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    @contextmanager
    def running_airflow(self) -> Iterator[OutsideAirflow]:
        """A whole Airflow on this host: API server, scheduler, DAG processor and triggerer."""
        environment, services = self.airflow_environment(), Services(self.folder)
        api = Calls(environment["AIRFLOW__API__BASE_URL"])
        try:
            start_airflow(services, environment)
            wait_until_answers(f"{api.base_url}/api/v2/version", services, _START_SECONDS)
            api.login()
            api.wait_for_dag(MANUAL_DAG_ID, services, _START_SECONDS)
            yield OutsideAirflow(api, services, environment)
        finally:
            services.stop()


@dataclass
class OutsideAirflow:
    """A running Airflow that has no part in the cluster but a connection."""

    api: Calls
    services: Services
    environment: dict[str, str]

    def start(self, form: dict[str, Any]) -> str:
        """Run the manual DAG with a form; the run's id."""
        return self.api.trigger(MANUAL_DAG_ID, form)

    def state(self, run_id: str) -> str:
        """State of a run; raises when a process of Airflow has ended."""
        self.services.check()
        return self.api.run_state(MANUAL_DAG_ID, run_id)

    def wait(self, run_id: str) -> str:
        """State in which a run ended."""

        def ended() -> str:
            state = self.state(run_id)
            return state if state in FINISHED else ""

        return str(wait_for(ended, f"the end of {run_id}", _RUN_SECONDS))

    def task_state(self, run_id: str) -> str:
        """State of the run's task ``tokenize``."""
        return self.api.task_states(MANUAL_DAG_ID, run_id)["tokenize"]

    def log(self, run_id: str) -> list[str]:
        """Lines of the log of task ``tokenize``."""
        return self.api.log_tail(MANUAL_DAG_ID, run_id, "tokenize", 100_000)

    def kill_triggerer(self) -> None:
        """End it without a word."""
        process = self.services._processes.pop("airflow-triggerer")
        leader = psutil.Process(process.pid)
        for one in [leader, *leader.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def start_triggerer(self) -> None:
        """Start a new one."""
        command = [*AIRFLOW_COMMAND, "triggerer", "--skip-serve-logs"]
        self.services.start("airflow-triggerer", command, self.environment)


def _image(name: str) -> dict[str, str]:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}
