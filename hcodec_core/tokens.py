"""What a codec is and what it produces, as plain values: no torch, no storage, no Airflow.

Shape letters used everywhere: B batch, Q codebook, T token frame, N sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hcodec_core.errors import ConfigError, ForeignTokensError

Codes = npt.NDArray[np.int32]
MANIFEST_FILE = "codec.json"
WEIGHTS_FILE = "model.safetensors"


def digest_of(value: Any) -> str:
    """Digest of a JSON-able value: sha256 of its canonical JSON, first 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class StreamSpec(BaseModel):
    """One stream of tokens; ``name`` is ``semantic``, ``acoustic`` or ``fused``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["semantic", "acoustic", "fused"]
    num_codebooks: int = Field(gt=0)
    codebook_size: int = Field(gt=1)


class PartDigests(BaseModel):
    """Digests of the tensors of each part of a codec (32 hex digits each, see ``models``).

    ``encoder`` covers all that turns audio into embeddings except the SSL model, ``ssl`` that
    model ("" where there is none), ``codebooks`` all quantisers, ``decoder`` the way back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str
    ssl: str = ""
    codebooks: str
    decoder: str


class CodecManifest(BaseModel):
    """The ``codec.json`` beside a codec's weights: all that planning needs without torch.

    ``architecture`` is the family's own configuration. ``weights_sha256`` is the digest of the
    whole safetensors file (64 hex digits). ``is_trained`` is false for random weights, and every
    report says so. ``min_tail_samples`` is the law of lengths: the last, unfinished hop of a clip
    becomes a frame when it holds at least so many samples (1: it is zero-padded, T = ceil(n / hop);
    the hop: it is dropped). A clip with fewer samples has no frame: the codec refuses it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    name: str
    family: str
    sample_rate: int = Field(gt=0)
    hop_length: int = Field(gt=0)
    streams: tuple[StreamSpec, ...] = Field(min_length=1)
    is_variable_rate: bool = False
    min_tail_samples: int = Field(default=1, gt=0)
    architecture: dict[str, Any]
    parts: PartDigests
    weights_sha256: str
    is_trained: bool
    num_parameters: int
    weights_licence: str
    source: str = ""

    @property
    def frame_rate(self) -> Fraction:
        """Token frames per second (base frames for a variable rate)."""
        return Fraction(self.sample_rate, self.hop_length)

    @overload
    def num_frames(self, num_samples: int) -> int: ...

    @overload
    def num_frames(self, num_samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...

    def num_frames(self, num_samples: Any) -> Any:
        """Base frames of clips of ``num_samples`` samples (see ``min_tail_samples``)."""
        return (num_samples + self.hop_length - self.min_tail_samples) // self.hop_length

    @property
    def digest(self) -> str:
        """Digest of the whole manifest: what a job document pins."""
        return digest_of(self.model_dump(mode="json"))


class ShapeRule(BaseModel):
    """Which batch shape a clip runs in, by its own length alone (mode ``exact``).

    A clip of F frames runs in a batch of ``rows(F)`` rows of ``frames(F)`` frames. Bucket bounds
    grow by ``growth`` (at least one frame; 1: every length is its own bucket), rows are what fits
    in ``batch_seconds`` up to ``max_rows``. The rule decides bits, so it is part of ``encode_id``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    growth: float = Field(default=1.125, ge=1.0)
    batch_seconds: float = Field(default=48.0, gt=0)
    max_rows: int = Field(default=16, ge=1)

    @classmethod
    def suited_to(cls, compute_class: str, mode: str = "exact") -> ShapeRule:
        """Default rule for a compute class. In mode ``fast`` it bounds what a batch may hold.

        A CPU gains nothing from rows and padding (measured with ``hcodec-nano`` on one core: each
        clip alone 158 x real time, rows of one shape 69 to 153 x): there every clip runs alone.
        """
        if compute_class.startswith("cpu-"):
            return cls(growth=1.0, max_rows=1)
        return cls() if mode == "exact" else cls(growth=1.25, batch_seconds=1536.0, max_rows=1024)

    def bucket_frames(self, num_frames: int) -> int:
        """Smallest bucket bound (frames) that holds ``num_frames`` frames."""
        if self.growth == 1.0:
            return max(1, num_frames)
        bound = 8
        while bound < num_frames:
            bound = max(bound + 1, int(bound * self.growth))
        return bound

    def bucket_rows(self, bound_frames: int, frame_rate: Fraction) -> int:
        """Rows of the batch whose rows are ``bound_frames`` frames long."""
        fitting = int(self.batch_seconds * frame_rate / bound_frames)
        return max(1, min(self.max_rows, fitting))


class EncodeSettings(BaseModel):
    """Everything beside the weights that decides codes; digested into ``encode_id``.

    Lengths in seconds. ``segment_seconds`` (L): a file up to L is one segment. ``halo_seconds``
    (H): context on both sides of a cut. ``gain``: factor on the samples. ``threshold``: only for
    codecs of variable rate. ``compute_class``: device and library build, such as
    ``cpu-avx2-torch2.13.0``. ``shapes``: when left out, what suits the compute class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["exact", "fast"] = "exact"
    channel: Literal["first", "mean"] = "mean"
    gain: float = Field(default=1.0, gt=0)
    resampler: Literal["soxr-hq"] = "soxr-hq"
    segment_seconds: float = Field(default=60.0, gt=1)
    halo_seconds: float = Field(default=2.0, ge=0)
    threshold: float | None = Field(default=None, gt=0, le=1)
    shapes: ShapeRule = ShapeRule()
    compute_class: str = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _choose_shapes(cls, values: Any) -> Any:
        if isinstance(values, dict) and "shapes" not in values:
            wanted = str(values.get("compute_class", ""))
            mode = str(values.get("mode", "exact"))
            return {**values, "shapes": ShapeRule.suited_to(wanted, mode)}
        return values


@dataclass(frozen=True)
class CodecSpec:
    """A codec together with how it is run: its rates, streams and identities.

    ``encode_id`` keys a dataset: equal ids mean equal codes for equal audio. ``decode_id`` names
    the way back to audio. ``codebook_id`` is what tokens and decoder must share. Raises
    ``ConfigError`` on construction when the settings make no sense for the codec.
    """

    manifest: CodecManifest
    settings: EncodeSettings

    def __post_init__(self) -> None:
        """Refuse a threshold that would change nothing but the ``encode_id``."""
        if self.settings.threshold is not None and not self.manifest.is_variable_rate:
            raise ConfigError(
                f"Codec {self.name} has a fixed frame rate: leave the threshold "
                f"({self.settings.threshold:g}) out."
            )

    @property
    def name(self) -> str:
        """Name of the codec."""
        return self.manifest.name

    @property
    def sample_rate(self) -> int:
        """Sample rate of audio in and out, Hz."""
        return self.manifest.sample_rate

    @property
    def hop_length(self) -> int:
        """Samples per base token frame."""
        return self.manifest.hop_length

    @property
    def frame_rate(self) -> Fraction:
        """Base token frames per second."""
        return self.manifest.frame_rate

    @property
    def streams(self) -> tuple[StreamSpec, ...]:
        """Streams in the order in which they are stored."""
        return self.manifest.streams

    @property
    def codebook_id(self) -> str:
        """Digest of the codebooks."""
        return self.manifest.parts.codebooks

    @property
    def encode_id(self) -> str:
        """Digest over everything that decides codes (32 hex digits)."""
        parts = self.manifest.parts
        return digest_of(
            {
                "encoder": parts.encoder,
                "ssl": parts.ssl,
                "codebooks": parts.codebooks,
                "family": self.manifest.family,
                "sample_rate": self.sample_rate,
                "hop_length": self.hop_length,
                "settings": self.settings.model_dump(mode="json"),
            }
        )

    @property
    def decode_id(self) -> str:
        """Digest over codebooks and decoder (32 hex digits)."""
        parts = self.manifest.parts
        return digest_of({"codebooks": parts.codebooks, "decoder": parts.decoder})

    def num_frames(self, num_samples: int) -> int:
        """Base frames of a clip of ``num_samples`` samples (see ``min_tail_samples``)."""
        return self.manifest.num_frames(num_samples)

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip that has a frame; shorter ones are ``too_short``."""
        return self.manifest.min_tail_samples


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of a batch of clips, the one value that flows through the system.

    codes: per stream an int32 array [B, Q, T]; entries past ``num_frames`` are 0.
    num_frames: int64 [B], valid token frames. num_samples: int64 [B], length of the audio at the
    codec's sample rate. frame_spans: int32 [B, T], base frames per token, only for adaptive
    rates. Raises ``ConfigError`` on construction when shapes do not agree.
    """

    codes: Mapping[str, Codes]
    num_frames: npt.NDArray[np.int64]
    num_samples: npt.NDArray[np.int64]
    encode_id: str
    codebook_id: str
    frame_spans: npt.NDArray[np.int32] | None = field(default=None)

    def __post_init__(self) -> None:
        """Check that all arrays speak of the same clips."""
        batch = len(self.num_frames)
        if len(self.num_samples) != batch:
            raise ConfigError(f"num_samples has {len(self.num_samples)} clips, num_frames {batch}.")
        longest = int(self.num_frames.max(initial=0))
        for name, codes in self.codes.items():
            if codes.ndim != 3 or codes.shape[0] != batch or codes.shape[2] < longest:
                raise ConfigError(
                    f"Codes of stream {name!r} have shape {codes.shape}; "
                    f"expected [{batch}, Q, T >= {longest}]."
                )
        if self.frame_spans is not None and self.frame_spans.shape[0] != batch:
            raise ConfigError(f"frame_spans has shape {self.frame_spans.shape} for {batch} clips.")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.num_frames)

    def clip(self, index: int) -> dict[str, Codes]:
        """Codes of one clip without padding: per stream [Q, num_frames]."""
        frames = int(self.num_frames[index])
        return {name: codes[index, :, :frames] for name, codes in self.codes.items()}


def check_tokens(batch: TokenBatch, spec: CodecSpec) -> None:
    """Refuse tokens that ``spec`` cannot decode.

    Raises ``ForeignTokensError`` when the codebooks differ or a stream is unknown, and
    ``ConfigError`` naming stream, clip, codebook and frame when a code is out of range.
    """
    if batch.codebook_id != spec.codebook_id:
        raise ForeignTokensError(
            f"These tokens were made with codebooks {batch.codebook_id[:12]}, codec {spec.name} "
            f"has {spec.codebook_id[:12]}: decode them with the codec that made them."
        )
    streams = {stream.name: stream for stream in spec.streams}
    for name, codes in batch.codes.items():
        if name not in streams:
            raise ForeignTokensError(
                f"Codec {spec.name} has no stream {name!r}: it cannot decode it."
            )
        if codes.shape[1] > streams[name].num_codebooks:
            raise ForeignTokensError(
                f"Stream {name!r} has {codes.shape[1]} codebooks; codec {spec.name} has "
                f"{streams[name].num_codebooks}."
            )
        bad = np.argwhere((codes < 0) | (codes >= streams[name].codebook_size))
        if len(bad):
            clip, book, frame = (int(i) for i in bad[0])
            raise ConfigError(
                f"Code {int(codes[clip, book, frame])} of stream {name!r}, clip {clip}, codebook "
                f"{book}, frame {frame} is outside 0..{streams[name].codebook_size - 1}."
            )
