"""Models of the transformers library to our codec folders.

A checkpoint is a folder that ``save_pretrained`` wrote, a hub id, or a name in ``HUB_IDS``. The
library itself renames what older versions of it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.models.conversion import ConvertRequest, GoldenCase
from hcodec_core.models.library.config import HUB_IDS, from_library
from hcodec_core.models.library.hosting import fill_codec, library_source, read_library_model
from hcodec_core.models.library.model import build
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.tokens import CodecManifest

_MODEL_CLASSES: Mapping[str, str] = {
    "mimi": "MimiModel",
    "dac": "DacModel",
    "encodec": "EncodecModel",
}
_USAGE_FLOOR = 1e-5  # of Mimi: entries are sums over at least so much usage
_MIMI_QUANTIZERS: Mapping[str, str] = {
    "semantic": "quantizer.semantic_residual_vector_quantizer.",
    "acoustic": "quantizer.acoustic_residual_vector_quantizer.",
}


def convert_checkpoint(request: ConvertRequest) -> CodecManifest:
    """Write a model of the library as a codec folder.

    ``options`` may hold ``model_type`` (mimi, dac or encodec) where the name does not tell.

    Raises:
        ConfigError: The model is of a kind, or of a variant, that has no adapter.
        CheckpointError: It cannot be read, or a tensor is missing, misshapen or left over.
    """
    source = library_source(request.checkpoint_path, HUB_IDS)
    kind = request.options.get("model_type") or _kind_of(source)
    if kind not in _MODEL_CLASSES:
        raise ConfigError(
            f"{source!r} is a model of type {kind!r}: there is an adapter for "
            f"{', '.join(_MODEL_CLASSES)} only."
        )
    values, found = read_library_model(source, _MODEL_CLASSES[kind])
    config = from_library(values)
    with torch.device("meta"):
        codec = build(config.architecture())
    fill_codec(codec, _own_names(kind, found), source)
    card = CodecCard(
        name=request.name or request.checkpoint_path.name,
        is_trained=request.is_trained,
        weights_licence=request.weights_licence,
        source=request.source or source,
    )
    return save_codec(codec, card, request.out_path)


def recognises_golden(config: Mapping[str, Any]) -> bool:
    """There are no recorded outputs of these models: the library is the published code."""
    return False


def golden_cases(folder_path: Path, work_path: Path) -> list[GoldenCase]:
    """None, see ``recognises_golden``."""
    return []


def _kind_of(source: str) -> str:
    from hcodec_core.nn.torchaudio_guard import guard_torchaudio

    guard_torchaudio()
    from transformers import PreTrainedConfig

    name, _, revision = source.partition("@")
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source!r} has no readable config.json: {reason}") from error
    if "model_type" not in values:
        raise CheckpointError(f"{source!r} has no config.json that names its model_type.")
    return str(values["model_type"])


def _own_names(kind: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {key: value for key, value in found.items() if not key.startswith("quantizer.")}
    if kind == "mimi":
        for name, prefix in _MIMI_QUANTIZERS.items():
            state |= _mimi_quantizer(name, prefix, found)
    elif kind == "dac":
        state |= _dac_books(found)
    else:
        books = _numbered(found, "quantizer.layers.", ".codebook.embed")
        state["quantizer.codebooks"] = torch.stack(books)
    return state


def _mimi_quantizer(name: str, prefix: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sums = _numbered(found, f"{prefix}layers.", ".codebook.embed_sum")
    usages = _numbered(found, f"{prefix}layers.", ".codebook.cluster_usage")
    books = [s / u.clamp(min=_USAGE_FLOOR)[:, None] for s, u in zip(sums, usages, strict=True)]
    maps = {
        f"{name}.{key.removeprefix(prefix)}": value
        for key, value in found.items()
        if key.startswith((f"{prefix}input_proj.", f"{prefix}output_proj."))
    }
    return {f"{name}.rvq.codebooks": torch.stack(books)} | maps


def _dac_books(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for key, value in found.items():
        if not key.startswith("quantizer.quantizers."):
            continue
        own = key.replace("quantizers.", "books.", 1).replace("codebook.weight", "entries")
        own = own.replace("in_proj.", "project_in.").replace("out_proj.", "project_out.")
        # Convolutions of kernel size 1 are linear maps.
        state[own] = value[:, :, 0].contiguous() if value.ndim == 3 else value
    return state


def _numbered(found: Mapping[str, Tensor], prefix: str, suffix: str) -> list[Tensor]:
    keys = [key for key in found if key.startswith(prefix) and key.endswith(suffix)]
    keys.sort(key=lambda key: int(key.removeprefix(prefix).removesuffix(suffix)))
    return [found[key] for key in keys]
