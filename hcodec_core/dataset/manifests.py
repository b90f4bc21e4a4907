"""Manifests: files that list audio objects and say something about each.

* CSV, Parquet, JSON lines with a column ``uri`` and, as far as known, ``etag``, ``size``,
  ``last_modified``; all other columns are metadata.
* NeMo: JSON lines with ``audio_filepath``; ``duration``, ``text`` and the rest are metadata.
* Lhotse: JSON lines of recordings, or of cuts that span their whole recording; what the one
  supervision says (``text``, ``language``, ``speaker``, ``custom`` ...) is metadata, several are
  kept as JSON in ``supervisions``.

Paths are absolute, or relative to the manifest's folder. Rows that name a part of a file are
refused: a token row is a whole object, whose parts are found by their time.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hcodec_core.errors import ConfigError
from hcodec_core.storage import file_uri, join_uri, split_uri

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
MANIFEST_SUFFIXES = (".csv", ".parquet", *JSON_SUFFIXES)
_FACT_COLUMNS = frozenset({"uri", "etag", "size", "last_modified"})
_BATCH_ROWS = 20_000
_SAME_SECONDS = 0.02

Row = dict[str, Any]


def is_manifest(uri: str) -> bool:
    """Whether a source's name is that of a manifest."""
    return uri.lower().endswith(MANIFEST_SUFFIXES)


def read_manifest(path: Path, manifest_uri: str) -> Iterator[list[Row]]:
    """Batches of rows: uri, etag, size, last_modified (None: not known), metadata (pairs of text).

    ``path``: local copy of ``manifest_uri``. Raises ``ConfigError`` naming what cannot be used.
    """
    name = manifest_uri.lower()
    batches = _json_batches if name.endswith(JSON_SUFFIXES) else _column_batches
    try:
        for batch in batches(path, name):
            yield [_row(_plain(row, manifest_uri), manifest_uri) for row in batch]
    except (ValueError, EOFError, OSError, pa.ArrowTypeError) as error:
        raise ConfigError(f"Manifest {manifest_uri} cannot be read: {error}.") from error


def _column_batches(path: Path, name: str) -> Iterator[list[Row]]:
    """Rows of CSV or Parquet; text columns of CSV stay text."""
    from pyarrow import csv

    if name.endswith(".parquet"):
        batches: Any = pq.ParquetFile(path).iter_batches(_BATCH_ROWS)
    else:
        names = csv.open_csv(path).schema.names
        as_text = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True
        )
        batches = csv.open_csv(path, convert_options=as_text)
    for batch in batches:
        yield batch.to_pylist()


def _json_batches(path: Path, name: str) -> Iterator[list[Row]]:
    opened = (
        gzip.open(path, "rt", encoding="utf-8")
        if name.endswith(".gz")
        else path.open(encoding="utf-8")
    )
    with opened as lines:
        rows = (json.loads(line) for line in lines if line.strip())
        while batch := list(islice(rows, _BATCH_ROWS)):
            for row in batch:
                if not isinstance(row, dict):
                    raise ValueError("a line is not an object in braces")
            yield batch


def _plain(row: Row, manifest_uri: str) -> Row:
    """A row of any kind with a ``uri``; the rest beside facts is metadata."""
    if "uri" in row:
        return row
    if "audio_filepath" in row:
        return _of_nemo(row, manifest_uri)
    if "sources" in row or "recording" in row:
        return _of_lhotse(row, manifest_uri)
    raise ConfigError(
        f"Manifest {manifest_uri} has no column 'uri' (nor NeMo's 'audio_filepath', nor Lhotse's "
        "'recording' or 'sources'): add one."
    )


def _of_nemo(row: Row, manifest_uri: str) -> Row:
    path = row["audio_filepath"]
    if float(row.get("offset") or 0) > 0:
        raise _part_of_a_file(manifest_uri, str(path))
    extra = {name: value for name, value in row.items() if name not in {"audio_filepath", "offset"}}
    return _with_uri(extra, path, manifest_uri)


def _of_lhotse(row: Row, manifest_uri: str) -> Row:
    recording: Row = row.get("recording") or row
    sources = recording.get("sources") or []
    if len(sources) != 1 or sources[0].get("type") not in {"file", "url"}:
        raise ConfigError(
            f"Recording {recording.get('id')} of manifest {manifest_uri} is not one file or URL: "
            "only such recordings can be tokenised."
        )
    path = sources[0]["source"]
    if recording is not row and not _is_whole(row, recording):
        raise _part_of_a_file(manifest_uri, str(path))
    kept = ("id", "duration", "sampling_rate", "num_samples")
    extra = {name: recording[name] for name in kept if name in recording}
    return _with_uri(extra | _told(row.get("supervisions") or []), path, manifest_uri)


def _is_whole(cut: Row, recording: Row) -> bool:
    missing = float(recording.get("duration", 0)) - float(cut.get("duration", 0))
    return float(cut.get("start", 0)) == 0 and abs(missing) <= _SAME_SECONDS


def _told(supervisions: list[Row]) -> Row:
    """What supervisions say of the speech in a recording."""
    if len(supervisions) > 1:
        return {"supervisions": supervisions}
    told: Row = {}
    for supervision in supervisions:
        names = ("text", "language", "speaker", "gender")
        told |= {name: supervision[name] for name in names if supervision.get(name) is not None}
        told |= supervision.get("custom") or {}
    return told


def _part_of_a_file(manifest_uri: str, path: str) -> ConfigError:
    return ConfigError(
        f"Manifest {manifest_uri} names a part of {path}: list whole files, a token row is one "
        "object and its parts are found by their time."
    )


def _with_uri(extra: Row, path: Any, manifest_uri: str) -> Row:
    """``extra`` as metadata of ``path``; its own facts about the object cannot be trusted."""
    metadata = {f"source_{k}" if k in _FACT_COLUMNS else k: v for k, v in extra.items()}
    return {**metadata, "uri": _uri_of(str(path), manifest_uri)}


def _uri_of(path: str, manifest_uri: str) -> str:
    if "://" in path:
        return path
    if path.startswith("/"):
        return file_uri(path)
    scheme, _, key = split_uri(manifest_uri)
    if scheme == "file":
        from urllib.parse import unquote

        return file_uri(Path(unquote(key)).parent / path)
    return join_uri(manifest_uri.rpartition("/")[0], path)


def _row(row: Row, manifest_uri: str) -> Row:
    uri = str(row["uri"] or "")
    split_uri(uri)
    extra = [name for name in row if name not in _FACT_COLUMNS and row[name] is not None]
    try:
        size = None if row.get("size") in (None, "") else int(row["size"])
    except ValueError as error:
        raise ConfigError(f"Manifest {manifest_uri} gives {uri} a size of no number.") from error
    etag = row.get("etag")
    return {
        "uri": uri,
        "etag": str(etag).strip('"') if etag else None,
        "size": size,
        "last_modified": _as_time(row.get("last_modified"), uri),
        "metadata": [(name, _text(row[name])) for name in extra] or None,
    }


def _text(value: Any) -> str:
    nested = isinstance(value, dict | list)
    return json.dumps(value, ensure_ascii=False, default=str) if nested else str(value)


def _as_time(value: Any, uri: str) -> datetime | None:
    if value is None or value == "":
        return None
    try:
        when = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError as error:
        raise ConfigError(f"The last_modified of {uri} is no ISO 8601 time.") from error
    return when if when.tzinfo else when.replace(tzinfo=UTC)
