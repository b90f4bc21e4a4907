"""Released U-Codec checkpoints to our codec folders.

Source of the names: the published classes of YangXusheng-yxs/CodecFormer_5Hz (wrapper
``TokenizerGANWrapper``; the README says MIT); weights: hub repository shaunxsyang/U-Codec, such as
``generator-650000.pt``, a dict with a state dict under ``model``.

Widths, counts and strides (half the kernels) come from the tensors; heads, positions, norms,
causality and padding from the configuration file that belongs to the weights (JSON with
``model.tokenizer_conf`` and ``model.wave_decoder_conf``, the published code's format and defaults).
Where both speak they must agree. No released file was at hand when this was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.models.conversion import ConvertRequest, GoldenCase, State, read_checkpoint, take
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
    read_decoder_shape,
    read_encoder_shape,
    released_weight,
)
from hcodec_core.models.ucodec.config import UCodecConfig
from hcodec_core.models.ucodec.model import UCodec
from hcodec_core.tokens import CodecManifest

_ROOTS = ("tokenizer", "token2wav")
_TRAINING_ONLY = re.compile(r"^(teacher|distill_learner)\.")
_ENCODER = "tokenizer.encoder.model."
_DECODER = "token2wav.decoder.model."
_DOWN = "tokenizer.proj.conv.conv.conv.weight"
_UP = "token2wav.proj.convtr.convtr.convtr.weight"
# Applied in order to our key, after the convolutional networks have been named.
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^down\.conv\.weight$", _DOWN),
    (r"^up\.conv\.weight$", _UP),
    (r"^quantizer\.books\.(\d+)\.entries$", r"tokenizer.vq.layers.\1._codebook.weight"),
    (r"^quantizer\.books\.(\d+)\.project_(in|out)\.", r"tokenizer.vq.layers.\1.\2_proj."),
    (r"^encoder_transformer\.", r"tokenizer.encoder_transformer."),
    (r"^decoder_transformer\.", r"token2wav.decoder_transformer."),
    (r"transformer\.project_in\.", r"transformer.input_proj."),
    (r"transformer\.project_out\.", r"transformer.output_projs.0."),
    (r"transformer\.layers\.", r"transformer.transformer.layers."),
    (r"\.attention\.query_key_value\.weight$", r".self_attn.in_proj_weight"),
    (r"\.attention\.out\.", r".self_attn.out_proj."),
    (r"\.attention_norm\.", r".norm1."),
    (r"\.mlp_norm\.", r".norm2."),
    (r"\.attention_scale$", r".layer_scale_1.scale"),
    (r"\.mlp_scale$", r".layer_scale_2.scale"),
)
_PLAIN_MLP = {"mlp.expand.": "linear1.", "mlp.reduce.": "linear2."}
_GATED_MLP = {"mlp.expand.": "gating.linear_in.", "mlp.reduce.": "gating.linear_out."}


def convert_checkpoint(request: ConvertRequest) -> CodecManifest:
    """Write a released U-Codec as a codec folder.

    Raises:
        ConfigError: No configuration file was given, or it cannot be used.
        CheckpointError: A tensor is missing, misshapen or unknown, or contradicts the file.
    """
    if request.config_path is None:
        raise ConfigError(
            "U-Codec's tensors do not tell its heads, positions and padding: give the JSON "
            "configuration that belongs to the weights (model.tokenizer_conf, ...)."
        )
    state = read_checkpoint(request.checkpoint_path, _ROOTS)
    state = {key: value for key, value in state.items() if not _TRAINING_ONLY.match(key)}
    config = config_from(state, read_config(request.config_path))
    with torch.device("meta"):
        codec = UCodec(config)
    codec.load_state_dict(our_state(state, codec), assign=True)
    card = CodecCard(
        name=request.name or "ucodec",
        is_trained=request.is_trained,
        weights_licence=request.weights_licence,
        source=request.source,
    )
    return save_codec(codec, card, request.out_path)


def config_from(state: Mapping[str, Tensor], values: Mapping[str, Any]) -> UCodecConfig:
    """Shape of a released checkpoint, from its tensors and its configuration file.

    Raises:
        ConfigError: The file lacks something, or asks for something that is not supported.
        CheckpointError: The tensors are of another model, or contradict the file.
    """
    tokenizer = section(values, "model", "tokenizer_conf")
    decoder = section(values, "model", "wave_decoder_conf")
    if any(key.startswith("token2wav.cond.") for key in state):
        raise ConfigError("This U-Codec is conditioned on speakers, which is not supported.")
    encoder_shape = read_encoder_shape(state, _ENCODER)
    decoder_shape = read_decoder_shape(state, _DECODER)
    books = count_like(state, r"tokenizer\.vq\.layers\.\d+\._codebook\.weight")
    book = shape_of(state, "tokenizer.vq.layers.0._codebook.weight")
    fields = {
        "sample_rate": tokenizer.get("sample_rate", 24000),
        "normalises_audio": bool(tokenizer.get("audio_do_normalize", False)),
        "encoder": _network(encoder_shape, tokenizer),
        "encoder_transformer": _transformer(state, "tokenizer.encoder_transformer", tokenizer),
        "frame_stride": _frame_stride(state, tokenizer, decoder),
        "latent_dim": shape_of(state, "tokenizer.vq.layers.0.out_proj.bias")[0],
        "num_codebooks": books,
        "codebook_size": book[0],
        "codebook_dim": book[1],
        "decoder": _network(decoder_shape, decoder),
        "decoder_transformer": _transformer(state, "token2wav.decoder_transformer", decoder),
    }
    quantiser = {"num_quantizers": books, "codebook_size": book[0], "codebook_dim": book[1]}
    check_agreement("vq_conf", tokenizer.get("vq_conf") or {}, quantiser)
    return UCodecConfig.from_architecture(fields)


def our_state(state: State, codec: UCodec) -> State:
    """Tensors of a released checkpoint under our names.

    Raises:
        CheckpointError: A tensor is missing, misshapen or unknown.
    """
    shapes = {key: tuple(value.shape) for key, value in codec.state_dict().items()}
    names = {key: released_name(key, codec.config) for key in shapes}
    unknown = leftovers(state, [*names.values(), *(_rms_name(name) for name in names.values())])
    if unknown:
        raise CheckpointError(f"The checkpoint has the tensor {unknown[0]!r}, unknown to U-Codec.")
    return {key: _our_tensor(state, names[key], shape) for key, shape in shapes.items()}


def released_name(key: str, config: UCodecConfig) -> str:
    """Released name of our tensor ``key`` (without the suffixes of weight norm)."""
    first, _, rest = key.partition(".")
    if first == "encoder":
        return _ENCODER + _tensors_only(config, "encoder").encoder_name(rest)
    if first == "decoder":
        return _DECODER + _tensors_only(config, "decoder").decoder_name(rest)
    transformer = (
        config.encoder_transformer if first == "encoder_transformer" else config.decoder_transformer
    )
    is_gated = transformer is not None and transformer.gating != "none"
    for ours, released in (_GATED_MLP if is_gated else _PLAIN_MLP).items():
        key = key.replace(ours, released)
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def recognises_golden(config: Mapping[str, Any]) -> bool:
    """Whether the ``config.json`` of a golden folder is of this family."""
    model = config.get("model")
    return isinstance(model, Mapping) and "tokenizer_conf" in model


def golden_cases(folder_path: Path, work_path: Path) -> list[GoldenCase]:
    """Convert a golden folder's checkpoint below ``work_path`` and list its cases."""
    codec_path = work_path / folder_path.name
    convert_checkpoint(
        ConvertRequest(
            checkpoint_path=folder_path / "codec.safetensors",
            out_path=codec_path,
            config_path=folder_path / "config.json",
            name=folder_path.name,
            is_trained=False,
        )
    )
    with np.load(folder_path / "expected.npz") as arrays:
        return list(_cases(arrays, codec_path))


def _cases(arrays: Mapping[str, Any], codec_path: Path) -> Iterator[GoldenCase]:
    for key in sorted(key for key in arrays if re.fullmatch(r"recon_\d+(_first\d+)?", key)):
        index, _, first = key.removeprefix("recon_").partition("_first")
        yield GoldenCase(
            name=key.replace("recon", "wav"),
            codec_path=codec_path,
            audio=arrays[f"wav_{index}"],
            codes={"fused": arrays[f"codes_{index}"]},
            recon=arrays[key],
            num_codebooks=int(first) if first else None,
        )


def _network(shape: SeanetShape, part: Mapping[str, Any]) -> dict[str, Any]:
    conf = section(part, "seanet_conf")
    expected = {
        "channels": 1,
        "activation": "ELU",
        "final_activation": None,
        "trim_right_ratio": 1.0,
        "n_filters": shape.num_filters,
        "dimension": shape.out_dim,
        "n_residual_layers": shape.num_residual_layers,
        "ratios": list(reversed(shape.strides)),
        "kernel_size": shape.kernel,
        "last_kernel_size": shape.last_kernel,
        "residual_kernel_size": shape.residual_kernel,
        "compress": shape.compress,
        "true_skip": not shape.has_conv_shortcut,
    }
    check_agreement("seanet_conf", conf, expected)
    return asdict(shape) | {
        "dilation_base": conf.get("dilation_base", 2),
        "pad_mode": conf.get("pad_mode", "reflect"),
        "is_causal": conf.get("causal", False),
    }


def _transformer(
    state: Mapping[str, Tensor], prefix: str, part: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Fields of a transformer; None where a pointwise convolution stands in its place."""
    if f"{prefix}.weight" in state:
        return None
    conf = section(part, "transformer_conf")
    if "num_heads" not in conf:
        raise ConfigError("The configuration's transformer_conf does not say num_heads.")
    layers = f"{prefix}.transformer.layers"
    gating = conf.get("gating") or "none"
    first = (
        f"{layers}.0.linear1.weight" if gating == "none" else f"{layers}.0.gating.linear_in.weight"
    )
    width, dim = shape_of(state, first)
    num_layers = count_like(state, re.escape(layers) + r"\.\d+\.self_attn\.in_proj_weight")
    has_scales = f"{layers}.0.layer_scale_1.scale" in state
    check_agreement(
        "transformer_conf",
        conf,
        {"d_model": dim, "num_layers": num_layers, "positional_scale": 1.0, "conv_layout": True},
    )
    return {
        "dim": dim,
        "num_heads": conf["num_heads"],
        "num_layers": num_layers,
        "hidden_dim": width if gating == "none" else width // 2,
        "norm": conf.get("norm", "layer_norm"),
        "positions": conf.get("positional_embedding", "sin"),
        "max_period": conf.get("max_period", 10000.0),
        "is_causal": conf.get("causal", False),
        "context": conf.get("context") if conf.get("causal", False) else None,
        "layer_scale": (conf.get("layer_scale") or 0.01) if has_scales else None,
        "gating": gating,
    }


def _frame_stride(
    state: Mapping[str, Tensor], tokenizer: Mapping[str, Any], decoder: Mapping[str, Any]
) -> int:
    strides = [shape_of(state, name)[2] // 2 if name in state else 1 for name in (_DOWN, _UP)]
    if strides[0] != strides[1]:
        raise CheckpointError(
            f"The checkpoint goes down by {strides[0]} and up by {strides[1]} frames."
        )
    check_agreement("tokenizer_conf", tokenizer, {"ds_rate": strides[0]})
    check_agreement("wave_decoder_conf", decoder, {"up_rate": strides[1]})
    return strides[0]


def _our_tensor(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    rms_name = _rms_name(name)
    if rms_name != name and rms_name in state:
        return take(state, rms_name, (1, 1, *shape)).reshape(shape)
    return released_weight(state, name, shape)


def _rms_name(name: str) -> str:
    """Name of a norm's weight where it is a root mean square norm."""
    return re.sub(r"(\.norm[12])\.weight$", r"\1.alpha", name)


def _tensors_only(config: UCodecConfig, part: str) -> SeanetShape:
    values = getattr(config, part).model_dump()
    return SeanetShape(**{field: values[field] for field in SeanetShape.__dataclass_fields__})
