"""The interface that all codecs share: audio in, tokens out, and back.

Shape letters: B batch, Q codebook, T token frame, N sample, D feature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, final

import numpy as np
import torch
from torch import Tensor, nn

from hcodec_core.errors import AudioError, ConfigError, ForeignTokensError, QuarantineReason
from hcodec_core.tokens import CodecSpec, Codes, TokenBatch, check_tokens

if TYPE_CHECKING:
    from hcodec_core.models.registry import FamilyConfig

Spans = np.ndarray[Any, np.dtype[np.int32]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


class Part(StrEnum):
    """What a tensor of a codec is for; decides which identity it enters (see ``PartDigests``)."""

    ENCODER = "encoder"
    SSL = "ssl"
    CODEBOOKS = "codebooks"
    DECODER = "decoder"
    TRAINING = "training"  # heads that neither encoding nor decoding uses


@dataclass(frozen=True)
class FrameCodes:
    """Codes of a batch on the codec's device: what families return and receive.

    codes: per stream int64 [B, Q, T]; entries past ``num_frames`` are undefined on the way out of
    ``_encode`` and 0 on the way into ``_decode``.
    num_frames: int64 [B], valid token frames, at least 1.
    frame_spans: int64 [B, T], base frames per token, only for variable rates.
    margins: per stream float [B, Q, T], only when asked for: (d2 - d1) / d1 of the squared
    distances to the best and the second best entry.
    start_margins: float [B, T] over base frames, only for variable rates and when asked for: below
    or equal 0 where the codec itself decides that a token begins, and how far that is from the
    opposite. Base frames past a clip's end are undefined. A run between two such beginnings that is
    longer than ``Codec.max_frame_span`` is cut into tokens of that span from its beginning on.
    """

    codes: Mapping[str, Tensor]
    num_frames: Tensor
    frame_spans: Tensor | None = None
    margins: Mapping[str, Tensor] | None = None
    start_margins: Tensor | None = None


@dataclass(frozen=True)
class TokenStarts:
    """Base frames at which tokens have to begin, whatever a codec of variable rate decides.

    frames: bool [B, T]. is_complete: tokens begin there and nowhere else; otherwise the codec adds
    its own beginnings.
    """

    frames: Tensor
    is_complete: bool = False


class SoloEncoder(Protocol):
    """Encodes one clip alone on a CPU: the codes that ``Codec.encode`` gives it, sooner."""

    def __call__(self, clip: np.ndarray[Any, np.dtype[np.float32]]) -> Mapping[str, Codes]:
        """Codes of each stream int32 [Q, T] of a clip float32 [N], N at least 1 and finite."""


class Codec(nn.Module, ABC):
    """A codec: the final ``encode`` and ``decode`` check, mask and trim; a family does the rest.

    A family writes ``_encode``, ``_decode``, ``part_of`` and ``identity``. Its modules
    hold no non-persistent buffers (constants are computed when used), so that a codec can be built
    on the meta device and filled from a file.

    What a family declares:
        batching: ``length-aware``: layers keep padding out, so clips of many lengths share a batch
            and the engine pads them to one shape. ``equal-length``: the layers cannot know where a
            clip ends, so a row runs only beside rows of exactly its own length; the codec itself
            sees to it (``EqualLengthCodec``), one row at a time in mode exact. Whatever batch the
            engine hands over, codes are the same. Padding to a shape and filling up with unused
            rows buys nothing there; sorting clips by exact length is what helps mode fast.
        decodes_prefixes: Whether the first codebooks alone can be decoded (``num_codebooks``).
        min_tail_samples: The law of lengths, see ``CodecManifest``.
        max_frame_span: Base frames that one token spans at most; above 1 for variable rates only.
    """

    family: ClassVar[str]
    batching: ClassVar[Literal["length-aware", "equal-length"]] = "length-aware"
    decodes_prefixes: ClassVar[bool] = True
    min_tail_samples: int = 1
    max_frame_span: int = 1

    def __init__(self, config: FamilyConfig) -> None:
        """Keep what all codecs answer alike; the weights come from the family."""
        super().__init__()
        self.sample_rate = config.sample_rate
        self.hop_length = config.hop_length
        self.streams = config.streams
        self.is_variable_rate = config.is_variable_rate
        self.architecture = config.architecture()
        self._spec: CodecSpec | None = None

    @property
    def spec(self) -> CodecSpec:
        """What this codec is and how it is run. Raises ``ConfigError`` before ``bind``."""
        if self._spec is None:
            raise ConfigError("This codec was built without a manifest: load it with load_codec.")
        return self._spec

    def bind(self, spec: CodecSpec) -> Self:
        """Give the codec its identity and settings; done by ``models.loading``."""
        manifest = spec.manifest
        assert manifest.sample_rate == self.sample_rate
        assert manifest.hop_length == self.hop_length
        assert manifest.streams == self.streams
        assert manifest.min_tail_samples == self.min_tail_samples
        self._spec = spec
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights: float32, or float64 when the codec judges ties."""
        return next(self.parameters()).dtype

    @final
    def encode(
        self, audio: Tensor, num_samples: Tensor, starts: TokenStarts | None = None
    ) -> TokenBatch:
        """Turn audio into tokens.

        Args:
            audio: float32 [B, 1, N] at the codec's sample rate, channel rule and gain already
                applied. What lies past a clip's end is ignored.
            num_samples: int64 [B], length of each clip in samples, 0..N. A row of length 0 is
                unused: it gets no frames.
            starts: Where tokens have to begin, T = ceil(N / hop). Where the rate is fixed every
                frame begins a token anyway.

        Returns:
            Tokens on the CPU; a clip's last hop is zero-padded.

        Raises:
            ConfigError: Wrong shape, type or length, or samples that are not finite.
            AudioError: A clip is too short to have a frame (reason ``too_short``).
        """
        spec = self.spec
        _check_audio(audio, num_samples)
        self._check_long_enough(num_samples)
        frames = self.encode_frames(audio, num_samples, starts=starts)
        return TokenBatch(
            codes={name: _to_int32(codes) for name, codes in frames.codes.items()},
            num_frames=frames.num_frames.cpu().numpy(),
            num_samples=num_samples.cpu().numpy().astype(np.int64),
            encode_id=spec.encode_id,
            codebook_id=spec.codebook_id,
            frame_spans=None if frames.frame_spans is None else _to_int32(frames.frame_spans),
        )

    @final
    def encode_frames(
        self,
        audio: Tensor,
        num_samples: Tensor,
        with_margins: bool = False,
        starts: TokenStarts | None = None,
    ) -> FrameCodes:
        """``encode`` without its checks, results on the codec's device, codes past the end 0.

        ``with_margins`` also returns how clear every decision was.
        """
        num_samples = num_samples.to(self.device)
        audio = _zero_past_end(audio.to(self.device, self.dtype), num_samples, self.hop_length)
        self._stop_training()
        with torch.inference_mode():
            if starts is None or not self.is_variable_rate:
                frames = self._encode(audio, num_samples.clamp(min=1), with_margins)
            else:
                assert starts.frames.shape == (len(audio), audio.shape[2] // self.hop_length)
                starts = replace(starts, frames=starts.frames.to(self.device))
                frames = self._encode_from(audio, num_samples.clamp(min=1), with_margins, starts)
            num_frames = torch.where(num_samples > 0, frames.num_frames, 0)
            return _zero_codes_past_end(frames, num_frames)

    @final
    def decode(self, tokens: TokenBatch, num_codebooks: int | None = None) -> Tensor:
        """Turn tokens back into audio.

        Args:
            tokens: Tokens made with this codec's codebooks, by whatever encoder.
            num_codebooks: Use only the first so many codebooks of every stream.

        Returns:
            float32 [B, 1, N] on the codec's device, N the longest ``num_samples``; zero past each
            clip's end.

        Raises:
            ForeignTokensError: The tokens belong to another codec.
            ConfigError: Codes out of range, lengths that do not fit the codes, or fewer codebooks
                than this codec can decode.
        """
        self.check(tokens)
        frames = self._frames_of(tokens, num_codebooks)
        longest = int(tokens.num_samples.max(initial=0))
        audio = torch.zeros(len(tokens), 1, longest, device=self.device, dtype=self.dtype)
        if longest == 0:
            return audio
        self._stop_training()
        with torch.inference_mode():
            decoded = self._decode(frames)[:, :, :longest]
            audio[:, :, : decoded.shape[2]] = decoded
            ends = torch.from_numpy(tokens.num_samples).to(self.device)
            return audio * (torch.arange(longest, device=self.device) < ends[:, None, None])

    @final
    def check(self, tokens: TokenBatch) -> None:
        """Refuse what ``decode`` cannot decode; raises as it does, but for ``num_codebooks``."""
        check_tokens(tokens, self.spec)
        missing = [stream.name for stream in self.streams if stream.name not in tokens.codes]
        if missing:
            raise ForeignTokensError(
                f"Codec {self.spec.name} needs stream {missing[0]!r}, which these tokens lack."
            )
        self._check_lengths(tokens)

    def forward(self, audio: Tensor, num_samples: Tensor) -> Any:
        """Training pass; families that can be trained replace it. Raises ``ConfigError`` here."""
        raise ConfigError(f"Codec family {self.family!r} has no training pass yet.")

    @abstractmethod
    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        """Codes of audio [B, 1, N], N a hop multiple, zero past each end, lengths at least 1.

        A clip's codes must depend on its own samples alone, whatever else is in the batch.
        """

    def solo_encoder(self) -> SoloEncoder | None:
        """What encodes a clip alone on a CPU sooner than ``encode`` does; None: nothing does.

        The codec's weights must not change while it is used.
        """
        return None

    def _encode_from(
        self, audio: Tensor, num_samples: Tensor, with_margins: bool, starts: TokenStarts
    ) -> FrameCodes:
        """``_encode`` with tokens that begin where they have to; for variable rates only."""
        raise NotImplementedError

    @abstractmethod
    def _decode(self, frames: FrameCodes) -> Tensor:
        """Audio [B, 1, M] of codes with at least one frame; what lies past a clip's end is free."""

    @classmethod
    @abstractmethod
    def part_of(cls, key: str) -> Part:
        """Part to which the tensor ``key`` of the state dict belongs."""

    @abstractmethod
    def identity(self, part: Part) -> Mapping[str, Any]:
        """Configuration (JSON-able) that decides results of ``part`` beside its tensors."""

    def _stop_training(self) -> None:
        # eval() visits every module twice and sets attributes: 2.5 ms that short clips feel.
        if any(module.training for module in self.modules()):
            self.eval()

    def _frames_of(self, tokens: TokenBatch, num_codebooks: int | None) -> FrameCodes:
        if num_codebooks is not None and num_codebooks < 1:
            raise ConfigError(f"num_codebooks is {num_codebooks}; at least 1 codebook is needed.")
        if not self.decodes_prefixes and self._is_cut(tokens, num_codebooks):
            raise ConfigError(
                f"Codec {self.spec.name} decodes all its codebooks or none: leave num_codebooks "
                "out and give tokens with every codebook."
            )
        num_frames = torch.from_numpy(tokens.num_frames).to(self.device)
        spans = tokens.frame_spans
        frames = FrameCodes(
            codes={
                stream.name: self._to_device(tokens.codes[stream.name][:, :num_codebooks])
                for stream in self.streams
            },
            num_frames=num_frames.clamp(min=1),
            frame_spans=None if spans is None else self._to_device(spans),
        )
        return _zero_codes_past_end(frames, num_frames.clamp(min=1))

    def _is_cut(self, tokens: TokenBatch, num_codebooks: int | None) -> bool:
        given = (
            (stream.num_codebooks, tokens.codes[stream.name].shape[1])
            for stream in self.streams
            if stream.name in tokens.codes
        )
        return any(min(has, num_codebooks or has) < wanted for wanted, has in given)

    def _check_long_enough(self, num_samples: Tensor) -> None:
        too_short = (num_samples > 0) & (num_samples < self.min_tail_samples)
        if bool(too_short.any()):
            clip = int(too_short.nonzero()[0])
            raise AudioError(
                QuarantineReason.TOO_SHORT,
                f"Clip {clip} has {int(num_samples[clip])} samples; codec {self.spec.name} needs "
                f"at least {self.min_tail_samples}.",
            )

    @final
    def base_frames(self, clip: int, num_frames: int, spans: Spans | None) -> int:
        """Base frames of a clip of so many tokens; ``clip`` is its number in messages.

        Raises ``ConfigError`` when ``spans`` (int32, at least ``num_frames``) are missing, not
        wanted, too few, or one is outside 1..``max_frame_span``.
        """
        if self.is_variable_rate != (spans is not None):
            raise ConfigError(
                f"Codec {self.spec.name} has "
                f"{'a variable' if spans is None else 'no variable'} rate: frame_spans must be "
                f"{'given' if spans is None else 'left out'}."
            )
        if spans is None:
            return num_frames
        if spans.ndim != 1 or len(spans) < num_frames:
            raise ConfigError(
                f"Clip {clip} has {num_frames} tokens, but frame_spans of shape {spans.shape}."
            )
        spans = spans[:num_frames]
        bad = np.flatnonzero((spans < 1) | (spans > self.max_frame_span))
        if len(bad):
            raise ConfigError(
                f"Token {bad[0]} of clip {clip} spans {spans[bad[0]]} base frames; codec "
                f"{self.spec.name} has tokens of 1..{self.max_frame_span}."
            )
        return int(spans.sum(dtype=np.int64))

    def _check_lengths(self, tokens: TokenBatch) -> None:
        spans = tokens.frame_spans
        base_frames = np.array(
            [
                self.base_frames(clip, int(count), None if spans is None else spans[clip])
                for clip, count in enumerate(tokens.num_frames)
            ],
            dtype=np.int64,
        )
        # One hop of slack: some codecs drop a tail shorter than a frame.
        bad = np.flatnonzero(tokens.num_samples > (base_frames + 1) * self.hop_length)
        if len(bad) or (tokens.num_samples < 0).any():
            clip = int(bad[0]) if len(bad) else int(tokens.num_samples.argmin())
            raise ConfigError(
                f"Clip {clip} claims {int(tokens.num_samples[clip])} samples, but its "
                f"{int(base_frames[clip])} frames hold "
                f"{int(base_frames[clip]) * self.hop_length}."
            )
        if self.is_variable_rate:
            self._check_sums(base_frames, tokens.num_samples)

    def _check_sums(self, base_frames: Counts, num_samples: Counts) -> None:
        wanted = (num_samples + self.hop_length - self.min_tail_samples) // self.hop_length
        bad = np.flatnonzero(base_frames != wanted)
        if len(bad):
            clip = int(bad[0])
            raise ConfigError(
                f"The frame_spans of clip {clip} add up to {int(base_frames[clip])} base frames; "
                f"its {int(num_samples[clip])} samples make {int(wanted[clip])}."
            )

    def _to_device(self, values: np.ndarray[Any, np.dtype[np.int32]]) -> Tensor:
        width = max(1, values.shape[-1])
        padded = np.zeros((*values.shape[:-1], width), dtype=np.int64)
        padded[..., : values.shape[-1]] = values
        return torch.from_numpy(padded).to(self.device)


def _check_audio(audio: Tensor, num_samples: Tensor) -> None:
    if audio.ndim != 3 or audio.shape[1] != 1 or audio.dtype != torch.float32:
        raise ConfigError(
            f"Audio has shape {tuple(audio.shape)} and type {audio.dtype}; "
            "expected float32 [B, 1, N]."
        )
    if num_samples.shape != audio.shape[:1] or num_samples.dtype != torch.int64:
        raise ConfigError(
            f"num_samples has shape {tuple(num_samples.shape)} and type {num_samples.dtype}; "
            f"expected int64 [{audio.shape[0]}]."
        )
    outside = (num_samples < 0) | (num_samples > audio.shape[2])
    if bool(outside.any()):
        clip = int(outside.nonzero()[0])
        raise ConfigError(
            f"Clip {clip} claims {int(num_samples[clip])} samples; the batch holds 0.."
            f"{audio.shape[2]}."
        )
    inside = torch.arange(audio.shape[2], device=audio.device) < num_samples[:, None].to(
        audio.device
    )
    bad = (~torch.isfinite(audio[:, 0]) & inside).nonzero()
    if len(bad):
        clip, sample = (int(i) for i in bad[0])
        raise ConfigError(f"Sample {sample} of clip {clip} is not a finite number.")


def _zero_past_end(audio: Tensor, num_samples: Tensor, hop_length: int) -> Tensor:
    """Audio padded to a hop multiple (at least one hop), zero past each clip's end."""
    size = max(1, -(-audio.shape[2] // hop_length)) * hop_length
    audio = nn.functional.pad(audio, (0, size - audio.shape[2]))
    inside = torch.arange(size, device=audio.device) < num_samples[:, None, None]
    # Not a product: what lies past an end may be NaN.
    return audio.masked_fill(~inside, 0.0)


def _zero_codes_past_end(frames: FrameCodes, num_frames: Tensor) -> FrameCodes:
    sizes = {codes.shape[-1] for codes in frames.codes.values()}
    assert len(sizes) == 1, "all streams share their frames"
    inside = torch.arange(sizes.pop(), device=num_frames.device) < num_frames[:, None]
    spans = frames.frame_spans
    return FrameCodes(
        codes={name: codes * inside[:, None] for name, codes in frames.codes.items()},
        num_frames=num_frames,
        frame_spans=None if spans is None else spans * inside,
        margins=frames.margins,
        start_margins=frames.start_margins,
    )


def _to_int32(values: Tensor) -> np.ndarray[Any, np.dtype[np.int32]]:
    return values.to("cpu", torch.int32).numpy()
