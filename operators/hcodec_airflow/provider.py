"""What Airflow is told of this provider through its entry point.

Airflow loads this module while it is itself being imported: it imports nothing.
"""

from __future__ import annotations

from typing import Any

SECTION = "hcodec"

OPTIONS: dict[str, dict[str, Any]] = {
    "config_file": {
        "description": "Path of the TOML file that names storage, allowed prefixes, catalog and "
        "costs; the same path on every host that runs tasks or triggers.",
        "type": "string",
        "default": "",
    },
    "backend": {
        "description": "Where workers run unless a DAG says otherwise: local, kubernetes, "
        "trainjob.",
        "type": "string",
        "default": "local",
    },
    "kubernetes_file": {
        "description": "Path of the TOML file with namespace, connection and GPU profiles of the "
        "backends kubernetes and trainjob (see docs/kubernetes.md).",
        "type": "string",
        "default": "",
    },
    "local_device": {
        "description": "Torch device of local workers: cpu, cuda, cuda:0.",
        "type": "string",
        "default": "cpu",
    },
    "local_threads": {
        "description": "CPU threads of one local worker's encoder. Part of the way codes are "
        "computed, so keep it fixed.",
        "type": "integer",
        "default": "1",
    },
    "local_decoders": {
        "description": "Audio decoding processes of one local worker.",
        "type": "integer",
        "default": "1",
    },
    "local_state_dir": {
        "description": "Folder for logs, exit codes and scratch files of local workers. Empty: "
        "the folder hcodec in AIRFLOW_HOME.",
        "type": "string",
        "default": "",
    },
    "report_base_url": {
        "description": "Address at which browsers reach the storage that holds reports, put in "
        "place of s3:// (http://127.0.0.1:9000 gives http://127.0.0.1:9000/bucket/key). Empty: "
        "links show the storage URI.",
        "type": "string",
        "default": "",
    },
}

EXTRA_LINKS = (
    "hcodec_airflow.links.ValidationReportLink",
    "hcodec_airflow.links.DatasetCardLink",
    "hcodec_airflow.links.DriftEvidenceLink",
    "hcodec_airflow.links.WorkerLogsLink",
    "hcodec_airflow.links.JobManifestLink",
    "hcodec_airflow.links.EvaluationReportLink",
)

_TEXT = {"type": ["string", "null"]}
_CONNECTION: dict[str, Any] = {
    "connection-type": "hcodec_kubernetes",
    "hook-class-name": "hcodec_airflow.kubernetes.connection.HCodecKubernetesHook",
    "hook-name": "H-Codec on Kubernetes",
    "ui-field-behaviour": {
        "hidden-fields": ["host", "schema", "login", "password", "port", "extra"],
    },
    "conn-fields": {
        "in_cluster": {
            "label": "Use the account of Airflow's own pods",
            "schema": {"type": ["boolean", "null"]},
        },
        "kube_config_path": {"label": "Path of a kubeconfig file", "schema": _TEXT},
        "kube_config": {
            "label": "Kubeconfig (JSON)",
            "schema": {"type": ["string", "null"], "format": "password"},
        },
        "cluster_context": {"label": "Context of the kubeconfig", "schema": _TEXT},
        "disable_verify_ssl": {
            "label": "Do not check the API server's certificate",
            "schema": {"type": ["boolean", "null"]},
        },
        "namespace": {
            "label": "Namespace of the workers",
            "description": "Empty: as the file of option kubernetes_file says.",
            "schema": _TEXT,
        },
    },
}


def get_provider_info() -> dict[str, Any]:
    """Name, configuration section and extra links, in the form of Airflow's provider schema."""
    return {
        "package-name": "hcodec-pipelines",
        "name": "H-Codec Pipelines",
        "description": "Audio corpora as tokens: versioned, checked, reproducible.",
        "extra-links": list(EXTRA_LINKS),
        "connection-types": [_CONNECTION],
        "config": {
            SECTION: {
                "description": "What an installation sets for all H-Codec DAGs.",
                "options": {
                    name: {"version_added": None, "example": None, **option}
                    for name, option in OPTIONS.items()
                },
            }
        },
    }
