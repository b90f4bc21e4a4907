"""X-Codec against recorded outputs of the published code and against the transformers library."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hcodec_core.errors import AudioError, CheckpointError, ConfigError, QuarantineReason
from hcodec_core.inference.engine import compute_class
from hcodec_core.inference.parity import run_parity
from hcodec_core.models.base import Part
from hcodec_core.models.conversion import ConvertRequest
from hcodec_core.models.library.hosting import draw_weights
from hcodec_core.models.loading import load_codec
from hcodec_core.models.registry import build_codec, presets
from hcodec_core.models.xcodec.config import HUB_IDS, PRESETS, XCodecConfig, tiny
from hcodec_core.models.xcodec.convert import convert_checkpoint, golden_cases
from hcodec_core.models.xcodec.model import XCodec, _library_model
from hcodec_core.nn.torchaudio_guard import guard_torchaudio
from hcodec_core.tokens import CodecManifest, EncodeSettings, TokenBatch

GOLDEN = Path(__file__).parents[2] / "golden" / "xcodec-tiny"
POSITIONAL = "semantic_model.encoder.pos_conv_embed.conv."


def settings(**changes: Any) -> EncodeSettings:
    return EncodeSettings(compute_class=compute_class("cpu"), **changes)


def convert(checkpoint_path: Path, out_path: Path, **changes: Any) -> CodecManifest:
    request = ConvertRequest(
        checkpoint_path=checkpoint_path, out_path=out_path, is_trained=False, **changes
    )
    return convert_checkpoint(request)


@pytest.fixture(scope="module")
def golden_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint as a codec folder."""
    path = tmp_path_factory.mktemp("xcodec") / "golden"
    convert(GOLDEN / "codec.safetensors", path, config_path=GOLDEN / "config.json")
    return path


@pytest.fixture(scope="module")
def golden_codec(golden_path: Path) -> XCodec:
    codec = load_codec(str(golden_path), settings())
    assert isinstance(codec, XCodec)
    return codec


def noise(num_samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(1, 1, num_samples, generator=generator)


def encode(codec: XCodec, audio: Tensor) -> TokenBatch:
    return codec.encode(audio, torch.full((len(audio),), audio.shape[2]))


def test_codes_and_audio_are_those_of_the_published_code() -> None:
    rows = run_parity([GOLDEN])
    assert [row.case for row in rows if not row.agrees or row.num_ties] == []
    assert all(row.num_equal == row.num_codes > 0 for row in rows)
    cases = {row.case for row in rows}
    assert {f"clip 2 at {rate} kbit/s" for rate in ("0.5", "1", "1.5", "2", "4")} <= cases
    assert {"clip 2 at 2 kbit/s x 0.95", "clip 2 at 4 kbit/s x 0.95"} <= cases
    assert {f"clip {clip} at 4 kbit/s" for clip in range(4)} <= cases


def test_parity_would_notice_the_missing_gain(tmp_path: Path) -> None:
    """Without the 0.95 the codes are others: the scaled cases are no copies of the plain ones."""
    cases = {case.name: case for case in golden_cases(GOLDEN, tmp_path)}
    plain, scaled = cases["clip 2 at 4 kbit/s"], cases["clip 2 at 4 kbit/s x 0.95"]
    np.testing.assert_allclose(scaled.audio, 0.95 * plain.audio, rtol=1e-6)
    assert (plain.codes["fused"] == scaled.codes["fused"]).mean() < 0.9


def test_gain_belongs_to_the_identity(golden_path: Path) -> None:
    plain, scaled = (load_codec(str(golden_path), settings(gain=g)).spec for g in (1.0, 0.95))
    assert plain.encode_id != scaled.encode_id
    assert plain.decode_id == scaled.decode_id


def test_length_law_and_shortest_clip(golden_codec: XCodec) -> None:
    for size in (80, 319, 399, 400, 401, 719, 720, 1000, 1600, 1679, 1680):
        tokens = encode(golden_codec, noise(size))
        assert tokens.num_frames.tolist() == [(size + 240) // 320]
        assert golden_codec.spec.num_frames(size) == (size + 240) // 320
        assert golden_codec.decode(tokens).shape == (1, 1, size)
    with pytest.raises(AudioError, match="79 samples") as refused:
        encode(golden_codec, noise(79))
    assert refused.value.reason is QuarantineReason.TOO_SHORT


def test_samples_after_the_last_frame_are_zero(golden_codec: XCodec) -> None:
    """Of 399 samples one frame remains: 320 samples of audio, and 79 that nobody coded."""
    tokens = encode(golden_codec, noise(399))
    assert tokens.num_frames.tolist() == [1]
    audio = golden_codec.decode(tokens)[0, 0]
    assert audio[:320].any()
    assert not audio[320:].any()


def test_acoustic_encoder_runs_again_where_its_frames_are_too_few() -> None:
    config = presets("xcodec")["xcodec-hubert-librispeech"]()
    assert isinstance(config, XCodecConfig)
    for size in range(80, 1400):
        is_short = config.acoustic_frames(size) != (size + 240) // 320
        assert is_short == (80 <= size % 320 < 312), size


def test_released_shapes() -> None:
    """Parameters: 160.7 million, of which 94.4 in the SSL model; codebooks come on top."""
    for name in HUB_IDS:
        config = PRESETS[name]()
        assert (config.sample_rate, config.hop_length, config.min_tail_samples) == (16000, 320, 80)
        assert config.streams[0].num_codebooks == 8
        assert [config.codebooks_of(rate) for rate in config.target_bandwidths] == [1, 2, 3, 4, 8]
    with torch.device("meta"):
        codec = build_codec("xcodec", PRESETS["xcodec-hubert-librispeech"]().architecture())
    sizes: dict[Part, int] = {}
    for key, value in codec.state_dict().items():
        part = codec.part_of(key)
        sizes[part] = sizes.get(part, 0) + value.numel()
    # The library counts three tensors more: masking vector, and the norm of a positional weight.
    assert sum(sizes.values()) - sizes[Part.CODEBOOKS] == 160_698_625 - 768 - 128
    assert sizes[Part.CODEBOOKS] == 8 * 1024 * 1024
    assert sizes[Part.SSL] == pytest.approx(94.4e6, rel=1e-3)


def test_fast_mode_runs_equal_lengths_together(
    golden_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = torch.cat([noise(1000, 1), noise(1000, 2), noise(1000, 3)])
    num_samples = torch.tensor([1000, 700, 1000])
    sizes: dict[str, list[tuple[int, int]]] = {}
    results = {}
    for mode in ("exact", "fast"):
        codec = load_codec(str(golden_path), settings(mode=mode))
        assert isinstance(codec, XCodec)
        seen = sizes.setdefault(mode, [])
        inner = codec.embed
        monkeypatch.setattr(
            codec, "embed", lambda x, y, f=inner, s=seen: (s.append(x.shape), f(x, y))[1]
        )
        results[mode] = codec.encode(clips, num_samples)
    assert [tuple(size) for size in sizes["exact"]] == [(1, 1, 1000), (1, 1, 700), (1, 1, 1000)]
    assert [tuple(size) for size in sizes["fast"]] == [(2, 1, 1000), (1, 1, 700)]
    for row in range(3):
        agreement = results["exact"].clip(row)["fused"] == results["fast"].clip(row)["fused"]
        assert agreement.mean() > 0.95


@pytest.mark.parametrize("ssl", ["hubert", "wavlm"])
def test_codes_are_those_of_the_library(ssl: str, tmp_path: Path) -> None:
    """A folder of the library, converted, gives the library's codes at every bandwidth."""
    model, config = random_library_model(ssl)
    model.save_pretrained(tmp_path / "library")
    manifest = convert(tmp_path / "library", tmp_path / "codec")
    assert manifest.architecture == config.architecture()
    codec = load_codec(str(tmp_path / "codec"), settings())
    for size in (1600, 1601, 2000):
        audio = noise(size)
        tokens = codec.encode(audio, torch.tensor([size]))
        assert len(np.unique(tokens.codes["fused"])) > 8
        for rate in config.target_bandwidths:
            with torch.inference_mode():
                expected = model.encode(audio, bandwidth=rate).audio_codes[0].numpy()
                audible = model.decode(torch.from_numpy(expected)[None]).audio_values
            books = config.codebooks_of(rate)
            np.testing.assert_array_equal(tokens.codes["fused"][0, :books], expected)
            shared = min(size, audible.shape[2])
            found = codec.decode(tokens, books)[:, :, :shared]
            torch.testing.assert_close(found, audible[:, :, :shared], atol=1e-5, rtol=1e-4)


def random_library_model(ssl: str) -> tuple[Any, XCodecConfig]:
    torch.manual_seed(3)
    small = tiny()
    config = small.model_copy(
        update={
            "semantic_model_config": small.semantic_model_config.model_copy(
                update={"model_type": ssl}
            )
        }
    )
    guard_torchaudio()
    model: Any = _library_model(config)
    draw_weights(model, gain=0.7)
    for book in model.quantizer.quantizers:
        book.codebook.embed.normal_(std=0.3)
    return model.eval(), config


@pytest.mark.parametrize("spelling", ["parametrizations", "weight_g"])
def test_original_file_with_strays(spelling: str, tmp_path: Path, golden_path: Path) -> None:
    """Either spelling of weight norm, training statistics, and entries that are no tensors."""
    state: dict[str, Any] = load_file(GOLDEN / "codec.safetensors")
    for book in range(8):
        prefix = f"quantizer.vq.layers.{book}._codebook."
        state |= {f"{prefix}embed_avg": torch.ones(4), f"{prefix}cluster_size": torch.ones(2)}
    if spelling == "weight_g":
        for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
            state[POSITIONAL + new] = state.pop(f"{POSITIONAL}parametrizations.weight.{old}")
    state |= {"stray": io.BytesIO(b"anything"), "step": 7}
    path = tmp_path / "xcodec.pth"
    torch.save({"codec_model": state, "optimizer_g": {"lr": 1e-4}}, path)
    manifest = convert(path, tmp_path / "codec", config_path=GOLDEN / "config.json")
    golden = load_codec(str(golden_path), settings()).spec.manifest
    assert manifest.parts == golden.parts
    assert manifest.weights_sha256 == golden.weights_sha256


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "xcodec.pth"
    torch.save({"encoder.block.0.bias": torch.ones(1), "evil": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"xcodec\.pth"):
        convert(path, tmp_path / "codec")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "codec").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc_prior.bias": None}, "'fc.bias'"),
        ({"decoder_2.model.2.block.1.weight_g": None}, "weight_g"),
        ({"encoder.block.1.surprise": torch.ones(1)}, "'encoder.block.1.surprise'"),
        ({"fc_post2.bias": torch.ones(3)}, r"fc2\.bias.*\(3,\)"),
    ],
)
def test_a_file_that_does_not_fit_names_the_tensor(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = load_file(GOLDEN / "codec.safetensors") | change
    path = tmp_path / "xcodec.pth"
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "codec", config_path=GOLDEN / "config.json")


def test_a_released_shape_is_assumed_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor for 'ssl\.encoder\.layers"):
        convert(GOLDEN / "codec.safetensors", tmp_path / "codec")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [2, 1]}, "strides"),
        ({"codebook_dim": 64}, "codebook_dim"),
        ({"semantic_model_config": {"model_type": "wav2vec2"}}, "model_type"),
        ({"acoustic_model_config": {"downsampling_ratios": [8, 5, 4]}}, "frame rates"),
    ],
)
def test_configurations_that_cannot_run_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XCodecConfig.from_library(tiny().architecture() | change)
