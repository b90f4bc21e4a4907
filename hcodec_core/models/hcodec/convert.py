"""Released H-Codec checkpoints (1.0, 1.5, 2.0) to our codec folders.

Files: ``weights.pt`` of the hub repository QuarkAudio/QuarkAudio-HCodec (1.0),
``hcode_1.5_adaptive_4+4.pt`` of QuarkAudio/HCodec-1.5-adaptive, ``large_12.5hz_weights.pt`` of
QuarkAudio/H-Codec-2.0: flat state dicts, or Lightning checkpoints. The keys tell the version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from hcodec_core.codecs import load_manifest
from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.models.conversion import (
    ConvertRequest,
    GoldenCase,
    State,
    read_checkpoint,
    read_ssl_model,
    ssl_state,
)
from hcodec_core.models.hcodec.config import (
    AdaptiveHCodecConfig,
    Fft,
    HCodecConfig,
    SeanetHCodecConfig,
    SpectralHCodecConfig,
    mimi_transformer,
)
from hcodec_core.models.hcodec.model import codec_of
from hcodec_core.models.hcodec.offset_ids import split_offset_ids
from hcodec_core.models.hcodec.released_names import our_state
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.models.released_config import (
    check_agreement,
    count_like,
    read_config,
    section,
    shape_of,
)
from hcodec_core.nn.ssl_config import SslConfig
from hcodec_core.tokens import CodecManifest

_ROOTS = ("encoder", "decoder", "quantizer", "semantic_quantizer", "semantic_encoder")
_SSL_MODELS = {
    "1.0": "bosonai/hubert_base",
    "1.5": "facebook/wav2vec2-large-xlsr-53",
    "2.0": "bosonai/hubert_base",
}
_ADAPTIVE_SSL_LAYERS = (11, 14, 16)
_SPECTRAL_HOP_LENGTH = 960
_SPECTRAL_HEAD_DIM = 64
_MARKS = {"bottleneck_transformer.": "1.5", "encoder.embed.": "2.0", "spatial_encoder.": "Spatial"}
_STREAMS = ("semantic", "acoustic")
_FFT_OPTIONS: tuple[Fft, ...] = get_args(Fft)


@dataclass(frozen=True)
class AdaptiveFacts:
    """What no tensor of a 1.5 checkpoint tells, as in the published configuration.

    ``threshold``: of the published tokeniser; ``trained_thresholds``: drawn from in training.
    """

    aggregator_heads: int = 8
    bottleneck_heads: int = 8
    max_frame_span: int = 8
    threshold: float = 0.6
    trained_thresholds: tuple[float, float] = (0.7, 1.0)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> AdaptiveFacts:
        """Read a configuration of the published form.

        Raises ``ConfigError`` when a section or a field is missing.
        """
        adaptive = section(values, "adaptive_config")
        try:
            return cls(
                section(adaptive, "aggregators", "semantic_aggregator")["num_heads"],
                section(adaptive, "transformer_kwargs")["num_heads"],
                adaptive["max_tokens_per_group"],
                adaptive["manual_threshold"] or adaptive["similarity_threshold"],
                (adaptive["similarity_threshold_lower"], adaptive["similarity_threshold_upper"]),
            )
        except KeyError as error:
            raise ConfigError(f"The configuration's adaptive_config lacks {error}.") from error


def convert_checkpoint(request: ConvertRequest) -> CodecManifest:
    """Write a released H-Codec as a codec folder.

    Shapes tell all of 1.0 and 2.0 but the numbers of heads, which never vary. For 1.5
    ``request.config_path`` may name the published configuration, as JSON, of a model with other
    heads, spans or thresholds than the released one. Rates that it states are held to the version.
    For 2.0 the option ``fft=float32`` keeps the published rounding of spectra.

    Raises:
        ConfigError: No SSL model was named, or the checkpoint is of a version not supported.
        CheckpointError: A tensor is missing, misshapen or unknown, the SSL model too small, or the
            configuration states another sample rate.
    """
    state = read_checkpoint(request.checkpoint_path, _ROOTS)
    version = version_of(state)
    if request.ssl is None:
        raise ConfigError(
            "H-Codec's checkpoints do not hold their SSL model: name its folder or hub id "
            f"({_SSL_MODELS[version]} for {version})."
        )
    ssl_config, ssl_tensors = read_ssl_model(request.ssl)
    if version == "1.5":
        ssl_config, ssl_tensors = _cut_ssl_model(ssl_config, ssl_tensors)
    facts = AdaptiveFacts()
    if version == "1.5" and request.config_path is not None:
        facts = AdaptiveFacts.of(read_config(request.config_path))
    config = config_from_shapes(state, ssl_config, facts, _fft_of(request, version))
    if request.config_path is not None:
        rates = dict.fromkeys(("sample_rate", "sampling_rate"), config.sample_rate)
        check_agreement("top level", read_config(request.config_path), rates)
    with torch.device("meta"):
        codec = codec_of(config)
    ours = our_state(state, config)
    ours.update({f"ssl.{key}": value for key, value in ssl_tensors.items()})
    codec.load_state_dict(ours, assign=True)
    card = CodecCard(
        name=request.name or f"hcodec-{config.version}",
        is_trained=request.is_trained,
        weights_licence=request.weights_licence,
        source=request.source,
    )
    return save_codec(codec, card, request.out_path)


def version_of(state: Mapping[str, Tensor]) -> str:
    """Version of a checkpoint, from its keys.

    Raises ``ConfigError`` when it is of a kind that is not supported.
    """
    found = {version for mark, version in _MARKS.items() if any(k.startswith(mark) for k in state)}
    if len(found) > 1 or "Spatial" in found:
        raise ConfigError(
            f"The checkpoint is H-Codec {' and '.join(sorted(found))}, which is not supported: "
            "1.0, 1.5 and 2.0 are."
        )
    return found.pop() if found else "1.0"


def config_from_shapes(
    state: Mapping[str, Tensor],
    ssl: SslConfig,
    facts: AdaptiveFacts | None = None,
    fft: Fft = "float64",
) -> HCodecConfig:
    """Read the shape of a checkpoint off its tensors.

    ``facts`` complete a 1.5 (None: as released), ``fft`` a 2.0: the type its spectra have.

    Raises:
        ConfigError: The checkpoint is of a version not supported.
        CheckpointError: A tensor that tells a dimension is missing.
    """
    version = version_of(state)
    if version == "2.0":
        return SpectralHCodecConfig(**_common(state, ssl), **_spectral(state), encoder_fft=fft)
    if version == "1.0":
        return SeanetHCodecConfig(**_common(state, ssl), **_seanet(state))
    return AdaptiveHCodecConfig(
        **_common(state, ssl), **_seanet(state), **_adaptive(state, facts or AdaptiveFacts())
    )


def recognises_golden(config: Mapping[str, Any]) -> bool:
    """Whether the ``config.json`` of a golden folder is of this family."""
    return config.get("version") in _SSL_MODELS


def golden_cases(folder_path: Path, work_path: Path) -> list[GoldenCase]:
    """Convert a golden folder's checkpoint below ``work_path`` and list its cases."""
    codec_path = work_path / folder_path.name
    manifest = convert_checkpoint(
        ConvertRequest(
            checkpoint_path=folder_path / "codec.safetensors",
            out_path=codec_path,
            ssl=str(folder_path / "ssl"),
            config_path=folder_path / "config.json",
            name=folder_path.name,
            is_trained=False,
            options=_golden_options(folder_path),
        )
    )
    with np.load(folder_path / "expected.npz") as arrays:
        make = _adaptive_case if manifest.is_variable_rate else _case
        found = (re.fullmatch(r"semantic_(\d+(?:_thr\d+)?)", key) for key in sorted(arrays))
        return [make(arrays, match[1], codec_path) for match in found if match is not None]


def _golden_options(folder_path: Path) -> Mapping[str, str]:
    """As published, since that is what was recorded."""
    version = read_config(folder_path / "config.json")["version"]
    return {"fft": "float32"} if version == "2.0" else {}


def _fft_of(request: ConvertRequest, version: str) -> Fft:
    unknown = sorted(request.options.keys() - ({"fft"} if version == "2.0" else set()))
    if unknown:
        raise ConfigError(f"H-Codec {version} has no option {unknown[0]!r}: leave it out.")
    asked = request.options.get("fft", "float64")
    for fft in _FFT_OPTIONS:
        if fft == asked:
            return fft
    raise ConfigError(f"Option fft is {asked!r}: it can be {' or '.join(_FFT_OPTIONS)}.")


def _case(arrays: Mapping[str, Any], name: str, codec_path: Path) -> GoldenCase:
    return GoldenCase(
        name=f"wav_{name}",
        codec_path=codec_path,
        audio=arrays[f"wav_{name}"],
        codes={stream: arrays[f"{stream}_{name}"] for stream in _STREAMS},
        recon=_recon(arrays, name),
    )


def _adaptive_case(arrays: Mapping[str, Any], name: str, codec_path: Path) -> GoldenCase:
    """``name`` is ``<wave>`` (the released threshold) or ``<wave>_thr<thousandths>``."""
    wave, _, thousandths = name.partition("_thr")
    ids = {stream: arrays[f"{stream}_{name}"] for stream in _STREAMS}
    codes, spans = split_offset_ids(ids, codebook_size=_golden_codebook_size(codec_path))
    return GoldenCase(
        name=f"wav_{name}",
        codec_path=codec_path,
        audio=arrays[f"wav_{wave}"],
        codes=codes,
        recon=_recon(arrays, name),
        frame_spans=spans,
        threshold=int(thousandths) / 1000 if thousandths else None,
    )


def _golden_codebook_size(codec_path: Path) -> int:
    return load_manifest(str(codec_path)).streams[0].codebook_size


def _recon(arrays: Mapping[str, Any], name: str) -> Any:
    return arrays[f"recon_{name}"] if f"recon_{name}" in arrays else None


def _cut_ssl_model(config: SslConfig, tensors: State) -> tuple[SslConfig, State]:
    """The layers that 1.5 uses; the others are never run."""
    needed = max(_ADAPTIVE_SSL_LAYERS)
    # The last layer's output would pass a norm that the model, cut here, does not have.
    if config.num_hidden_layers <= needed:
        raise CheckpointError(
            f"The SSL model has {config.num_hidden_layers} layers; H-Codec 1.5 needs more than "
            f"{needed} ({_SSL_MODELS['1.5']})."
        )
    cut = config.model_copy(update={"num_hidden_layers": needed})
    return cut, ssl_state(tensors, cut)


def _common(state: Mapping[str, Tensor], ssl: SslConfig) -> dict[str, Any]:
    """Fields of all versions that tensors of the same names tell."""
    book = shape_of(state, "quantizer.layers.0._codebook.embed")
    return {
        "latent_dim": book[2],
        "ssl": ssl,
        "semantic_dim": shape_of(state, "semantic_encoder.conv.conv.weight")[0],
        "semantic_strides": tuple(_semantic_strides(state)),
        "num_codebooks": count_like(state, r"quantizer\.layers\.\d+\._codebook\.embed"),
        "codebook_size": book[1],
        "decoder_dim": shape_of(state, "decoder.norm.weight")[0],
        "decoder_layers": _num_layers(state, "decoder.prior_net.3"),
        "convnext_dim": shape_of(state, "decoder.post_net.0.pwconv1.linear.weight")[0],
        "convnext_layers": count_like(state, r"decoder\.post_net\.\d+\.gamma"),
        "n_fft": shape_of(state, "decoder.head.out.weight")[0] - 2,
    }


def _seanet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of 1.0 and 1.5 (8 heads everywhere)."""
    middle = _only_index(state, r"encoder\.model\.(\d+)\.layers\.0\.mlp\.w1\.weight")
    convs = [f"encoder.model.{i}.conv.conv.weight" for i in (0, *range(3, middle, 3), middle + 3)]
    shapes = [shape_of(state, name) for name in convs]
    rows = shape_of(state, "decoder.embed.up.weight")[0]
    return {
        "sample_rate": 16000,
        "num_filters": shapes[0][0],
        "strides": tuple(shape[2] // 2 for shape in shapes[1:-1]),
        "last_stride": shapes[-1][2] // 2,
        "encoder_heads": 8,
        "encoder_layers": _num_layers(state, f"encoder.model.{middle}"),
        "decoder_heads": 8,
        "decoder_upsample": rows // shape_of(state, "decoder.norm.weight")[0],
    }


def _adaptive(state: Mapping[str, Tensor], facts: AdaptiveFacts) -> dict[str, Any]:
    """Fields of 1.5 beyond those of a SEANet codec."""

    def transformer(prefix: str, num_heads: int) -> Any:
        layers = f"{prefix}.transformer.layers"
        hidden_dim, dim = shape_of(state, f"{layers}.0.linear1.weight")
        num_layers = count_like(state, re.escape(layers) + r"\.\d+\.linear1\.weight")
        return mimi_transformer(dim, hidden_dim, num_heads, num_layers)

    return {
        "ssl_layers": _ADAPTIVE_SSL_LAYERS,
        "aggregator": transformer("semantic_aggregator.transformer", facts.aggregator_heads),
        "bottleneck": transformer("bottleneck_transformer", facts.bottleneck_heads),
        "max_frame_span": facts.max_frame_span,
        "released_threshold": facts.threshold,
        "trained_thresholds": facts.trained_thresholds,
    }


def _spectral(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of 2.0 (heads of 64 features)."""
    dim, features, _ = shape_of(state, "encoder.embed.conv.weight")
    return {
        "sample_rate": 48000,
        "encoder_dim": dim,
        "encoder_heads": dim // _SPECTRAL_HEAD_DIM,
        "encoder_layers": _num_layers(state, "encoder.post_net.1"),
        "encoder_convnext_dim": shape_of(state, "encoder.prior_net.0.pwconv1.linear.weight")[0],
        "encoder_convnext_layers": count_like(state, r"encoder\.prior_net\.\d+\.gamma"),
        "encoder_n_fft": features - 2,
        "encoder_hop_length": _SPECTRAL_HOP_LENGTH,
        "encoder_stride": shape_of(state, "encoder.out.conv.weight")[2] // 2,
        "decoder_heads": shape_of(state, "decoder.norm.weight")[0] // _SPECTRAL_HEAD_DIM,
        "decoder_upsample": shape_of(state, "decoder.embed.conv.weight")[2] - 1,
    }


def _num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return count_like(state, re.escape(prefix) + r"\.layers\.\d+\.mlp\.w1\.weight")


def _semantic_strides(state: Mapping[str, Tensor]) -> Iterator[int]:
    num_blocks = count_like(state, r"semantic_encoder\.conv_blocks\.\d+\.conv\.conv\.weight")
    for block in range(num_blocks):
        kernel = shape_of(state, f"semantic_encoder.conv_blocks.{block}.conv.conv.weight")[2]
        yield 1 if kernel == 3 else kernel // 2


def _only_index(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for key in state if (match := re.fullmatch(pattern, key))]
    if len(found) != 1:
        raise CheckpointError(
            f"The checkpoint has {len(found)} tensors like {pattern}, expected 1."
        )
    return found[0]
