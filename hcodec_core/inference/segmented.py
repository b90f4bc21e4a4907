"""Encoding audio in memory as a worker encodes a file: in segments with halos, joined."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hcodec_core.audio.segments import Segment, segments
from hcodec_core.inference.clips import Clip, ClipTokens
from hcodec_core.inference.engine import Engine
from hcodec_core.inference.joining import FileTokens, interior_of, join

_SEGMENTS_AT_ONCE = 16


def encode_in_segments(engine: Engine, clip: Clip) -> ClipTokens:
    """Tokens of a clip of any length, float32 [N], cut as the engine's settings say.

    Raises ``AudioError`` as ``Engine.encode_clips`` does.
    """
    spec = engine.codec.spec
    cut = segments(
        [clip],
        sample_rate=spec.sample_rate,
        hop_length=spec.hop_length,
        segment_seconds=spec.settings.segment_seconds,
        halo_seconds=spec.settings.halo_seconds,
    )
    joined = join(list(_interiors(engine, cut)), len(clip), spec)
    num_frames = next(iter(joined.codes.values())).shape[1]
    return ClipTokens(joined.codes, num_frames, len(clip), joined.frame_spans)


def token_bounds(segment: Segment) -> tuple[int, int | None]:
    """Base frames of a segment's tokens to keep: from the first to the second (None: the end).

    The last segment has no halo behind it: whether its tail is a frame, the codec decides.
    """
    first = segment.halo_left_frames
    return first, None if segment.is_last else first + segment.num_interior_frames


def _interiors(engine: Engine, cut: Iterator[Segment]) -> Iterator[FileTokens]:
    is_variable = engine.codec.is_variable_rate
    while together := list(islice(cut, _SEGMENTS_AT_ONCE)):
        bounds = [token_bounds(segment) for segment in together]
        # No token may hold frames of the halo beside frames that are kept.
        cuts = [tuple(frame for frame in bound if frame) for bound in bounds]
        found = engine.encode_clips([s.samples for s in together], cuts if is_variable else None)
        for tokens, (first, end) in zip(found, bounds, strict=True):
            yield interior_of(tokens, first, end)
