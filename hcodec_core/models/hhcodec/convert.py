"""HH-Codec checkpoints to our codec folders.

Source of the names: the published classes of opendilab/HH-Codec (Apache-2.0 LICENSE file), which
write a Lightning checkpoint (a state dict under ``state_dict``), and the generator of
NVIDIA/BigVGAN (MIT) in it. No weights are public: this is for checkpoints trained with that code.

Two sets of weights lie in a checkpoint; option ``weights`` chooses ``ema`` (the moving average, as
the published evaluation does; the default) or ``raw``. Not used, and ignored: ``decoder.*`` (built
and never called), ``conv_transpose.*`` (distillation head) and ``loss.*``.
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
from hcodec_core.models.conversion import ConvertRequest, GoldenCase, State, read_checkpoint
from hcodec_core.models.hhcodec.config import HHCodecConfig
from hcodec_core.models.hhcodec.model import NUM_LSTM_LAYERS, HHCodec
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.models.released_config import (
    check_agreement,
    count_like,
    read_config,
    section,
    shape_of,
)
from hcodec_core.models.seanet_names import (
    SeanetShape,
    leftovers,
    read_encoder_shape,
    released_weight,
)
from hcodec_core.nn.snake import half_band_taps
from hcodec_core.tokens import CodecManifest

_ROOTS = ("encoder", "quantize", "backbone", "melhead", "bigvqgan")
_IGNORED = re.compile(r"^(decoder|conv_transpose|loss)\.")
_EMA = "model_ema."
_BUFFER = re.compile(r"\.(frozen_codebook|filter)$")
_FILTER = re.compile(r"^bigvqgan\..*\.filter$")
_SHARED = re.compile(r"^quantize\.layers\.[1-9]\d*\.code_transform\.")
# The published vocoder's; tensors do not show them.
_DILATIONS = (1, 3, 5)
# Applied in order to our key, after the encoder has been named.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^(encoder\.model\.\d+)\.ahead\.(\d+)\.(\w+)_l0$", r"\1.lstm.\3_l\2"),
    (r"^(encoder\.model\.\d+)\.back\.(\d+)\.(\w+)_l0$", r"\1.lstm.\3_l\2_reverse"),
    (r"^quantizer\.books\.(\d+)\.entries$", r"quantize.layers.\1.frozen_codebook"),
    (r"^quantizer\.transform\.", r"quantize.layers.0.code_transform."),
    (r"^backbone\.embed\.conv\.", r"backbone.embed."),
    (r"^backbone\.resnets_before\.(\d)\.", r"backbone.pos_net.\1."),
    (r"^backbone\.attention\.(norm|query|key|value)", r"backbone.pos_net.2.\1"),
    (r"^backbone\.attention\.out\.", r"backbone.pos_net.2.proj_out."),
    (r"^backbone\.resnets_after\.0\.", r"backbone.pos_net.3."),
    (r"^backbone\.resnets_after\.1\.", r"backbone.pos_net.4."),
    (r"^backbone\.group_norm\.", r"backbone.pos_net.5."),
    (r"^backbone\.final_norm\.", r"backbone.final_layer_norm."),
    (r"(pos_net\.\d\.conv\d)\.conv\.", r"\1."),
    (r"(pos_net\.2)\.(q|k|v)(uery|ey|alue)\.", r"\1.\2."),
    (r"(convnext\.\d+)\.depthwise\.conv\.", r"\1.dwconv."),
    (r"(convnext\.\d+)\.expand\.", r"\1.pwconv1."),
    (r"(convnext\.\d+)\.reduce\.", r"\1.pwconv2."),
    (r"^mel_head\.", r"melhead.transconv."),
    (r"^vocoder\.conv_in\.conv\.", r"bigvqgan.conv_pre."),
    (r"^vocoder\.conv_out\.conv\.", r"bigvqgan.conv_post."),
    (r"^vocoder\.activation\.", r"bigvqgan.activation_post.act."),
    (r"^vocoder\.stages\.(\d+)\.up\.", r"bigvqgan.ups.\1.0."),
    (r"(resblocks\.\d+\.convs\d\.\d+)\.conv\.", r"\1."),
)


def convert_checkpoint(request: ConvertRequest) -> CodecManifest:
    """Write an HH-Codec checkpoint as a codec folder; a configuration file is only compared.

    Raises:
        ConfigError: An option or the configuration file cannot be used.
        CheckpointError: A tensor is missing, misshapen or unknown, or contradicts the file.
    """
    which = _chosen_weights(request.options)
    state = _used(read_checkpoint(request.checkpoint_path, _ROOTS), which)
    config = config_from_shapes(state)
    if request.config_path is not None:
        _compare(read_config(request.config_path), config)
    with torch.device("meta"):
        codec = HHCodec(config)
    codec.load_state_dict(our_state(state, codec), assign=True)
    card = CodecCard(
        name=request.name or "hhcodec",
        is_trained=request.is_trained,
        weights_licence=request.weights_licence,
        source=request.source,
    )
    return save_codec(codec, card, request.out_path)


def config_from_shapes(state: Mapping[str, Tensor]) -> HHCodecConfig:
    """Shape of a checkpoint: strides and up-sampling rates are half the kernels.

    Raises:
        ConfigError: The parts do not fit each other.
        CheckpointError: The tensors are of another model.
    """
    encoder = read_encoder_shape(state, "encoder.model.")
    if encoder != _seanet_shape(encoder.num_filters, encoder.strides, encoder.out_dim):
        raise CheckpointError(f"The encoder is not HH-Codec's: {encoder}.")
    book = shape_of(state, "quantize.layers.0.frozen_codebook")
    mel = shape_of(state, "melhead.transconv.weight")
    return HHCodecConfig.from_architecture(
        {
            "num_filters": encoder.num_filters,
            "strides": encoder.strides,
            "latent_dim": book[1],
            "codebook_size": book[0],
            "num_training_books": count_like(state, r"quantize\.layers\.\d+\.frozen_codebook"),
            "transform_dim": shape_of(state, "quantize.layers.0.code_transform.0.weight")[0],
            "backbone_dim": mel[0],
            "convnext_dim": shape_of(state, "backbone.convnext.0.pwconv1.weight")[0],
            "convnext_layers": count_like(state, r"backbone\.convnext\.\d+\.gamma"),
            "mel_stride": mel[2],
            "vocoder": _vocoder(state),
        }
    )


def our_state(state: State, codec: HHCodec) -> State:
    """Tensors of a checkpoint, one set of weights chosen, under our names.

    Raises:
        CheckpointError: A tensor is missing, misshapen or unknown, or a filter or a shared tensor
            is not what the model computes.
    """
    shapes = {key: tuple(value.shape) for key, value in codec.state_dict().items()}
    names = {key: released_name(key, codec.config) for key in shapes}
    _check_copies(state)
    unknown = [
        key
        for key in leftovers(state, list(names.values()))
        if not _FILTER.match(key) and not _SHARED.match(key)
    ]
    if unknown:
        raise CheckpointError(f"The checkpoint has the tensor {unknown[0]!r}, unknown to HH-Codec.")
    return {key: _our_tensor(state, names[key], shape) for key, shape in shapes.items()}


def released_name(key: str, config: HHCodecConfig) -> str:
    """Released name of our tensor ``key`` (without the suffixes of weight norm)."""
    first, _, rest = key.partition(".")
    if first == "encoder":
        shape = _seanet_shape(config.num_filters, config.strides, config.latent_dim)
        key = "encoder.model." + shape.encoder_name(rest, has_middle=True)
    block = re.match(r"^vocoder\.stages\.(\d+)\.blocks\.(\d+)\.(.*)$", key)
    if block is not None:
        index = int(block[1]) * len(config.vocoder.block_kernels) + int(block[2])
        inner = re.sub(r"^activations([12])\.(\d+)\.", _released_activation, block[3])
        key = f"bigvqgan.resblocks.{index}.{inner}"
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def recognises_golden(config: Mapping[str, Any]) -> bool:
    """Whether the ``config.json`` of a golden folder is of this family."""
    return "ddconfig" in config and "bigvgan" in config


def golden_cases(folder_path: Path, work_path: Path) -> list[GoldenCase]:
    """Convert a golden folder's checkpoint below ``work_path`` and list its cases.

    Raw and averaged weights are two codecs; a folder may hold outputs of either or both.
    """
    cases: list[GoldenCase] = []
    with np.load(folder_path / "expected.npz") as arrays:
        for which, suffix in (("raw", ""), ("ema", "_ema")):
            codec_path = work_path / f"{folder_path.name}-{which}"
            found = list(_cases(arrays, suffix, codec_path))
            if found:
                _convert_golden(folder_path, codec_path, which)
            cases.extend(found)
    return cases


def _convert_golden(folder_path: Path, codec_path: Path, which: str) -> None:
    convert_checkpoint(
        ConvertRequest(
            checkpoint_path=folder_path / "codec.safetensors",
            out_path=codec_path,
            config_path=folder_path / "config.json",
            name=codec_path.name,
            is_trained=False,
            options={"weights": which},
        )
    )


def _cases(arrays: Mapping[str, Any], suffix: str, codec_path: Path) -> Iterator[GoldenCase]:
    for index in sorted(key.removeprefix("wav_") for key in arrays if key.startswith("wav_")):
        codes, recon = f"indices_{index}{suffix}", f"recon_{index}{suffix}"
        if codes in arrays:
            yield GoldenCase(
                name=f"wav_{index}",
                codec_path=codec_path,
                audio=arrays[f"wav_{index}"],
                codes={"fused": arrays[codes][None]},
                recon=arrays[recon] if recon in arrays else None,
            )


def _chosen_weights(options: Mapping[str, str]) -> str:
    unknown = sorted(options.keys() - {"weights"})
    which = options.get("weights", "ema")
    if unknown or which not in ("ema", "raw"):
        raise ConfigError("HH-Codec's converter has one option: weights=ema or weights=raw.")
    return which


def _used(state: State, which: str) -> State:
    """The tensors that inference uses, from the moving average or as last trained."""
    raw = {
        key: value
        for key, value in state.items()
        if not key.startswith(_EMA) and not _IGNORED.match(key)
    }
    if which == "raw":
        return raw
    _check_averaged(state)
    return {
        key: value if _BUFFER.search(key) else _shadow(state, key) for key, value in raw.items()
    }


def _check_averaged(state: Mapping[str, Tensor]) -> None:
    if not any(key.startswith(_EMA) for key in state):
        raise CheckpointError(
            "The checkpoint holds no moving average (model_ema.*): convert it with weights=raw."
        )
    updates = state.get(f"{_EMA}num_updates")
    # A count below zero means that updates are not counted.
    if updates is not None and int(updates) == 0:
        raise CheckpointError(
            "The checkpoint's moving average was never updated (training averages from epoch 10 "
            "on): convert it with weights=raw."
        )


def _shadow(state: Mapping[str, Tensor], key: str) -> Tensor:
    """Moving average of ``key``; a shared tensor has one, under its first name."""
    name = _EMA + _SHARED.sub("quantize.layers.0.code_transform.", key).replace(".", "")
    if name not in state:
        raise CheckpointError(f"The checkpoint's moving average lacks the tensor {name!r}.")
    return state[name]


def _check_copies(state: Mapping[str, Tensor]) -> None:
    taps = torch.tensor(half_band_taps())
    for key, value in state.items():
        if _FILTER.match(key) and not torch.allclose(value.flatten().float(), taps, atol=1e-6):
            raise CheckpointError(f"{key} is not the filter that this BigVGAN computes.")
        first = _SHARED.sub("quantize.layers.0.code_transform.", key)
        if first != key and not torch.equal(value, state.get(first, value)):
            raise CheckpointError(f"{key} differs from {first}: the books must share one map.")


def _our_tensor(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if re.search(r"pos_net\.2\.(q|k|v|proj_out)\.weight$", name):
        return released_weight(state, name, (*shape, 1)).squeeze(-1)
    return released_weight(state, name, shape)


def _released_activation(match: re.Match[str]) -> str:
    return f"activations.{2 * int(match[2]) + int(match[1]) - 1}.act."


def _seanet_shape(num_filters: int, strides: tuple[int, ...], out_dim: int) -> SeanetShape:
    return SeanetShape(
        num_filters=num_filters,
        strides=strides,
        out_dim=out_dim,
        kernel=7,
        last_kernel=7,
        residual_kernel=3,
        num_residual_layers=1,
        compress=2,
        has_conv_shortcut=True,
    )


def _vocoder(state: Mapping[str, Tensor]) -> dict[str, Any]:
    num_ups = count_like(state, r"bigvqgan\.ups\.\d+\.0\.bias")
    num_blocks = count_like(state, r"bigvqgan\.resblocks\.\d+\.convs1\.0\.bias") // max(num_ups, 1)
    first = shape_of(state, "bigvqgan.conv_pre.weight")
    kernels = [shape_of(state, f"bigvqgan.ups.{i}.0.weight")[2] for i in range(num_ups)]
    return {
        "num_mels": first[1],
        "initial_dim": first[0],
        "upsample_rates": [kernel // 2 for kernel in kernels],
        "upsample_kernels": kernels,
        "block_kernels": [
            shape_of(state, f"bigvqgan.resblocks.{i}.convs1.0.weight")[2] for i in range(num_blocks)
        ],
        "block_dilations": _DILATIONS,
        "has_final_bias": "bigvqgan.conv_post.bias" in state,
    }


def _compare(values: Mapping[str, Any], config: HHCodecConfig) -> None:
    check_agreement(
        "top level", values, {"sample_rate": config.sample_rate, "audio_normalize": False}
    )
    encoder = {"causal": True, "ratios": list(reversed(config.strides)), "lstm": NUM_LSTM_LAYERS}
    check_agreement("ddconfig", section(values, "ddconfig"), encoder)
    vocoder = config.vocoder
    expected = {
        "upsample_rates": list(vocoder.upsample_rates),
        "resblock": "1",
        "resblock_dilation_sizes": [list(vocoder.block_dilations)] * len(vocoder.block_kernels),
        "activation": "snakebeta",
        "snake_logscale": True,
        "use_tanh_at_final": vocoder.has_final_tanh,
        "sampling_rate": config.sample_rate,
        "hop_size": vocoder.hop_length,
    }
    check_agreement("bigvgan", values.get("bigvgan") or {}, expected)
