"""``GpuProfile``: how a worker pod looks, by name, in a TOML file of the installation.

```toml
format_version = 1
connection = "hcodec_kubernetes"
namespace = "hcodec"
default_profile = "gpu"

[profiles.gpu]
image = "registry.example/hcodec-worker@sha256:..."
compute_class = "cuda-..."
gpus = 1
```
All entries are listed in ``docs/kubernetes.md``.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from hcodec_core.config import describe
from hcodec_core.errors import ConfigError

Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|k|[KMGTPE]i?)?$")]
DnsName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Object = dict[str, Any]
"""A piece of a Kubernetes manifest."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuProfile(_Document):
    """How one worker pod looks.

    ``compute_class``: what ``hcodec env`` prints in that image on that device; plans for workers of
    this profile are made for it. ``gpu_resource``: of a device plugin, a MIG slice as well.
    ``kueue_queue``: the Job starts suspended and Kueue admits it. Lists of objects and
    ``pod_template`` have the form of a pod's own fields.
    """

    image: str = Field(min_length=1)
    compute_class: str = ""
    device: str = ""
    threads: int = Field(default=1, ge=1)
    decoders: int = Field(default=1, ge=1)
    cpu: Quantity = "1"
    memory: Quantity = "4Gi"
    scratch_size: Quantity = "16Gi"
    scratch_path: str = "/scratch"
    gpus: int = Field(default=0, ge=0)
    gpu_resource: str = "nvidia.com/gpu"
    service_account: DnsName = "hcodec-worker"
    config_map: DnsName = "hcodec-config"
    config_path: str = "/etc/hcodec/hcodec.toml"
    node_selector: dict[str, str] = {}
    tolerations: list[Object] = []
    affinity: Object = {}
    runtime_class: str = ""
    priority_class: str = ""
    image_pull_policy: str = Field(default="IfNotPresent", pattern="^(Always|IfNotPresent|Never)$")
    image_pull_secrets: list[DnsName] = []
    volumes: list[Object] = []
    volume_mounts: list[Object] = []
    env: dict[str, str] = {}
    env_from_secrets: list[DnsName] = []
    kueue_queue: str = ""
    kueue_priority_class: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    ttl_seconds_after_finished: int = Field(default=86_400, ge=60)
    active_deadline_seconds: int = Field(default=604_800, ge=60)
    termination_grace_seconds: int = Field(default=60, ge=0)
    command: list[str] = Field(default=["hcodec"], min_length=1)
    pod_template: Object = {}

    @property
    def torch_device(self) -> str:
        """Device of the workers: as given, or what follows from the GPUs."""
        return self.device or ("cuda" if self.gpus else "cpu")


class ClusterConfig(_Document):
    """The whole file. ``connection``: id of an Airflow connection; empty: default credentials."""

    format_version: int = Field(default=1, ge=1, le=1)
    connection: str = "hcodec_kubernetes"
    namespace: DnsName = "hcodec"
    default_profile: str = ""
    profiles: dict[str, GpuProfile] = Field(min_length=1)

    def profile(self, name: str) -> GpuProfile:
        """The profile called ``name`` (empty: the default). Raises ``ConfigError``."""
        wanted = name or self.default_profile or _only(self.profiles)
        if wanted not in self.profiles:
            known = ", ".join(sorted(self.profiles))
            raise ConfigError(
                f"There is no GPU profile {wanted!r}: use one of {known}, or add "
                f"[profiles.{wanted or 'name'}] to the file that kubernetes_file names."
            )
        return self.profiles[wanted]


def _only(profiles: dict[str, GpuProfile]) -> str:
    return next(iter(profiles)) if len(profiles) == 1 else ""


def load_cluster_config(path: Path) -> ClusterConfig:
    """Read and check the file. Raises ``ConfigError`` naming it and each wrong entry."""
    from hcodec_airflow.kubernetes.pod_template import refuse_loosened

    try:
        config = ClusterConfig.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist: write it, or correct option kubernetes_file of [hcodec]."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}.") from error
    for name, profile in config.profiles.items():
        refuse_loosened(profile.pod_template, f"{path}, profiles.{name}.pod_template")
    return config
