"""Writing a version in the forms that other training stacks read.

* ``webdataset``: tar files; per row ``<audio_id>.json`` and one ``<audio_id>.<stream>.npy`` [Q, T]
* ``huggingface``: a folder that ``datasets.load_dataset`` reads: Parquet files and a dataset card
* ``mds``: MosaicML Streaming, written by its own library, which must be installed

Rows come in the order of the version's files. What was done is in ``export.json``, written last.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from hcodec_core.config import Config
from hcodec_core.dataset.pinned import pin_snapshot
from hcodec_core.dataset.stream import Place, Sample, StreamOptions, TokenStream
from hcodec_core.errors import ConfigError, FolderMissingError
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import Codes

logger = logging.getLogger(__name__)

Kind = Literal["webdataset", "huggingface", "mds"]
INFO_FILE = "export.json"
_INT16_CODES = 2**15
_COLUMNS = ("uri", "etag", "num_samples", "sample_rate", "duration_seconds", "metadata")


class ExportInfo(BaseModel):
    """What an export holds; ``files`` are names below ``out_uri``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    kind: Kind
    dataset: str
    version: str
    snapshot_id: int
    codec_name: str
    codebook_id: str
    num_rows: int
    files: tuple[str, ...]
    out_uri: str


def export_dataset(
    config: Config,
    storage: Storage,
    name: str,
    kind: Kind,
    out_uri: str,
    *,
    version: str = "latest",
    encode_id: str | None = None,
    row_filter: str | None = None,
    rows_per_file: int = 10_000,
) -> ExportInfo:
    """Write one version below ``out_uri``, which must be empty.

    Raises ``ConfigError`` when there is no such version, the folder holds something, or a library
    is missing; ``StorageError``.
    """
    _check_empty(storage, out_uri)
    snapshot = pin_snapshot(config, name, version, encode_id, row_filter)
    write = _writer_of(kind)
    with tempfile.TemporaryDirectory(prefix="hcodec-export-") as folder:
        # A cache of one file: an export reads each once.
        options = StreamOptions(
            columns=_COLUMNS,
            shuffle=None,
            remainder="keep",
            cache_path=Path(folder, "cache"),
            cache_bytes=1,
        )
        stream = TokenStream(snapshot, options, Place())
        out = _Out(storage, out_uri, Path(folder))
        write(stream, out, rows_per_file)
        info = ExportInfo(
            kind=kind,
            dataset=name,
            version=snapshot.version,
            snapshot_id=snapshot.snapshot_id,
            codec_name=snapshot.manifest.name,
            codebook_id=snapshot.manifest.parts.codebooks,
            num_rows=len(stream),
            files=tuple(out.names),
            out_uri=out_uri,
        )
        if kind == "huggingface":
            storage.write(join_uri(out_uri, "README.md"), _card(info, snapshot.manifest).encode())
        storage.write(join_uri(out_uri, INFO_FILE), info.model_dump_json(indent=1).encode())
    return info


def _check_empty(storage: Storage, out_uri: str) -> None:
    try:
        held = next(iter(storage.list_objects(out_uri.rstrip("/") + "/")), None)
    except FolderMissingError:
        return  # it will be made
    if held is not None:
        raise ConfigError(f"{out_uri} is not empty: export to a new folder.")


class _Out:
    """Uploads finished local files one by one, so that the disk holds few."""

    def __init__(self, storage: Storage, out_uri: str, folder_path: Path) -> None:
        self._storage = storage
        self._out_uri = out_uri
        self.folder_path = folder_path
        self.names: list[str] = []

    def put(self, path: Path, name: str) -> None:
        self._storage.upload(path, join_uri(self._out_uri, name))
        path.unlink()
        self.names.append(name)


_Write = Callable[[TokenStream, _Out, int], None]


def _writer_of(kind: Kind) -> _Write:
    if kind == "mds":
        return _mds_writer()
    return {"webdataset": _write_webdataset, "huggingface": _write_huggingface}[kind]


def _parts(stream: TokenStream, rows_per_file: int) -> Iterator[list[Sample]]:
    samples = iter(stream)
    while part := list(islice(samples, rows_per_file)):
        yield part


def _narrow(codes: Codes, stream: TokenStream) -> np.ndarray[Any, Any]:
    """Codes in 16 bits where all codebooks of the codec fit; torch has no unsigned ones."""
    sizes = [s.codebook_size for s in stream.snapshot.manifest.streams]
    return codes.astype(np.int16) if max(sizes) <= _INT16_CODES else codes


def _facts_of(sample: Sample) -> dict[str, Any]:
    facts: dict[str, Any] = {"audio_id": sample.audio_id, "num_frames": sample.num_frames}
    facts |= {column: sample.columns[column] for column in _COLUMNS}
    facts["metadata"] = dict(facts["metadata"] or {})
    return facts


def _write_webdataset(stream: TokenStream, out: _Out, rows_per_file: int) -> None:
    for number, part in enumerate(_parts(stream, rows_per_file)):
        path = out.folder_path / "part.tar"
        with tarfile.open(path, "w") as tar:
            for sample in part:
                _add_sample(tar, sample, stream)
        out.put(path, f"tokens-{number:06d}.tar")


def _add_sample(tar: tarfile.TarFile, sample: Sample, stream: TokenStream) -> None:
    arrays: dict[str, Any] = {n: _narrow(c, stream) for n, c in sample.codes.items()}
    if sample.frame_spans is not None:
        arrays["frame_spans"] = sample.frame_spans
    _add(tar, f"{sample.audio_id}.json", json.dumps(_facts_of(sample)).encode())
    for name, array in arrays.items():
        data = io.BytesIO()
        np.save(data, array, allow_pickle=False)
        _add(tar, f"{sample.audio_id}.{name}.npy", data.getvalue())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without time or owner: equal versions give equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_huggingface(stream: TokenStream, out: _Out, rows_per_file: int) -> None:
    count = max(1, -(-len(stream) // rows_per_file))
    for number, part in enumerate(_parts(stream, rows_per_file)):
        path = out.folder_path / "part.parquet"
        rows = [_huggingface_row(sample, stream) for sample in part]
        pq.write_table(pa.Table.from_pylist(rows, _schema(stream)), path, compression="zstd")
        out.put(path, f"data/train-{number:05d}-of-{count:05d}.parquet")


def _huggingface_row(sample: Sample, stream: TokenStream) -> dict[str, Any]:
    row = _facts_of(sample)
    row["metadata"] = json.dumps(row["metadata"])
    row |= {name: list(_narrow(codes, stream)) for name, codes in sample.codes.items()}
    if sample.frame_spans is not None:
        row["frame_spans"] = sample.frame_spans
    return row


def _schema(stream: TokenStream) -> pa.Schema:
    """Columns that the ``datasets`` library has types for (it has none for maps)."""
    manifest = stream.snapshot.manifest
    kinds: dict[str, pa.DataType] = {
        "audio_id": pa.string(),
        "uri": pa.string(),
        "etag": pa.string(),
        "num_samples": pa.int64(),
        "sample_rate": pa.int32(),
        "num_frames": pa.int32(),
        "duration_seconds": pa.float64(),
        "metadata": pa.string(),
    }
    is_small = max(s.codebook_size for s in manifest.streams) <= _INT16_CODES
    code = pa.int16() if is_small else pa.int32()
    kinds |= {s.name: pa.list_(pa.list_(code)) for s in manifest.streams}
    if manifest.is_variable_rate:
        kinds["frame_spans"] = pa.list_(pa.int32())
    return pa.schema(list(kinds.items()))


def _card(info: ExportInfo, manifest: Any) -> str:
    streams = "\n".join(
        f"| {s.name} | {s.num_codebooks} | {s.codebook_size} |" for s in manifest.streams
    )
    trained = "" if manifest.is_trained else "\n\nThe codec has random weights: for tests only."
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- audio-tokens
---

# {info.dataset} {info.version}

{info.num_rows} audio objects as tokens of codec {info.codec_name} ({manifest.sample_rate} Hz,
{float(manifest.frame_rate):g} base frames a second; codebooks {info.codebook_id}).{trained}

| stream | codebooks | codebook size |
|---|---|---|
{streams}

Codes are lists [codebook][frame]. `metadata` is JSON. Snapshot {info.snapshot_id} of the table.
"""


def _mds_writer() -> _Write:
    try:
        from streaming import MDSWriter
    except ImportError as error:
        raise ConfigError(
            "MDS is written by MosaicML's own library, which is not installed: install "
            "mosaicml-streaming, or export to webdataset or huggingface."
        ) from error

    def write(stream: TokenStream, out: _Out, rows_per_file: int) -> None:
        folder = out.folder_path / "mds"
        columns = {"facts": "json"}
        columns |= {s.name: "ndarray" for s in stream.snapshot.manifest.streams}
        if stream.snapshot.manifest.is_variable_rate:
            columns["frame_spans"] = "ndarray"
        with MDSWriter(out=str(folder), columns=columns, exist_ok=True) as writer:
            for sample in stream:
                arrays: dict[str, Any] = {n: _narrow(c, stream) for n, c in sample.codes.items()}
                if sample.frame_spans is not None:
                    arrays["frame_spans"] = sample.frame_spans
                writer.write({"facts": _facts_of(sample), **arrays})
        for path in sorted(folder.iterdir()):
            out.put(path, path.name)

    return write
