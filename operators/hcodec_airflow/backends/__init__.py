"""The ways of running workers; one literal table from name to module."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from hcodec_core.errors import ConfigError

if TYPE_CHECKING:
    from hcodec_airflow.backends.base import Backend
    from hcodec_airflow.settings import Settings

BACKENDS = {
    "local": "hcodec_airflow.backends.local",
    "kubernetes": "hcodec_airflow.backends.kubernetes",
    "trainjob": "hcodec_airflow.backends.trainjob",
}


def check_backend_name(name: str) -> None:
    """Raise ``ConfigError`` when there is no backend called ``name``."""
    if name not in BACKENDS:
        raise ConfigError(
            f"There is no backend {name!r} in this version: use one of {', '.join(BACKENDS)}."
        )


def open_backend(name: str, settings: Settings, *, is_offline: bool = False) -> Backend:
    """The backend called ``name``; ``is_offline``: only for what asks nobody (``manifest``).

    Raises ``ConfigError`` when there is none.
    """
    check_backend_name(name)
    module = importlib.import_module(BACKENDS[name])
    return cast("Backend", module.open_backend(settings, is_offline=is_offline))
