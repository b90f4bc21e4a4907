"""A real Kubernetes (1.20) on this machine: etcd, API server, controllers, containerd, kubelet.

    with Cluster(cache_path()) as cluster:
        cluster.kubectl("get", "nodes")

Everything it starts, mounts, links or sets is undone at the end, also after a failure. It needs
root, Linux with cgroup v1 and what ``build.sh`` put into the cache. The API server listens on its
own service address, so there is no kube-proxy and no iptables rule; pods reach services of this
machine at ``host_address``. There is no DNS. Pod Security labels and NetworkPolicies have no effect
in it: the one is later than 1.20, the other needs a network plugin that enforces them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster.certificates import Authority, inline, write_key
from tests.cluster.images import PAUSE
from tests.helm.tools import find_tool

NODE = "hcodec-node"
_RUN = Path("/run/hcodec-cluster")
_HOST_ADDRESS = "10.99.0.1"
_SERVICE_ADDRESS = "10.96.0.1"
_POD_NETWORK = "10.244.0.0/24"
_LINK, _PEER, _BRIDGE = "hcodec0", "hcodec1", "hcodec-br"
_SYSCTLS = (
    "vm.overcommit_memory",
    "vm.panic_on_oom",
    "kernel.panic",
    "kernel.panic_on_oops",
    "kernel.keys.root_maxkeys",
    "kernel.keys.root_maxbytes",
    "net.ipv4.ip_forward",
)
_READY_SECONDS = 180.0


class ClusterError(Exception):
    """The cluster did not come up; the message says which part, and what it said last."""


class Cluster:
    """See the module's docstring. Use as a context manager."""

    host_address = _HOST_ADDRESS

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.state = _RUN
        self.kubeconfig = _RUN / "admin.kubeconfig"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        if self.state.exists():
            # Left by a run that was killed outright.
            _sweep_runtime()
            shutil.rmtree(self.state, ignore_errors=True)
        self.state.mkdir(mode=0o700)
        try:
            self._start()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator; returns its output."""
        command = [str(find_tool("kubectl")), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout + ("" if check else done.stderr)

    def objects(self, *arguments: str) -> list[dict[str, Any]]:
        """``kubectl get`` as objects."""
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", *arguments, "-o", "json"))[
            "items"
        ]
        return found

    def import_image(self, archive: Path) -> None:
        """Let containerd have an image that was exported as an archive."""
        self._ctr("images", "import", str(archive))

    def has_image(self, name: str, digest: str) -> bool:
        """Whether an image of that configuration digest is there already, from an earlier run."""
        marker = self._containerd_root() / f"{name.replace('/', '_')}.digest"
        return marker.exists() and marker.read_text() == digest

    def remember_image(self, name: str, digest: str) -> None:
        """Note what was imported: the store of images outlives the cluster."""
        (self._containerd_root() / f"{name.replace('/', '_')}.digest").write_text(digest)

    def forget_images(self) -> None:
        """Empty the store of images; only while the cluster does not run."""
        shutil.rmtree(self._containerd_root(), ignore_errors=True)

    def token_kubeconfig(self, account: str, namespace: str, path: Path) -> Path:
        """A kubeconfig for a service account, with its token."""
        secret = f"{account}-test-token"
        manifest = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/service-account-token",
            "metadata": {
                "name": secret,
                "namespace": namespace,
                "annotations": {"kubernetes.io/service-account.name": account},
            },
        }
        self.kubectl("apply", "-f", "-", text=json.dumps(manifest))
        jsonpath = "jsonpath={.data.token}"

        def read() -> str:
            return self.kubectl("-n", namespace, "get", "secret", secret, "-o", jsonpath)

        import base64

        token = base64.b64decode(wait_for(read, f"a token of {account}")).decode()
        path.touch(mode=0o600)
        path.write_text(self._authority.kubeconfig(self._server, {"token": token}, "default"))
        return path

    def add_fake_gpus(self, number: int) -> None:
        """Let the node say that it has GPUs: pods that ask for one are scheduled."""
        path = "/status/capacity/nvidia.com~1gpu"
        patch = [{"op": "add", "path": path, "value": str(number)}]
        url = f"{self._server}/api/v1/nodes/{NODE}/status"
        request = urllib.request.Request(url, json.dumps(patch).encode(), method="PATCH")
        request.add_header("Content-Type", "application/json-patch+json")
        urllib.request.urlopen(request, context=self._admin_context()).close()

    # Starting

    def _start(self) -> None:
        self._save_sysctls()
        self._add_links()
        # Undone in the reverse order: processes end before what they use goes.
        self._undo.callback(_sweep_runtime)
        self._undo.callback(self._stop_processes)
        self._make_certificates()
        self._start_etcd()
        self._start_api_server()
        self._start_controllers()
        self._start_containerd()
        self._start_kubelet()
        self._undo.callback(self._delete_pods)
        self._wait(self._is_node_ready, "the node")

    def _start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        self._etcd = client
        self._launch(
            "etcd", "etcd", f"--data-dir={self.state}/etcd", "--name=test",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=test={peer}",
        )  # fmt: skip

    def _make_certificates(self) -> None:
        folder = self.state / "pki"
        folder.mkdir()
        self._authority = Authority(folder)
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
        self._serving = self._authority.issue(
            "kube-apiserver", addresses=(_SERVICE_ADDRESS, _HOST_ADDRESS, "127.0.0.1", *names)
        )
        self._node = self._authority.issue("kubelet", addresses=(_HOST_ADDRESS, NODE))
        self._admin = self._authority.issue("admin", "system:masters")
        self._account_key = write_key(folder / "accounts.key")
        self._server = f"https://{_SERVICE_ADDRESS}:443"
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(self._authority.kubeconfig(self._server, inline(self._admin)))

    def _start_api_server(self) -> None:
        self._launch(
            "kube-apiserver", f"{self.cache}/bin/kube-apiserver",
            f"--etcd-servers={self._etcd}",
            f"--bind-address={_SERVICE_ADDRESS}", "--secure-port=443",
            f"--advertise-address={_HOST_ADDRESS}",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--authorization-mode=RBAC", "--anonymous-auth=false",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=false", f"--cert-dir={self.state}/pki",
            f"--client-ca-file={self._authority.path}",
            f"--tls-cert-file={self._serving.certificate}",
            f"--tls-private-key-file={self._serving.key}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-certificate-authority={self._authority.path}",
            f"--kubelet-client-certificate={self._admin.certificate}",
            f"--kubelet-client-key={self._admin.key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._account_key}",
            f"--service-account-signing-key-file={self._account_key}",
        )  # fmt: skip
        self._wait(self._is_api_ready, "the API server")

    def _start_controllers(self) -> None:
        shared = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--port=0",
                  "--secure-port=0"]  # fmt: skip
        self._launch(
            "kube-controller-manager", f"{self.cache}/bin/kube-controller-manager", *shared,
            f"--service-account-private-key-file={self._account_key}",
            f"--root-ca-file={self._authority.path}",
        )  # fmt: skip
        self._launch("kube-scheduler", f"{self.cache}/bin/kube-scheduler", *shared)

    def _start_containerd(self) -> None:
        self._containerd_root().mkdir(exist_ok=True)
        (self.state / "cni").mkdir()
        network = {
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": _BRIDGE,
                    "isGateway": True,
                    "ipMasq": False,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": f"{self.state}/ipam",
                        "ranges": [[{"subnet": _POD_NETWORK}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "loopback"},
            ],
        }
        (self.state / "cni" / "10-pods.conflist").write_text(json.dumps(network))
        config = self.state / "containerd.toml"
        config.write_text(
            f"""version = 2
root = "{self._containerd_root()}"
state = "{self.state}/containerd"
[grpc]
  address = "{self._socket()}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{self.state}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
        )
        self._launch("containerd", "containerd", "--config", str(config))
        self._wait(lambda: self._socket().exists() and bool(self._ctr("version")), "containerd")

    def _start_kubelet(self) -> None:
        config = {
            "kind": "KubeletConfiguration",
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "address": _HOST_ADDRESS,
            "healthzPort": 0,
            "readOnlyPort": 0,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(self._authority.path)},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "tlsCertFile": str(self._node.certificate),
            "tlsPrivateKeyFile": str(self._node.key),
            "cgroupDriver": "cgroupfs",
            "failSwapOn": False,
            "maxOpenFiles": 20000,
            "oomScoreAdj": 0,
            "makeIPTablesUtilChains": False,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "volumePluginDir": f"{self.state}/volume-plugins",
        }
        path = self.state / "kubelet.json"
        path.write_text(json.dumps(config))
        self._launch(
            "kubelet", f"{self.cache}/bin/kubelet", f"--config={path}",
            f"--kubeconfig={self.kubeconfig}", f"--hostname-override={NODE}",
            f"--node-ip={_HOST_ADDRESS}", f"--root-dir={self.state}/kubelet",
            f"--cert-dir={self.state}/pki", "--container-runtime=remote",
            f"--container-runtime-endpoint=unix://{self._socket()}",
            f"--image-service-endpoint=unix://{self._socket()}",
        )  # fmt: skip

    def _save_sysctls(self) -> None:
        for name in _SYSCTLS:
            path = Path("/proc/sys") / name.replace(".", "/")
            if path.exists():
                self._undo.callback(path.write_text, path.read_text())

    def _add_links(self) -> None:
        _remove_links()
        self._undo.callback(_remove_links)
        _run("ip", "link", "add", _LINK, "type", "veth", "peer", "name", _PEER)
        for address in (_HOST_ADDRESS, _SERVICE_ADDRESS):
            _run("ip", "address", "add", f"{address}/32", "dev", _LINK)
        _run("ip", "link", "set", _LINK, "up")
        _run("ip", "link", "set", _PEER, "up")

    # Looking

    def _is_api_ready(self) -> bool:
        with suppress(OSError):
            with urllib.request.urlopen(
                f"{self._server}/readyz", context=self._admin_context(), timeout=5
            ) as answer:
                return bool(answer.status == 200)
        return False

    def _is_node_ready(self) -> bool:
        with suppress(ClusterError):
            for node in self.objects("nodes"):
                conditions = node["status"].get("conditions", [])
                return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return False

    def _admin_context(self) -> Any:
        import ssl

        context = ssl.create_default_context(cafile=str(self._authority.path))
        context.load_cert_chain(self._admin.certificate, self._admin.key)
        return context

    def _wait(self, condition: Callable[[], Any], what: str) -> None:
        def look() -> Any:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise ClusterError(f"{name} ended: {self._last_words(name)}")
            return condition()

        wait_for(look, what, _READY_SECONDS)

    def _last_words(self, name: str) -> str:
        return self.log_path(name).read_text(errors="replace")[-3000:]

    def log_path(self, name: str) -> Path:
        """Where a part's output goes."""
        return self.state / f"{name}.log"

    # Ending

    def _delete_pods(self) -> None:
        """Let the kubelet take the pods down while it can."""
        with suppress(ClusterError):
            for kind in ("cronjobs", "jobs"):
                self.kubectl("delete", kind, "--all", "--all-namespaces", "--wait=false")
            self.kubectl(
                "delete", "pods", "--all", "--all-namespaces", "--grace-period=1", "--wait=false"
            )
            with suppress(TimeoutError):
                wait_for(lambda: not self.objects("pods", "--all-namespaces"), "pods to go", 60)

    def _stop_processes(self) -> None:
        for name in reversed(list(self._processes)):
            process = self._processes[name]
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    # Small things

    def _launch(self, name: str, *command: str) -> None:
        with self.log_path(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def _containerd_root(self) -> Path:
        return self.cache / "containerd"

    def _socket(self) -> Path:
        return self.state / "containerd.sock"

    def _ctr(self, *arguments: str) -> str:
        return _run("ctr", "--address", str(self._socket()), "--namespace", "k8s.io", *arguments)


def wait_for(look: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """Look until something true comes back. Raises ``TimeoutError`` saying what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.5)
    return found


def free_port() -> int:
    """A port that nobody listens on, on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")
    return done.stdout


def _remove_links() -> None:
    for link in (_LINK, _BRIDGE):
        subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)


def _sweep_runtime() -> None:
    """End containers that outlived their containerd, unmount, and remove what they left."""
    shims = list(_shims())
    for pid in [pid for shim in shims for pid in (*_children(shim), shim)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for path in sorted((m for m in mounts if m.startswith(f"{_RUN}/")), reverse=True):
        subprocess.run(["umount", "--lazy", path], capture_output=True, check=False)
    _remove_cgroups()
    shutil.rmtree(_RUN, ignore_errors=True)


def _shims() -> Sequence[int]:
    """Processes that hold our containers, by the socket in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            ours = f"{_RUN}/containerd.sock".encode() in words
            if ours and b"containerd-shim" in words[0]:
                found.append(int(folder.name))
    return found


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        direct = [int(word) for word in text.split()]
        return [below for child in direct for below in (*_children(child), child)]
    return []


def _remove_cgroups() -> None:
    for top in Path("/sys/fs/cgroup").glob("*/kubepods"):
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()
