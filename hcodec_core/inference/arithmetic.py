"""Arithmetic of the two modes: what torch may choose freely is fixed while a batch runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Mode = Literal["exact", "fast"]


_WIDE_PARAMETERS = 50_000_000


def narrow_type(device: torch.device, mode: Mode, num_parameters: int) -> torch.dtype | None:
    """Type of products and convolutions in this mode; None: float32 throughout.

    Mode fast runs in bfloat16 where that helps: on GPUs, and for codecs of 50 million parameters
    or more on CPUs with AMX. (Measured there on one core: full-size codecs up to 1.5 times as fast,
    nano with its few channels 4 times slower.)
    """
    if mode == "exact":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if num_parameters < _WIDE_PARAMETERS:
        return None
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("amx_bf16") else None


@contextmanager
def encoding(
    device: torch.device, mode: Mode, num_threads: int, narrow: torch.dtype | None
) -> Iterator[None]:
    """While it lasts, arithmetic is that of encoding in ``mode``, products in type ``narrow``.

    What autocast leaves in float32 (code search, residual streams, mel features) is meant to be:
    TF32 is off in both modes.
    """
    is_narrow = narrow is not None
    with _fixed(num_threads, is_deterministic=mode == "exact", has_tf32=False):
        with torch.autocast(device.type, narrow, enabled=is_narrow):
            yield


@contextmanager
def decoding(mode: Mode, num_threads: int) -> Iterator[None]:
    """While it lasts, arithmetic is that of decoding: float32, in mode fast with TF32 products."""
    is_exact = mode == "exact"
    with _fixed(num_threads, is_deterministic=is_exact, has_tf32=not is_exact):
        yield


@contextmanager
def _fixed(num_threads: int, *, is_deterministic: bool, has_tf32: bool) -> Iterator[None]:
    """Fix what torch may choose freely, and put it back afterwards.

    Kernels are never chosen by timing: in mode exact that would decide bits, in mode fast every
    batch has another shape and would be timed anew. The forward passes hold no atomic additions, so
    kernels are deterministic without torch's global switch, which would demand an environment
    variable.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        torch.get_num_threads(),
        cudnn.allow_tf32,
        cudnn.benchmark,
        cudnn.deterministic,
        matmul.allow_tf32,
    )
    try:
        torch.set_num_threads(num_threads)
        cudnn.allow_tf32 = matmul.allow_tf32 = has_tf32
        cudnn.benchmark, cudnn.deterministic = False, is_deterministic
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:4]
        matmul.allow_tf32 = before[4]
