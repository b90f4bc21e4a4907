"""U-Codec against the published code's recorded outputs, and what its length rules mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hcodec_core.inference.engine import Engine, compute_class
from hcodec_core.inference.parity import run_parity
from hcodec_core.models.base import Part
from hcodec_core.models.conversion import ConvertRequest
from hcodec_core.models.loading import load_codec
from hcodec_core.models.registry import build_codec, presets
from hcodec_core.models.ucodec.config import UCodecConfig, tiny, tiny_strided
from hcodec_core.models.ucodec.convert import convert_checkpoint
from hcodec_core.models.ucodec.model import UCodec, normalised
from hcodec_core.nn.lengths import Lengths
from hcodec_core.tokens import EncodeSettings

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = ("ucodec-tiny", "ucodec-tiny-ds2")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def codecs(tmp_path_factory) -> dict[str, UCodec]:
    loaded = {}
    for name in FOLDERS:
        path = tmp_path_factory.mktemp("codec") / name
        convert_checkpoint(
            ConvertRequest(
                checkpoint_path=GOLDEN / name / "codec.safetensors",
                out_path=path,
                config_path=GOLDEN / name / "config.json",
                is_trained=False,
            )
        )
        codec = load_codec(str(path), EncodeSettings(compute_class=compute_class("cpu")))
        assert isinstance(codec, UCodec)
        loaded[name] = codec
    return loaded


@pytest.mark.parametrize("name", FOLDERS)
def test_parity_with_the_published_code(name: str):
    rows = run_parity([GOLDEN / name])
    assert rows
    for row in rows:
        assert row.agrees
        assert row.num_equal == row.num_codes > 300
        assert row.wave_difference < 2e-5


@pytest.mark.parametrize(("name", "clip"), [("ucodec-tiny", 0), ("ucodec-tiny-ds2", 2)])
def test_intermediate_values(codecs: dict[str, UCodec], name: str, clip: int):
    codec = codecs[name]
    expected = np.load(GOLDEN / name / "expected.npz")
    wave = torch.from_numpy(expected[f"wav_{clip}"])
    audio = torch.nn.functional.pad(wave, (0, -len(wave) % 3200))[None, None]
    latents, frames, whole = codec.embed(audio, torch.tensor([len(wave)]))
    assert frames.valid.tolist() == [latents.shape[2]]
    np.testing.assert_allclose(
        latents[0].numpy(), expected[f"embedding_{clip}"], rtol=1e-4, atol=1e-5
    )
    quantised = codec.quantizer.encode(latents)
    end = int(whole[0])
    found = quantised.vectors[0, :, :end].numpy()
    np.testing.assert_allclose(found, expected[f"quantized_{clip}"][:, :end], rtol=1e-4, atol=1e-4)
    assert not expected[f"quantized_{clip}"][:, end:].any()


def test_fewer_codebooks_are_as_published(codecs: dict[str, UCodec]):
    """Also part of the parity run; here so that its case cannot vanish unseen."""
    names = {row.case for row in run_parity([GOLDEN / "ucodec-tiny"])}
    assert names == {"wav_0", "wav_0_first8"}


@pytest.mark.parametrize(("name", "clip"), [("ucodec-tiny", 0), ("ucodec-tiny-ds2", 2)])
def test_golden_codes_in_company(codecs: dict[str, UCodec], name: str, clip: int):
    expected = np.load(GOLDEN / name / "expected.npz")
    wave = expected[f"wav_{clip}"]
    rng = np.random.default_rng(0)
    others = [rng.standard_normal(n).astype(np.float32) for n in (len(wave) - 900, 1, 3200)]
    tokens = Engine(codecs[name]).encode_clips([others[0], wave, *others[1:]])[1]
    np.testing.assert_array_equal(tokens.codes["fused"], expected[f"codes_{clip}"])


def test_an_unfinished_last_frame_is_quantised_to_zeros(codecs: dict[str, UCodec]):
    expected = np.load(GOLDEN / "ucodec-tiny-ds2" / "expected.npz")
    assert (expected["raw_tokens_2"][:, -1] == -1).all()
    assert (expected["codes_2"][:, -1] == 0).all()
    assert int(expected["token_len_2"][0]) == expected["codes_2"].shape[1] - 1
    codec, wave = codecs["ucodec-tiny-ds2"], expected["wav_2"]
    whole, odd = Engine(codec).encode_clips([wave[: 20 * 3200], wave[: 20 * 3200 + 1600]])
    assert (whole.codes["fused"][:, -1] != 0).any()
    assert (odd.codes["fused"][:, -1] == 0).all()
    frames = codec.encode_frames(
        torch.from_numpy(wave)[None, None], torch.tensor([len(wave)]), with_margins=True
    )
    assert frames.margins is not None
    assert torch.isinf(frames.margins["fused"][0, :, -1]).all()
    assert torch.isfinite(frames.margins["fused"][0, :, :-1]).all()


def test_normalising_counts_the_padding_of_the_last_frame():
    audio = torch.zeros(2, 1, 12)
    audio[0, 0, :7] = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, 2.0, -1.0])
    audio[1, 0, :3] = torch.tensor([5.0, 6.0, 7.0])
    found = normalised(audio, Lengths(torch.tensor([8, 4]), 12))
    for row, end in ((0, 8), (1, 4)):
        valid = audio[row, 0, :end]
        expected = (valid - valid.mean()) / (valid.var(correction=0) + 1e-7).sqrt()
        torch.testing.assert_close(found[row, 0, :end], expected)
        assert not found[row, 0, end:].any()


@pytest.mark.parametrize("name", ["ucodec-5hz", "ucodec-5hz-8x16384"])
def test_full_size_presets_have_the_published_rates(name: str):
    config = presets("ucodec")[name]()
    assert config.hop_length == 3200
    assert config.sample_rate / config.hop_length == 5
    books = config.streams[0]
    expected = (32, 256) if name == "ucodec-5hz" else (8, 16384)
    assert (books.name, books.num_codebooks, books.codebook_size) == ("fused", *expected)
    with torch.device("meta"):
        codec = build_codec("ucodec", config.architecture())
    assert 70e6 < sum(value.numel() for value in codec.state_dict().values()) < 90e6


def test_identity_tells_what_tensors_do_not():
    codec = UCodec(tiny())
    heads = UCodec(
        UCodecConfig.model_validate(
            tiny().model_dump()
            | {"encoder_transformer": tiny().encoder_transformer.model_dump() | {"num_heads": 1}}
        )
    )
    assert codec.identity(Part.ENCODER) != heads.identity(Part.ENCODER)
    assert codec.identity(Part.DECODER) == heads.identity(Part.DECODER)
    rescaled = tiny_strided().encoder_transformer.model_copy(update={"layer_scale": 0.1})
    first = UCodec(tiny_strided().model_copy(update={"encoder_transformer": rescaled}))
    assert first.identity(Part.ENCODER) == UCodec(tiny_strided()).identity(Part.ENCODER)


def test_a_pointwise_convolution_may_stand_for_a_transformer():
    config = tiny().model_copy(update={"encoder_transformer": None, "decoder_transformer": None})
    codec = build_codec("ucodec", config.architecture())
    frames = codec.encode_frames(torch.randn(1, 1, 5 * 200), torch.tensor([1000]))
    assert frames.codes["fused"].shape == (1, 4, 5)
