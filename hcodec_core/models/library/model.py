"""Mimi, DAC and EnCodec of the transformers library behind our codec interface.

Encoders and decoders are the library's; residual search is ours (``hcodec_core.nn``), because it
runs in float32 under autocast, tells how clear each decision was, and stores each book once.

Deliberate differences: a clip's last hop is zero-padded before the model sees it, so that no
tail is lost; audio is trimmed to the clip's length. EnCodec reflects the first steps of each layer
into its left padding: a clip of fewer frames than that padding is reflected together with the
silence behind it, where the published code puts zeros in the layer itself.

Shape letters: B batch, R row of one group, Q codebook, T token frame, N sample, D feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.models.base import Codec, FrameCodes, Part
from hcodec_core.models.equal_length import EqualLengthCodec
from hcodec_core.models.library.config import (
    DacConfig,
    EncodecConfig,
    MimiConfig,
    from_architecture,
)
from hcodec_core.models.library.hosting import draw_weights, hosted
from hcodec_core.nn.factorised import FactorisedResidualQuantizer
from hcodec_core.nn.quantize import Quantised, ResidualQuantizer


def build(architecture: Mapping[str, Any]) -> Codec:
    """A codec with random weights.

    Raises ``ConfigError`` naming the field that is wrong.
    """
    config = from_architecture(architecture)
    codec: Codec
    if isinstance(config, MimiConfig):
        codec = MimiCodec(config)
    elif isinstance(config, DacConfig):
        codec = DacCodec(config)
    else:
        codec = EncodecCodec(config)
    if codec.device.type != "meta":
        draw_weights(codec, gain=0.7 if isinstance(codec, DacCodec) else 1.0)
    return codec


class _LibraryCodec(Codec):
    """What the three share: tensors are told apart by the first part of their name."""

    family = "library"

    @classmethod
    def part_of(cls, key: str) -> Part:
        """Part to which the tensor ``key`` belongs."""
        parts = {"encoder": Part.ENCODER, "decoder": Part.DECODER}
        return parts.get(key.partition(".")[0], Part.CODEBOOKS)

    def identity(self, part: Part) -> Mapping[str, Any]:
        """Codebooks say all by their tensors; encoder and decoder share their configuration."""
        if part is Part.CODEBOOKS:
            return {"model_type": self.architecture["model_type"]}
        return self.architecture


class MimiCodec(_LibraryCodec):
    """Mimi (arXiv 2410.00037, section 3.3), the library's ``MimiModel``.

    Causal throughout: at hop multiples what lies past a clip's end reaches none of its codes.
    """

    def __init__(self, config: MimiConfig) -> None:
        """Build with random weights."""
        super().__init__(config)

        def make() -> nn.Module:
            from transformers import MimiConfig as LibraryConfig
            from transformers import MimiModel

            module: nn.Module = MimiModel(LibraryConfig(**config.library_fields()))
            return module

        model: Any = hosted(make)
        self.encoder = model.encoder
        self.decoder = model.decoder
        num_semantic, num_acoustic = (stream.num_codebooks for stream in config.streams)
        self.semantic = _ProjectedQuantizer(config, num_semantic)
        self.acoustic = _ProjectedQuantizer(config, num_acoustic)

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        latents = self.encoder(audio).latents
        semantic = self.semantic.encode(latents, with_margins)
        acoustic = self.acoustic.encode(latents, with_margins)
        return _frame_codes(
            {"semantic": semantic, "acoustic": acoustic}, num_samples, self.hop_length
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        semantic = self.semantic.decode(frames.codes["semantic"])
        latents = semantic + self.acoustic.decode(frames.codes["acoustic"])
        audio: Tensor = self.decoder(latents).audio_values
        return audio


class _ProjectedQuantizer(nn.Module):
    """Residual quantisation of a linear map of the features."""

    def __init__(self, config: MimiConfig, num_codebooks: int) -> None:
        super().__init__()
        dim, inner = config.hidden_size, config.vector_quantization_hidden_dimension
        has_maps = inner != dim
        self.input_proj = nn.Conv1d(dim, inner, 1, bias=False) if has_maps else nn.Identity()
        self.output_proj = nn.Conv1d(inner, dim, 1, bias=False) if has_maps else nn.Identity()
        self.rvq = ResidualQuantizer(inner, num_codebooks, config.codebook_size)

    def encode(self, x: Tensor, with_margins: bool) -> Quantised:
        """Quantise [B, D, T]; the vectors of the result are those of the inner space."""
        return self.rvq.encode(self.input_proj(x), with_margins)

    def decode(self, codes: Tensor) -> Tensor:
        """[B, q, T] -> [B, D, T]."""
        y: Tensor = self.output_proj(self.rvq.decode(codes))
        return y


class EncodecCodec(_LibraryCodec):
    """EnCodec (arXiv 2210.13438) for 24 kHz mono, the library's ``EncodecModel``. Causal."""

    def __init__(self, config: EncodecConfig) -> None:
        """Build with random weights."""
        super().__init__(config)

        def make() -> nn.Module:
            from transformers import EncodecConfig as LibraryConfig
            from transformers import EncodecModel

            module: nn.Module = EncodecModel(LibraryConfig(**config.library_fields()))
            return module

        model: Any = hosted(make)
        self.encoder = model.encoder
        self.decoder = model.decoder
        self.quantizer = ResidualQuantizer(
            config.codebook_dim, config.num_codebooks, config.codebook_size
        )
        # The longest reflection, in token frames, reads so many frames of a clip's beginning.
        self._min_frames = max(config.kernel_size, config.last_kernel_size)

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        missing = self._min_frames * self.hop_length - audio.shape[2]
        latents = self.encoder(F.pad(audio, (0, max(0, missing))))
        latents = latents[:, :, : audio.shape[2] // self.hop_length]
        quantised = self.quantizer.encode(latents, with_margins)
        return _frame_codes({"fused": quantised}, num_samples, self.hop_length)

    def _decode(self, frames: FrameCodes) -> Tensor:
        codes = frames.codes["fused"]
        codes = F.pad(codes, (0, max(0, self._min_frames - codes.shape[2])))
        audio: Tensor = self.decoder(self.quantizer.decode(codes))
        return audio


class DacCodec(_LibraryCodec, EqualLengthCodec):
    """DAC (arXiv 2306.06546), the library's ``DacModel``.

    Its convolutions look to both sides: padding would reach a clip's last frames. With an odd
    stride the published decoder gives a few samples less than the hop says (8 of 320 T at 16 kHz);
    they are zero.
    """

    def __init__(self, config: DacConfig) -> None:
        """Build with random weights."""
        super().__init__(config)

        def make() -> nn.Module:
            from transformers import DacConfig as LibraryConfig
            from transformers import DacModel

            module: nn.Module = DacModel(LibraryConfig(**config.library_fields()))
            return module

        model: Any = hosted(make)
        self.encoder = model.encoder
        self.decoder = model.decoder
        self.quantizer = FactorisedResidualQuantizer(
            config.hidden_size, config.n_codebooks, config.codebook_size, config.codebook_dim
        )

    def _run_samples(self, num_samples: Tensor) -> Tensor:
        return (num_samples + self.hop_length - 1) // self.hop_length * self.hop_length

    def _encode_alike(self, audio: Tensor, with_margins: bool) -> Quantised:
        return self.quantizer.encode(self.encoder(audio), with_margins)

    def _decode_alike(self, codes: Tensor) -> Tensor:
        audio: Tensor = self.decoder(self.quantizer.decode(codes))
        return audio


def _frame_codes(
    streams: Mapping[str, Quantised], num_samples: Tensor, hop_length: int
) -> FrameCodes:
    margins = {name: found.margins for name, found in streams.items() if found.margins is not None}
    return FrameCodes(
        codes={name: found.codes for name, found in streams.items()},
        num_frames=torch.div(num_samples + hop_length - 1, hop_length, rounding_mode="floor"),
        margins=margins or None,
    )
