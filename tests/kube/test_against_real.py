"""The same requests to this server and to a real one of 1.20: alike, but for what 1.20 lacks.

The real one is etcd, API server and controllers from the cache of ``tests/cluster`` (see its
``build.sh``), without nodes. Compared are codes, reasons and the fields of causes; messages differ
between versions.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.certificates import write_key
from tests.cluster.images import cache_path
from tests.kube.manifests import container, plain_job
from tests.kube.server import KubeServer

pytestmark = pytest.mark.slow

Ask = Callable[..., tuple[int, dict[str, Any]]]
JOBS = "/apis/batch/v1/namespaces/default/jobs"
MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
MERGE = "application/merge-patch+json"
TOKEN = "test-token"


def asker(url: str, token: str) -> Ask:
    """Sends one request; answers (code, body)."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    def ask(method: str, path: str, body: Any = None, content_type: str = "application/json"):
        headers = {"Authorization": f"Bearer {token}", "Content-Type": content_type}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers, method=method)
        secure = {"context": context} if url.startswith("https") else {}
        try:
            with urllib.request.urlopen(request, timeout=60, **secure) as answer:
                code, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            code, text = error.code, error.read()
        try:
            return code, json.loads(text)
        except ValueError:
            return code, {"text": text.decode()}

    return ask


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RealServer:
    """etcd, kube-apiserver and kube-controller-manager, on loopback, until ``close``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.url = ""

    def start(self) -> None:
        folder = self.folder
        client, peer, port = (free_port() for _ in range(3))
        etcd, raft = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        (folder / "tokens").write_text(f"{TOKEN},admin,admin,system:masters\n")
        key = write_key(folder / "accounts.key")
        self.url = f"https://127.0.0.1:{port}"
        self.launch(
            "etcd", f"--data-dir={folder}/etcd", "--name=t", f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}", f"--listen-peer-urls={raft}",
            f"--initial-advertise-peer-urls={raft}", f"--initial-cluster=t={raft}",
        )  # fmt: skip
        self.launch(
            str(cache_path() / "bin" / "kube-apiserver"), f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1", f"--secure-port={port}", "--advertise-address=127.0.0.1",
            "--service-cluster-ip-range=10.97.0.0/24", f"--cert-dir={folder}/pki",
            f"--token-auth-file={folder}/tokens", "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount", "--allow-privileged=true",
            "--service-account-issuer=https://test", f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
        )  # fmt: skip
        self.await_namespace()
        self.launch(
            str(cache_path() / "bin" / "kube-controller-manager"),
            f"--kubeconfig={self.kubeconfig()}", "--leader-elect=false", "--port=0",
            "--secure-port=0", "--controllers=job,garbagecollector,podgc",
        )  # fmt: skip

    def launch(self, *command: str) -> None:
        log = self.folder / f"{Path(command[0]).name}.log"
        with log.open("wb") as output:
            self.processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            )

    def kubeconfig(self) -> Path:
        path = self.folder / "kubeconfig"
        cluster = {"server": self.url, "insecure-skip-tls-verify": True}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "t",
            "clusters": [{"name": "t", "cluster": cluster}],
            "users": [{"name": "t", "user": {"token": TOKEN}}],
            "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
        }
        path.write_text(yaml.safe_dump(document))
        return path

    def await_namespace(self) -> None:
        ask, deadline = asker(self.url, TOKEN), time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                if ask("GET", "/api/v1/namespaces/default")[0] == 200:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.5)
        raise TimeoutError((self.folder / "kube-apiserver.log").read_text()[-2000:])

    def close(self) -> None:
        for process in reversed(self.processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[tuple[Ask, Ask]]:
    if not (cache_path() / "bin" / "kube-apiserver").exists():
        pytest.skip(f"NOT RUN: no Kubernetes in {cache_path()}; tests/cluster/build.sh makes one.")
    real = RealServer(tmp_path_factory.mktemp("real"))
    try:
        real.start()
        with KubeServer(nodes=()) as kube:
            yield asker(real.url, TOKEN), asker(kube.url, kube.token)
    finally:
        real.close()


def brief(answer: tuple[int, dict[str, Any]]) -> list[Any]:
    """Code, and what it says that does not depend on the version."""
    code, body = answer
    if body.get("kind") != "Status":
        return [code, body.get("kind")]
    causes = (body.get("details") or {}).get("causes") or []
    fields = sorted({(cause["field"], cause["reason"]) for cause in causes})
    return [code, body.get("status"), body.get("reason"), fields]


def job(**spec: Any) -> dict[str, Any]:
    return plain_job("wrong", **spec)


def with_pod(**fields: Any) -> dict[str, Any]:
    body = plain_job("wrong")
    body["spec"]["template"]["spec"].update(fields)
    return body


def with_container(**fields: Any) -> dict[str, Any]:
    return with_pod(containers=[container(**fields)])


def with_source(**source: Any) -> dict[str, Any]:
    return with_container(env=[{"name": "A", "valueFrom": source}])


EMPTY = {"name": "a", "emptyDir": {}}
SECRET = {"name": "a", "key": "b"}
WRONG_JOBS = {
    "negative parallelism": job(parallelism=-1),
    "negative limit": job(backoffLimit=-1),
    "long name": plain_job("x" * 64),
    "Always": with_pod(restartPolicy="Always"),
    "unknown restart policy": with_pod(restartPolicy="Maybe"),
    "selector": job(selector={"matchLabels": {"a": "b"}}),
    "no manual selector": job(manualSelector=True),
    "other manual selector": job(manualSelector=True, selector={"matchLabels": {"a": "b"}}),
    "no image": with_container(image=""),
    "container name": with_container(name="A"),
    "variable name": with_container(env=[{"name": "1A", "value": "x"}]),
    "empty variable name": with_container(env=[{"name": "", "value": "x"}]),
    "two sources": with_source(fieldRef={"fieldPath": "metadata.name"}, secretKeyRef=SECRET),
    "no source": with_source(),
    "field path": with_source(fieldRef={"fieldPath": "metadata.generation"}),
    "resource field": with_source(resourceFieldRef={"resource": "limits.gpu"}),
    "GPU without limit": with_container(resources={"requests": {"nvidia.com/gpu": "1"}}),
    "part of a GPU": with_container(resources={"limits": {"nvidia.com/gpu": "500m"}}),
    "resource name": with_container(resources={"limits": {"gpu": "1"}}),
    "negative memory": with_container(resources={"limits": {"memory": "-1Gi"}}),
    "quantity": with_container(resources={"limits": {"memory": "4 GB"}}),
    "request over limit": with_container(
        resources={"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}
    ),
    "mount of nothing": with_container(volumeMounts=[{"name": "x", "mountPath": "/x"}]),
    "pull policy": with_container(imagePullPolicy="Some"),
    "volume twice": with_pod(volumes=[EMPTY, EMPTY]),
    "volume of two kinds": with_pod(volumes=[{**EMPTY, "configMap": {"name": "c"}}]),
    "deadline": with_pod(activeDeadlineSeconds=0),
    "host name": with_pod(hostname="a.b"),
    "priority class": with_pod(priorityClassName="A!"),
    "node selector": with_pod(nodeSelector={"gpu": "A B"}),
    "DNS policy": with_pod(dnsPolicy="No"),
    "toleration value": with_pod(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
    "toleration operator": with_pod(tolerations=[{"key": "a", "operator": "In"}]),
    "toleration effect": with_pod(tolerations=[{"key": "a", "operator": "Exists", "effect": "No"}]),
    "toleration key": with_pod(tolerations=[{"operator": "Equal", "value": "b"}]),
    "container twice": with_pod(containers=[container(), container()]),
    "no spec": {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "wrong"}},
}


@pytest.mark.parametrize("name", WRONG_JOBS)
def test_wrong_jobs_are_refused_alike(servers, name):
    real, ours = (brief(ask("POST", JOBS, WRONG_JOBS[name])) for ask in servers)
    assert real[0] in (400, 422)
    assert ours == real


REQUESTS: dict[str, tuple[Any, ...]] = {
    "unknown group": ("GET", "/apis/nothing.example/v1/x"),
    "unknown resource": ("GET", "/api/v1/namespaces/default/nothings"),
    "version": ("GET", "/version/"),
    "missing Job": ("GET", f"{JOBS}/nobody"),
    "log of a missing pod": ("GET", f"{PODS}/nobody/log"),
    "missing namespace": ("POST", MAPS.replace("default", "nowhere"), {"metadata": {"name": "a"}}),
    "other namespace": ("POST", MAPS, {"metadata": {"name": "a", "namespace": "x"}}),
    "other kind": ("POST", MAPS, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}}),
    "no name": ("POST", MAPS, {"metadata": {}}),
    "bad name": ("POST", MAPS, {"metadata": {"name": "A_"}}),
    "version of a new object": ("POST", MAPS, {"metadata": {"name": "a", "resourceVersion": "1"}}),
    "bad label": ("POST", MAPS, {"metadata": {"name": "a", "labels": {"a": "b c"}}}),
    "bad label name": ("POST", MAPS, {"metadata": {"name": "a", "labels": {"a b": "c"}}}),
    "bad finalizer": ("POST", MAPS, {"metadata": {"name": "a", "finalizers": ["x"]}}),
    "list": ("GET", MAPS),
    "field selector": ("GET", f"{MAPS}?fieldSelector=data.x%3D1"),
    "label selector": ("GET", f"{MAPS}?labelSelector=a%3D%3D%3Db"),
    "bad continue": ("GET", f"{MAPS}?continue=zzz"),
    "patch of nothing": ("PATCH", f"{MAPS}/nobody", {}, MERGE),
    "put of a collection": ("PUT", MAPS, {}),
    "post to an object": ("POST", f"{MAPS}/x", {}),
    "deletion of nothing": ("DELETE", f"{MAPS}/nobody"),
    "bad propagation": ("DELETE", f"{MAPS}/nobody", {"propagationPolicy": "Sideways"}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_answered_alike(servers, name):
    real, ours = (brief(ask(*REQUESTS[name])) for ask in servers)
    assert ours == real


def story_of_a_map(ask: Ask) -> list[Any]:
    """One object made, changed by all kinds of patches, protected and deleted."""
    path, made = f"{MAPS}/story", ask("POST", MAPS, {"metadata": {"name": "story"}})
    stale = {"metadata": {"resourceVersion": made[1]["metadata"]["resourceVersion"]}}
    add = [{"op": "add", "path": "/data/y", "value": "2"}, {"op": "remove", "path": "/data/x"}]
    test = [{"op": "test", "path": "/data/y", "value": "9"}]
    answers = [
        made,
        ask("POST", MAPS, {"metadata": {"name": "story"}}),
        ask("PATCH", path, {"data": {"x": "1"}}, MERGE),
        ask("PUT", path, made[1]),
        ask("PATCH", path, stale, MERGE),
        ask("PATCH", path, add, "application/json-patch+json"),
        ask("PATCH", path, test, "application/json-patch+json"),
        ask("PATCH", path, {}, "application/json"),
        ask("PUT", path, {"metadata": {"name": "other"}}),
        ask("DELETE", path, {"preconditions": {"uid": "other"}}),
        ask("DELETE", path, {"preconditions": {"resourceVersion": "1"}}),
        ask("POST", f"{MAPS}?dryRun=All", {"metadata": {"name": "dry"}}),
        ask("GET", f"{MAPS}/dry"),
    ]
    data = ask("GET", path)[1]["data"]
    return [*map(brief, answers), data, brief(ask("DELETE", path)), brief(ask("GET", path))]


def until(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def pods_of(ask: Ask, name: str) -> list[dict[str, Any]]:
    return ask("GET", f"{PODS}?labelSelector=job-name%3D{name}")[1]["items"]


def story_of_a_job(ask: Ask) -> list[Any]:
    """A Job whose pod gets no node, looked at and deleted without a policy: its pod is orphaned."""
    made = ask("POST", JOBS, plain_job("kept"))
    defaults = {k: made[1]["spec"][k] for k in ("backoffLimit", "parallelism", "completions")}
    template = made[1]["spec"]["template"]["spec"]
    (pod,) = until(lambda: pods_of(ask, "kept"))
    metadata, owner = pod["metadata"], dict(pod["metadata"]["ownerReferences"][0])
    owner.pop("uid")
    image = {"spec": {"template": {"spec": {"containers": [{"name": "worker", "image": "b"}]}}}}
    strategic = "application/strategic-merge-patch+json"
    failed = ask("PATCH", f"{JOBS}/kept", {"status": {"failed": 7}}, MERGE)[1]["status"]
    told = [
        brief(ask("PATCH", f"{JOBS}/kept", image, strategic))[:3],
        failed.get("failed"),
        ask("GET", f"{PODS}/{metadata['name']}/log"),
        brief(ask("GET", f"{PODS}/{metadata['name']}/log?container=zz"))[:3],
        brief(ask("DELETE", f"{JOBS}/kept")),
    ]
    until(lambda: ask("GET", f"{JOBS}/kept")[0] == 404)
    orphan = until(
        lambda: [p for p in pods_of(ask, "kept") if "ownerReferences" not in p["metadata"]]
    )
    tolerations = pod["spec"]["tolerations"]
    told.append([len(orphan), ask("DELETE", f"{PODS}/{metadata['name']}")[0]])
    return [defaults, template, owner, metadata["generateName"], tolerations, told]


def story_of_deletions(ask: Ask) -> list[Any]:
    """Jobs deleted in the background and in the foreground take their pods with them."""
    told: list[Any] = []
    for policy in ("Background", "Foreground"):
        name = policy.lower()
        ask("POST", JOBS, plain_job(name))
        until(lambda name=name: pods_of(ask, name))
        answer = ask("DELETE", f"{JOBS}/{name}", {"propagationPolicy": policy})
        finalizers = answer[1].get("metadata", {}).get("finalizers")
        gone = until(lambda name=name: not pods_of(ask, name))
        told += [brief(answer), finalizers, gone]
        told.append(until(lambda name=name: ask("GET", f"{JOBS}/{name}")[0] == 404))
    return told


@pytest.mark.parametrize("story", [story_of_a_map, story_of_a_job, story_of_deletions])
def test_stories_are_told_alike(servers, story):
    real, ours = (story(ask) for ask in servers)
    assert ours == real
