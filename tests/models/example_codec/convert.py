"""Released example checkpoints to codec folders: names, and nothing else, differ from ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hcodec_core.errors import CheckpointError
from hcodec_core.models.conversion import ConvertRequest, GoldenCase, State, read_checkpoint, take
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.models.released_config import shape_of
from hcodec_core.tokens import CodecManifest
from tests.models.example_codec.config import ExampleConfig
from tests.models.example_codec.model import ExampleCodec

_NAMES = {
    "enc.proj.weight": "analysis.weight",
    "enc.proj.bias": "analysis.bias",
    "enc.conv.weight": "mix.conv.weight",
    "enc.conv.bias": "mix.conv.bias",
    "vq.embed": "quantizer.codebooks",
    "dec.proj.weight": "synthesis.weight",
    "dec.proj.bias": "synthesis.bias",
}


def convert_checkpoint(request: ConvertRequest) -> CodecManifest:
    """Write a released checkpoint as a codec folder.

    Raises:
        CheckpointError: A tensor is missing, misshapen, unknown or not finite.
    """
    state = read_checkpoint(request.checkpoint_path, ("enc", "vq", "dec"))
    config = config_from_shapes(state)
    with torch.device("meta"):
        codec = ExampleCodec(config)
    for unknown in sorted(state.keys() - _NAMES.keys()):
        raise CheckpointError(f"The checkpoint has the tensor {unknown!r}, unknown to this codec.")
    shapes = {key: tuple(value.shape) for key, value in codec.state_dict().items()}
    ours = {name: take(state, key, shapes[name]) for key, name in _NAMES.items()}
    codec.load_state_dict(ours, assign=True)
    card = CodecCard(
        name=request.name or "example",
        is_trained=request.is_trained,
        weights_licence=request.weights_licence,
        source=request.source,
    )
    return save_codec(codec, card, request.out_path)


def config_from_shapes(state: State) -> ExampleConfig:
    """Shape of a released checkpoint. Raises ``CheckpointError`` when a tensor is missing."""
    num_codebooks, codebook_size, _ = shape_of(state, "vq.embed")
    dim, hop_length = shape_of(state, "enc.proj.weight")
    return ExampleConfig(
        hop_length=hop_length,
        dim=dim,
        kernel_size=shape_of(state, "enc.conv.weight")[2],
        num_codebooks=num_codebooks,
        codebook_size=codebook_size,
    )


def recognises_golden(config: Mapping[str, Any]) -> bool:
    """Whether the ``config.json`` of a golden folder is of this family."""
    return config.get("model") == "example"


def golden_cases(folder_path: Path, work_path: Path) -> list[GoldenCase]:
    """Convert a golden folder's checkpoint below ``work_path`` and list its cases."""
    codec_path = work_path / folder_path.name
    convert_checkpoint(
        ConvertRequest(
            checkpoint_path=folder_path / "codec.safetensors",
            out_path=codec_path,
            name=folder_path.name,
            is_trained=False,
        )
    )
    with np.load(folder_path / "expected.npz") as arrays:
        return [
            GoldenCase(
                name="clip",
                codec_path=codec_path,
                audio=arrays["audio"],
                codes={"fused": arrays["codes"]},
                recon=arrays["recon"],
            )
        ]
