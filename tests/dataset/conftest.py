from __future__ import annotations

from pathlib import Path

import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.storage import Storage, file_uri, open_storage
from tests.dataset.factories import World
from tests.dataset.postgres import postgres_uri

__all__ = ["postgres_uri"]


@pytest.fixture
def local_world(tmp_path: Path) -> World:
    """A world in a local folder."""
    root = tmp_path / "root"
    (root / "audio").mkdir(parents=True)
    return World(file_uri(root), tmp_path, open_storage(StorageConfig()))


@pytest.fixture
def s3_world(tmp_path: Path, bucket_uri: str, s3_endpoint: str, s3_storage: Storage) -> World:
    """A world in a bucket; only the catalog's database is local."""
    config = StorageConfig(endpoint_url=s3_endpoint)
    return World(bucket_uri, tmp_path, s3_storage, config)


@pytest.fixture(params=["file", "s3"])
def world(request: pytest.FixtureRequest) -> World:
    """The same world in a local folder and in a bucket."""
    name = "s3_world" if request.param == "s3" else "local_world"
    made: World = request.getfixturevalue(name)
    return made
