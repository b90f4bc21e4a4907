"""Codecs whose layers cannot know where a clip ends: rows run beside rows of their own length.

Shape letters: B batch, R row of one group, Q codebook, T token frame, N sample.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from hcodec_core.models.base import Codec, FrameCodes
from hcodec_core.nn.quantize import Quantised


class EqualLengthCodec(Codec):
    """A codec of one stream that takes a batch apart into groups of equal length.

    In mode exact every row runs alone, at its own length: its codes are those of the clip alone,
    bit for bit. In mode fast rows of equal length run together. Rows without a frame do not run.
    """

    batching = "equal-length"

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        hop = self.hop_length
        num_frames = (num_samples + hop - self.min_tail_samples) // hop
        stream = self.streams[0]
        shape = (len(audio), stream.num_codebooks, int(num_frames.max()))
        codes = torch.zeros(shape, dtype=torch.int64, device=audio.device)
        margins = torch.zeros(shape, dtype=audio.dtype, device=audio.device)
        for rows, num_run in self._groups(self._run_samples(num_samples) * (num_frames > 0)):
            quantised = self._encode_alike(audio[rows, :, :num_run], with_margins)
            found = quantised.codes.shape[2]
            assert found == int(num_frames[rows[0]]), "the model does not follow its law of lengths"
            codes[rows, :, :found] = quantised.codes
            if quantised.margins is not None:
                margins[rows, :, :found] = quantised.margins
        return FrameCodes(
            codes={stream.name: codes},
            num_frames=num_frames,
            margins={stream.name: margins} if with_margins else None,
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        codes = frames.codes[self.streams[0].name]
        audio = torch.zeros(
            len(codes), 1, codes.shape[2] * self.hop_length, dtype=self.dtype, device=self.device
        )
        for rows, num_run in self._groups(frames.num_frames):
            decoded = self._decode_alike(codes[rows, :, :num_run])[:, :, : audio.shape[2]]
            audio[rows, :, : decoded.shape[2]] = decoded
        return audio

    def _groups(self, lengths: Tensor) -> Iterator[tuple[list[int], int]]:
        """Rows that run together, with their length; rows of length 0 are left out."""
        groups: dict[tuple[int, int], list[int]] = {}
        is_exact = self._spec is None or self._spec.settings.mode == "exact"
        for row, length in enumerate(lengths.tolist()):
            if length:
                groups.setdefault((length, row if is_exact else 0), []).append(row)
        for (length, _), rows in groups.items():
            yield rows, length

    @abstractmethod
    def _run_samples(self, num_samples: Tensor) -> Tensor:
        """How many samples of each row go into the model: its own, or these and some padding."""

    @abstractmethod
    def _encode_alike(self, audio: Tensor, with_margins: bool) -> Quantised:
        """Codes [R, Q, T] of audio [R, 1, N] that is signal to its last sample."""

    @abstractmethod
    def _decode_alike(self, codes: Tensor) -> Tensor:
        """Audio [R, 1, N] of codes [R, q, T], all of them valid."""
