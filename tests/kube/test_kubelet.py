"""Containers run as processes with what their pod says, and never outlive the server."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kube import kinds
from tests.kube.environment import expanded
from tests.kube.errors import ApiError
from tests.kube.manifests import DEAF, FOREVER, container, indexed_job, pod
from tests.kube.processes import is_alive, marked
from tests.kube.server import KubeServer, NodeSpec, Settings


def ended(kube: KubeServer, name: str) -> dict:
    """The pod once it is over."""

    def look() -> dict | None:
        item = kube.store.get(kinds.POD, "default", name)
        return item if item and item["status"]["phase"] in ("Succeeded", "Failed") else None

    return kube.wait_until(look, f"the end of pod {name}")


def terminated(item: dict) -> dict:
    return item["status"]["containerStatuses"][0]["state"]["terminated"]


def waiting(kube: KubeServer, name: str) -> dict:
    item = kube.store.get(kinds.POD, "default", name)
    (status,) = item["status"].get("containerStatuses") or [{}]
    return (status.get("state") or {}).get("waiting") or {}


def test_pod_runs_through_its_phases(kube):
    kube.create(pod("one", "echo hello"))
    item = ended(kube, "one")
    status = item["status"]
    assert status["phase"] == "Succeeded"
    assert status["podIP"].startswith("10.244.")
    assert terminated(item)["reason"] == "Completed"
    assert kube.log("one") == "hello\n"
    reasons = [reason for reason, _ in kube.events("one")]
    assert set(reasons) == {"Scheduled", "Pulled", "Created", "Started"}


def test_environment_is_the_pods_only(kube, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "1")
    kube.settings.base_environment["FROM_BASE"] = "b"
    kube.create(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "keys"},
            "data": {"KEY": base64.b64encode(b"s3cret").decode()},
        }
    )
    data = {"x": "from the map"}
    kube.create(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "map"}, "data": data}
    )
    variables = [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}},
        {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "X", "valueFrom": {"configMapKeyRef": {"name": "map", "key": "x"}}},
        {"name": "BOTH", "value": "$(NAME)-$(X) $$(NAME) $(NONE)"},
        {"name": "NO", "valueFrom": {"secretKeyRef": {"name": "n", "key": "k", "optional": True}}},
    ]
    box = container(
        "env",
        env=variables,
        envFrom=[{"secretRef": {"name": "keys"}, "prefix": "AWS_"}],
        resources={"limits": {"cpu": "1500m"}},
    )
    body = pod("one", containers=[box])
    body["metadata"]["labels"] = {"a": "b"}
    made = kube.create(body)
    ended(kube, "one")
    found = dict(line.split("=", 1) for line in kube.log("one").splitlines())
    assert found["UID"] == made["metadata"]["uid"]
    assert (found["NAME"], found["LABEL"], found["CPUS"]) == ("one", "b", "2")
    assert found["BOTH"] == "one-from the map $(NAME) $(NONE)"
    assert (found["AWS_KEY"], found["FROM_BASE"]) == ("s3cret", "b")
    assert not {"SECRET_OF_THE_TEST", "NO", "HOME"} & set(found)


def test_expansion_follows_kubernetes():
    assert expanded("$(A) $$(A) $(B) $A", {"A": "1"}) == "1 $(A) $(B) $A"


def test_volumes_are_folders(kube):
    data = {"hcodec.toml": "threads = 4\n"}
    kube.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": data})
    volumes = [
        {"name": "config", "configMap": {"name": "c"}},
        {"name": "scratch", "emptyDir": {}},
    ]
    mounts = [
        {"name": "config", "mountPath": "/etc/hcodec"},
        {"name": "scratch", "mountPath": "/scratch"},
    ]
    script = 'cat "$1"; touch "$2/made"; ls "$OUT"; echo "$3"'
    box = container(
        volumeMounts=mounts,
        env=[{"name": "OUT", "value": "/scratch"}],
        command=["/bin/sh", "-c", script, "--"],
        args=["/etc/hcodec/hcodec.toml", "/scratch", "--out=/scratch/x", "/scratchy"],
    )
    kube.create(pod("one", containers=[box], volumes=volumes))
    assert ended(kube, "one")["status"]["phase"] == "Succeeded"
    first, second, third = kube.log("one").splitlines()
    assert (first, second) == ("threads = 4", "made")
    assert third.endswith("/volumes/scratch/x")
    assert third.startswith("--out=")
    assert "/scratchy" not in third


def test_what_lies_on_this_machine_is_not_mapped(kube, tmp_path):
    """Interpreters and buckets of tests may be below ``/tmp``, which pods mount too."""
    volumes = [{"name": "tmp", "emptyDir": {}}]
    root = f"/{tmp_path.parts[1]}"
    box = container(
        'echo "$0 $1"',
        args=[str(tmp_path), f"{root}/not-here"],
        volumeMounts=[{"name": "tmp", "mountPath": root}],
    )
    kube.create(pod("one", containers=[box], volumes=volumes))
    ended(kube, "one")
    kept, mapped = kube.log("one").split()
    assert kept == str(tmp_path)
    assert mapped.endswith("/volumes/tmp/not-here")


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [("exit 43", 43, "Error"), ("kill -9 $$$$", 137, "Error"), ("kill -TERM $$$$", 143, "Error")],
)
def test_exit_codes(kube, script, code, reason):
    kube.create(pod("one", script))
    item = ended(kube, "one")
    assert item["status"]["phase"] == "Failed"
    assert (terminated(item)["exitCode"], terminated(item)["reason"]) == (code, reason)


def test_out_of_memory(kube):
    kube.create(pod("one", FOREVER))
    kube.wait_until(kube.running_pods)
    kube.faults.kill_for_memory("one")
    item = ended(kube, "one")
    assert (terminated(item)["exitCode"], terminated(item)["reason"]) == (137, "OOMKilled")


def test_last_lines_are_the_termination_message(kube):
    box = container("echo one; echo two >&2; exit 3")
    box["terminationMessagePolicy"] = "FallbackToLogsOnError"
    kube.create(pod("one", containers=[box]))
    assert terminated(ended(kube, "one"))["message"] == "one\ntwo"


def test_command_that_is_not_there(kube):
    kube.create(pod("one", containers=[container(command=["no-such-command"])]))
    item = ended(kube, "one")
    assert (terminated(item)["exitCode"], terminated(item)["reason"]) == (128, "StartError")


def test_missing_configuration_waits(kube):
    source = [{"secretRef": {"name": "keys"}}]
    kube.create(pod("one", containers=[container(envFrom=source)]))
    kube.wait_until(lambda: waiting(kube, "one").get("reason") == "CreateContainerConfigError")
    assert waiting(kube, "one")["message"] == 'secret "keys" not found'
    kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}})
    assert ended(kube, "one")["status"]["phase"] == "Succeeded"


def test_image_that_cannot_be_pulled(kube):
    kube.faults.break_image("hcodec")
    kube.create(pod("one"))
    kube.wait_until(lambda: waiting(kube, "one").get("reason") == "ImagePullBackOff")
    assert "Failed" in [reason for reason, _ in kube.events("one")]
    assert kube.store.get(kinds.POD, "default", "one")["status"]["phase"] == "Pending"
    kube.faults.mend_image("hcodec")
    assert ended(kube, "one")["status"]["phase"] == "Succeeded"


def test_grace_period_ends_with_a_kill(kube):
    kube.create(pod("deaf", DEAF, terminationGracePeriodSeconds=1))
    kube.wait_until(lambda: kube.running_pods() and kube.log("deaf"))
    kube.registry.delete(kinds.POD, "default", "deaf")
    (item,) = kube.pods()
    assert item["metadata"]["deletionGracePeriodSeconds"] == 1
    kube.wait_until(lambda: not kube.pods())
    last = [c.object for c in kube.store.history if c.key == ("pods", "default", "deaf")][-1]
    assert terminated(last)["exitCode"] == 137


def test_sigterm_is_heard_first(kube):
    kube.create(pod("kind", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.02; done"))
    kube.wait_until(lambda: kube.running_pods() and kube.log("kind"))
    kube.registry.delete(kinds.POD, "default", "kind")
    kube.wait_until(lambda: not kube.pods())
    last = [c.object for c in kube.store.history if c.key == ("pods", "default", "kind")][-1]
    assert last["status"]["phase"] == "Succeeded"


def test_restarts_in_place(kube, tmp_path):
    counter = tmp_path / "count"
    script = f"echo x >> {counter}; test $(wc -l < {counter}) = 3"
    kube.create(pod("one", script, restartPolicy="OnFailure"))
    item = ended(kube, "one")
    status = item["status"]["containerStatuses"][0]
    assert (item["status"]["phase"], status["restartCount"]) == ("Succeeded", 2)
    assert status["lastState"]["terminated"]["exitCode"] == 1


def test_init_containers_come_first(kube, tmp_path):
    first, second = container(f"echo a > {tmp_path}/a"), container(f"cat {tmp_path}/a")
    kube.create(pod("one", initContainers=[{**first, "name": "init"}], containers=[second]))
    assert ended(kube, "one")["status"]["phase"] == "Succeeded"
    assert kube.log("one") == "a\n"
    bad = {**container("exit 1"), "name": "init"}
    kube.create(pod("two", initContainers=[bad], containers=[second]))
    assert ended(kube, "two")["status"]["phase"] == "Failed"


def test_pod_without_room_says_why():
    nodes = [
        NodeSpec("small", {"cpu": "1", "memory": "1Gi"}),
        NodeSpec("tainted", taints=({"key": "gpu", "value": "yes", "effect": "NoSchedule"},)),
        NodeSpec("elsewhere", labels={"zone": "b"}),
    ]
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    with KubeServer(nodes=nodes) as kube:
        body = pod("one", containers=[container(resources=gpu)], nodeSelector={"zone": "a"})
        kube.create(body)
        kube.wait_until(lambda: kube.events("one"))
        ((reason, message),) = kube.events("one")
        assert reason == "FailedScheduling"
        assert message.startswith("0/3 nodes are available: ")
        assert "1 node(s) had untolerated taint {gpu: yes}" in message
        (item,) = kube.pods()
        (condition,) = item["status"]["conditions"]
        assert (condition["type"], condition["reason"]) == ("PodScheduled", "Unschedulable")
        # A new node is used as soon as it is there.
        kube.nodes.add(NodeSpec("big", labels={"zone": "a"}))
        assert ended(kube, "one")["spec"]["nodeName"] == "big"


def test_gpus_are_counted_and_given_back():
    mig = "nvidia.com/mig-1g.10gb"
    with KubeServer(nodes=[NodeSpec("n", {"cpu": "8", "memory": "8Gi", mig: "1"})]) as kube:
        box = container("sleep 0.2", resources={"limits": {mig: "1"}})
        for name in ("a", "b"):
            kube.create(pod(name, containers=[box]))
        first = ended(kube, "a")
        second = ended(kube, "b")
        assert "FailedScheduling" in [reason for reason, _ in kube.events("b")]
        assert terminated(second)["startedAt"] >= terminated(first)["startedAt"]


def test_tolerations_and_affinity_choose_nodes():
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    nodes = [NodeSpec("cpu"), NodeSpec("gpu", taints=(taint,), labels={"gpu": "H200"})]
    term = {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["H200"]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    with KubeServer(nodes=nodes) as kube:
        kube.create(
            pod(
                "one",
                affinity={"nodeAffinity": required},
                tolerations=[{"key": "gpu", "operator": "Exists"}],
            )
        )
        assert ended(kube, "one")["spec"]["nodeName"] == "gpu"


def test_paused_pod_hangs_until_it_is_woken(kube, tmp_path):
    marker = tmp_path / "tick"
    kube.create(pod("one", f"while :; do date +%N > {marker}; sleep 0.02; done"))
    kube.wait_until(marker.exists)
    kube.faults.pause("one")
    time.sleep(0.1)
    before = marker.read_text()
    time.sleep(0.2)
    assert marker.read_text() == before
    assert kube.running_pods()
    kube.faults.wake("one")
    kube.wait_until(lambda: marker.read_text() != before)


def test_image_without_a_command_runs_its_entrypoint():
    settings = Settings(entrypoints={"hcodec": ["/bin/echo", "entry"]})
    with KubeServer(settings) as kube:
        box = container(args=["x"])
        del box["command"]
        kube.create(pod("one", containers=[box]))
        ended(kube, "one")
        assert kube.log("one") == "entry x\n"


def test_two_containers_end_together(kube):
    boxes = [container("echo a"), {**container("echo b; exit 1"), "name": "other"}]
    kube.create(pod("one", containers=boxes))
    assert ended(kube, "one")["status"]["phase"] == "Failed"
    with pytest.raises(ApiError, match="a container name must be specified"):
        kube.log("one")


ESCAPING = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(600)
time.sleep(600)
"""


def test_no_process_outlives_the_server(tmp_path):
    path = tmp_path / "pid"
    with KubeServer() as kube:
        mark = kube.mark
        box = container(command=[sys.executable, "-c", ESCAPING, str(path)])
        kube.create(pod("one", containers=[box]))
        kube.wait_until(lambda: path.exists() and path.read_text())
        assert len(marked(mark + "/")) >= 2
    assert marked(mark + "/") == []
    assert not is_alive(int(path.read_text()))


def test_no_process_outlives_a_failed_test():
    kube = KubeServer()

    def fail() -> None:
        with kube:
            kube.create(indexed_job("work", FOREVER))
            kube.wait_until(lambda: len(kube.running_pods("work")) == 2)
            raise RuntimeError("of the test")

    with pytest.raises(RuntimeError, match="of the test"):
        fail()
    assert marked(kube.mark + "/") == []


def test_no_process_outlives_its_container(kube, tmp_path):
    path = tmp_path / "pid"
    box = container(command=[sys.executable, "-c", ESCAPING, str(path)])
    kube.create(pod("one", containers=[box]))
    kube.wait_until(lambda: path.exists() and path.read_text())
    kube.faults.kill_process("one")
    ended(kube, "one")
    assert not is_alive(int(path.read_text()))


HARD_DEATH = """
import os, sys
from tests.kube.manifests import container, pod
from tests.kube.server import KubeServer
kube = KubeServer().__enter__()
box = container(command=[sys.executable, "-c", sys.argv[2], sys.argv[1]])
kube.create(pod("one", containers=[box]))
kube.wait_until(lambda: os.path.exists(sys.argv[1]) and open(sys.argv[1]).read())
print(kube.kubelet.pids("default", "one")[0], open(sys.argv[1]).read(), flush=True)
os.kill(os.getpid(), 9)
"""


def test_no_process_outlives_a_killed_test_run(tmp_path):
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", HARD_DEATH, str(tmp_path / "pid"), ESCAPING],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    pids = [int(word) for word in run.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "processes of the pod live on"
        time.sleep(0.05)
