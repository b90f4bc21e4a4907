"""Embedded S3 endpoint for demo and tests: moto's server, kept on disk between runs.

moto holds objects in memory. A thin WSGI layer writes every change of an object to a folder
before the client gets its answer, and loads the folder at the start, etags included. It is for
small corpora on one machine; it checks no credentials, so it listens on 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

ACCOUNT = "123456789012"
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class PersistentS3:
    """WSGI application: S3 whose objects survive in ``folder``.

    Layout: ``<folder>/<bucket>/<digest of the key>`` holds the content and the same name with
    ``.meta`` its key, etag and content type.
    """

    def __init__(self, folder: Path) -> None:
        """Load what ``folder`` holds."""
        from moto.moto_server.werkzeug_app import (
            DomainDispatcherApplication,
            create_backend_app,
        )

        self._folder = folder
        self._lock = threading.Lock()
        self._app: WsgiApp = DomainDispatcherApplication(create_backend_app)
        self._load()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Serve one request; changes are on disk when the answer leaves."""
        # A browser sends no signature; on this loopback endpoint it may read reports all the same.
        environ.setdefault("HTTP_AUTHORIZATION", "AWS anonymous:none")
        body = self._app(environ, start_response)
        method = environ["REQUEST_METHOD"]
        if method in {"PUT", "POST", "DELETE"}:
            body = [b"".join(body)]
            query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
            # The path as sent: keys may hold double slashes and percent signs.
            path = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
            bucket, _, key = path.lstrip("/").partition("/")
            with self._lock:
                if "delete" in query or not key:
                    self._mirror_bucket(bucket)
                elif "partNumber" not in query and "uploads" not in query:
                    self._mirror(bucket, key)
        return body

    def _backend(self) -> Any:
        from moto.s3.models import s3_backends

        return s3_backends[ACCOUNT]["aws"]

    def _load(self) -> None:
        backend = self._backend()
        for folder in sorted(p for p in self._folder.glob("*") if p.is_dir()):
            backend.create_bucket(folder.name, "us-east-1")
            for meta_path in folder.glob("*.meta"):
                content = meta_path.with_suffix("")
                meta = json.loads(meta_path.read_text())
                key = backend.put_object(
                    folder.name, meta["key"], content.read_bytes(), etag=meta["etag"]
                )
                if meta["content_type"]:
                    key.set_metadata({"Content-Type": meta["content_type"]})

    def _mirror_bucket(self, bucket: str) -> None:
        if not bucket or bucket not in self._backend().buckets:
            return
        folder = self._folder / bucket
        folder.mkdir(parents=True, exist_ok=True)
        kept = {_file_name(name) for name in self._backend().buckets[bucket].keys.keys()}
        for meta_path in list(folder.glob("*.meta")):
            if meta_path.stem not in kept:
                self._remove(folder, meta_path.stem)

    def _mirror(self, bucket: str, key: str) -> None:
        stored = self._backend().buckets.get(bucket)
        if stored is None:
            return
        folder = self._folder / bucket
        folder.mkdir(parents=True, exist_ok=True)
        found = stored.keys.get(key)
        if found is None:
            self._remove(folder, _file_name(key))
            return
        content = folder / _file_name(key)
        content.write_bytes(found.value)
        content_type = dict(found.metadata).get("content-type", "")
        meta = {"key": key, "etag": found.etag.strip('"'), "content_type": content_type}
        content.with_name(content.name + ".meta").write_text(json.dumps(meta))

    @staticmethod
    def _remove(folder: Path, name: str) -> None:
        # The meta file goes first: content without it is not loaded.
        (folder / f"{name}.meta").unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)


def _file_name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def main() -> None:
    """Serve until ended."""
    from werkzeug.serving import run_simple

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    run_simple("127.0.0.1", arguments.port, PersistentS3(arguments.folder), threaded=True)


if __name__ == "__main__":
    main()
