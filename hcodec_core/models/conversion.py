"""What all families' converters share: reading released checkpoints, and golden cases as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ConvertRequest:
    """One conversion of a released checkpoint into a codec folder.

    checkpoint_path: ``.pt`` / ``.pth`` / ``.ckpt`` (read with ``weights_only=True``) or
    ``.safetensors``. ssl: local folder, or hub id, of the self-supervised model, where the
    checkpoint does not hold it. config_path: the family's configuration file, where shapes alone do
    not tell. options: switches of a family, such as ``{"weights": "ema"}``.
    """

    checkpoint_path: Path
    out_path: Path
    ssl: str | None = None
    config_path: Path | None = None
    name: str | None = None
    is_trained: bool = True
    weights_licence: str = "unknown"
    source: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GoldenCase:
    """One recorded input with what the published code gives for it.

    audio: float32 [N], gain already applied. codes: per stream int32 [Q, T], plain (no offsets).
    recon: float32 [M], published decode of those codes, untrimmed; None where there is none.
    frame_spans: int32 [T] for variable rates. threshold: for variable rates. num_codebooks: how
    many codebooks ``recon`` used; None for all.
    """

    name: str
    codec_path: Path
    audio: npt.NDArray[np.float32]
    codes: Mapping[str, npt.NDArray[np.int32]]
    recon: npt.NDArray[np.float32] | None = None
    frame_spans: npt.NDArray[np.int32] | None = None
    threshold: float | None = None
    num_codebooks: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
