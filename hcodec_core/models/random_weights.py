"""Codecs with random weights under which codes still change with the signal.

For measurements that need a codec and no trained one: speed, invariance, tests. Start values made
for training may let a signal die on its way through the layers: then every code is the same, and
any measurement of codes is void.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hcodec_core.models.base import Codec
from hcodec_core.models.library.hosting import draw_weights
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.models.registry import build_codec, family_of, presets
from hcodec_core.tokens import CodecManifest

_GAINS = (1.0, 1.4, 0.7)
_PROBE_FRAMES = 24


def random_codec(preset: str, seed: int = 0) -> Codec:
    """A preset with random weights, on the CPU, in float32; the same for the same seed.

    Raises ``ConfigError`` when no family has such a preset.
    """
    family = family_of(preset)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        codec = build_codec(family, presets(family)[preset]().architecture())
        for gain in _GAINS:
            if is_lively(codec):
                break
            draw_weights(codec, gain)
    return codec


def write_random_codec(preset: str, folder_path: Path, seed: int = 0) -> CodecManifest:
    """Write a preset with random weights as a codec folder, marked as not trained.

    Raises ``ConfigError`` when no family has such a preset.
    """
    source = f"random weights from seed {seed}, not trained"
    card = CodecCard(preset, is_trained=False, weights_licence="Apache-2.0", source=source)
    return save_codec(random_codec(preset, seed), card, folder_path)


def is_lively(codec: Codec) -> bool:
    """Whether two signals get different codes, and neither one code throughout."""
    size = _PROBE_FRAMES * codec.hop_length
    clips = torch.stack([_signal(size, codec.sample_rate, seed) for seed in (1, 2)])
    frames = codec.encode_frames(clips[:, None], torch.full((2,), size))
    return all(
        len(set(codes[0].flatten().tolist())) > 2 and not torch.equal(codes[0], codes[1])
        for codes in frames.codes.values()
    )


def _signal(num_samples: int, sample_rate: int, seed: int) -> Tensor:
    """A gliding tone in noise: something happens in every frame."""
    generator = torch.Generator().manual_seed(seed)
    seconds = torch.arange(num_samples) / sample_rate
    tone = torch.sin(2 * torch.pi * (150 + 60 * seed) * seconds * (1 + 2 * seconds))
    return 0.2 * tone + 0.1 * torch.randn(num_samples, generator=generator)
