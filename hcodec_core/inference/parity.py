"""Comparing our codecs with recorded outputs of the published code."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hcodec_core.errors import ConfigError
from hcodec_core.inference.engine import compute_class
from hcodec_core.inference.spans import forced, start_margins, starts_of, strays
from hcodec_core.models.base import Codec
from hcodec_core.models.conversion import GoldenCase
from hcodec_core.models.loading import load_codec
from hcodec_core.models.registry import FAMILIES, FamilyConversion, conversion
from hcodec_core.tokens import EncodeSettings, TokenBatch

Codes = npt.NDArray[np.int32]

TIE_MARGIN = 1e-4
"""A decision whose float64 relative margin is below this may differ between compute classes."""
WAVE_TOLERANCE = 1e-4
"""Largest difference of a waveform, relative to its peak."""
_NOISE = 2.0**-26
"""Deviation of the noise that tells steady codes, in peaks: half a float32 step of the peak."""
_NUM_NOISES = 16


@dataclass(frozen=True)
class ParityRow:
    """Outcome of one golden case.

    num_codes: codes compared; num_equal: equal ones. num_ties: frames (of a stream) whose first
    differing code is a near tie. num_unsteady: other frames that differ, whose codes change already
    under noise below float32's resolution of the clip's peak: rounding decides them, which another
    machine does otherwise (H-Codec 2.0 as published; its docs page says why). wave_difference:
    largest difference over the recorded peak, when decoding the recorded codes. num_boundary_ties:
    base frames at which a token of a variable rate begins on one side only, where the similarity is
    as good as the threshold; codes are then compared with tokens made to begin as recorded. agrees:
    every difference is a near tie or unsteady, and the waveform is within ``WAVE_TOLERANCE``.
    """

    codec: str
    case: str
    num_codes: int
    num_equal: int
    num_ties: int
    wave_difference: float
    agrees: bool
    num_boundary_ties: int = 0
    num_unsteady: int = 0


def run_parity(folders: Sequence[Path]) -> list[ParityRow]:
    """Convert, encode and decode each golden folder (format: its NOTES) and compare.

    Raises:
        ConfigError: A folder has no ``config.json``, or no family knows it.
        CheckpointError: Its checkpoint cannot be converted.
    """
    rows: list[ParityRow] = []
    with tempfile.TemporaryDirectory(prefix="hcodec-parity-") as work:
        for folder in folders:
            family = _family_of(folder)
            cases = family.golden_cases(folder, Path(work))
            rows.extend(_compare(case) for case in cases)
    return rows


def _family_of(folder: Path) -> FamilyConversion:
    try:
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no readable config.json: it is no golden folder."
        ) from error
    for name in FAMILIES:
        family = conversion(name)
        if family.recognises_golden(config):
            return family
    raise ConfigError(f"No codec family knows the golden folder {folder}.")


def _compare(case: GoldenCase) -> ParityRow:
    settings = EncodeSettings(compute_class=compute_class("cpu"), threshold=case.threshold)
    codec = load_codec(str(case.codec_path), settings)
    audio = torch.from_numpy(case.audio)[None, None]
    num_samples = torch.tensor([audio.shape[2]])
    tokens = codec.encode(audio, num_samples)
    boundaries = _stray_boundaries(codec, case, tokens)
    boundaries_agree = all(margin < TIE_MARGIN for margin in boundaries.values())
    if boundaries and boundaries_agree:
        assert case.frame_spans is not None
        # Tokens that begin elsewhere are other tokens: there is nothing to compare codes with.
        tokens = codec.encode(audio, num_samples, forced(case.frame_spans))
    num_codes = sum(codes.size for codes in case.codes.values())
    found = _compare_codes(codec, case, tokens)
    difference = _wave_difference(codec, case)
    return ParityRow(
        codec=codec.spec.name,
        case=case.name,
        num_codes=num_codes,
        num_equal=found.num_equal,
        num_ties=found.num_ties,
        num_unsteady=found.num_unsteady,
        wave_difference=difference,
        agrees=(
            boundaries_agree
            and found.num_different == found.num_ties + found.num_unsteady
            and difference <= WAVE_TOLERANCE
        ),
        num_boundary_ties=sum(margin < TIE_MARGIN for margin in boundaries.values()),
    )


def _stray_boundaries(codec: Codec, case: GoldenCase, tokens: TokenBatch) -> dict[int, float]:
    """Float64 margins of the base frames at which tokens begin on one side only."""
    if case.frame_spans is None or tokens.frame_spans is None:
        return {}
    found = tokens.frame_spans[0, : int(tokens.num_frames[0])]
    if np.array_equal(found, case.frame_spans):
        return {}
    if found.sum() != case.frame_spans.sum():
        return {0: np.inf}
    margins = start_margins(copy.deepcopy(codec).double(), case.audio)
    sides = [
        strays(starts_of(spans), margins, codec.max_frame_span)
        for spans in (found, case.frame_spans)
    ]
    return sides[0] | sides[1]


@dataclass
class _Comparison:
    """Equal codes; (stream, frame) pairs that differ, near ties among them, unsteady others."""

    num_equal: int = 0
    num_different: int = 0
    num_ties: int = 0
    num_unsteady: int = 0


def _compare_codes(codec: Codec, case: GoldenCase, tokens: TokenBatch) -> _Comparison:
    total = _Comparison()
    judge: _Judge | None = None
    for name, expected in case.codes.items():
        found = tokens.clip(0)[name][: expected.shape[0]]
        if found.shape != expected.shape:
            # Another number of frames is no near tie, however many codes happen to agree.
            total.num_different += expected.shape[1]
            continue
        equal = found == expected
        total.num_equal += int(equal.sum())
        frames = np.flatnonzero(~equal.all(axis=0))
        total.num_different += len(frames)
        if len(frames):
            judge = judge or _Judge(codec, case)
            ties = judge.ties(name, found[:, frames], expected[:, frames], frames)
            total.num_ties += int(ties.sum())
            others = frames[~ties]
            total.num_unsteady += _num_unsteady(codec, case, name, found, others)
    return total


def _num_unsteady(
    codec: Codec, case: GoldenCase, stream: str, found: Codes, frames: npt.NDArray[np.intp]
) -> int:
    """How many of ``frames`` change, at the recording's first difference or before, under noise.

    ``found``: [Q, T]. None does in a case of a variable rate, where frames could move.
    """
    if len(frames) == 0 or case.frame_spans is not None:
        return 0
    audio = torch.from_numpy(case.audio)[None, None]
    noise = torch.Generator().manual_seed(0)
    moved = np.zeros(found.shape, bool)
    for _ in range(_NUM_NOISES):
        other = audio + _NOISE * audio.abs().max() * torch.randn(audio.shape, generator=noise)
        codes = codec.encode(other, torch.tensor([audio.shape[2]])).clip(0)[stream]
        moved |= codes[: len(found)] != found
    first = (found != case.codes[stream]).argmax(axis=0)
    return sum(bool(moved[: first[frame] + 1, frame].any()) for frame in frames)


class _Judge:
    """Float64 codes and margins of one case."""

    def __init__(self, codec: Codec, case: GoldenCase) -> None:
        exact = copy.deepcopy(codec).double()
        audio = torch.from_numpy(case.audio)[None, None]
        self._frames = exact.encode_frames(
            audio,
            torch.tensor([audio.shape[2]]),
            with_margins=True,
            starts=None if case.frame_spans is None else forced(case.frame_spans),
        )

    def ties(
        self, stream: str, found: Codes, expected: Codes, frames: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.bool_]:
        """Whether the first decision of a frame that is not unanimous has a small margin.

        ``found`` and ``expected`` are [Q, len(frames)].
        """
        assert self._frames.margins is not None
        codes = self._frames.codes[stream][0].cpu().numpy()[: len(found), frames]
        margins = self._frames.margins[stream][0].cpu().numpy()[: len(found), frames]
        first = ((found != expected) | (found != codes)).argmax(axis=0)
        small: npt.NDArray[np.bool_] = margins[first, np.arange(len(frames))] < TIE_MARGIN
        return small


def _wave_difference(codec: Codec, case: GoldenCase) -> float:
    if case.recon is None:
        return 0.0
    spans = case.frame_spans
    num_frames = next(iter(case.codes.values())).shape[1]
    tokens = TokenBatch(
        codes={name: codes[None].astype(np.int32) for name, codes in case.codes.items()},
        num_frames=np.array([num_frames]),
        num_samples=np.array([len(case.recon)]),
        encode_id=codec.spec.encode_id,
        codebook_id=codec.spec.codebook_id,
        frame_spans=None if spans is None else spans[None].astype(np.int32),
    )
    decoded = codec.decode(tokens, case.num_codebooks)[0, 0].numpy()
    peak = float(np.abs(case.recon).max())
    return float(np.abs(decoded - case.recon).max()) / max(peak, 1e-12)
