"""A real PostgreSQL for tests of the catalog."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hcodec_core.config import CatalogConfig, Config
from tests.dataset.factories import World

PROGRAMS = ("initdb", "pg_ctl", "postgres", "pg_dump", "psql")


@dataclass
class PostgresWorld(World):
    """A world whose catalog is a real PostgreSQL."""

    catalog_uri: str = ""

    @property
    def config(self) -> Config:
        config = super().config
        catalog = CatalogConfig(uri=self.catalog_uri, warehouse_uri=config.catalog.warehouse_uri)
        return config.model_copy(update={"catalog": catalog})


def programs() -> dict[str, str]:
    """Paths of PostgreSQL's programs; Debian keeps them out of PATH."""
    folders = ":".join(str(path) for path in Path("/usr/lib/postgresql").glob("*/bin"))
    found = {name: shutil.which(name) or shutil.which(name, path=folders) for name in PROGRAMS}
    return {name: path for name, path in found.items() if path}


@pytest.fixture(scope="module")
def postgres_uri() -> Iterator[str]:
    """A PostgreSQL server of its own on the loopback interface."""
    found = programs()
    if len(found) < len(PROGRAMS):
        pytest.skip("PostgreSQL is not installed: the catalog was NOT tested on it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not below pytest's folder, which belongs to one user alone: PostgreSQL refuses to run as root.
    with tempfile.TemporaryDirectory(prefix="hcodec-postgres-") as folder:
        as_user = {"user": "nobody"} if os.getuid() == 0 else {}
        if as_user:
            shutil.chown(folder, "nobody")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        control = [found["pg_ctl"], "-D", f"{folder}/data", "-w"]
        # Without pipes: the server would inherit them and hold them open.
        quiet = {"stdout": subprocess.DEVNULL, "timeout": 120, "cwd": folder, **as_user}
        make = [found["initdb"], "-D", f"{folder}/data", "-U", "hcodec", "-A", "trust"]
        subprocess.run(make, check=True, **quiet)
        subprocess.run(
            [*control, "-l", f"{folder}/log", "-o", options, "start"], check=True, **quiet
        )
        try:
            yield f"postgresql+psycopg2://hcodec@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, **quiet)
