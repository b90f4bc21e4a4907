"""HH-Codec against the published code's recorded outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hcodec_core.inference.engine import Engine, compute_class
from hcodec_core.inference.parity import run_parity
from hcodec_core.models.base import Part
from hcodec_core.models.conversion import ConvertRequest
from hcodec_core.models.hhcodec.convert import convert_checkpoint
from hcodec_core.models.hhcodec.model import HHCodec
from hcodec_core.models.loading import load_codec
from hcodec_core.models.registry import build_codec, presets
from hcodec_core.nn.lengths import Lengths
from hcodec_core.tokens import EncodeSettings

GOLDEN = Path(__file__).parents[2] / "golden" / "hhcodec-tiny"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> HHCodec:
    path = tmp_path_factory.mktemp("codec") / "codec"
    convert_checkpoint(
        ConvertRequest(
            checkpoint_path=GOLDEN / "codec.safetensors",
            out_path=path,
            is_trained=False,
            options={"weights": "raw"},
        )
    )
    codec = load_codec(str(path), EncodeSettings(compute_class=compute_class("cpu")))
    assert isinstance(codec, HHCodec)
    return codec


def test_parity_with_the_published_code():
    rows = run_parity([GOLDEN])
    assert [(row.codec, row.case) for row in rows] == [
        ("hhcodec-tiny-raw", "wav_0"),
        ("hhcodec-tiny-raw", "wav_2"),
    ]
    for row in rows:
        assert row.agrees
        assert row.num_equal == row.num_codes >= 24
    assert 0 < rows[0].wave_difference < 5e-5


def test_intermediate_values(codec: HHCodec, expected: dict[str, np.ndarray]):
    wave = torch.from_numpy(expected["wav_0"])
    audio = torch.nn.functional.pad(wave, (0, -len(wave) % 1024))[None, None]
    latents, frames = codec.embed(audio, torch.tensor([len(wave)]))

    def close(found: torch.Tensor, name: str, atol: float) -> None:
        np.testing.assert_allclose(found[0].numpy(), expected[name], rtol=1e-4, atol=atol)

    close(latents, "embedding_0", 1e-5)
    one = codec.quantizer.encode(latents, num_codebooks=1)
    both = codec.quantizer.encode(latents)
    close(one.vectors, "first_quant_0", 1e-5)
    close(both.vectors - one.vectors, "second_quant_0", 1e-5)
    close(both.vectors, "quant_sum_0", 1e-5)
    np.testing.assert_array_equal(both.codes[0].T.numpy(), expected["indices_both_0"])
    close(codec.backbone(one.vectors, frames), "backbone_0", 2e-4)
    close(codec.mel(one.vectors, frames), "mel_0", 2e-4)


def test_decoding_the_codes_alone(codec: HHCodec, expected: dict[str, np.ndarray]):
    """The recorded decode from indices is as near as the one from the forward pass."""
    codes = torch.from_numpy(expected["indices_0"].astype(np.int64))[None, None]
    latents = codec.quantizer.decode(codes)
    frames = Lengths(torch.tensor([codes.shape[2]]), codes.shape[2])
    audio = codec.vocoder(codec.mel(latents, frames), frames.multiplied(4))
    difference = np.abs(audio[0, 0].numpy() - expected["recon_from_indices_0"]).max()
    assert difference < 1e-4
    assert np.abs(expected["recon_from_indices_0"]).max() > 0.1


def test_golden_codes_in_company(codec: HHCodec, expected: dict[str, np.ndarray]):
    """The LSTM reads a clip backwards from its own end, whatever is padded behind it."""
    wave = expected["wav_2"]
    rng = np.random.default_rng(0)
    others = [rng.standard_normal(n).astype(np.float32) for n in (len(wave) - 1500, 1, 24000)]
    tokens = Engine(codec).encode_clips([others[0], wave, *others[1:]])[1]
    np.testing.assert_array_equal(tokens.codes["fused"], expected["indices_2"][None])


def test_full_size_preset_has_the_published_shape():
    config = presets("hhcodec")["hhcodec-24khz"]()
    assert config.hop_length == 1024
    assert (config.sample_rate, config.streams[0].num_codebooks) == (24000, 1)
    assert config.streams[0].codebook_size == 8192
    with torch.device("meta"):
        codec = build_codec("hhcodec", config.architecture())
    # The vocoder is as large as the published bigvgan_v2_24khz_100band_256x: 112 million.
    assert 111e6 < sum(value.numel() for value in codec.vocoder.state_dict().values()) < 114e6


def test_training_codebooks_enter_no_identity(codec: HHCodec):
    parts = {key: codec.part_of(key) for key in codec.state_dict() if "books" in key}
    assert parts == {
        "quantizer.books.0.entries": Part.CODEBOOKS,
        "quantizer.books.1.entries": Part.TRAINING,
    }
