"""Hosting modules of the transformers library inside our codecs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hcodec_core.errors import CheckpointError
from hcodec_core.models.base import Codec
from hcodec_core.nn.quantize import ResidualQuantizer
from hcodec_core.nn.torchaudio_guard import guard_torchaudio

_Module = TypeVar("_Module", bound=nn.Module)


def hosted(make: Callable[[], _Module]) -> _Module:
    """Build a module of the library on torch's current default device, weight norm folded.

    The library keeps constants in buffers that no state dict holds; a module with such buffers is
    built on the CPU where the meta device was asked for, so that they have values.
    """
    guard_torchaudio()
    module = make()
    if any(module.get_buffer(name).is_meta for name in _unsaved_buffers(module)):
        with torch.device("cpu"):
            module = make()
    fold_parametrizations(module)
    return module


def fold_parametrizations(module: nn.Module) -> None:
    """Turn weight norm into plain weights, in place."""
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)


def draw_weights(module: nn.Module, gain: float) -> None:
    """Draw random weights that let a signal through.

    The library's own start values are made for training, and its codebooks start as zeros: every
    code of a codec with random weights would be the same. ``gain`` is that of each layer; what
    keeps a signal at its size depends on the number of residual branches.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.ConvTranspose1d | nn.Linear):
            fan_in = part.weight[0].numel()
            if isinstance(part, nn.ConvTranspose1d):
                fan_in = part.in_channels * part.kernel_size[0] // part.stride[0]
            nn.init.normal_(part.weight, std=gain * fan_in**-0.5)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.01)
        elif isinstance(part, ResidualQuantizer):
            nn.init.normal_(part.codebooks, std=0.3)


def read_library_model(source: str, model_class: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict (float32, weight norm folded) of a model of the library.

    Args:
        source: A folder that the library wrote, or a hub id with or without ``@revision``. Only
            safetensors are read.
        model_class: Name of the class in ``transformers``.

    Raises:
        CheckpointError: There is no such model, or it is not of this class, or lacks tensors.
    """
    guard_torchaudio()
    import transformers

    library_logging: Any = transformers.utils.logging
    library_logging.disable_progress_bar()
    name, _, revision = source.partition("@")
    try:
        model, report = getattr(transformers, model_class).from_pretrained(
            name,
            revision=revision or "main",
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source!r} cannot be read as a {model_class} with safetensors weights: {reason}"
        ) from error
    for fault in ("missing_keys", "mismatched_keys"):
        if report[fault]:
            raise CheckpointError(
                f"{source!r} is no whole {model_class}: {fault.replace('_', ' ')}: "
                f"{sorted(map(str, report[fault]))[0]}."
            )
    fold_parametrizations(model)
    return model.config.to_dict(), dict(model.state_dict())


def fill_codec(codec: Codec, state: Mapping[str, Tensor], source: str) -> None:
    """Load a converted state dict into a codec, naming the first tensor that does not fit.

    Raises ``CheckpointError``.
    """
    wanted = codec.state_dict()
    for key in sorted(wanted.keys() - state.keys()):
        raise CheckpointError(f"{source} has no tensor for {key!r}.")
    for key in sorted(state.keys() - wanted.keys()):
        raise CheckpointError(f"{source} has the tensor {key!r}, for which there is no place.")
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise CheckpointError(
                f"{source} has {key!r} with shape {tuple(value.shape)}; the configuration asks "
                f"for {tuple(wanted[key].shape)}."
            )
    codec.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)


def library_source(path: Path, hub_ids: Mapping[str, str]) -> str:
    """What to read: a folder, a hub id ``org/name@revision``, or that of a released model's name.

    Raises ``CheckpointError`` when it is none of these.
    """
    name = path.as_posix()
    if path.is_dir():
        return str(path)
    if name in hub_ids:
        return hub_ids[name]
    if name.count("/") == 1 and not name.startswith((".", "/")) and not path.exists():
        return name
    raise CheckpointError(
        f"There is no folder {name!r}, it is no hub id of the form org/name, and no released "
        f"model: these are {', '.join(hub_ids)}."
    )


def _unsaved_buffers(module: nn.Module) -> Iterable[str]:
    saved = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name not in saved]
