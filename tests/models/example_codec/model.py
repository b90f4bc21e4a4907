"""The example codec: frames of samples, one convolution along time, residual quantisation, back.

Shape letters: B batch, D feature, Q codebook, N sample, T frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hcodec_core.models.base import Codec, FrameCodes, Part
from hcodec_core.nn.conv import SameConv1d
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.quantize import ResidualQuantizer
from tests.models.example_codec.config import ExampleConfig

_PARTS = {
    "analysis": Part.ENCODER,
    "mix": Part.ENCODER,
    "quantizer": Part.CODEBOOKS,
    "synthesis": Part.DECODER,
}


class ExampleCodec(Codec):
    """One stream. A frame's codes depend on its samples and on those of its neighbours."""

    family = "example"

    def __init__(self, config: ExampleConfig) -> None:
        """Build with random weights."""
        super().__init__(config)
        self.analysis = nn.Linear(config.hop_length, config.dim)
        self.mix = SameConv1d(config.dim, config.dim, config.kernel_size)
        self.quantizer = ResidualQuantizer(config.dim, config.num_codebooks, config.codebook_size)
        self.synthesis = nn.Linear(config.dim, config.hop_length)

    def _encode(self, audio: Tensor, num_samples: Tensor, with_margins: bool) -> FrameCodes:
        frames = audio.reshape(len(audio), -1, self.hop_length)
        lengths = Lengths(-(-num_samples // self.hop_length), frames.shape[1])
        # The convolution looks along time: it is told where each clip ends.
        latents = self.mix(self.analysis(frames).transpose(1, 2), lengths)
        quantised = self.quantizer.encode(latents, with_margins)
        margins = quantised.margins
        return FrameCodes(
            codes={"fused": quantised.codes},
            num_frames=lengths.valid,
            margins=None if margins is None else {"fused": margins},
        )

    def _decode(self, frames: FrameCodes) -> Tensor:
        vectors = self.quantizer.decode(frames.codes["fused"])
        return self.synthesis(vectors.transpose(1, 2)).flatten(1)[:, None]

    @classmethod
    def part_of(cls, key: str) -> Part:
        """Part of the tensor ``key``, by its first name."""
        return _PARTS[key.partition(".")[0]]

    def identity(self, part: Part) -> Mapping[str, Any]:
        """Tensors show all of the configuration."""
        return {}


def build(architecture: Mapping[str, Any]) -> ExampleCodec:
    """A codec of this family with random weights. Raises ``ConfigError`` for a wrong field."""
    return ExampleCodec(ExampleConfig.from_architecture(architecture))
