"""Released X-Codec checkpoints to our codec folders.

Two layouts: the original ``.pth`` of the hub repository ZhenYe234/xcodec (a flat state dict that
holds the SSL model too), and folders or hub ids of the transformers library. Source of the names:
the classes of zhenye234/xcodec (2024-10-01).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hcodec_core.errors import CheckpointError
from hcodec_core.models.conversion import (
    ConvertRequest,
    GoldenCase,
    fold_weight_norm,
    read_checkpoint,
)
from hcodec_core.models.library.hosting import fill_codec, library_source, read_library_model
from hcodec_core.models.loading import CodecCard, save_codec
from hcodec_core.models.xcodec.config import HUB_IDS, XCodecConfig, hubert, wavlm
from hcodec_core.models.xcodec.model import build
from hcodec_core.tokens import CodecManifest

_UNITS = ("snake1", "conv1", "snake2", "conv2")
# Original first name -> ours, for modules whose inner names agree but for doubled ``.conv``.
_SAME_INSIDE: Mapping[str, str] = {
    "encoder_semantic": "encoder_semantic",
    "decoder_semantic": "decoder_semantic",
    "semantic_model": "ssl",
    "fc_prior": "fc",
    "fc_post1": "fc1",
    "fc_post2": "fc2",
}
_ROOTS = ("encoder", "decoder_2", "quantizer", *_SAME_INSIDE)
_BOOK = re.compile(r"^quantizer\.(?:vq\.layers\.(\d+)\._|quantizers\.(\d+)\.)codebook\.embed$")
_UNUSED = re.compile(r"\.(inited|cluster_size|embed_avg)$|^ssl\.masked_spec_embed$")
_POSITIONAL = "ssl.encoder.pos_conv_embed.conv"


def convert_checkpoint(request: ConvertRequest) -> CodecManifest:
    """Write a released X-Codec as a codec folder.

    ``checkpoint_path``: an original file, a folder of the library, a hub id, or a name in
    ``HUB_IDS``. ``config_path``: for original files, an ``XcodecConfig`` as JSON; without it the
    shape is that of the released models, with HuBERT or WavLM as the file's keys tell.

    Raises:
        ConfigError: The configuration cannot be used.
        CheckpointError: A file cannot be read, or a tensor is missing, misshapen or left over.
    """
    path = request.checkpoint_path
    if path.suffix in (".pth", ".pt", ".ckpt", ".safetensors"):
        source = path.name
        state = _from_original(read_checkpoint(path, _ROOTS))
        config = _config_of(request.config_path, state)
    else:
        source = library_source(path, HUB_IDS)
        values, found = read_library_model(source, "XcodecModel")
        config = XCodecConfig.from_library(values)
        state = _from_library(found)
    with torch.device("meta"):
        codec = build(config.architecture())
    fill_codec(codec, state, source)
    card = CodecCard(
        name=request.name or path.stem,
        is_trained=request.is_trained,
        weights_licence=request.weights_licence,
        source=request.source or source,
    )
    return save_codec(codec, card, request.out_path)


def recognises_golden(config: Mapping[str, Any]) -> bool:
    """Whether the ``config.json`` of a golden folder is of this family."""
    return config.get("model_type") == "xcodec"


def golden_cases(folder_path: Path, work_path: Path) -> list[GoldenCase]:
    """Every recorded (clip, bandwidth), with and without the 0.95 of the published script.

    Raises ``CheckpointError`` when the checkpoint cannot be converted.
    """
    codec_path = work_path / folder_path.name
    config_path = folder_path / "config.json"
    convert_checkpoint(
        ConvertRequest(
            checkpoint_path=folder_path / "codec.safetensors",
            out_path=codec_path,
            config_path=config_path,
            name=folder_path.name,
            is_trained=False,
        )
    )
    with np.load(folder_path / "expected.npz") as recorded:
        return list(_cases(dict(recorded), codec_path))


def _cases(recorded: Mapping[str, npt.NDArray[Any]], codec_path: Path) -> Iterator[GoldenCase]:
    pattern = re.compile(r"codes_(\d+)_bw(\w+?)(_scaled095)?$")
    for key, codes in recorded.items():
        found = pattern.match(key)
        if found is None:
            continue
        clip, bandwidth, scaled = found.groups(default="")
        gain = np.float32(0.95 if scaled else 1.0)
        yield GoldenCase(
            name=f"clip {clip} at {bandwidth.replace('p', '.')} kbit/s{' x 0.95' * bool(scaled)}",
            codec_path=codec_path,
            audio=recorded[f"wav_{clip}"] * gain,
            codes={"fused": codes},
            recon=recorded.get(key.replace("codes_", "recon_")),
            num_codebooks=len(codes),
        )


def _config_of(config_path: Path | None, state: Mapping[str, Tensor]) -> XCodecConfig:
    if config_path is None:
        return wavlm() if any("gru_rel_pos" in key for key in state) else hubert()
    try:
        return XCodecConfig.from_library(json.loads(config_path.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_path} is no readable JSON file.") from error


def _from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names, weight norm folded."""
    modules = _acoustic_modules(state)
    plain = {}
    for key, value in state.items():
        module, _, tensor = key.rpartition(".")
        root, _, rest = key.partition(".")
        if module in modules:
            plain[f"{modules[module]}.{tensor}"] = value
        elif root in _SAME_INSIDE:
            if root.endswith("_semantic"):
                rest = re.sub(r"(^|\.)(conv\d?)\.conv\.", r"\1\2.", rest)
            plain[f"{_SAME_INSIDE[root]}.{rest}"] = value
        elif root in _ROOTS:
            plain[key] = value
    return _with_books(_folded(plain))


def _from_library(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names of the library's."""
    return _with_books({re.sub(r"^semantic_model\.", "ssl.", k): v for k, v in state.items()})


def _acoustic_modules(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Module of the original acoustic encoder and decoder -> ours."""
    modules: dict[str, str] = {}
    for original, own, strided, first_unit in (
        ("encoder.block", "acoustic_encoder", {3: "snake1", 4: "conv1"}, 0),
        ("decoder_2.model", "acoustic_decoder", {0: "snake1", 1: "conv_t1"}, 2),
    ):
        pattern = re.compile(re.escape(original) + r"\.(\d+)\.")
        last = max((int(m[1]) for m in map(pattern.match, state) if m), default=2)
        ends = {0: "conv1", last - 1: "snake1", last: "conv2"}
        modules |= {f"{original}.{i}": f"{own}.{name}" for i, name in ends.items()}
        for block in range(1, last - 1):
            inner, mine = f"{original}.{block}.block", f"{own}.block.{block - 1}"
            modules |= {f"{inner}.{i}": f"{mine}.{name}" for i, name in strided.items()}
            modules |= {
                f"{inner}.{first_unit + unit}.block.{i}": f"{mine}.res_unit{unit + 1}.{name}"
                for unit in range(3)
                for i, name in enumerate(_UNITS)
            }
    return modules


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    folded = {}
    for key, value in state.items():
        if key.endswith(".weight_v"):
            module = key.removesuffix(".weight_v")
            gain = state.get(f"{module}.weight_g")
            if gain is None:
                raise CheckpointError(f"The checkpoint has {key!r} without its weight_g.")
            dim = 2 if module == _POSITIONAL else 0
            folded[f"{module}.weight"] = fold_weight_norm(gain.float(), value.float(), dim)
        elif not key.endswith(".weight_g"):
            folded[key] = value
    return folded


def _with_books(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codebooks in one tensor; what neither encoding nor decoding reads is left out."""
    books, rest = {}, {}
    for key, value in state.items():
        found = _BOOK.match(key)
        if found is not None:
            books[int(found[1] or found[2])] = value
        elif not _UNUSED.search(key):
            rest[key] = value
    if not books:
        raise CheckpointError("The checkpoint has no codebooks.")
    return rest | {"quantizer.codebooks": torch.stack([books[i] for i in sorted(books)])}
