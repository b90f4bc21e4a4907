"""Validation: how well the codec rebuilds clips that it is never trained on.

Shape letters: B batch, N sample.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hcodec_core.audio.native import Samples
from hcodec_core.errors import (
    AudioError,
    ConfigError,
    HCodecError,
    ObjectMissingError,
    QuarantineReason,
    SourceChangedError,
)
from hcodec_core.training.batches import SampleDataset
from hcodec_core.training.learner import Learner
from hcodec_core.training.ranks import Ranks
from hcodec_core.training.sources import SourceFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutClip:
    """One clip: float32 [N], N a hop multiple."""

    uri: str
    audio: Samples


def read_held_out(
    dataset: SampleDataset,
    files: Sequence[SourceFile],
    max_samples: int,
    hop_length: int,
    ranks: Ranks,
) -> list[HeldOutClip]:
    """This rank's share of the held-out files, each cut to ``max_samples`` and whole hops.

    Raises ``ConfigError`` when no file on any rank can be used; says why.
    """
    clips: list[HeldOutClip] = []
    faults: list[HCodecError] = []
    for file in files[ranks.rank :: ranks.size]:
        try:
            audio = dataset.clip(file, max_samples)
            audio = audio[: len(audio) // hop_length * hop_length]
            if len(audio):
                clips.append(HeldOutClip(file.uri, audio))
        except (AudioError, SourceChangedError, ObjectMissingError) as error:
            logger.warning("Held-out file %s is left out: %s", file.uri, error)
            faults.append(error)
    totals = ranks.gather((len(clips), [(_reason(error), str(error)) for error in faults]))
    if not any(count for count, _ in totals):
        reasons = [reason for _, each in totals for reason in each]
        raise ConfigError(_all_bad(reasons, len(files)))
    return clips


def _reason(error: HCodecError) -> str:
    return error.reason.value if isinstance(error, AudioError) else "missing"


def _all_bad(reasons: Sequence[tuple[str, str]], num_files: int) -> str:
    if reasons and all(reason == QuarantineReason.UNSUPPORTED_RATE for reason, _ in reasons):
        return f"The data has another sample rate than the codec: {reasons[0][1]}"
    last = f" (last: {reasons[-1][1]})" if reasons else ""
    return (
        f"None of the {num_files} held-out files can be used{last}: the held-out set would be "
        "empty; check the sources."
    )


def validate(learner: Learner, clips: Sequence[HeldOutClip], ranks: Ranks) -> dict[str, float]:
    """Means over all clips of all ranks: multi-scale mel and spectral distance, level error in dB.

    ``validation/mel`` is the score by which checkpoints are compared.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    with learner.as_exported(), torch.no_grad():
        for clip in clips:
            audio = torch.from_numpy(clip.audio)[None, None].to(learner.device)
            decoded = learner.objective.reconstruct(audio).float()
            sums += torch.tensor([*_distances(learner, decoded, audio), 1.0], dtype=torch.float64)
    totals = ranks.sum_(sums.to(learner.device)).tolist()
    names = ("validation/mel", "validation/spectral", "validation/level_db")
    return {name: total / totals[-1] for name, total in zip(names, totals, strict=False)}


def _distances(learner: Learner, decoded: Tensor, audio: Tensor) -> tuple[float, float, float]:
    levels = [10 * torch.log10(x.square().mean() + 1e-10) for x in (decoded, audio)]
    return (
        learner.mel(decoded, audio).item(),
        learner.spectral(decoded, audio).item(),
        (levels[0] - levels[1]).abs().item(),
    )


def rebuilt(learner: Learner, clip: HeldOutClip) -> Samples:
    """What the codec as it would be exported makes of a clip."""
    with learner.as_exported(), torch.no_grad():
        audio = torch.from_numpy(clip.audio)[None, None].to(learner.device)
        samples: Samples = learner.objective.reconstruct(audio).float()[0, 0].cpu().numpy()
    return np.ascontiguousarray(samples)
