"""Keeping a bucket equal to a local folder: what the demo's user edits is what the source holds."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from hcodec_airflow.demo.services import DemoError
from hcodec_core.storage import Storage, join_uri


@dataclass
class SyncReport:
    """Names (relative to the folder) that were written to or removed from the bucket."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    num_files: int = 0


def sync_folder(folder: Path, prefix_uri: str, storage: Storage) -> SyncReport:
    """Make the objects below ``prefix_uri`` equal to the files below ``folder``.

    Files that are equal already (by MD5, the etag of a small object) are left alone. Raises
    ``DemoError`` when the folder is missing or holds no file.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise DemoError(f"{folder} holds no files: name another folder with CORPUS=DIR.")
    stored = {info.uri: info.etag for info in storage.list_objects(prefix_uri + "/")}
    report = SyncReport(num_files=len(files))
    for path in files:
        name = path.relative_to(folder).as_posix()
        uri = join_uri(prefix_uri, name)
        content = path.read_bytes()
        etag = stored.pop(uri, None)
        if etag != hashlib.md5(content, usedforsecurity=False).hexdigest():
            storage.write(uri, content)
            (report.added if etag is None else report.changed).append(name)
    storage.delete(stored)
    report.deleted = [uri.removeprefix(prefix_uri + "/") for uri in stored]
    return report


def slug_of(folder: Path) -> str:
    """A name for the datasets made from ``folder``: its last parts, lower case."""
    parts = folder.resolve().parts[-2:]
    slug = re.sub(r"[^a-z0-9]+", "_", "_".join(parts).lower()).strip("_")
    return slug if slug[:1].isalpha() else f"c_{slug}"
