"""``python -m hcodec_airflow.cluster_check``: is what the chart installed enough to start work?

What ``helm test`` runs, under the launcher's account: it reads the two configuration files as
Airflow would, and asks the API server for every verb that the operator uses.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hcodec_core.errors import EXIT_FAILURE, EXIT_OK, HCodecError

logger = logging.getLogger(__name__)


async def find_missing(namespace: str) -> list[str]:
    """``resource: verbs`` that the account of this pod lacks in ``namespace``."""
    from hcodec_airflow.kubernetes.client import ClusterApi
    from hcodec_airflow.kubernetes.connection import RIGHTS, missing_rights, opener

    async with ClusterApi(opener({}), namespace) as api:
        missing = await missing_rights(api, RIGHTS)
    return [f"{right.resource}: {', '.join(right.verbs)}" for right in missing]


def _check(config_folder: Path) -> int:
    from hcodec_airflow.kubernetes.profiles import load_cluster_config
    from hcodec_core.config import load_config

    config = load_config(config_folder / "hcodec.toml")
    logger.info("hcodec.toml: work lies in %s", config.work.work_uri)
    cluster = load_cluster_config(config_folder / "kubernetes.toml")
    logger.info("kubernetes.toml: profiles %s", ", ".join(sorted(cluster.profiles)))
    missing = asyncio.run(find_missing(cluster.namespace))
    if missing:
        logger.error("In namespace %s this account may not: %s", cluster.namespace, missing)
        return EXIT_FAILURE
    logger.info("All verbs that are needed in namespace %s are granted.", cluster.namespace)
    return EXIT_OK


def main(arguments: Sequence[str] | None = None) -> int:
    """Check once; exit code 0 when all is well."""
    parser = argparse.ArgumentParser(prog="hcodec_airflow.cluster_check", description=__doc__)
    parser.add_argument("--config-folder", type=Path, default=Path("/etc/hcodec"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        return _check(options.config_folder)
    except HCodecError as error:
        logger.error("%s", error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
