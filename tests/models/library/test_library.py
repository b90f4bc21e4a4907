"""Mimi, DAC and EnCodec behind our interface against the library's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.inference.engine import compute_class
from hcodec_core.models.base import Codec
from hcodec_core.models.conversion import ConvertRequest
from hcodec_core.models.library.config import (
    HUB_IDS,
    PRESETS,
    AnyConfig,
    from_library,
    tiny_dac,
    tiny_encodec,
    tiny_mimi,
)
from hcodec_core.models.library.convert import convert_checkpoint
from hcodec_core.models.library.hosting import draw_weights
from hcodec_core.models.loading import load_codec
from hcodec_core.models.registry import build_codec
from hcodec_core.nn.torchaudio_guard import guard_torchaudio
from hcodec_core.tokens import EncodeSettings

TINY = {"mimi": tiny_mimi, "dac": tiny_dac, "encodec": tiny_encodec}
CLASSES = {"mimi": "Mimi", "dac": "Dac", "encodec": "Encodec"}


def library_model(kind: str) -> Any:
    """A random model of the library; its codebooks start as zeros and are filled."""
    guard_torchaudio()
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**TINY[kind]().library_fields())
    model = getattr(transformers, f"{CLASSES[kind]}Model")(config).eval()
    draw_weights(model, gain=0.7 if kind == "dac" else 1.0)
    for name, buffer in model.named_buffers():
        if name.endswith(("codebook.embed", "codebook.embed_sum")):
            buffer.normal_(std=0.3)
        if name.endswith("codebook.cluster_usage"):
            buffer.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="module", params=list(TINY))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Codec]:
    """A model of the library, and the codec made of the folder that it wrote."""
    model = library_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path / "library")
    manifest = convert_checkpoint(
        ConvertRequest(path / "library", path / "codec", is_trained=False, name="small")
    )
    assert manifest.architecture == TINY[request.param]().architecture()
    assert manifest.name == "small"
    settings = EncodeSettings(compute_class=compute_class("cpu"))
    return model, load_codec(str(path / "codec"), settings)


def library_codes(model: Any, audio: Tensor) -> Tensor:
    """All codebooks [Q, T] that the library gives."""
    kind = model.config.model_type
    with torch.inference_mode():
        if kind == "encodec":
            rate = model.config.target_bandwidths[-1]
            codes: Tensor = model.encode(audio, bandwidth=rate).audio_codes[0, 0]
            return codes
        codes = model.encode(audio).audio_codes[0]
        return codes


def library_audio(model: Any, codes: Tensor) -> Tensor:
    """Audio [N] that the library gives for codes [Q, T]."""
    with torch.inference_mode():
        if model.config.model_type == "encodec":
            audio: Tensor = model.decode(codes[None, None], [None]).audio_values
        elif model.config.model_type == "dac":
            audio = model.decode(audio_codes=codes[None]).audio_values
        else:
            audio = model.decode(codes[None]).audio_values
    return audio.reshape(-1)


def noise(num_samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(1, 1, num_samples, generator=generator)


def test_codes_and_audio_are_the_librarys(pair: tuple[Any, Codec]) -> None:
    model, codec = pair
    for num_frames in (9, 30):
        audio = noise(num_frames * codec.hop_length, num_frames)
        tokens = codec.encode(audio, torch.tensor([audio.shape[2]]))
        found = np.concatenate([tokens.codes[stream.name][0] for stream in codec.streams])
        expected = library_codes(model, audio)
        assert len(expected.unique()) > 8
        np.testing.assert_array_equal(found, expected.numpy())
        audible = library_audio(model, expected)
        size = min(len(audible), audio.shape[2])
        torch.testing.assert_close(
            codec.decode(tokens)[0, 0, :size], audible[:size], atol=1e-5, rtol=1e-4
        )


def test_an_unfinished_hop_is_padded_before_the_model_sees_it(pair: tuple[Any, Codec]) -> None:
    model, codec = pair
    hop = codec.hop_length
    audio = noise(11 * hop - hop // 2)
    tokens = codec.encode(audio, torch.tensor([audio.shape[2]]))
    assert tokens.num_frames.tolist() == [11]
    padded = F.pad(audio, (0, 11 * hop - audio.shape[2]))
    found = np.concatenate([tokens.codes[stream.name][0] for stream in codec.streams])
    np.testing.assert_array_equal(found, library_codes(model, padded).numpy())
    assert codec.decode(tokens).shape == audio.shape


def test_fewer_codebooks_are_the_librarys_lower_bandwidths(pair: tuple[Any, Codec]) -> None:
    model, codec = pair
    audio = noise(12 * codec.hop_length)
    tokens = codec.encode(audio, torch.tensor([audio.shape[2]]))
    cut = [
        torch.from_numpy(tokens.codes[stream.name][0, :2]).long()
        for stream in codec.streams  # Mimi's one semantic book and its first two acoustic ones
    ]
    audible = library_audio(model, torch.cat(cut))
    found = codec.decode(tokens, num_codebooks=2)[0, 0, : len(audible)]
    torch.testing.assert_close(found, audible[: len(found)], atol=1e-5, rtol=1e-4)


def test_short_encodec_clips_do_not_see_their_neighbours(tmp_path: Path) -> None:
    """Reflection at a clip's beginning reads frames that a very short clip does not have."""
    torch.manual_seed(0)
    codec = build_codec("library", tiny_encodec().architecture())
    hop = codec.hop_length
    long, short = noise(20 * hop, 1), noise(2 * hop, 2)
    both = torch.cat([long, F.pad(short, (0, 18 * hop))])
    together = codec.encode_frames(both, torch.tensor([20 * hop, 2 * hop]))
    alone = codec.encode_frames(short, torch.tensor([2 * hop]))
    assert torch.equal(together.codes["fused"][1, :, :2], alone.codes["fused"][0, :, :2])


@pytest.mark.parametrize(
    ("name", "rate", "hop", "streams"),
    [
        ("mimi", 24_000, 1920, [("semantic", 1, 2048), ("acoustic", 31, 2048)]),
        ("dac-16khz", 16_000, 320, [("fused", 12, 1024)]),
        ("dac-24khz", 24_000, 320, [("fused", 32, 1024)]),
        ("dac-44khz", 44_100, 512, [("fused", 9, 1024)]),
        ("encodec-24khz", 24_000, 320, [("fused", 32, 1024)]),
    ],
)
def test_released_shapes_build(
    name: str, rate: int, hop: int, streams: list[tuple[str, int, int]]
) -> None:
    config: AnyConfig = PRESETS[name]()
    assert name in HUB_IDS
    assert (config.sample_rate, config.hop_length) == (rate, hop)
    assert [(s.name, s.num_codebooks, s.codebook_size) for s in config.streams] == streams
    with torch.device("meta"):
        codec = build_codec("library", config.architecture())
    assert codec.batching == ("equal-length" if name.startswith("dac") else "length-aware")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "xcodec2"}, "no adapter for model type 'xcodec2'"),
        ({"model_type": "encodec", "normalize": True}, "normalize"),
        ({"model_type": "encodec", "chunk_length_s": 1.0}, "chunk_length_s"),
        ({"model_type": "encodec", "use_causal_conv": False}, "use_causal_conv"),
        ({"model_type": "encodec", "audio_channels": 2}, "audio_channels"),
        ({"model_type": "mimi", "pad_mode": "reflect"}, "pad_mode"),
        ({"model_type": "mimi", "frame_rate": 25.0}, "frame_rate is 25.0"),
        (tiny_dac().architecture() | {"hidden_size": 7}, "hidden_size is 7"),
    ],
)
def test_variants_without_an_adapter_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_library(values)


def test_folders_that_hold_no_such_model_are_refused(tmp_path: Path) -> None:
    library_model("dac").save_pretrained(tmp_path / "library")
    (tmp_path / "library" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="DacModel"):
        convert_checkpoint(ConvertRequest(tmp_path / "library", tmp_path / "codec"))
    (tmp_path / "library" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert_checkpoint(ConvertRequest(tmp_path / "library", tmp_path / "codec"))
    assert not (tmp_path / "codec").exists()


@pytest.mark.parametrize("name", ["nothing", "no/such/folder", "./here", "/nowhere"])
def test_names_that_mean_nothing_are_refused_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="released model: these are mimi, dac-16khz"):
        convert_checkpoint(ConvertRequest(Path(name), tmp_path / "codec"))


def test_a_model_with_other_shapes_is_refused(tmp_path: Path) -> None:
    library_model("dac").save_pretrained(tmp_path / "library")
    config_path = tmp_path / "library" / "config.json"
    text = config_path.read_text()
    config_path.write_text(text.replace('"n_codebooks": 4', '"n_codebooks": 5'))
    with pytest.raises(CheckpointError, match="missing keys"):
        convert_checkpoint(ConvertRequest(tmp_path / "library", tmp_path / "codec"))
