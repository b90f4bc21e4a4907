"""Names and shapes of released H-Codec checkpoints, from ours.

The name map is data: ``_RENAMES`` turns our key into the released one. Source of the names: the
published classes of alibaba/unified-audio (Apache-2.0), folders HCodec-1.0, HCodec-1.5, HCodec-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hcodec_core.errors import CheckpointError
from hcodec_core.models.conversion import State, fold_weight_norm, take
from hcodec_core.models.hcodec.config import (
    HCodecConfig,
    SeanetHCodecConfig,
    SpectralHCodecConfig,
)
from hcodec_core.models.hcodec.model import codec_of

Shape = tuple[int, ...]

_QUANTIZERS = {"acoustic": "quantizer", "semantic": "semantic_quantizer"}
_QUERY = re.compile(r"aggregators\.\w+\.query")
# Applied in order to our key.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^acoustic_encoder\.conv_in\.", r"encoder.embed."),
    (r"^acoustic_encoder\.convnext\.", r"encoder.prior_net."),
    (r"^acoustic_encoder\.middle\.", r"encoder.post_net.1."),
    (r"^acoustic_encoder\.final_norm\.", r"encoder.final_layer_norm."),
    (r"^acoustic_encoder\.conv_out\.", r"encoder.out."),
    (r"^acoustic_encoder\.", r"encoder."),
    (r"^decoder\.upsample\.expand\.", r"decoder.embed.up."),
    (r"^decoder\.upsample\.smooth\.", r"decoder.embed."),
    (r"^decoder\.resnets_before\.(\d)\.", r"decoder.prior_net.\1."),
    (r"^decoder\.transformer\.", r"decoder.prior_net.3."),
    (r"^decoder\.resnets_after\.0\.", r"decoder.prior_net.5."),
    (r"^decoder\.resnets_after\.1\.", r"decoder.prior_net.6."),
    (r"^decoder\.group_norm\.", r"decoder.prior_net.7."),
    (r"^decoder\.convnext\.", r"decoder.post_net."),
    (r"^decoder\.final_norm\.", r"decoder.final_layer_norm."),
    (r"((?:post|prior)_net\.\d+)\.depthwise\.", r"\1.dwconv."),
    (r"((?:post|prior)_net\.\d+)\.expand\.", r"\1.pwconv1.linear."),
    (r"((?:post|prior)_net\.\d+)\.reduce\.", r"\1.pwconv2.linear."),
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
    (r"^bottleneck\.", r"bottleneck_transformer.transformer."),
    (r"^aggregators\.(\w+)\.query$", r"\1_aggregator.query_embedding"),
    (r"^aggregators\.(\w+)\.transformer\.", r"\1_aggregator.transformer.transformer."),
)
# Within the layers of 1.5's transformers, where the plain names mean something else.
_MIMI_RENAMES: tuple[tuple[str, str], ...] = (
    ("attention_norm.", "norm1."),
    ("mlp_norm.", "norm2."),
    ("attention.query_key_value.weight", "self_attn.in_proj_weight"),
    ("attention.out.", "self_attn.out_proj."),
    ("mlp.expand.", "linear1."),
    ("mlp.reduce.", "linear2."),
    ("attention_scale", "layer_scale_1.scale"),
    ("mlp_scale", "layer_scale_2.scale"),
)


def our_state(state: Mapping[str, Tensor], config: HCodecConfig) -> State:
    """Tensors of a released checkpoint under our names, without the SSL model.

    Raises:
        CheckpointError: A tensor is missing, misshapen or unknown, or a stored window is not the
            periodic Hann window that the model computes.
    """
    unknown = sorted(state.keys() - released_keys(config).keys())
    if unknown:
        raise CheckpointError(f"The checkpoint has the tensor {unknown[0]!r}, unknown to H-Codec.")
    for name, size in _windows(config).items():
        _check_window(state, name, size)
    return {key: _our_tensor(state, key, shape, config) for key, shape in _our_shapes(config)}


def released_keys(config: HCodecConfig) -> dict[str, Shape]:
    """Names and shapes that a released checkpoint of this shape has."""
    keys: dict[str, Shape] = {name: (size,) for name, size in _windows(config).items()}
    for key, shape in _our_shapes(config):
        name = released_name(key, config)
        if key.startswith("quantizers."):
            keys.update(_released_codebooks(key, shape))
        elif _is_weight_normed(key, config):
            keys[f"{name}_g"] = (shape[0], 1, 1)
            keys[f"{name}_v"] = shape
        else:
            keys[name] = _released_shape(key, shape)
    return keys


def released_name(key: str, config: HCodecConfig) -> str:
    """Released name of our tensor ``key`` (without the suffixes of weight norm)."""
    if isinstance(config, SeanetHCodecConfig) and key.startswith("acoustic_encoder."):
        key = _released_seanet_name(key.removeprefix("acoustic_encoder."), config)
    if key.startswith(("aggregators.", "bottleneck.")):
        for ours, released in _MIMI_RENAMES:
            key = key.replace(ours, released)
    key = re.sub(r"^semantic_(en|de)coder\.units\.(\d+)\.", _released_unit, key)
    stride_one = {str(i) for i, stride in enumerate(config.semantic_strides) if stride == 1}
    up = re.match(r"^semantic_decoder\.ups\.(\d+)\.conv\.(.*)$", key)
    if up is not None:
        kind = "conv" if up[1] in stride_one else "deconv"
        key = f"semantic_decoder.conv_blocks.{up[1]}.conv.{kind}.{up[2]}"
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    if isinstance(config, SeanetHCodecConfig):
        # The one depthwise convolution that the published code does not wrap.
        return re.sub(r"^decoder\.embed\.conv\.", "decoder.embed.dw.", key)
    return key


def _windows(config: HCodecConfig) -> dict[str, int]:
    windows = {"decoder.head.istft.window": config.n_fft}
    if isinstance(config, SpectralHCodecConfig):
        windows["encoder.stft.window"] = config.encoder_n_fft
    return windows


def _check_window(state: Mapping[str, Tensor], name: str, size: int) -> None:
    window = take(state, name, (size,))
    if not torch.allclose(window, torch.hann_window(size), atol=1e-6):
        raise CheckpointError(f"{name} is not the periodic Hann window of {size} samples.")


def _our_shapes(config: HCodecConfig) -> Iterator[tuple[str, Shape]]:
    with torch.device("meta"):
        state = codec_of(config).state_dict()
    for key, value in state.items():
        if not key.startswith("ssl."):
            yield key, tuple(value.shape)


def _our_tensor(
    state: Mapping[str, Tensor], key: str, shape: Shape, config: HCodecConfig
) -> Tensor:
    if key.startswith("quantizers."):
        names = [name for name in _released_codebooks(key, shape) if name.endswith(".embed")]
        return torch.cat([take(state, name, (1, *shape[1:])) for name in names])
    name = released_name(key, config)
    if not _is_weight_normed(key, config):
        return take(state, name, _released_shape(key, shape)).reshape(shape)
    gain = take(state, f"{name}_g", (shape[0], 1, 1))
    return fold_weight_norm(gain, take(state, f"{name}_v", shape))


def _is_weight_normed(key: str, config: HCodecConfig) -> bool:
    is_conv = key.startswith("acoustic_encoder.") and key.endswith(".conv.weight")
    return is_conv and isinstance(config, SeanetHCodecConfig)


def _released_shape(key: str, shape: Shape) -> Shape:
    return (1, *shape, 1) if _QUERY.fullmatch(key) else shape


def _released_codebooks(key: str, shape: Shape) -> dict[str, Shape]:
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


def _released_seanet_name(key: str, config: SeanetHCodecConfig) -> str:
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
