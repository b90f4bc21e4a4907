"""Tokens of real audio, and a dataset made of them: speech first, then what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hcodec_core.config import StorageConfig
from hcodec_core.dataset.schema import arrow_schema, audio_id_of
from hcodec_core.monitoring.profiles import Profile
from hcodec_core.storage import file_uri, open_storage
from hcodec_core.tokens import CodecManifest
from tests.dataset import factories
from tests.dataset.factories import World, toy_manifest

SPEECH, OTHER = 0, 1


def toy_tokens(
    manifest: CodecManifest, name: str, kind: int, *, gain_db: float = 0.0
) -> dict[str, Any]:
    """A row of a made-up file: its codes hang together, as those of one speaker do.

    Each file prefers some entries of its own, among those that its kind prefers.
    """
    rng = np.random.default_rng([kind, *name.encode()])
    num_frames = int(rng.integers(40, 120))
    level = float(rng.normal(-22, 2) + gain_db)
    row: dict[str, Any] = {
        "audio_id": audio_id_of(name, "e"),
        "uri": name,
        "etag": "e",
        "num_frames": num_frames,
        "duration_seconds": num_frames * 0.02,
        "peak": float(np.clip(10 ** ((level + 12) / 20), 0, 1)),
        "loudness_db": level,
        "clipped_share": 0.0,
        "native_sample_rate": 16000,
        "native_channels": 1,
    }
    for stream in manifest.streams:
        chances = np.arange(1, stream.codebook_size + 1) ** -0.8
        chances = np.roll(chances, stream.codebook_size // 3 * kind)
        own = rng.gamma(1.0, size=stream.codebook_size) * chances
        codes = rng.choice(
            stream.codebook_size, num_frames * stream.num_codebooks, p=own / own.sum()
        )
        row[stream.name] = codes.astype(np.int32).tolist()
        row[f"{stream.name}_perplexity"] = float(rng.normal(20, 2))
    return row


def profile_of(manifest: CodecManifest, rows: list[dict[str, Any]]) -> Profile:
    """A profile of rows that have just the columns it reads."""
    profile = Profile(manifest)
    full = arrow_schema(manifest)
    schema = pa.schema([full.field(name) for name in profile.columns])
    kept = [{name: row[name] for name in profile.columns} for row in rows]
    table = pa.Table.from_pylist(kept, schema)
    return profile.fill(table.combine_chunks().to_batches())


@pytest.fixture(scope="session")
def manifest() -> CodecManifest:
    return toy_manifest(streams={"semantic": 1, "acoustic": 2})


@pytest.fixture
def drifting_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose files have tokens of another kind when their names say so."""
    root = tmp_path / "root"
    (root / "audio").mkdir(parents=True)
    made = World(file_uri(root), tmp_path, open_storage(StorageConfig()))
    plain = factories.toy_row

    def row(job: Any, shard_id: str, file: dict[str, Any]) -> dict[str, Any]:
        kind = OTHER if "/music" in file["uri"] else SPEECH
        tokens = toy_tokens(job.manifest, file["uri"], kind)
        tokens["num_samples"] = tokens["num_frames"] * 320
        own = {"audio_id", "etag", "uri"}
        return plain(job, shard_id, file) | {k: v for k, v in tokens.items() if k not in own}

    monkeypatch.setattr(factories, "toy_row", row)
    return made


@pytest.fixture
def add(drifting_world: World) -> Callable[[str, int], str]:
    """Put so many files of a kind into the source and publish them; the version's name."""

    def publish(kind: str, count: int) -> str:
        at = drifting_world.num_inventories
        drifting_world.put(*(f"{kind}-{at}-{index}.wav" for index in range(count)))
        return drifting_world.version().version

    return publish
