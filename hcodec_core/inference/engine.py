"""Running a codec over clips of any length, so that no clip's codes depend on its company.

In mode ``exact`` a clip runs in a batch whose shape follows from its own length alone
(``ShapeRule``); rows left over stay zero. Together with fixed threads and plain float32 arithmetic
that makes its codes a function of the audio and the codec's settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hcodec_core.errors import AudioError, ConfigError, QuarantineReason
from hcodec_core.models.base import Codec, TokenStarts
from hcodec_core.tokens import Codes, TokenBatch

Clip = npt.NDArray[np.float32]
Cuts = Sequence[int]
"""Base frames of a clip at which a token has to begin."""


@dataclass(frozen=True)
class ClipTokens:
    """Tokens of one clip: codes per stream int32 [Q, T], T = num_frames.

    num_samples: length of the audio at the codec's sample rate. frame_spans: int32 [T], base frames
    per token, only for variable rates.
    """

    codes: Mapping[str, Codes]
    num_frames: int
    num_samples: int
    frame_spans: npt.NDArray[np.int32] | None = None


def compute_class(device: str | torch.device, num_threads: int = 1) -> str:
    """Name of what decides bits beside audio and codec: device kind and library build.

    Such as ``cpu-avx512-torch2.13.0`` or ``nvidia-h200-torch2.13.0-cu128``. On a CPU, products
    split over several threads round otherwise, so ``num_threads`` above 1 is part of the name.

    Raises ``ConfigError`` when the device is not there.
    """
    device = torch.device(device)
    version = torch.__version__.partition("+")[0]
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability().lower()
        threads = "" if num_threads == 1 else f"-threads{num_threads}"
        return f"cpu-{_plain(capability)}-torch{version}{threads}"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(f"There is no device {str(device)!r} here: use cpu, or cuda where it is.")
    runtime = (torch.version.cuda or "").replace(".", "")
    return f"{_plain(torch.cuda.get_device_name(device))}-torch{version}-cu{runtime}"


class Engine:
    """Encodes and decodes lists of clips with one codec on one device."""

    def __init__(self, codec: Codec, num_threads: int = 1) -> None:
        """Take a loaded codec; ``num_threads`` are CPU threads per product.

        Raises:
            ConfigError: The codec's settings name another compute class than this machine's.
        """
        wanted = codec.spec.settings.compute_class
        found = compute_class(codec.device, num_threads)
        if wanted != found:
            raise ConfigError(
                f"These tokens are to be made on {wanted}, this is {found}: codes may differ at "
                "near ties, so run on the planned kind of machine, or plan a dataset for this one."
            )
        self.codec = codec
        self.num_threads = num_threads

    def encode_clips(
        self, clips: Sequence[Clip], cuts: Sequence[Cuts] | None = None
    ) -> list[ClipTokens]:
        """Tokens of each clip, in the order of ``clips``.

        Args:
            clips: float32 [N] each, at the codec's sample rate, channel rule and gain applied.
            cuts: For each clip, where no token may lie across; only variable rates need them.

        Raises:
            AudioError: A clip is empty, too short or not finite; carries the quarantine reason.
            ConfigError: A clip has another shape or type.
        """
        for index, clip in enumerate(clips):
            self._check_clip(index, clip)
        done: dict[int, ClipTokens] = {}
        with _arithmetic(self.num_threads, self._is_exact):
            for batch in self._encode_batches([len(clip) for clip in clips]):
                done.update(self._encode_batch(batch, clips, cuts))
        return [done[index] for index in range(len(clips))]

    def decode_clips(
        self,
        clips: Sequence[ClipTokens],
        num_codebooks: int | None = None,
        codebook_id: str | None = None,
    ) -> list[Clip]:
        """Audio of each clip, float32 [num_samples], in the order of ``clips``.

        Args:
            clips: Tokens made with this codec's codebooks.
            num_codebooks: Use only the first so many codebooks of every stream.
            codebook_id: Codebooks with which the tokens were made, where they come from elsewhere.

        Raises:
            ForeignTokensError: The tokens belong to another codec.
            ConfigError: Codes out of range, or lengths that do not fit.
        """
        done: dict[int, Clip] = {}
        sizes = [
            self.codec.base_frames(index, clip.num_frames, clip.frame_spans)
            for index, clip in enumerate(clips)
        ]
        with _arithmetic(self.num_threads, self._is_exact):
            for batch in self._batches(sizes):
                tokens = self._token_batch(batch, clips, codebook_id)
                audio = self.codec.decode(tokens, num_codebooks).cpu().numpy()
                for row, index in enumerate(batch.indices):
                    done[index] = audio[row, 0, : clips[index].num_samples].copy()
        return [done[index] for index in range(len(clips))]

    @property
    def _is_exact(self) -> bool:
        return self.codec.spec.settings.mode == "exact"

    def _check_clip(self, index: int, clip: Clip) -> None:
        if clip.ndim != 1 or clip.dtype != np.float32:
            raise ConfigError(
                f"Clip {index} has shape {clip.shape} and type {clip.dtype}; expected float32 [N]."
            )
        if len(clip) == 0:
            raise AudioError(QuarantineReason.EMPTY, f"Clip {index} has no samples.")
        if len(clip) < self.codec.spec.min_samples:
            raise AudioError(
                QuarantineReason.TOO_SHORT,
                f"Clip {index} has {len(clip)} samples; codec {self.codec.spec.name} needs at "
                f"least {self.codec.spec.min_samples}.",
            )
        if not np.isfinite(clip).all():
            raise AudioError(
                QuarantineReason.NON_FINITE, f"Clip {index} has samples that are not finite."
            )

    def _encode_batches(self, num_samples: Sequence[int]) -> Iterator[_Batch]:
        """Batches of clips; ``size`` in samples."""
        if self.codec.batching == "equal-length":
            yield from _equal_lengths(num_samples, 1 if self._is_exact else None)
            return
        hop = self.codec.hop_length
        for batch in self._batches([self.codec.spec.num_frames(size) for size in num_samples]):
            yield _Batch(batch.indices, batch.num_rows, batch.size * hop)

    def _batches(self, num_frames: Sequence[int]) -> Iterator[_Batch]:
        """Batches of clips, long ones first; ``size`` in base frames."""
        shapes, rate = self.codec.spec.settings.shapes, self.codec.spec.frame_rate
        bounds = {size: shapes.bucket_frames(size) for size in set(num_frames)}
        order = sorted(range(len(num_frames)), key=lambda index: -num_frames[index])
        while order:
            longest = num_frames[order[0]]
            bound = bounds[longest]
            rows = shapes.bucket_rows(bound, rate)
            chosen = order[:rows]
            if self._is_exact:
                chosen = [index for index in chosen if bounds[num_frames[index]] == bound]
                yield _Batch(chosen, rows, bound)
            else:
                yield _Batch(chosen, len(chosen), longest)
            order = order[len(chosen) :]

    def _encode_batch(
        self, batch: _Batch, clips: Sequence[Clip], cuts: Sequence[Cuts] | None
    ) -> Iterator[tuple[int, ClipTokens]]:
        audio = np.zeros((batch.num_rows, 1, batch.size), dtype=np.float32)
        num_samples = np.zeros(batch.num_rows, dtype=np.int64)
        for row, index in enumerate(batch.indices):
            audio[row, 0, : len(clips[index])] = clips[index]
            num_samples[row] = len(clips[index])
        starts = None if cuts is None else self._starts(batch, cuts)
        tokens = self.codec.encode(torch.from_numpy(audio), torch.from_numpy(num_samples), starts)
        for row, index in enumerate(batch.indices):
            yield index, _clip_of(tokens, row)

    def _starts(self, batch: _Batch, cuts: Sequence[Cuts]) -> TokenStarts:
        num_frames = -(-batch.size // self.codec.hop_length)
        frames = torch.zeros(batch.num_rows, num_frames, dtype=torch.bool)
        for row, index in enumerate(batch.indices):
            frames[row, list(cuts[index])] = True
        return TokenStarts(frames)

    def _token_batch(
        self, batch: _Batch, clips: Sequence[ClipTokens], codebook_id: str | None
    ) -> TokenBatch:
        chosen = [clips[index] for index in batch.indices]
        unused = batch.num_rows - len(chosen)
        spec = self.codec.spec
        spans = [_at_row(clip.frame_spans) for clip in chosen if clip.frame_spans is not None]
        return TokenBatch(
            codes={
                stream: _stack([clip.codes[stream] for clip in chosen], batch)
                for stream in chosen[0].codes
            },
            num_frames=np.array([clip.num_frames for clip in chosen] + [0] * unused),
            num_samples=np.array([clip.num_samples for clip in chosen] + [0] * unused),
            encode_id=spec.encode_id,
            codebook_id=codebook_id or spec.codebook_id,
            frame_spans=_stack(spans, batch)[:, 0] if spans else None,
        )


@dataclass(frozen=True)
class _Batch:
    """Clips that run together: ``num_rows`` rows of ``size`` samples or base frames."""

    indices: Sequence[int]
    num_rows: int
    size: int


def _equal_lengths(num_samples: Sequence[int], max_rows: int | None) -> Iterator[_Batch]:
    by_length: dict[int, list[int]] = {}
    for index, size in enumerate(num_samples):
        by_length.setdefault(size, []).append(index)
    for size, indices in by_length.items():
        rows = max_rows or len(indices)
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            yield _Batch(chosen, len(chosen), size)


def _clip_of(tokens: TokenBatch, row: int) -> ClipTokens:
    num_frames = int(tokens.num_frames[row])
    spans = tokens.frame_spans
    return ClipTokens(
        codes={name: codes.copy() for name, codes in tokens.clip(row).items()},
        num_frames=num_frames,
        num_samples=int(tokens.num_samples[row]),
        frame_spans=None if spans is None else spans[row, :num_frames].copy(),
    )


def _at_row(spans: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return spans[None, :]


def _stack(arrays: Sequence[npt.NDArray[np.int32]], batch: _Batch) -> npt.NDArray[np.int32]:
    """Arrays [Q, T] as one [num_rows, Q, size], zero where there is nothing."""
    stacked = np.zeros((batch.num_rows, arrays[0].shape[0], batch.size), dtype=np.int32)
    for row, array in enumerate(arrays):
        stacked[row, :, : array.shape[1]] = array
    return stacked


@contextmanager
def _arithmetic(num_threads: int, is_exact: bool) -> Iterator[None]:
    """Fix what torch may choose freely, and put it back afterwards.

    Besides threads: TF32 and kernel choice by timing are off in mode exact. The forward passes hold
    no atomic additions, so kernels are deterministic without torch's global switch, which would
    demand an environment variable.
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
        cudnn.allow_tf32, cudnn.benchmark = not is_exact, not is_exact
        cudnn.deterministic, matmul.allow_tf32 = is_exact, not is_exact
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:4]
        matmul.allow_tf32 = before[4]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
