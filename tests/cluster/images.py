"""Builds the product's images on a debootstrapped Debian and runs them, without a Docker engine.

No registry is needed: the base comes from the cache that ``build.sh`` made, the stand-in for
Airflow's own image is built on it, and the Dockerfiles are those of the product.
``python -m tests.cluster.images`` builds both (minutes) and prints their sizes.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hcodec_core.codecs import SHIPPED, load_manifest

ROOT = Path(__file__).parents[2]
WORKER = "localhost/hcodec-worker:test"
AIRFLOW = "localhost/hcodec-airflow:test"
PAUSE = "localhost/hcodec-pause:1"
_BASE = "localhost/hcodec-debian:test"
_AIRFLOW_BASE = "localhost/hcodec-airflow-base:test"


def cache_path() -> Path:
    """Where ``build.sh`` keeps the cluster and the base image."""
    default = Path.home() / ".cache" / "hcodec" / "cluster-1.20"
    return Path(os.environ.get("HCODEC_CLUSTER_CACHE", default))


class ImageStore:
    """Images below the cache, apart from those of the machine. Needs root, buildah and podman."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        storage = ["--root", f"{cache}/images", "--runroot", "/run/hcodec-images"]
        self._buildah = ["buildah", *storage, "--storage-driver=overlay"]
        self._podman = [
            "podman", *storage, "--storage-driver=overlay",
            "--cgroup-manager=cgroupfs", "--runtime=runc",
        ]  # fmt: skip

    def build_worker(self) -> None:
        """The worker image, with the shipped codec baked in under its digest."""
        self._ensure_base()
        weights = self.cache / "weights"
        shutil.rmtree(weights, ignore_errors=True)
        digest = load_manifest("hcodec-nano").digest
        shutil.copytree(SHIPPED["hcodec-nano"], weights / digest)
        self._build_product("worker", _BASE, WEIGHTS=str(weights))

    def build_airflow(self) -> None:
        """The Airflow image on the stand-in for Airflow's own."""
        self._ensure_base()
        self._run(
            [*self._buildah, "build", *self._options(), "--build-arg", f"BASE_IMAGE={_BASE}",
             "--file", "tests/docker/airflow-base.Dockerfile", "--tag", _AIRFLOW_BASE, "."]
        )  # fmt: skip
        self._build_product("airflow", _AIRFLOW_BASE)

    def build_pause(self) -> None:
        """The image that holds a pod's namespaces."""
        found = self._run([*self._podman, "images", "--quiet", PAUSE])
        if found.strip():
            return
        container = self._run([*self._buildah, "from", "scratch"]).split()[-1]
        self._run([*self._buildah, "copy", container, f"{self.cache}/bin/pause", "/pause"])
        self._run([*self._buildah, "config", "--entrypoint", '["/pause"]', container])
        self._run([*self._buildah, "commit", "--rm", container, PAUSE])

    def image_id(self, image: str) -> str:
        """Digest of an image's configuration."""
        return self._run([*self._podman, "image", "inspect", "--format", "{{.Id}}", image]).strip()

    def export(self, image: str, archive: Path) -> None:
        """Write an image as a file that containerd imports."""
        archive.unlink(missing_ok=True)
        self._run([*self._buildah, "push", image, f"docker-archive:{archive}:{image}"])

    def size_bytes(self, image: str) -> int:
        """Size of all layers."""
        text = self._run([*self._podman, "image", "inspect", "--format", "{{.Size}}", image])
        return int(text)

    def run(
        self, image: str, arguments: Sequence[str], options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end as a pod of ours would: read-only root, no rights, no network.

        ``/tmp`` is the only place to write to.
        """
        return subprocess.run(
            [*self.command(options), image, *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def command(self, options: Sequence[str] = ()) -> list[str]:
        """``podman run`` with those limits, up to the image's name."""
        limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        rights = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all",
                  "--security-opt=no-new-privileges", "--tmpfs=/tmp:rw,mode=1777"]  # fmt: skip
        return [*self._podman, "run", "--rm", "--network=none", *limits, *rights, *options]

    def _ensure_base(self) -> None:
        found = self._run([*self._podman, "images", "--quiet", _BASE])
        if not found.strip():
            self._run([*self._podman, "import", f"{self.cache}/base.tar", _BASE])

    def _build_product(self, name: str, base: str, **settings: str) -> None:
        environment = {
            **os.environ,
            **settings,
            "ENGINE": " ".join(self._buildah),
            "TAG": "test",
            "BASE_IMAGE": base,
            "BUILD_OPTIONS": " ".join(self._options()),
        }
        self._run([f"{ROOT}/docker/build.sh", name], environment)

    def _options(self) -> list[str]:
        return ["--isolation=chroot", "--layers", *self._pip_options()]

    def _pip_options(self) -> list[str]:
        """Hand this machine's pip configuration to the build: a secret, and what it names."""
        config = configparser.ConfigParser(interpolation=None)
        config["global"] = host_pip_settings()
        path = self.cache / "pip.conf"
        path.touch(mode=0o600)
        with path.open("w") as file:
            config.write(file)
        words = " ".join(config["global"].values()).replace("file://", "").split()
        folders = sorted({word for word in words if word.startswith("/") and Path(word).exists()})
        # An index on disk may refer to files beside it.
        roots = {str(Path(f).parent) if f.endswith("/simple") else f for f in folders}
        mounts = [option for root in sorted(roots) for option in ("--volume", f"{root}:{root}:ro")]
        return ["--secret", f"id=pip_config,src={path}", *mounts]

    @staticmethod
    def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}")
        return done.stdout


def host_pip_settings() -> dict[str, str]:
    """pip's settings on this machine, whatever file or variable they come from."""
    text = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        # Variables come last in pip's order of precedence, and in its list first.
        if name.startswith(("global.", ":env:.", "install.")):
            settings.setdefault(name.rpartition(".")[2], value.strip("'"))
    settings.pop("disable-pip-version-check", None)
    return settings


def main() -> None:
    """Build both images and say how large they are."""
    store = ImageStore(cache_path())
    wanted = sys.argv[1:] or ["worker", "airflow"]
    if "worker" in wanted:
        store.build_worker()
        print(f"worker: {store.size_bytes(WORKER) / 1e9:.2f} GB")
    if "airflow" in wanted:
        store.build_airflow()
        print(f"airflow: {store.size_bytes(AIRFLOW) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
