"""X-Codec (arXiv 2408.17175, section 3) through the transformers library's ``XcodecModel``.

Follows zhenye234/xcodec, models/soundstream_semantic.py. Encoders, decoder and SSL model are the
library's modules; residual search is ours (``hcodec_core.nn.quantize``).

Deliberate differences: the published script multiplies samples by 0.95 before the codec; here
that is ``EncodeSettings.gain``. Audio is trimmed to the clip's length, with zeros where the last
samples are too few for a frame. All codebooks are searched: those of a lower bandwidth are the
first ones.

Shape letters: B batch, R row of one group, Q codebook, T token frame, N sample, D feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcodec_core.models.base import Part
from hcodec_core.models.equal_length import EqualLengthCodec
from hcodec_core.models.library.hosting import draw_weights, hosted
from hcodec_core.models.xcodec.config import XCodecConfig
from hcodec_core.nn.quantize import Quantised, ResidualQuantizer

_PARTS: Mapping[str, Part] = {
    "acoustic_encoder": Part.ENCODER,
    "encoder_semantic": Part.ENCODER,
    "fc": Part.ENCODER,
    "ssl": Part.SSL,
    "quantizer": Part.CODEBOOKS,
    "fc2": Part.DECODER,
    "acoustic_decoder": Part.DECODER,
    "fc1": Part.TRAINING,
    "decoder_semantic": Part.TRAINING,
}


def build(architecture: Mapping[str, Any]) -> XCodec:
    """A codec with random weights. Raises ``ConfigError`` naming the field that is wrong."""
    codec = XCodec(XCodecConfig.from_architecture(architecture))
    if codec.device.type != "meta":
        draw_weights(codec, gain=0.7)
    return codec


class XCodec(EqualLengthCodec):
    """X-Codec: rows run only beside rows of equal length.

    Its SSL model normalises over a whole clip and its convolutions look to both sides, so padding
    would change codes throughout.
    """

    family = "xcodec"

    def __init__(self, config: XCodecConfig) -> None:
        """Build with random weights."""
        super().__init__(config)
        self.config = config
        self.min_tail_samples = config.min_tail_samples
        model: Any = hosted(lambda: _library_model(config))
        self.acoustic_encoder = model.acoustic_encoder
        self.acoustic_decoder = model.acoustic_decoder
        self.encoder_semantic = model.encoder_semantic
        self.decoder_semantic = model.decoder_semantic
        self.ssl = model.semantic_model
        self.fc = model.fc
        self.fc1 = model.fc1
        self.fc2 = model.fc2
        self.quantizer = ResidualQuantizer(
            config.quantized_dim, config.num_codebooks, config.codebook_size
        )

    @classmethod
    def part_of(cls, key: str) -> Part:
        """Part to which the tensor ``key`` belongs."""
        return _PARTS[key.partition(".")[0]]

    def identity(self, part: Part) -> Mapping[str, Any]:
        """Codebooks say all by their tensors; the SSL model has a configuration of its own."""
        if part is Part.CODEBOOKS:
            return {}
        semantic = self.architecture["semantic_model_config"]
        if part is Part.SSL:
            return {"padding": self.config.ssl_padding, **semantic}
        return {k: v for k, v in self.architecture.items() if k != "semantic_model_config"}

    def embed(self, audio: Tensor, features: Tensor) -> Tensor:
        """What is quantised: [R, 1, N], signal to the last sample -> [R, D, T], acoustic first.

        ``features``: of the same audio, see ``features``.
        """
        semantic = self.encoder_semantic(features)
        padding = self.config.ssl_padding
        # The published code runs the encoder, and runs it again on padded audio when its frames
        # are not as many as the SSL model's; the acoustic frames then sit half a hop later.
        if self.config.acoustic_frames(audio.shape[2]) != semantic.shape[2]:
            audio = F.pad(audio, (padding, padding))
        both = torch.cat([self.acoustic_encoder(audio), semantic], dim=1)
        embedding: Tensor = self.fc(both.transpose(1, 2)).transpose(1, 2)
        return embedding

    def features(self, audio: Tensor) -> Tensor:
        """Mean of all hidden states, [R, D, T]; the audio is not normalised."""
        padding = self.config.ssl_padding
        # On a CPU the library's layer norms pass bfloat16 on, and with it the residual stream.
        narrow = audio.device.type != "cpu" and torch.is_autocast_enabled(audio.device.type)
        with torch.autocast(audio.device.type, enabled=narrow):
            found = self.ssl(F.pad(audio[:, 0], (padding, padding)), output_hidden_states=True)
        return torch.stack(found.hidden_states, dim=1).mean(dim=1).transpose(1, 2)

    def _run_samples(self, num_samples: Tensor) -> Tensor:
        return num_samples

    def _encode_alike(self, audio: Tensor, with_margins: bool) -> Quantised:
        return self.quantizer.encode(self.embed(audio, self.features(audio)), with_margins)

    def _decode_alike(self, codes: Tensor) -> Tensor:
        return self.rebuild(self.quantizer.decode(codes))

    def rebuild(self, vectors: Tensor) -> Tensor:
        """Audio [R, 1, N] of quantised latents [R, D, T]."""
        features = self.fc2(vectors.transpose(1, 2)).transpose(1, 2)
        audio: Tensor = self.acoustic_decoder(features)
        return audio


def _library_model(config: XCodecConfig) -> nn.Module:
    from transformers import DacConfig, HubertConfig, WavLMConfig, XcodecConfig, XcodecModel

    fields = config.model_dump(mode="json")
    semantic = config.semantic_model_config
    kind = {"hubert": HubertConfig, "wavlm": WavLMConfig}[semantic.model_type]
    fields["semantic_model_config"] = kind(**semantic.library_fields())
    fields["acoustic_model_config"] = DacConfig(
        **config.acoustic_model_config.model_dump(mode="json"), sampling_rate=config.sample_rate
    )
    model: nn.Module = XcodecModel(XcodecConfig(**fields))
    return model
