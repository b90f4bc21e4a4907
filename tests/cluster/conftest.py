"""A Kubernetes for the tests of this folder: from the cache, or the one that a kubeconfig names.

Variables: HCODEC_CLUSTER_CACHE (see build.sh); HCODEC_CLUSTER_KEEP_IMAGES=1 takes the images of the
last run as they are, though the code may have changed. For another cluster:
HCODEC_CLUSTER_KUBECONFIG, with HCODEC_CLUSTER_HOST (address of this machine as pods see it),
HCODEC_CLUSTER_WORKER_IMAGE and HCODEC_CLUSTER_AIRFLOW_IMAGE (as its nodes can pull them).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.airflow_states import AirflowStates
from tests.cluster.cluster import Cluster
from tests.cluster.foreign import ForeignCluster
from tests.cluster.house import CREDENTIALS, House, Kubernetes, OutsideAirflow
from tests.cluster.images import AIRFLOW, PAUSE, WORKER, ImageStore, cache_path

COPIES = 20


@pytest.fixture(scope="session")
def images() -> ImageStore:
    cache = cache_path()
    if not (cache / "bin" / "kubelet").exists():
        pytest.skip(
            f"NOT RUN: no Kubernetes in {cache}. Run tests/cluster/build.sh --install once as "
            "root on Debian 12 (6 to 18 minutes), or name a cluster with HCODEC_CLUSTER_KUBECONFIG."
        )
    if os.getuid() != 0:
        pytest.skip("NOT RUN: starting a node and building images here needs root.")
    store = ImageStore(cache)
    if not os.environ.get("HCODEC_CLUSTER_KEEP_IMAGES"):
        store.build_worker()
        store.build_airflow()
    store.build_pause()
    return store


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Kubernetes]:
    kubeconfig = os.environ.get("HCODEC_CLUSTER_KUBECONFIG")
    if kubeconfig:
        yield ForeignCluster(Path(kubeconfig), os.environ["HCODEC_CLUSTER_HOST"])
        return
    store: ImageStore = request.getfixturevalue("images")
    digests = {name: store.image_id(name) for name in (PAUSE, WORKER, AIRFLOW)}
    unstarted = Cluster(cache_path())
    if not all(unstarted.has_image(name, digest) for name, digest in digests.items()):
        # containerd would keep what was replaced, gigabytes each time.
        unstarted.forget_images()
    with unstarted as own:
        for name, digest in digests.items():
            _import(name, digest, store, own)
        own.add_fake_gpus(4)
        yield own


def _import(name: str, digest: str, store: ImageStore, cluster: Cluster) -> None:
    if cluster.has_image(name, digest):
        return
    archive = cluster.cache / "image.tar"
    try:
        store.export(name, archive)
        cluster.import_image(archive)
    finally:
        archive.unlink(missing_ok=True)
    cluster.remember_image(name, digest)


@pytest.fixture(scope="session")
def s3_on_host(cluster: Kubernetes) -> Iterator[str]:
    """URL of an S3 server that pods reach."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_PROFILE", raising=False)
        server = ThreadedMotoServer(ip_address=cluster.host_address, port=0, verbose=False)
        server.start()
        yield f"http://{cluster.host_address}:{server.get_host_and_port()[1]}"
        server.stop()


@pytest.fixture(scope="session")
def airflow_states(cluster: Kubernetes) -> Iterator[AirflowStates]:
    """What stands for Airflow's REST API before the janitor, which runs in the cluster."""
    with AirflowStates(cluster.host_address) as states:
        yield states


@pytest.fixture(scope="session")
def house(
    cluster: Kubernetes,
    s3_on_host: str,
    airflow_states: AirflowStates,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    """The chart installed, the corpus in the bucket, an Airflow's database made."""
    folder = tmp_path_factory.mktemp("cluster")
    here = subprocess.run(
        [sys.executable, "-m", "hcodec_core.cli", "env", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    made = House(
        cluster=cluster,
        folder=folder,
        endpoint=s3_on_host,
        compute_class=json.loads(here.stdout)["compute_class"],
        airflow_url=airflow_states.url,
        has_gpus=isinstance(cluster, Cluster),
        worker_image=os.environ.get("HCODEC_CLUSTER_WORKER_IMAGE", WORKER),
        airflow_image=os.environ.get("HCODEC_CLUSTER_AIRFLOW_IMAGE", AIRFLOW),
    )
    made.fill(COPIES)
    made.install()
    try:
        made.python("-m", "airflow", "db", "migrate")
        yield made
    finally:
        made.uninstall()


@pytest.fixture(scope="session")
def airflow(house: House) -> Iterator[OutsideAirflow]:
    """A whole Airflow on this host that reaches the cluster by its connection."""
    with house.running_airflow() as made:
        yield made
