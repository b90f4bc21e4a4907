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
from hcodec_core.models.base import Codec
from hcodec_core.models.conversion import GoldenCase
from hcodec_core.models.loading import load_codec
from hcodec_core.models.registry import FAMILIES, FamilyConversion, conversion
from hcodec_core.tokens import EncodeSettings, TokenBatch

TIE_MARGIN = 1e-4
"""A decision whose float64 relative margin is below this may differ between compute classes."""
WAVE_TOLERANCE = 1e-4
"""Largest difference of a waveform, relative to its peak."""


@dataclass(frozen=True)
class ParityRow:
    """Outcome of one golden case.

    num_codes: codes compared; num_equal: equal ones. num_ties: frames (of a stream) whose first
    differing code is a near tie. wave_difference: largest difference over the recorded peak, when
    decoding the recorded codes. agrees: every difference is a near tie and the waveform is within
    ``WAVE_TOLERANCE``.
    """

    codec: str
    case: str
    num_codes: int
    num_equal: int
    num_ties: int
    wave_difference: float
    agrees: bool


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
    tokens = codec.encode(audio, torch.tensor([audio.shape[2]]))
    num_codes = sum(codes.size for codes in case.codes.values())
    num_equal, num_different_frames, num_ties = _compare_codes(codec, case, tokens)
    difference = _wave_difference(codec, case)
    return ParityRow(
        codec=codec.spec.name,
        case=case.name,
        num_codes=num_codes,
        num_equal=num_equal,
        num_ties=num_ties,
        wave_difference=difference,
        agrees=num_different_frames == num_ties and difference <= WAVE_TOLERANCE,
    )


def _compare_codes(codec: Codec, case: GoldenCase, tokens: TokenBatch) -> tuple[int, int, int]:
    """Equal codes, (stream, frame) pairs that differ, and how many of these are near ties."""
    num_equal = num_different = num_ties = 0
    judge: _Judge | None = None
    for name, expected in case.codes.items():
        found = tokens.clip(0)[name][: expected.shape[0]]
        if found.shape != expected.shape:
            # Another number of frames is no near tie, however many codes happen to agree.
            num_different += expected.shape[1]
            continue
        equal = found == expected
        num_equal += int(equal.sum())
        frames = np.flatnonzero(~equal.all(axis=0))
        num_different += len(frames)
        if len(frames):
            judge = judge or _Judge(codec, case)
            num_ties += judge.count_ties(name, found[:, frames], expected[:, frames], frames)
    return num_equal, num_different, num_ties


class _Judge:
    """Float64 codes and margins of one case."""

    def __init__(self, codec: Codec, case: GoldenCase) -> None:
        exact = copy.deepcopy(codec).double()
        audio = torch.from_numpy(case.audio)[None, None]
        self._frames = exact.encode_frames(audio, torch.tensor([audio.shape[2]]), with_margins=True)

    def count_ties(
        self,
        stream: str,
        found: npt.NDArray[np.int32],
        expected: npt.NDArray[np.int32],
        frames: npt.NDArray[np.intp],
    ) -> int:
        """Frames whose first decision that is not unanimous has a small margin.

        ``found`` and ``expected`` are [Q, len(frames)].
        """
        assert self._frames.margins is not None
        codes = self._frames.codes[stream][0].cpu().numpy()[: len(found), frames]
        margins = self._frames.margins[stream][0].cpu().numpy()[: len(found), frames]
        first = ((found != expected) | (found != codes)).argmax(axis=0)
        return int((margins[first, np.arange(len(frames))] < TIE_MARGIN).sum())


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
