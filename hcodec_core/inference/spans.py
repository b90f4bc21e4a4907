"""Where the tokens of a variable rate begin, and how clear that was."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hcodec_core.models.base import Codec, Spans, TokenStarts

Starts = npt.NDArray[np.bool_]


def starts_of(spans: Spans) -> Starts:
    """Base frames at which tokens of ``spans`` (int32 [T]) begin, bool [sum of spans]."""
    starts = np.zeros(int(spans.sum()), np.bool_)
    starts[np.cumsum(spans) - spans] = True
    return starts


def forced(spans: Spans) -> TokenStarts:
    """Tokens of one clip begin so, and nowhere else."""
    return TokenStarts(torch.from_numpy(starts_of(spans))[None], is_complete=True)


def strays(starts: Starts, margins: npt.NDArray[np.float64], max_span: int) -> dict[int, float]:
    """Decisions that must have gone another way than ``margins`` say, for tokens to begin so.

    Args:
        starts: Base frames at which the tokens of a clip begin, bool [T].
        margins: ``FrameCodes.start_margins`` of the clip, [T].
        max_span: ``Codec.max_frame_span``.

    Returns:
        Base frame -> how far its margin is from 0; infinite where no decision can explain the
        token (it is too long, or the clip does not begin with one).
    """
    found: dict[int, float] = {} if starts[0] else {0: np.inf}
    run_start = 0
    for frame in range(1, len(starts)):
        # The span is used up here: a token begins whatever was decided.
        is_bound = (frame - run_start) % max_span == 0
        if is_bound:
            if not starts[frame]:
                found[frame] = np.inf
            continue
        if starts[frame] != (margins[frame] <= 0):
            found[frame] = abs(float(margins[frame]))
        if starts[frame]:
            run_start = frame
    return found


def start_margins(exact: Codec, audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Margins of one clip [N], [T], as a float64 codec sees them."""
    clip = torch.from_numpy(audio)[None, None]
    frames = exact.encode_frames(clip, torch.tensor([len(audio)]), with_margins=True)
    assert frames.start_margins is not None, "a codec of a fixed rate decides no starts"
    return frames.start_margins[0].cpu().numpy()
