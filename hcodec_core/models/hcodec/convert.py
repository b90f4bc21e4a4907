"""Released H-Codec checkpoints to our codec folders.

The name map is data: ``_RENAMES`` turns our key into the released one. Source of the names: the
published classes of alibaba/unified-audio (Apache-2.0), folder HCodec-1.0; its file is a flat state
dict ``weights.pt`` of the hub repository QuarkAudio/QuarkAudio-HCodec.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.models.conversion import (
    ConvertRequest,
    GoldenCase,
    State,
    fold_weight_norm,
    read_checkpoint,
    read_ssl_model,
    take,
)
from hcodec_core.models.hcodec.config import HCodecConfig
from hcodec_core.models.hcodec.model import HCodec
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.nn.ssl_config import SslConfig
from hcodec_core.tokens import CodecManifest

_ROOTS = ("encoder", "decoder", "quantizer", "semantic_quantizer", "semantic_encoder")
_WINDOW = "decoder.head.istft.window"
_QUANTIZERS = {"acoustic": "quantizer", "semantic": "semantic_quantizer"}
# Applied in order to our key.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^decoder\.upsample\.expand\.", r"decoder.embed.up."),
    (r"^decoder\.upsample\.smooth\.conv\.", r"decoder.embed.dw."),
    (r"^decoder\.resnets_before\.(\d)\.", r"decoder.prior_net.\1."),
    (r"^decoder\.transformer\.", r"decoder.prior_net.3."),
    (r"^decoder\.resnets_after\.0\.", r"decoder.prior_net.5."),
    (r"^decoder\.resnets_after\.1\.", r"decoder.prior_net.6."),
    (r"^decoder\.group_norm\.", r"decoder.prior_net.7."),
    (r"^decoder\.convnext\.", r"decoder.post_net."),
    (r"^decoder\.final_norm\.", r"decoder.final_layer_norm."),
    (r"(post_net\.\d+)\.depthwise\.", r"\1.dwconv."),
    (r"(post_net\.\d+)\.expand\.", r"\1.pwconv1.linear."),
    (r"(post_net\.\d+)\.reduce\.", r"\1.pwconv2.linear."),
    (r"(layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
    (r"(layers\.\d+)\.mlp_norm\.", r"\1.post_attention_layernorm."),
    (r"(layers\.\d+)\.attention\.lstm\.", r"\1.self_attn.rnn."),
    (r"(layers\.\d+)\.attention\.query\.", r"\1.self_attn.q_proj."),
    (r"(layers\.\d+)\.attention\.key\.", r"\1.self_attn.k_proj."),
    (r"(layers\.\d+)\.attention\.value\.", r"\1.self_attn.v_proj."),
    (r"(layers\.\d+)\.attention\.out\.", r"\1.self_attn.o_proj."),
    (r"(layers\.\d+\.mlp)\.gate\.", r"\1.w1."),
    (r"(layers\.\d+\.mlp)\.down\.", r"\1.w2."),
    (r"(layers\.\d+\.mlp)\.up\.", r"\1.w3."),
    (r"^semantic_encoder\.conv_in\.", r"semantic_encoder.conv."),
    (r"^semantic_decoder\.conv_in\.", r"semantic_decoder.conv1."),
    (r"^(semantic_(?:en|de)coder)\.conv_out\.", r"\1.conv2."),
    (r"^semantic_encoder\.downs\.(\d+)\.", r"semantic_encoder.conv_blocks.\1.conv."),
)


def convert_checkpoint(request: ConvertRequest) -> CodecManifest:
    """Write a released H-Codec 1.0 as a codec folder; shapes tell everything but the heads.

    Raises:
        ConfigError: No SSL model was named, or the checkpoint is of a version not supported.
        CheckpointError: A tensor is missing, misshapen or unknown.
    """
    state = read_checkpoint(request.checkpoint_path, _ROOTS)
    if request.ssl is None:
        raise ConfigError(
            "H-Codec's checkpoints do not hold their SSL model: name its folder or hub id "
            "(bosonai/hubert_base for 1.0)."
        )
    ssl_config, ssl_tensors = read_ssl_model(request.ssl)
    config = config_from_shapes(state, ssl_config)
    with torch.device("meta"):
        codec = HCodec(config)
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


def config_from_shapes(state: Mapping[str, Tensor], ssl: SslConfig) -> HCodecConfig:
    """Read the shape of a 1.0 checkpoint off its tensors (8 heads everywhere).

    Raises:
        ConfigError: The checkpoint is of another version.
        CheckpointError: A tensor that tells a dimension is missing.
    """
    _refuse_other_versions(state)
    middle = _only_index(state, r"encoder\.model\.(\d+)\.layers\.0\.mlp\.w1\.weight")
    stages = range(3, middle, 3)
    book = _shape(state, "quantizer.layers.0._codebook.embed")
    decoder_dim = _shape(state, "decoder.norm.weight")[0]
    return HCodecConfig(
        sample_rate=16000,
        latent_dim=book[2],
        num_filters=_shape(state, "encoder.model.0.conv.conv.weight_v")[0],
        strides=tuple(
            _shape(state, f"encoder.model.{i}.conv.conv.weight_v")[2] // 2 for i in stages
        ),
        last_stride=_shape(state, f"encoder.model.{middle + 3}.conv.conv.weight_v")[2] // 2,
        encoder_heads=8,
        encoder_layers=_count(state, rf"encoder\.model\.{middle}\.layers\.\d+\.mlp\.w1\.weight"),
        ssl=ssl,
        semantic_dim=_shape(state, "semantic_encoder.conv.conv.weight")[0],
        semantic_strides=tuple(_semantic_strides(state)),
        num_codebooks=_count(state, r"quantizer\.layers\.\d+\._codebook\.embed"),
        codebook_size=book[1],
        decoder_dim=decoder_dim,
        decoder_heads=8,
        decoder_layers=_count(state, r"decoder\.prior_net\.3\.layers\.\d+\.mlp\.w1\.weight"),
        decoder_upsample=_shape(state, "decoder.embed.up.weight")[0] // decoder_dim,
        convnext_dim=_shape(state, "decoder.post_net.0.pwconv1.linear.weight")[0],
        convnext_layers=_count(state, r"decoder\.post_net\.\d+\.gamma"),
        n_fft=_shape(state, "decoder.head.out.weight")[0] - 2,
    )


def our_state(state: Mapping[str, Tensor], config: HCodecConfig) -> State:
    """Tensors of a released checkpoint under our names, without the SSL model.

    Raises:
        CheckpointError: A tensor is missing, misshapen or unknown, or the stored window is not the
            periodic Hann window that the model computes.
    """
    unknown = sorted(state.keys() - released_keys(config).keys())
    if unknown:
        raise CheckpointError(f"The checkpoint has the tensor {unknown[0]!r}, unknown to H-Codec.")
    _check_window(state, config.n_fft)
    return {key: _our_tensor(state, key, shape, config) for key, shape in _our_shapes(config)}


def released_keys(config: HCodecConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a released checkpoint of this shape has."""
    keys: dict[str, tuple[int, ...]] = {_WINDOW: (config.n_fft,)}
    for key, shape in _our_shapes(config):
        if key.startswith("quantizers."):
            keys.update(_released_codebooks(key, shape))
        elif _is_weight_normed(key):
            name = released_name(key, config)
            keys[f"{name}_g"] = (shape[0], 1, 1)
            keys[f"{name}_v"] = shape
        else:
            keys[released_name(key, config)] = shape
    return keys


def released_name(key: str, config: HCodecConfig) -> str:
    """Released name of our tensor ``key`` (without the suffixes of weight norm)."""
    if key.startswith("acoustic_encoder."):
        key = _released_encoder_name(key.removeprefix("acoustic_encoder."), config)
    key = re.sub(r"^semantic_(en|de)coder\.units\.(\d+)\.", _released_unit, key)
    stride_one = {str(i) for i, stride in enumerate(config.semantic_strides) if stride == 1}
    up = re.match(r"^semantic_decoder\.ups\.(\d+)\.conv\.(.*)$", key)
    if up is not None:
        kind = "conv" if up[1] in stride_one else "deconv"
        key = f"semantic_decoder.conv_blocks.{up[1]}.conv.{kind}.{up[2]}"
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def recognises_golden(config: Mapping[str, Any]) -> bool:
    """Whether the ``config.json`` of a golden folder is of this family."""
    return config.get("version") == "1.0"


def golden_cases(folder_path: Path, work_path: Path) -> list[GoldenCase]:
    """Convert a golden folder's checkpoint below ``work_path`` and list its cases."""
    codec_path = work_path / folder_path.name
    convert_checkpoint(
        ConvertRequest(
            checkpoint_path=folder_path / "codec.safetensors",
            out_path=codec_path,
            ssl=str(folder_path / "ssl"),
            name=folder_path.name,
            is_trained=False,
        )
    )
    with np.load(folder_path / "expected.npz") as arrays:
        names = sorted(key.removeprefix("wav_") for key in arrays if key.startswith("wav_"))
        return [
            GoldenCase(
                name=f"wav_{name}",
                codec_path=codec_path,
                audio=arrays[f"wav_{name}"],
                codes={stream: arrays[f"{stream}_{name}"] for stream in _QUANTIZERS},
                recon=arrays[f"recon_{name}"],
            )
            for name in names
        ]


def _our_shapes(config: HCodecConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        state = HCodec(config).state_dict()
    for key, value in state.items():
        if not key.startswith("ssl."):
            yield key, tuple(value.shape)


def _our_tensor(
    state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], config: HCodecConfig
) -> Tensor:
    if key.startswith("quantizers."):
        names = [name for name in _released_codebooks(key, shape) if name.endswith(".embed")]
        return torch.cat([take(state, name, (1, *shape[1:])) for name in names])
    name = released_name(key, config)
    if not _is_weight_normed(key):
        return take(state, name, shape)
    gain = take(state, f"{name}_g", (shape[0], 1, 1))
    return fold_weight_norm(gain, take(state, f"{name}_v", shape))


def _is_weight_normed(key: str) -> bool:
    return key.startswith("acoustic_encoder.") and key.endswith(".conv.weight")


def _released_codebooks(key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Buffers of the library's residual quantiser; only ``embed`` decides codes."""
    prefix = _QUANTIZERS[key.split(".")[1]]
    num_codebooks, size, dim = shape
    return {
        f"{prefix}.layers.{book}._codebook.{name}": value
        for book in range(num_codebooks)
        for name, value in (
            ("initted", (1,)),
            ("cluster_size", (1, size)),
            ("embed_avg", (1, size, dim)),
            ("embed", (1, size, dim)),
        )
    }


def _released_encoder_name(key: str, config: HCodecConfig) -> str:
    """Position in the released list: conv, (residual, ELU, conv) per stage, ... (see the spec)."""
    middle = 3 * len(config.strides) + 2
    first, _, rest = key.partition(".")
    if first == "stages":
        stage, kind, rest = rest.split(".", 2)
        index = 3 * int(stage) + (3 if kind == "down" else 1)
        if kind == "residuals":
            _, layer, rest = rest.split(".", 2)
            inner = {"conv1": "block.1", "conv2": "block.3", "shortcut": "shortcut"}[layer]
            return f"encoder.model.{index}.{inner}.conv.{rest}"
        return f"encoder.model.{index}.conv.{rest}"
    if first == "middle":
        return f"encoder.model.{middle}.{rest}"
    return f"encoder.model.{0 if first == 'conv_in' else middle + 3}.conv.{rest}"


def _released_unit(match: re.Match[str]) -> str:
    block, unit = divmod(int(match[2]), 2)
    return f"semantic_{match[1]}coder.conv_blocks.{block}.res_units.{unit}."


def _refuse_other_versions(state: Mapping[str, Tensor]) -> None:
    marks = {"bottleneck_transformer": "1.5", "spatial_encoder": "Spatial"}
    found = {marks[root] for root in (key.partition(".")[0] for key in state) if root in marks}
    if "encoder.embed.conv.weight" in state:
        found.add("2.0")
    if found:
        raise ConfigError(f"The checkpoint is H-Codec {found.pop()}, which is not supported yet.")


def _check_window(state: Mapping[str, Tensor], n_fft: int) -> None:
    window = take(state, _WINDOW, (n_fft,))
    if not torch.allclose(window, torch.hann_window(n_fft), atol=1e-6):
        raise CheckpointError(f"{_WINDOW} is not the periodic Hann window of {n_fft} samples.")


def _semantic_strides(state: Mapping[str, Tensor]) -> Iterator[int]:
    num_blocks = _count(state, r"semantic_encoder\.conv_blocks\.\d+\.conv\.conv\.weight")
    for block in range(num_blocks):
        kernel_size = _shape(state, f"semantic_encoder.conv_blocks.{block}.conv.conv.weight")[2]
        yield 1 if kernel_size == 3 else kernel_size // 2


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"The checkpoint lacks the tensor {key!r}.")
    return tuple(state[key].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)


def _only_index(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for key in state if (match := re.fullmatch(pattern, key))]
    if len(found) != 1:
        raise CheckpointError(
            f"The checkpoint has {len(found)} tensors like {pattern}, expected 1."
        )
    return found[0]
