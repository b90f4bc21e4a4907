"""Running a codec over clips of any length, so that no clip's codes depend on its company.

In mode ``exact`` a clip runs in a batch whose shape follows from its own length alone
(``ShapeRule``); rows left over stay zero. Together with fixed threads and plain float32 arithmetic
that makes its codes a function of the audio and the codec's settings. In mode ``fast`` clips of
like length run together in any shape, as many as memory holds (see ``arithmetic``, ``shaping``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from hcodec_core.audio.segments import SegmentRule
from hcodec_core.errors import AudioError, ConfigError, QuarantineReason
from hcodec_core.inference.arithmetic import Mode, decoding, encoding, narrow_type
from hcodec_core.inference.batch_runner import BatchRunner
from hcodec_core.inference.clips import Clip as Clip
from hcodec_core.inference.clips import ClipTokens as ClipTokens
from hcodec_core.inference.clips import Cuts as Cuts
from hcodec_core.inference.long_audio import TokenPiece, faded, is_long, token_pieces
from hcodec_core.inference.shaping import (
    Batch,
    BatchBudget,
    in_equal_lengths,
    in_fixed_shapes,
    in_free_shapes,
)
from hcodec_core.models.base import Codec, TokenStarts
from hcodec_core.tokens import CodecSpec, EncodeSettings, TokenBatch

_FADE_SECONDS = 0.05


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
        settings = codec.spec.settings
        self.mode: Mode = settings.mode
        size = codec.spec.manifest.num_parameters
        self.narrow_type = narrow_type(codec.device, self.mode, size)
        self._rule = SegmentRule.of(
            sample_rate=codec.sample_rate,
            hop_length=codec.hop_length,
            segment_seconds=settings.segment_seconds,
            halo_seconds=settings.halo_seconds,
        )
        runs_alone = settings.shapes.max_rows == 1 and self.narrow_type is None
        self._solo = codec.solo_encoder() if runs_alone else None
        self._encoder, self._decoder = (
            BatchRunner(codec.device, self.mode, settings.shapes) for _ in range(2)
        )

    def in_mode(self, mode: Mode) -> Engine:
        """The same codec, its weights shared, in another mode with the shapes that suit it."""
        spec = self.codec.spec
        values = spec.settings.model_dump(exclude={"shapes"}) | {"mode": mode}
        settings = EncodeSettings.model_validate(values)
        codec = copy.copy(self.codec).bind(CodecSpec(spec.manifest, settings))
        return Engine(codec, self.num_threads)

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
        with encoding(self.codec.device, self.mode, self.num_threads, self.narrow_type):
            done = self._encoder.run(
                self._encode_batches([len(clip) for clip in clips]),
                lambda batch: self._encode_batch(batch, clips, cuts),
                self.codec.sample_rate,
            )
        return [done[index] for index in range(len(clips))]

    def decode_clips(
        self,
        clips: Sequence[ClipTokens],
        num_codebooks: int | None = None,
        codebook_id: str | None = None,
    ) -> list[Clip]:
        """Audio of each clip, float32 [num_samples], in the order of ``clips``.

        A clip longer than a segment of the settings is decoded in pieces (see ``decode_stream``).

        Args:
            clips: Tokens made with this codec's codebooks.
            num_codebooks: Use only the first so many codebooks of every stream.
            codebook_id: Codebooks with which the tokens were made, where they come from elsewhere.

        Raises:
            ForeignTokensError: The tokens belong to another codec.
            ConfigError: Codes out of range, or lengths that do not fit.
        """
        short = [i for i, clip in enumerate(clips) if not is_long(clip.num_samples, self._rule)]
        whole = self._decode_whole([clips[i] for i in short], num_codebooks, codebook_id)
        done = dict(zip(short, whole, strict=True))
        for index in range(len(clips)):
            if index not in done:
                pieces = self.decode_stream(clips[index], num_codebooks, codebook_id)
                done[index] = np.concatenate(list(pieces))
        return [done[index] for index in range(len(clips))]

    def decode_stream(
        self,
        clip: ClipTokens,
        num_codebooks: int | None = None,
        codebook_id: str | None = None,
    ) -> Iterator[Clip]:
        """Audio of a clip of any length in pieces, float32 [n] each, together ``num_samples``.

        Memory does not grow with the clip: it is cut where the encoder would cut it, pieces carry
        the settings' halo and go over into each other. A clip of up to a segment is one piece.
        Arguments and errors: see ``decode_clips``.
        """
        if not is_long(clip.num_samples, self._rule):
            yield self._decode_whole([clip], num_codebooks, codebook_id)[0]
            return
        one = Batch([0], 1, clip.num_frames)
        self.codec.check(self._token_batch(one, [clip], codebook_id))
        fade = min(int(_FADE_SECONDS * self.codec.sample_rate), 2 * self._rule.halo_samples)
        yield from faded(self._decoded_pieces(clip, num_codebooks, codebook_id), fade)

    def _decoded_pieces(
        self, clip: ClipTokens, num_codebooks: int | None, codebook_id: str | None
    ) -> Iterator[tuple[TokenPiece, Clip]]:
        settings, rule = self.codec.spec.settings, self._rule
        longest = (rule.segment_samples + 2 * rule.halo_samples) // rule.hop_length
        rows = settings.shapes.bucket_rows(longest, self.codec.spec.frame_rate)
        pieces = token_pieces(clip, rule)
        while together := list(islice(pieces, rows)):
            tokens = [piece.tokens for piece in together]
            yield from zip(
                together, self._decode_whole(tokens, num_codebooks, codebook_id), strict=True
            )

    def _decode_whole(
        self, clips: Sequence[ClipTokens], num_codebooks: int | None, codebook_id: str | None
    ) -> list[Clip]:
        sizes = [
            self.codec.base_frames(index, clip.num_frames, clip.frame_spans)
            for index, clip in enumerate(clips)
        ]
        with decoding(self.mode, self.num_threads):
            done = self._decoder.run(
                self._batches(sizes, self._decoder.budget),
                lambda batch: self._decode_batch(batch, clips, num_codebooks, codebook_id),
                float(self.codec.spec.frame_rate),
            )
        return [done[index] for index in range(len(clips))]

    @property
    def _is_exact(self) -> bool:
        return self.mode == "exact"

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

    def _encode_batches(self, num_samples: Sequence[int]) -> Iterator[Batch]:
        """Batches of clips; ``size`` in samples."""
        spec, budget = self.codec.spec, self._encoder.budget
        if self.codec.batching == "equal-length":
            yield from in_equal_lengths(num_samples, self._rows_of_length)
            return
        hop = self.codec.hop_length
        for batch in self._batches([spec.num_frames(size) for size in num_samples], budget):
            yield Batch(batch.indices, batch.num_rows, batch.size * hop)

    def _rows_of_length(self, num_samples: int) -> int:
        if self._is_exact:
            return 1
        rows = self._encoder.budget.rows(num_samples / self.codec.sample_rate)
        return min(rows, self.codec.spec.settings.shapes.max_rows)

    def _batches(self, num_frames: Sequence[int], budget: BatchBudget) -> Iterator[Batch]:
        """Batches of clips, long ones first; ``size`` in base frames."""
        shapes, rate = self.codec.spec.settings.shapes, self.codec.spec.frame_rate
        if self._is_exact:
            return in_fixed_shapes(num_frames, shapes, rate)
        return in_free_shapes(num_frames, shapes, rate, budget)

    def _encode_batch(
        self, batch: Batch, clips: Sequence[Clip], cuts: Sequence[Cuts] | None
    ) -> list[tuple[int, ClipTokens]]:
        if self._solo is not None and self.narrow_type is None:
            return [(index, self._encode_alone(clips[index])) for index in batch.indices]
        audio = np.zeros((batch.num_rows, 1, batch.size), dtype=np.float32)
        num_samples = np.zeros(batch.num_rows, dtype=np.int64)
        for row, index in enumerate(batch.indices):
            audio[row, 0, : len(clips[index])] = clips[index]
            num_samples[row] = len(clips[index])
        starts = None if cuts is None else self._starts(batch, cuts)
        tokens = self.codec.encode(torch.from_numpy(audio), torch.from_numpy(num_samples), starts)
        return [(index, _clip_of(tokens, row)) for row, index in enumerate(batch.indices)]

    def _encode_alone(self, clip: Clip) -> ClipTokens:
        assert self._solo is not None
        codes = self._solo(clip)
        return ClipTokens(codes, self.codec.spec.num_frames(len(clip)), len(clip))

    def _decode_batch(
        self,
        batch: Batch,
        clips: Sequence[ClipTokens],
        num_codebooks: int | None,
        codebook_id: str | None,
    ) -> list[tuple[int, Clip]]:
        tokens = self._token_batch(batch, clips, codebook_id)
        audio = self.codec.decode(tokens, num_codebooks).cpu().numpy()
        return [
            (index, audio[row, 0, : clips[index].num_samples].copy())
            for row, index in enumerate(batch.indices)
        ]

    def _starts(self, batch: Batch, cuts: Sequence[Cuts]) -> TokenStarts:
        num_frames = -(-batch.size // self.codec.hop_length)
        frames = torch.zeros(batch.num_rows, num_frames, dtype=torch.bool)
        for row, index in enumerate(batch.indices):
            frames[row, list(cuts[index])] = True
        return TokenStarts(frames)

    def _token_batch(
        self, batch: Batch, clips: Sequence[ClipTokens], codebook_id: str | None
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


def _stack(arrays: Sequence[npt.NDArray[np.int32]], batch: Batch) -> npt.NDArray[np.int32]:
    """Arrays [Q, T] as one [num_rows, Q, size], zero where there is nothing."""
    stacked = np.zeros((batch.num_rows, arrays[0].shape[0], batch.size), dtype=np.int32)
    for row, array in enumerate(arrays):
        stacked[row, :, : array.shape[1]] = array
    return stacked


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
