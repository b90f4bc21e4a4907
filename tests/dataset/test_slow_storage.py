"""Storage that takes its time is waited for by the table as by everything else."""

from __future__ import annotations

import time
from pathlib import Path

from hcodec_core.config import StorageConfig
from hcodec_core.dataset.table import load_file_io
from hcodec_core.storage import Storage, join_uri
from tests.conftest import FaultProxy
from tests.dataset.factories import World

# Arrow gives a request 3 seconds unless it is told otherwise.
SLOW_SECONDS = 4.5


def test_the_table_waits_for_slow_storage(
    tmp_path: Path, bucket_uri: str, s3_storage: Storage, fault_proxy: FaultProxy
) -> None:
    uri = join_uri(bucket_uri, "slow")
    s3_storage.write(uri, b"worth the wait")

    def slowly(method: str, path: str, headers: dict[str, str]) -> None:
        time.sleep(SLOW_SECONDS if method == "GET" else 0)

    fault_proxy.rule = slowly
    config = World(bucket_uri, tmp_path, s3_storage, StorageConfig(endpoint_url=fault_proxy.url))
    with load_file_io(config.config).new_input(uri).open() as file:
        assert file.read() == b"worth the wait"
    assert sum(request.startswith("GET") for request in fault_proxy.requests) == 1
