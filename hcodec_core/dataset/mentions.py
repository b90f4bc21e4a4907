"""Where an object's name stands: finding it in every kind of document we write, and taking it out.

A name is mentioned as it is, as a path without its scheme, escaped for JSON, HTML or a URL, as hex
in the bounds of a column, and as the ``audio_id`` of one of its contents. In columns and fields
that hold nothing but a URI whole values are compared: ``a.wav`` is not found in ``a.wav.bak``.
"""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc

from hcodec_core.dataset.schema import audio_id_of
from hcodec_core.dataset.tabular import is_in
from hcodec_core.errors import StorageError

ERASED = "(erased)"
_BEFORE = r"(?<![0-9A-Za-z._%-])(?:[a-z0-9]+://)?"
# The end of a name: what follows may close a sentence, but must not make it another name.
_AFTER = r"(?![0-9A-Za-z_~%/+@=$-])(?![.,:;!?'()#*]+[0-9A-Za-z_~%/])"
_REST = r'[^<>"\n]+'
_IDS = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_ID_BYTES = re.compile(rb"[0-9a-f]{16,32}")
_NUM_ID_DIGITS = 16  # what Iceberg keeps of an audio_id in its bounds


@dataclass(frozen=True)
class Targets:
    """Objects to look for: ``uris`` themselves, or with ``is_prefix`` all that begin so."""

    uris: tuple[str, ...]
    is_prefix: bool = False
    audio_ids: frozenset[str] = frozenset()

    def with_keys(self, keys: Iterable[tuple[str, str]]) -> Targets:
        """The same, knowing also the audio ids of these (uri, etag)."""
        found = {audio_id_of(uri, etag) for uri, etag in keys if self.holds(uri)}
        return replace(self, audio_ids=self.audio_ids | found)

    def holds(self, uri: Any) -> bool:
        """Whether a URI is one of the targets."""
        if not isinstance(uri, str):
            return False
        if not self.is_prefix:
            return uri in self._known
        return any(uri.startswith(known) and uri != known for known in self.uris)

    def flags(self, uris: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Boolean array: which URIs are targets."""
        uris = uris.combine_chunks() if isinstance(uris, pa.ChunkedArray) else uris
        if not self.is_prefix:
            return pc.fill_null(is_in(uris, pa.array(self.uris, uris.type)), False)
        found = pa.repeat(False, len(uris))
        for known in self.uris:
            longer = pc.not_equal(uris, known)
            found = pc.or_(found, pc.and_(pc.starts_with(uris, pattern=known), longer))
        return pc.fill_null(found, False)

    def count(self, text: str) -> int:
        """Mentions in free text."""
        if not self.may_be_in(text):
            return 0
        return len(self._pattern.findall(text)) + sum(
            found in self.audio_ids for found in _IDS.findall(text)
        )

    def redact(self, text: str) -> str:
        """Free text without mentions."""
        if not self.may_be_in(text):
            return text
        text = self._pattern.sub(ERASED, text)
        return _IDS.sub(lambda m: ERASED if m[0] in self.audio_ids else m[0], text)

    def may_be_in(self, text: str) -> bool:
        """A quick look: false when there is surely no mention."""
        if any(fragment in text for fragment in self._fragments):
            return True
        return any(found in self.audio_ids for found in _IDS.findall(text))

    def count_values(self, values: pa.Array) -> int:
        """Mentions in a column of texts that are no URIs."""
        found = pa.repeat(False, len(values))
        for fragment in self._fragments:
            found = pc.or_(found, pc.fill_null(pc.match_substring(values, fragment), False))
        return sum(map(self.count, values.filter(found).to_pylist()))

    def count_json(self, value: Any) -> int:
        """Mentions in a parsed JSON document."""
        if isinstance(value, dict):
            return sum(
                int(self.holds(item)) if key == "uri" else self.count_json(item)
                for key, item in value.items()
            )
        if isinstance(value, list):
            return sum(map(self.count_json, value))
        return self.count(value) if isinstance(value, str) else 0

    def redact_json(self, value: Any) -> Any:
        """A parsed JSON document without mentions; list entries that are about a target go."""
        if isinstance(value, dict):
            return {
                key: item if key == "uri" else self.redact_json(item) for key, item in value.items()
            }
        if isinstance(value, list):
            kept = (i for i in value if not (isinstance(i, dict) and self.holds(i.get("uri"))))
            return [self.redact_json(item) for item in kept]
        if isinstance(value, str):
            # A bound stays readable as hex.
            return "" if self._hex_pattern.fullmatch(value) else self.redact(value)
        return value

    def count_bytes(self, data: bytes) -> int:
        """Mentions in Avro's binary form, where a text follows its length."""
        needles = [uri.encode() for uri in self.uris]
        if not self.is_prefix:
            needles = [_avro_length(len(needle)) + needle for needle in needles]
        named = sum(data.count(needle) for needle in needles)
        short = {known[:_NUM_ID_DIGITS].encode() for known in self.audio_ids}
        digits = _ID_BYTES.findall(data) if short else []
        return named + sum(found[:_NUM_ID_DIGITS] in short for found in digits)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.uris)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = {form for uri in self.uris for form in _forms(uri)}
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        end = _REST if self.is_prefix else _AFTER
        spelled = "|".join(map(re.escape, longest_first))
        return re.compile(f"{_BEFORE}(?:{spelled}){end}|{self._hex_pattern.pattern}")

    @cached_property
    def _hex_pattern(self) -> re.Pattern[str]:
        names = "|".join(uri.encode(errors="surrogateescape").hex() for uri in self.uris)
        end = "[0-9a-f]+" if self.is_prefix else ""
        return re.compile(f"(?<![0-9a-f])(?:{names}){end}(?![0-9a-f])")

    @cached_property
    def _fragments(self) -> tuple[str, ...]:
        """What every mention begins with, in each of the ways in which a name is written."""
        columns = zip(*map(_forms, self.uris), strict=True)
        hexes = [uri.encode(errors="surrogateescape").hex() for uri in self.uris]
        return tuple(sorted({_common_start(texts) for texts in (*columns, hexes)}))


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first[:length]


def _forms(uri: str) -> tuple[str, ...]:
    """Ways in which a name is written, without its scheme; always as many, in the same order."""
    bare = uri.partition("://")[2]
    plain = unquote(bare) if uri.startswith("file://") else bare
    shown = plain if plain.isprintable() else ascii(plain)[1:-1]
    return (
        bare,
        plain,
        json.dumps(plain)[1:-1],
        html.escape(bare),
        html.escape(shown).replace("&#x27;", "&#39;").replace("&quot;", "&#34;"),
        quote(plain, safe="/", errors="surrogateescape"),
        quote(plain, safe="", errors="surrogateescape"),
        shown,
    )


def count_in_document(name: str, data: bytes, targets: Targets) -> int:
    """Mentions in the content of an object of ours that is no Parquet; ``name`` tells its kind."""
    if name.endswith(".avro"):
        return sum(map(targets.count_bytes, avro_blocks(data)))
    text = data.decode(errors="surrogateescape")
    if not targets.may_be_in(text):
        return 0
    if name.endswith(".json"):
        parsed = _parse(text)
        return targets.count(text) if parsed is None else targets.count_json(parsed)
    if name.endswith((".jsonl", ".log")):
        return sum(_count_in_line(line, targets) for line in text.splitlines())
    return targets.count(text)


def redact_document(name: str, data: bytes, targets: Targets) -> bytes:
    """The same document without mentions: lines of logs go whole, elsewhere the name goes."""
    text = data.decode(errors="surrogateescape")
    if name.endswith(".json") and (parsed := _parse(text)) is not None:
        redacted = json.dumps(targets.redact_json(parsed), indent=1)
    elif name.endswith((".jsonl", ".log")):
        lines = text.splitlines(keepends=True)
        redacted = "".join(line for line in lines if not _count_in_line(line, targets))
    else:
        redacted = targets.redact(text)
    return redacted.encode(errors="surrogateescape")


def _count_in_line(line: str, targets: Targets) -> int:
    if not targets.may_be_in(line):
        return 0
    parsed = _parse(line)
    return targets.count(line) if parsed is None else targets.count_json(parsed)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None  # cut off, or no JSON at all: it is read as text


def count_in_parquet(file: Any, targets: Targets) -> int:
    """Mentions in an open ``pyarrow.parquet.ParquetFile``: its texts and its statistics."""
    names = _text_columns(file.schema_arrow)
    count = _count_in_statistics(file.metadata, targets)
    for index in range(file.num_row_groups):
        rows = file.read_row_group(index, columns=names)
        count += sum(_count_in_column(name, rows[name], targets) for name in names)
    return count


def _text_columns(schema: pa.Schema) -> list[str]:
    def is_text(kind: pa.DataType) -> bool:
        types = pa.types
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_map(kind))

    return [field.name for field in schema if is_text(field.type)]


def _count_in_column(name: str, column: pa.ChunkedArray, targets: Targets) -> int:
    if name == "uri":
        return int(pc.sum(targets.flags(column)).as_py() or 0)
    if name == "audio_id":
        known = pa.array(sorted(targets.audio_ids), column.type)
        return int(pc.sum(is_in(column, known)).as_py() or 0)
    count = 0
    for chunk in column.chunks:
        texts = [chunk.keys, chunk.items] if pa.types.is_map(chunk.type) else [chunk]
        count += sum(targets.count_values(values) for values in texts if len(values))
    return count


def _count_in_statistics(metadata: Any, targets: Targets) -> int:
    count = 0
    for group in range(metadata.num_row_groups):
        columns = (metadata.row_group(group).column(index) for index in range(metadata.num_columns))
        for column in columns:
            known = column.statistics
            if column.path_in_schema == "uri" and known is not None and known.has_min_max:
                count += targets.holds(known.min) + targets.holds(known.max)
    return count


def redact_rows(rows: pa.Table, targets: Targets) -> pa.Table:
    """A small table of ours without the rows of targets, and without mentions in other texts.

    Names in ``metadata`` stay: they came with another object and are its own.
    """
    if "uri" in rows.schema.names:
        rows = rows.filter(pc.invert(targets.flags(rows["uri"])))
    for index, field in enumerate(rows.schema):
        if field.name not in {"uri", "etag"} and pa.types.is_string(field.type):
            texts = rows[field.name].to_pylist()
            if any(text is not None and targets.count(text) for text in texts):
                cleaned = [None if text is None else targets.redact(text) for text in texts]
                rows = rows.set_column(index, field, pa.array(cleaned, field.type))
    return rows


def avro_blocks(data: bytes) -> Iterator[bytes]:
    """Header and blocks of an Avro file, unpacked. Raises ``StorageError`` when it is none."""
    reader = _AvroReader(data)
    try:
        codec = reader.read_header()
        yield data[: reader.position]
        while reader.position < len(data):
            reader.read_long()
            block = reader.read_bytes()
            reader.position += 16  # the marker between blocks
            yield _unpacked(block, codec)
    except (IndexError, zlib.error) as error:
        raise StorageError("An Avro file is cut off or damaged: it cannot be searched.") from error


def _unpacked(block: bytes, codec: bytes) -> bytes:
    if codec in {b"", b"null"}:
        return block
    if codec == b"deflate":
        return zlib.decompress(block, -15)
    raise StorageError(f"An Avro file is packed with {codec.decode()!r}: it cannot be searched.")


@dataclass
class _AvroReader:
    data: bytes
    position: int = 4

    def read_header(self) -> bytes:
        """The codec's name, at the end of the header."""
        codec = b""
        while (count := self.read_long()) != 0:
            if count < 0:
                self.read_long()
            for _ in range(abs(count)):
                name, value = self.read_bytes(), self.read_bytes()
                codec = value if name == b"avro.codec" else codec
        self.position += 16
        return codec

    def read_bytes(self) -> bytes:
        size = self.read_long()
        if not 0 <= size <= len(self.data) - self.position:
            raise IndexError(size)
        self.position += size
        return self.data[self.position - size : self.position]

    def read_long(self) -> int:
        number = shift = 0
        while True:
            byte = self.data[self.position]
            self.position += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return (number >> 1) ^ -(number & 1)


def _avro_length(length: int) -> bytes:
    number = length << 1
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def keys_in(rows: pa.Table, targets: Targets) -> Sequence[tuple[str, str]]:
    """(uri, etag) of targets among rows with these columns."""
    found = rows.filter(targets.flags(rows["uri"]))
    return list(zip(found["uri"].to_pylist(), found["etag"].to_pylist(), strict=True))
