"""A variable rate from files to rows: H-Codec 1.5 through worker, table checks and decoder."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hcodec_core.audio.decode import DecodeSettings, decode_all
from hcodec_core.audio.segments import Segment, segments
from hcodec_core.dataset.rowfacts import CodeCounter, flag_columns, needed_columns, row_facts
from hcodec_core.dataset.schema import unflatten_codes
from hcodec_core.dataset.shards import results_by_shard
from hcodec_core.inference.batching import Batcher, BatchShape
from hcodec_core.inference.engine import ClipTokens, Engine
from hcodec_core.inference.joining import interior_of
from hcodec_core.inference.worker import WorkerOptions, run_worker
from hcodec_core.jobs import TokenizeJob
from hcodec_core.models.hcodec.convert import golden_cases
from hcodec_core.models.loading import load_codec
from hcodec_core.storage import Storage, file_uri
from tests.inference.plans import SETTINGS, job_uri, rows, speech, wav, write_plan

FOLDER = Path(__file__).parents[1] / "golden" / "hcodec-1.5-tiny"
ADAPTIVE = SETTINGS.model_copy(update={"threshold": 0.75})


@pytest.fixture(scope="module")
def codec_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(golden_cases(FOLDER, tmp_path_factory.mktemp("golden"))[0].codec_path)


@pytest.fixture(scope="module")
def engine(codec_uri: str) -> Engine:
    return Engine(load_codec(codec_uri, ADAPTIVE))


def cut(samples: np.ndarray, engine: Engine) -> list[Segment]:
    spec = engine.codec.spec
    return list(
        segments(
            [samples],
            sample_rate=spec.sample_rate,
            hop_length=spec.hop_length,
            segment_seconds=spec.settings.segment_seconds,
            halo_seconds=spec.settings.halo_seconds,
        )
    )


def cuts_of(segment: Segment) -> list[int]:
    """First base frame that is kept, and first of the halo behind; the outer ends are none."""
    end = None if segment.is_last else segment.interior.stop
    return [frame for frame in (segment.interior.start, end) if frame]


def samples_of(content: bytes, tmp_path: Path, engine: Engine) -> np.ndarray:
    path = tmp_path / "alone"
    path.write_bytes(content)
    return decode_all(path, DecodeSettings(engine.codec.sample_rate))[0]


@pytest.fixture
def done(
    s3_storage: Storage, engine: Engine, codec_uri: str, tmp_path: Path
) -> tuple[TokenizeJob, dict[str, bytes]]:
    """A plan with long and short files that a worker has run."""
    (tmp_path / "root").mkdir()
    (tmp_path / "scratch").mkdir()
    files = speech(4) | {"long.wav": wav(13.3, seed=50)}
    job = write_plan(
        s3_storage,
        file_uri(tmp_path / "root"),
        files,
        codec_uri=codec_uri,
        manifest=engine.codec.spec.manifest,
        settings=ADAPTIVE,
    )
    options = WorkerOptions(scratch_path=tmp_path / "scratch", heartbeat_seconds=0.3)
    assert run_worker(job_uri(job), s3_storage, options, threading.Event()) == 0
    return job, files


def test_rows_hold_each_files_own_tokens(
    s3_storage: Storage,
    engine: Engine,
    done: tuple[TokenizeJob, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    job, files = done
    table = rows(s3_storage, job)
    assert table.keys() == files.keys()
    spans_seen: set[int] = set()
    for name, row in table.items():
        samples = samples_of(files[name], tmp_path, engine)
        spans, codes = [], []
        for segment in cut(samples, engine):
            (tokens,) = engine.encode_clips([segment.samples], [cuts_of(segment)])
            kept = interior_of(tokens, segment.interior.start, segment.interior.stop)
            assert kept.frame_spans is not None
            spans.append(kept.frame_spans)
            codes.append(kept.codes["acoustic"])
        assert row["frame_spans"] == np.concatenate(spans).tolist()
        flat = np.array(row["acoustic"], np.int32)
        np.testing.assert_array_equal(unflatten_codes(flat, 4), np.concatenate(codes, axis=1))
        assert row["num_frames"] == len(row["frame_spans"])
        assert sum(row["frame_spans"]) == -(-len(samples) // 640)
        spans_seen |= set(row["frame_spans"])
    assert len(spans_seen) > 2, "the example is too plain"


def test_rows_pass_the_checks_and_decode(
    s3_storage: Storage,
    engine: Engine,
    done: tuple[TokenizeJob, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    job, _ = done
    (result,) = results_by_shard(s3_storage, job).values()
    assert result.data_file is not None
    path = tmp_path / "rows.parquet"
    s3_storage.download(result.data_file.uri, path, result.data_file.etag)
    table = pq.read_table(path, columns=needed_columns(job.manifest))
    (batch,) = table.combine_chunks().to_batches()
    counters = [CodeCounter(stream) for stream in job.manifest.streams]
    facts = row_facts(batch, job.manifest, counters)
    for flag in flag_columns(job.manifest):
        assert not any(facts[flag].to_pylist()), flag
    broken = table.set_column(
        table.column_names.index("frame_spans"),
        table.schema.field("frame_spans"),
        pa.array([[span + 1 for span in s] for s in table["frame_spans"].to_pylist()]).cast(
            table.schema.field("frame_spans").type
        ),
    )
    (batch,) = broken.combine_chunks().to_batches()
    assert all(row_facts(batch, job.manifest, counters)["frames_match_samples"].to_pylist())
    clips = [
        ClipTokens(
            {s: unflatten_codes(np.array(row[s], np.int32), 4) for s in ("semantic", "acoustic")},
            row["num_frames"],
            row["num_samples"],
            np.array(row["frame_spans"], np.int32),
        )
        for row in table.to_pylist()
    ]
    for clip, audio in zip(clips, engine.decode_clips(clips), strict=True):
        assert audio.shape == (clip.num_samples,)
        assert np.isfinite(audio).all()


def test_no_token_lies_across_a_cut(engine: Engine, tmp_path: Path) -> None:
    """Whole tokens are kept: nothing that is dropped is told of by a token that is kept."""
    samples = samples_of(wav(13.3, seed=50), tmp_path, engine)
    num_across = 0
    for segment in cut(samples, engine):
        free = engine.encode_clips([segment.samples])[0]
        bound = engine.encode_clips([segment.samples], [cuts_of(segment)])[0]
        for tokens in (free, bound):
            assert tokens.frame_spans is not None
            starts = np.cumsum(tokens.frame_spans) - tokens.frame_spans
            across = [frame for frame in cuts_of(segment) if frame not in starts]
            if tokens is bound:
                assert not across
            num_across += len(across)
    assert num_across, "no token would have lain across a cut anyway: nothing is tested"


def test_clips_go_to_the_batcher_with_their_cuts(engine: Engine) -> None:
    clips = [np.full(640 * n, 0.01, np.float32) for n in (20, 17, 19)]
    cuts = [(), (3, 9), (5,)]
    with Batcher(engine, lambda _: BatchShape(0, 3), max_held_samples=10**9) as batcher:
        batcher.begin()
        waiting = [batcher.submit(*pair) for pair in zip(clips, cuts, strict=True)]
        found = [future.result(30).tokens for future in waiting]
    for clip, frames, tokens in zip(clips, cuts, found, strict=True):
        (alone,) = engine.encode_clips([clip], [frames])
        np.testing.assert_array_equal(tokens.frame_spans, alone.frame_spans)
        assert tokens.frame_spans is not None
        starts = np.cumsum(tokens.frame_spans) - tokens.frame_spans
        assert set(frames) <= set(starts.tolist())
        for name, codes in alone.codes.items():
            np.testing.assert_array_equal(tokens.codes[name], codes)
