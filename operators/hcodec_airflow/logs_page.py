"""The page that lists all logs of a plan: what the button *Worker logs* leads to."""

from __future__ import annotations

from html import escape
from urllib.parse import quote

from hcodec_airflow.progress import list_folder
from hcodec_core.storage import Storage, join_uri

PAGE = "index.html"


def logs_uri(plan_uri: str) -> str:
    """Folder of a plan's logs."""
    return join_uri(plan_uri, "logs")


def write_logs_page(storage: Storage, plan_uri: str) -> list[str]:
    """Write the page anew; returns the URIs of all logs, by name."""
    listed = (info.uri for info in list_folder(storage, logs_uri(plan_uri) + "/"))
    uris = sorted(uri for uri in listed if uri.endswith(".log"))
    names = [uri.rpartition("/")[2] for uri in uris]
    entries = "".join(f'<li><a href="{quote(n)}">{escape(n)}</a></li>' for n in names)
    page = f"<!doctype html><meta charset=utf-8><title>Worker logs</title><ul>{entries}</ul>"
    storage.write(join_uri(logs_uri(plan_uri), PAGE), page.encode())
    return uris
