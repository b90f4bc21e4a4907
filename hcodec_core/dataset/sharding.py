"""How long files are likely to be, and how they are dealt out to shards."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hcodec_core.dataset.tabular import keys_of

# Guesses for speech, on the side of too many hours: a plan's cost is then not understated.
BYTES_PER_SECOND: Mapping[str, float] = {
    "wav": 32_000.0,
    "aif": 32_000.0,
    "aiff": 32_000.0,
    "flac": 16_000.0,
    "mp3": 8_000.0,
    "m4a": 8_000.0,
    "mp4": 8_000.0,
    "aac": 8_000.0,
    "ogg": 6_000.0,
    "oga": 6_000.0,
    "opus": 4_000.0,
    "webm": 6_000.0,
}
_OTHER_BYTES_PER_SECOND = 16_000.0

Seconds = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def estimate_seconds(files: pa.Table, bytes_per_second: Mapping[str, float]) -> Seconds:
    """Likely length of each file, from its size and the end of its name (columns uri, size).

    ``bytes_per_second`` adds to or replaces the built-in guesses, by lower-case extension.
    """
    guesses = {**BYTES_PER_SECOND, **bytes_per_second}
    names = pc.utf8_lower(files["uri"].combine_chunks())
    ends = pc.struct_field(pc.extract_regex(names, r"\.(?P<end>[a-z0-9]{1,5})$"), "end")
    coded = pc.dictionary_encode(ends.fill_null(""))
    rates = np.array(
        [guesses.get(end, _OTHER_BYTES_PER_SECOND) for end in coded.dictionary.to_pylist()]
    )
    sizes: Seconds = files["size"].to_numpy().astype(np.float64)
    return sizes / rates[coded.indices.to_numpy()] if len(files) else sizes


def deal_out(keys: pa.Array, seconds: Seconds, num_shards: int) -> Indices:
    """Shard index of each file: longest first, each to the emptiest shard; the same every time.

    ``keys`` (unique strings) settle the order of files of one length. No shard stays empty when
    ``num_shards`` is at most the number of files.
    """
    by_key = pc.sort_indices(keys).to_numpy()
    lengths = np.maximum(1, np.round(seconds * 1000)).astype(np.int64)
    order = by_key[np.argsort(-lengths[by_key], kind="stable")]
    shard_of = np.zeros(len(order), dtype=np.int64)
    heap = [(0, shard) for shard in range(num_shards)]
    for file in order.tolist():
        load, shard = heap[0]
        shard_of[file] = shard
        heapq.heapreplace(heap, (load + int(lengths[file]), shard))
    return shard_of


def shard_digest(encode_id: str, files: pa.Table) -> str:
    """Name of a shard from what it holds (columns uri, etag), 16 hex digits; order is no matter."""
    digest = hashlib.sha256(encode_id.encode())
    for key in sorted(keys_of(files, "uri", "etag").to_pylist()):
        digest.update(b"\n\n" + key.encode())
    return digest.hexdigest()[:16]
