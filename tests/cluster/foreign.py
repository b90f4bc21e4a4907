"""A cluster that somebody else runs, for the same tests: only a kubeconfig is known of it."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.cluster import ClusterError
from tests.helm.tools import find_tool


class ForeignCluster:
    """``kubeconfig`` must be an administrator's; ``host_address``: this machine, as pods see it."""

    def __init__(self, kubeconfig: Path, host_address: str) -> None:
        self.kubeconfig = kubeconfig
        self.host_address = host_address

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator; returns its output."""
        command = [str(find_tool("kubectl")), "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout + ("" if check else done.stderr)

    def objects(self, *arguments: str) -> list[dict[str, Any]]:
        """``kubectl get`` as objects."""
        text = self.kubectl("get", *arguments, "-o", "json")
        found: list[dict[str, Any]] = json.loads(text)["items"]
        return found

    def token_kubeconfig(self, account: str, namespace: str, path: Path) -> Path:
        """A kubeconfig for a service account, with a token of some hours."""
        token = self.kubectl("-n", namespace, "create", "token", account, "--duration=4h").strip()
        text = self.kubectl("config", "view", "--raw", "--minify", "--flatten")
        config = copy.deepcopy(yaml.safe_load(text))
        config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config))
        return path
