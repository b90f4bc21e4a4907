"""The connection type ``hcodec_kubernetes``: where the API server is, and what the account may do.

Log-in is the Kubernetes provider's: kubeconfig, in-cluster account, exec plugins of the clouds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow.sdk import BaseHook

from hcodec_airflow.kubernetes.client import ClusterApi, OpenClient
from hcodec_core.errors import ConfigError, HCodecError

CONNECTION_TYPE = "hcodec_kubernetes"
_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@dataclass(frozen=True)
class Right:
    """Verbs on one resource; ``resource`` with its subresource, as in a Role."""

    group: str
    resource: str
    verbs: tuple[str, ...]


_ALL_VERBS = ("get", "list", "watch", "create", "patch", "delete")
RIGHTS = (
    Right("batch", "jobs", _ALL_VERBS),
    Right("", "pods", ("get", "list", "watch")),
    Right("", "pods/log", ("get",)),
    Right("", "events", ("list",)),
)
KUEUE_RIGHTS = (Right("kueue.x-k8s.io", "workloads", ("list",)),)
TRAINING_RIGHTS = {
    "trainer.kubeflow.org": Right("trainer.kubeflow.org", "trainjobs", _ALL_VERBS),
    "jobset.x-k8s.io": Right("jobset.x-k8s.io", "jobsets", _ALL_VERBS),
}


class HCodecKubernetesHook(BaseHook):
    """Airflow's view of the connection: its form, and the button *Test*."""

    conn_name_attr = "conn_id"
    default_conn_name = "hcodec_kubernetes"
    conn_type = CONNECTION_TYPE
    hook_name = "H-Codec on Kubernetes"

    def __init__(self, conn_id: str = default_conn_name) -> None:
        """Keep the connection's id."""
        super().__init__()
        self.conn_id = conn_id

    def test_connection(self) -> tuple[bool, str]:
        """Ask the API server for every verb that the operators use; name all that are missing."""
        try:
            extras = read_extras(self.conn_id)
            namespace = str(extras.get("namespace") or "") or _configured_namespace()
            return asyncio.run(_review(opener(extras), namespace))
        except HCodecError as error:
            return False, str(error)


def _configured_namespace() -> str:
    from hcodec_airflow.settings import read_settings

    return read_settings().load_cluster_config().namespace


async def _review(open_client: OpenClient, namespace: str) -> tuple[bool, str]:
    from hcodec_airflow.kubernetes.discovery import served_groups

    async with ClusterApi(open_client, namespace) as api:
        served = await served_groups(api)
        wanted = [*RIGHTS, *(right for group, right in TRAINING_RIGHTS.items() if group in served)]
        if "kueue.x-k8s.io" in served:
            wanted += KUEUE_RIGHTS
        missing = await missing_rights(api, wanted)
    if not missing:
        number = sum(len(right.verbs) for right in wanted)
        return True, f"All {number} verbs that are needed in namespace {namespace} are granted."
    lines = "; ".join(f"{right.resource}: {', '.join(right.verbs)}" for right in missing)
    return False, (
        f"In namespace {namespace} the account may not: {lines}. Bind it to the launcher Role of "
        "the chart, or to one with these verbs."
    )


async def missing_rights(api: ClusterApi, wanted: Iterable[Right]) -> list[Right]:
    """Those of ``wanted`` that are not granted, with only the verbs that are missing."""
    missing = []
    for right in wanted:
        denied = [verb for verb in right.verbs if not await _is_granted(api, right, verb)]
        if denied:
            missing.append(Right(right.group, right.resource, tuple(denied)))
    return missing


async def _is_granted(api: ClusterApi, right: Right, verb: str) -> bool:
    resource, _, subresource = right.resource.partition("/")
    attributes = {
        "namespace": api.namespace,
        "verb": verb,
        "group": right.group,
        "resource": resource,
        **({"subresource": subresource} if subresource else {}),
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = await api.create(_REVIEWS, review)
    return bool(answer.get("status", {}).get("allowed"))


def read_extras(conn_id: str) -> dict[str, Any]:
    """Fields of a connection; none for an empty id. Blocks; any thread of a task or triggerer.

    Raises ``ConfigError`` when there is no such connection.
    """
    # The provider's hook takes seconds to import: here, off the event loop, and not when asked.
    import airflow.providers.cncf.kubernetes.hooks.kubernetes  # noqa: F401
    from airflow.sdk.exceptions import AirflowNotFoundException

    if not conn_id:
        return {}
    try:
        connection = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as error:
        raise ConfigError(
            f"There is no Airflow connection {conn_id!r}: add one of type {CONNECTION_TYPE}, or "
            'set connection = "" in the file of kubernetes_file for the default credentials.'
        ) from error
    return dict(connection.extra_dejson)


def opener(extras: Mapping[str, Any]) -> OpenClient:
    """What opens a client by a connection's fields, or by the account of this pod."""

    def open_client() -> AbstractAsyncContextManager[Any]:
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook

        hook = AsyncKubernetesHook(
            conn_id=None,
            kubernetes_conn_id=None,
            connection_extras=_with_account(extras),
            client_configuration=_configuration(extras),
        )
        return hook.get_conn()

    return open_client


def _configuration(extras: Mapping[str, Any]) -> Any:
    """The client library's settings; the provider's asynchronous hook drops this field."""
    from kubernetes_asyncio.client import Configuration

    configuration = Configuration()
    if str(extras.get("disable_verify_ssl")).lower() == "true":
        configuration.verify_ssl = False
    return configuration


def _with_account(extras: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with the pod's own account where nothing says who to log in as."""
    known = {name: value for name, value in extras.items() if value not in (None, "")}
    if not {"in_cluster", "kube_config", "kube_config_path"} & set(known):
        known["in_cluster"] = _ACCOUNT_TOKEN.exists()
    return known
