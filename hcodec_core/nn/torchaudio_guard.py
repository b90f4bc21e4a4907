"""Importing torchaudio, and what imports it, beside a CPU build of torch."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_EXTENSION = "torchaudio._extension"


def guard_torchaudio() -> None:
    """Make ``import torchaudio`` work beside a CPU build of torch; call before importing it.

    The wheels of torchaudio 2.11 link CUDA libraries. Beside a CPU build their import fails, and
    with it that of every audio module of transformers. A stand-in for the module that loads those
    libraries leaves what is written in Python working (resampling, mel filters). With a CUDA build,
    or when torchaudio was imported already, nothing is done.
    """
    if torch.version.cuda is not None or _EXTENSION in sys.modules:
        return
    stand_in = ModuleType(_EXTENSION)
    vars(stand_in).update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _check_cuda_version=lambda: None,
        fail_if_no_align=lambda function: function,
    )
    sys.modules[_EXTENSION] = stand_in
