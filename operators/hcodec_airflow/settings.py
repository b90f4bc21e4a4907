"""What an installation sets for all DAGs: section ``[hcodec]`` of the Airflow configuration.

Every option can be given as ``AIRFLOW__HCODEC__<OPTION>``. Read when a task or trigger runs, never
when a DAG file is parsed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hcodec_airflow.provider import OPTIONS, SECTION
from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from hcodec_airflow.kubernetes.profiles import ClusterConfig
    from hcodec_core.config import Config
    from hcodec_core.storage import Storage


@dataclass(frozen=True)
class Settings:
    """Section ``[hcodec]`` as values; see ``provider.OPTIONS``."""

    config_path: Path
    backend: str
    local_device: str
    local_threads: int
    local_decoders: int
    local_state_path: Path
    report_base_url: str
    kubernetes_file: str = ""

    def load_cluster_config(self) -> ClusterConfig:
        """Namespace, connection and GPU profiles. Raises ``ConfigError`` naming file and entry."""
        from hcodec_airflow.kubernetes.profiles import load_cluster_config

        if not self.kubernetes_file:
            raise ConfigError(
                "No GPU profiles are configured: set kubernetes_file in section [hcodec], or "
                "AIRFLOW__HCODEC__KUBERNETES_FILE, to the path of the TOML file (see "
                "docs/kubernetes.md)."
            )
        return load_cluster_config(Path(self.kubernetes_file))

    def load_config(self) -> Config:
        """The product's configuration. Raises ``ConfigError`` naming the file and the entry."""
        from hcodec_core.config import load_config

        return load_config(self.config_path)

    def open_storage(self) -> Storage:
        """Object storage as configured."""
        from hcodec_core.storage import open_storage

        # It would tell in every task's log, many times, where it found its credentials.
        logging.getLogger("botocore").setLevel(logging.WARNING)
        return open_storage(self.load_config().storage)

    def browser_url(self, uri: str) -> str:
        """Address of a stored object for a browser; the URI itself when none is configured."""
        if not self.report_base_url or not uri.startswith("s3://"):
            return uri
        return f"{self.report_base_url.rstrip('/')}/{uri.removeprefix('s3://')}"


def read_settings() -> Settings:
    """Read ``[hcodec]``. Raises ``ConfigError`` naming the option that is missing or wrong."""
    config_file = _text("config_file")
    if not config_file:
        raise ConfigError(
            "No hcodec configuration is named: set config_file in section [hcodec] of "
            "airflow.cfg, or AIRFLOW__HCODEC__CONFIG_FILE, to the path of the TOML file."
        )
    return Settings(
        config_path=Path(config_file),
        backend=_text("backend"),
        local_device=_text("local_device"),
        local_threads=_positive("local_threads"),
        local_decoders=_positive("local_decoders"),
        local_state_path=Path(_text("local_state_dir") or _default_state_path()),
        report_base_url=_text("report_base_url"),
        kubernetes_file=_text("kubernetes_file"),
    )


def _text(option: str) -> str:
    from airflow.sdk import conf

    # The fallback keeps this working before Airflow has loaded this provider's own section.
    return str(conf.get(SECTION, option, fallback=OPTIONS[option]["default"]) or "")


def _positive(option: str) -> int:
    text = _text(option)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"Option {option} in section [hcodec] is {text!r}: write a count.")
    return int(text)


def _default_state_path() -> Path:
    from airflow.sdk.configuration import get_sdk_expansion_variables

    return Path(get_sdk_expansion_variables()["AIRFLOW_HOME"]) / SECTION
