"""What all families' converters share: reading released files, and golden cases as values."""

from __future__ import annotations

import io
import json
import pickle  # noqa: TID251 - only its error class, to say which file was refused
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.nn.ssl import SslModel
from hcodec_core.nn.ssl_config import SslConfig

State = dict[str, Tensor]
_WRAPPERS = ("generator.", "model.", "module.")
# What the restricted unpickler raises on bytes that are no checkpoint is not documented; seen are
# all of these.
_UNREADABLE = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
_POSITIONAL = "encoder.pos_conv_embed.conv"


@dataclass(frozen=True)
class ConvertRequest:
    """One conversion of a released checkpoint into a codec folder.

    checkpoint_path: ``.safetensors``, or ``.pt`` / ``.pth`` / ``.ckpt`` (read with
    ``weights_only=True``). ssl: local folder, or hub id ``org/name@revision``, of the
    self-supervised model, where the checkpoint does not hold it. config_path: the family's
    configuration file, where shapes alone do not tell. options: switches of a family, such as
    ``{"weights": "ema"}``.
    """

    checkpoint_path: Path
    out_path: Path
    ssl: str | None = None
    config_path: Path | None = None
    name: str | None = None
    is_trained: bool = True
    weights_licence: str = "unknown"
    source: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GoldenCase:
    """One recorded input with what the published code gives for it.

    audio: float32 [N], gain already applied. codes: per stream int32 [Q, T], plain (no offsets).
    recon: float32 [M], published decode of those codes, untrimmed; None where there is none.
    frame_spans: int32 [T] for variable rates. threshold: for variable rates. num_codebooks: how
    many codebooks ``recon`` used; None for all.
    """

    name: str
    codec_path: Path
    audio: npt.NDArray[np.float32]
    codes: Mapping[str, npt.NDArray[np.int32]]
    recon: npt.NDArray[np.float32] | None = None
    frame_spans: npt.NDArray[np.int32] | None = None
    threshold: float | None = None
    num_codebooks: int | None = None


def read_checkpoint(path: Path, roots: Collection[str]) -> State:
    """Tensors of a released checkpoint under plain names.

    A ``state_dict``, ``model`` or ``codec_model`` wrapper and the prefixes ``generator.``,
    ``model.``, ``module.`` are removed, entries that are not tensors dropped, and both spellings of
    weight norm brought to ``weight_g`` / ``weight_v``.

    Args:
        path: The file.
        roots: First names of the model's own keys, such as ``encoder``.

    Raises:
        CheckpointError: The file cannot be read safely, or holds none of ``roots``.
    """
    state = _unwrap(_load(path))
    for _ in range(len(_WRAPPERS)):
        if any(key.partition(".")[0] in roots for key in state):
            return {_plain_weight_norm(key): value for key, value in state.items()}
        prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    raise CheckpointError(
        f"{path.name} holds no tensor of {', '.join(sorted(roots))}: it is a checkpoint of another "
        "model."
    )


def read_ssl_model(ssl: str) -> tuple[SslConfig, State]:
    """Configuration and tensors (names of ``SslModel``) of a transformers folder or hub id.

    Raises:
        CheckpointError: A file is missing or damaged, or the model is of another kind.
    """
    config_path = _ssl_file(ssl, ("config.json",))
    try:
        values = json.loads(config_path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_path.name} of SSL model {ssl!r} cannot be read.") from error
    config = SslConfig.from_transformers(values)
    weights_path = _ssl_file(ssl, ("model.safetensors", "pytorch_model.bin"))
    return config, ssl_state(_load(weights_path), config)


def ssl_state(tensors: Mapping[str, Tensor], config: SslConfig) -> State:
    """Tensors of a transformers model as ``SslModel`` names them, weight norm folded.

    What the model has beyond ``config`` (further layers, heads, the masking vector) is left out.

    Raises:
        CheckpointError: A tensor is missing; names it.
    """
    plain = {
        _plain_weight_norm(key.removeprefix(f"{config.model_type}.")): value
        for key, value in tensors.items()
    }
    if f"{_POSITIONAL}.weight_v" in plain:
        plain[f"{_POSITIONAL}.weight"] = fold_weight_norm(
            plain[f"{_POSITIONAL}.weight_g"], plain[f"{_POSITIONAL}.weight_v"], dim=2
        )
    with torch.device("meta"):
        wanted = SslModel(config).state_dict()
    return {key: take(plain, key, tuple(value.shape)) for key, value in wanted.items()}


def fold_weight_norm(gain: Tensor, direction: Tensor, dim: int = 0) -> Tensor:
    """Weight of a weight-normed layer; the norm runs across all dimensions but ``dim``."""
    others = [i for i in range(direction.ndim) if i != dim]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    return direction * (gain / norm)


def take(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """Tensor ``key`` as its own float32 copy.

    Raises ``CheckpointError`` when it is missing or has another shape.
    """
    if key not in state:
        raise CheckpointError(f"The checkpoint lacks the tensor {key!r}.")
    value = state[key]
    if tuple(value.shape) != shape:
        raise CheckpointError(
            f"Tensor {key!r} of the checkpoint is {tuple(value.shape)}; expected {shape}."
        )
    return value.detach().to(torch.float32).contiguous().clone()


def _ssl_file(ssl: str, names: tuple[str, ...]) -> Path:
    folder = Path(ssl)
    if folder.is_dir():
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"The SSL model in {ssl!r} has no {' or '.join(names)}.")
        return found
    if ssl.startswith((".", "/")) or ssl.count("/") != 1:
        raise ConfigError(f"There is no folder {ssl!r}, and it is no hub id of the form org/name.")
    return _ssl_file_from_hub(ssl, names)


def _ssl_file_from_hub(ssl: str, names: tuple[str, ...]) -> Path:
    from hcodec_core.codecs import local_file

    for name in names[:-1]:
        try:
            path = local_file(f"hf://{ssl}", name)
        except CheckpointError:
            continue
        assert path is not None
        return path
    path = local_file(f"hf://{ssl}", names[-1])
    assert path is not None
    return path


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_safetensors(path)
        else:
            # X-Codec's released files also hold byte buffers; they are data, and are dropped.
            with torch.serialization.safe_globals([io.BytesIO]):
                loaded = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.") from error
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path.name} cannot be read as a checkpoint without running code from it "
            f"({type(error).__name__})."
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path.name} holds a {type(loaded).__name__}, not a state dict.")
    return loaded


def _unwrap(loaded: Mapping[str, Any]) -> State:
    for wrapper in ("state_dict", "model", "codec_model"):
        inner = loaded.get(wrapper)
        if isinstance(inner, Mapping):
            return _unwrap(inner)
    return {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}


def _plain_weight_norm(key: str) -> str:
    return key.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )
