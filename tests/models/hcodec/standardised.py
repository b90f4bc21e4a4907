"""Untrained H-Codecs whose latents are standardised and whose codebooks fit them.

The encoders are scaled so that each latent feature has mean 0 and deviation 1 on synthetic audio,
and the codebooks are k-means centres of those latents, so that codes vary with the audio.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcodec_core.models.hcodec.config import HCodecConfig
from hcodec_core.models.hcodec.model import HCodec, codec_of
from hcodec_core.nn.quantize import ResidualQuantizer, nearest_entries

_NUM_CLIPS = 24
_CLIP_SECONDS = 8
_KMEANS_STEPS = 8


def random_codec(config: HCodecConfig, seed: int, num_clips: int = _NUM_CLIPS) -> HCodec:
    """An untrained codec whose codes vary: see the module."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        codec = codec_of(config).eval()
        audio = synthetic_audio(num_clips, _CLIP_SECONDS, config.sample_rate)
        audio = audio[:, None, : audio.shape[1] // config.hop_length * config.hop_length]
        _standardise_latents(codec, audio)
        latents, _ = codec.embed(audio, torch.full((len(audio),), audio.shape[2]))
        for name, latent in latents.items():
            quantizer = codec.quantizers[name]
            assert isinstance(quantizer, ResidualQuantizer)
            _fill_codebooks(quantizer, latent.transpose(1, 2).flatten(0, 1))
        # Magnitudes near exp(0) would decode to noise at full scale.
        codec.decoder.head.out.bias[: config.n_fft // 2 + 1] = -3.0
    return codec


def synthetic_audio(num_clips: int, clip_seconds: float, sample_rate: int) -> Tensor:
    """Gliding harmonics in noise with pauses, [num_clips, N], from torch's current seed."""
    num_samples = int(clip_seconds * sample_rate)
    seconds = torch.arange(num_samples) / sample_rate
    clips = []
    for _ in range(num_clips):
        pitch = 80 + 220 * torch.rand(1) + 60 * torch.sin(2 * torch.pi * torch.rand(1) * seconds)
        phase = 2 * torch.pi * torch.cumsum(pitch / sample_rate, dim=0)
        weights = torch.rand(20) / torch.arange(1, 21)
        voice = sum(weight * torch.sin((k + 1) * phase) for k, weight in enumerate(weights))
        pace = 1 + 4 * torch.rand(1)
        envelope = torch.sin(2 * torch.pi * pace * seconds + 6 * torch.rand(1)).clamp(min=0)
        noise = torch.randn(num_samples) * torch.rand(1) ** 2
        clips.append(torch.rand(1) * (voice * envelope + noise * envelope.roll(num_samples // 7)))
    return 0.3 * torch.stack(clips)


def _standardise_latents(codec: HCodec, audio: Tensor) -> None:
    latents, _ = codec.embed(audio, torch.full((len(audio),), audio.shape[2]))
    acoustic = codec.acoustic_encoder.conv_out.conv
    _rescale(acoustic, latents["acoustic"])
    _rescale(codec.semantic_encoder.conv_out.conv, latents["semantic"])


def _rescale(conv: nn.Conv1d, output: Tensor) -> None:
    """Bring each output channel of ``conv`` to deviation 1 and, where it has a bias, to mean 0."""
    deviation = output.std(dim=(0, 2)).clamp(min=1e-6)
    conv.weight /= deviation[:, None, None]
    if conv.bias is not None:
        conv.bias.copy_((conv.bias - output.mean(dim=(0, 2))) / deviation)


def _fill_codebooks(quantizer: ResidualQuantizer, points: Tensor) -> None:
    for book in quantizer.codebooks:
        book.copy_(_kmeans(points, len(book)))
        points = points - book[nearest_entries(points, book)]


def _kmeans(points: Tensor, num_centres: int) -> Tensor:
    centres = points[torch.randperm(len(points))[:num_centres]].clone()
    for _ in range(_KMEANS_STEPS):
        nearest = nearest_entries(points, centres)
        counts = torch.bincount(nearest, minlength=num_centres)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
