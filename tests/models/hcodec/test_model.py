"""A clip's result depends on its own samples alone; in float64 that shows to rounding."""

import pytest
import torch

from hcodec_core.models.base import FrameCodes
from hcodec_core.models.hcodec.config import tiny
from hcodec_core.models.loading import load_codec
from hcodec_core.nn.lengths import Lengths
from hcodec_core.tokens import EncodeSettings
from tests.models.hcodec.standardised import random_codec, synthetic_audio


@pytest.fixture(scope="module", params=["tiny", "nano"])
def codec(request):
    if request.param == "tiny":
        return random_codec(tiny(), seed=1, num_clips=4).double()
    return load_codec("hcodec-nano", EncodeSettings(compute_class="cpu-test")).double()


LENGTHS = [1, 640, 641, 3200, 6401, 12800]


def batch_of(lengths):
    torch.manual_seed(2)
    audio = synthetic_audio(len(lengths), 0.8, 16000).double()[:, None, :12800]
    for row, length in enumerate(lengths):
        audio[row, :, length:] = 0
    return audio


def test_embeddings_of_padded_rows_are_those_of_single_files(codec):
    audio = batch_of(LENGTHS)
    with torch.no_grad():
        together, frames = codec.embed(audio, torch.tensor(LENGTHS))
        for row, length in enumerate(LENGTHS):
            num_frames = -(-length // 640)
            assert int(frames.valid[row]) == num_frames
            alone, _ = codec.embed(
                audio[row : row + 1, :, : num_frames * 640], torch.tensor([length])
            )
            for name, latent in alone.items():
                found = together[name][row : row + 1, :, :num_frames]
                # |x| ** 0.3 lifts rounding noise of 1e-16 near zero to 1e-5.
                torch.testing.assert_close(found, latent, rtol=1e-6, atol=1e-4)
                assert (found - latent).abs().median() < 1e-10


def test_decoded_padded_rows_are_those_of_single_files(codec):
    frames = [1, 2, 5, 12]
    size = codec.config.codebook_size
    generator = torch.Generator().manual_seed(0)
    codes = {
        stream.name: torch.randint(0, size, (4, stream.num_codebooks, 12), generator=generator)
        for stream in codec.streams
    }
    with torch.no_grad():
        together = codec._decode(FrameCodes(codes, torch.tensor(frames)))
        for row, length in enumerate(frames):
            own = {name: value[row : row + 1, :, :length] for name, value in codes.items()}
            alone = codec._decode(FrameCodes(own, torch.tensor([length])))
            found = together[row : row + 1, :, : length * 640]
            torch.testing.assert_close(found, alone, rtol=1e-8, atol=1e-10)
            assert not together[row, 0, length * 640 :].any()


def test_predicted_features_have_the_shape_of_features(codec):
    audio = batch_of([12800])
    with torch.no_grad():
        latents, frames = codec.embed(audio, torch.tensor([12800]))
        features = codec.features(audio, frames.multiplied(640))
        predicted = codec.semantic_decoder(latents["semantic"], frames)
    assert predicted.shape == features.shape == (1, codec.config.feature_dim, 40)


def test_predicted_features_of_padded_rows(codec):
    latent = torch.randn(2, codec.config.latent_dim, 9, dtype=torch.float64)
    with torch.no_grad():
        together = codec.semantic_decoder(latent, Lengths(torch.tensor([9, 4]), 9))
        alone = codec.semantic_decoder(latent[1:, :, :4], Lengths(torch.tensor([4]), 4))
    torch.testing.assert_close(together[1:, :, :8], alone)


def test_codes_of_the_shipped_codec_vary_with_the_audio():
    codec = load_codec("hcodec-nano", EncodeSettings(compute_class="cpu-test"))
    torch.manual_seed(3)
    audio = synthetic_audio(1, 8, 16000)[:, None]
    frames = codec.encode_frames(audio, torch.tensor([128000]))
    for codes in frames.codes.values():
        for book in codes[0]:
            assert len(book.unique()) >= 40
