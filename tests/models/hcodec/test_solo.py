"""A clip alone on a CPU: the shorter way gives the codes of ``Codec.encode``, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hcodec_core.inference.invariance import synthetic_clips
from hcodec_core.models.base import Codec
from hcodec_core.models.hcodec.model import HCodec
from hcodec_core.models.hcodec.solo import HCodecSolo, _full, _seanet
from hcodec_core.models.random_weights import random_codec
from hcodec_core.nn.lengths import Lengths
from hcodec_core.nn.seanet import SeanetEncoder

PRESETS = ("hcodec-nano", "hcodec-tiny")


def _codec(preset: str) -> HCodec:
    codec = random_codec(preset, 0).requires_grad_(False).eval()
    assert isinstance(codec, HCodec)
    return codec


def _plain_codes(codec: Codec, clip: np.ndarray) -> dict[str, np.ndarray]:
    frames = codec.encode_frames(torch.from_numpy(clip)[None, None], torch.tensor([len(clip)]))
    return {name: codes[0].numpy() for name, codes in frames.codes.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_codes_are_those_of_the_plain_way(preset: str, one_thread: None) -> None:
    codec = _codec(preset)
    solo = codec.solo_encoder()
    assert isinstance(solo, HCodecSolo)
    clips = [clip[: 3 * codec.sample_rate] for clip in synthetic_clips(codec.sample_rate, 8, 1)]
    hop = codec.hop_length
    lengths = (1, 2, hop - 1, hop, hop + 1, 2 * hop, 3 * hop + 7)
    for clip in [*clips, *(clips[0][:length] for length in lengths)]:
        plain, found = _plain_codes(codec, clip), solo(clip)
        assert found.keys() == plain.keys()
        for name, codes in found.items():
            assert codes.dtype == np.int32
            np.testing.assert_array_equal(codes, plain[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_latents_are_equal_to_the_bit(preset: str, one_thread: None) -> None:
    # Codes forgive rounding but at near ties; a product or an ELU done otherwise shows here.
    codec = _codec(preset)
    encoder = codec.acoustic_encoder
    assert isinstance(encoder, SeanetEncoder)
    for clip in synthetic_clips(codec.sample_rate, 4, 2):
        size = len(clip) // codec.hop_length * codec.hop_length
        audio = torch.from_numpy(clip[:size])[None, None]
        with torch.inference_mode():
            plain = encoder(audio, Lengths(torch.tensor([size]), size))
            assert torch.equal(_seanet(encoder, audio), plain)


def test_lengths_of_a_row_alone_are_full() -> None:
    assert _full(torch.zeros(1, 3, 5)).is_full


def test_codecs_of_variable_rate_have_no_shorter_way() -> None:
    assert random_codec("hcodec-1.5-tiny", 0).solo_encoder() is None
