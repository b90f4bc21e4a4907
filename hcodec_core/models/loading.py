"""Loading and saving codecs: safetensors only, every digest checked.

The weights file of a codec holds exactly the tensors of the model's state dict. The frozen SSL
model lies in it under the prefix ``ssl.``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors
from torch import Tensor

from hcodec_core.codecs import Fetch, fetch_file, load_manifest, local_file
from hcodec_core.errors import CheckpointError
from hcodec_core.models.base import Codec, Part
from hcodec_core.models.registry import build_codec
from hcodec_core.tokens import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    CodecManifest,
    CodecSpec,
    EncodeSettings,
    PartDigests,
)


def load_codec(
    uri: str,
    settings: EncodeSettings,
    device: str | torch.device = "cpu",
    expected_digest: str | None = None,
    fetch: Fetch | None = None,
) -> Codec:
    """Load a codec and check every byte of it.

    Args:
        uri: A preset, a folder, ``file://``, ``s3://`` or ``hf://`` (see ``hcodec_core.codecs``).
        settings: How it will be run; together with the weights they make its ``encode_id``.
        device: Where the weights go.
        expected_digest: ``CodecManifest.digest`` that the codec must have.
        fetch: Reads ``s3://`` objects; needed for those only.

    Returns:
        The codec in eval mode, float32.

    Raises:
        ConfigError: The URI or the family is unknown.
        CheckpointError: A digest, key, shape, type or value is wrong; names the tensor.
    """
    manifest = load_manifest(uri, expected_digest=expected_digest, fetch=fetch)
    state = _read_weights(uri, manifest, fetch)
    with torch.device("meta"):
        codec = build_codec(manifest.family, manifest.architecture)
    _check_state(state, codec.state_dict(), manifest.name)
    codec.load_state_dict(state, assign=True)
    _check_facts(codec, manifest)
    return codec.requires_grad_(False).to(device).eval().bind(CodecSpec(manifest, settings))


@dataclass(frozen=True)
class CodecCard:
    """What a manifest says of a codec beside what its tensors and configuration say."""

    name: str
    is_trained: bool
    weights_licence: str
    source: str = ""


def save_codec(codec: Codec, card: CodecCard, folder_path: Path) -> CodecManifest:
    """Write ``codec.json`` and ``model.safetensors`` into a folder (made when missing).

    The manifest is written last, and an old one removed first, so that a folder is whole or has
    none. Tensors are stored as they are: float32.

    Raises:
        CheckpointError: A tensor holds a value that is not finite.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in codec.state_dict().items()}
    _check_finite(state, card.name)
    folder_path.mkdir(parents=True, exist_ok=True)
    (folder_path / MANIFEST_FILE).unlink(missing_ok=True)
    save_safetensors(state, folder_path / WEIGHTS_FILE)
    manifest = describe_codec(codec, card, _sha256_of_file(folder_path / WEIGHTS_FILE))
    text = json.dumps(manifest.model_dump(mode="json"), indent=1)
    (folder_path / MANIFEST_FILE).write_text(text + "\n")
    return manifest


def describe_codec(codec: Codec, card: CodecCard, weights_sha256: str) -> CodecManifest:
    """Manifest of a codec in memory."""
    return CodecManifest(
        name=card.name,
        family=codec.family,
        sample_rate=codec.sample_rate,
        hop_length=codec.hop_length,
        streams=codec.streams,
        is_variable_rate=codec.is_variable_rate,
        min_tail_samples=codec.min_tail_samples,
        architecture=codec.architecture,
        parts=part_digests(codec),
        weights_sha256=weights_sha256,
        is_trained=card.is_trained,
        num_parameters=sum(value.numel() for value in codec.state_dict().values()),
        weights_licence=card.weights_licence,
        source=card.source,
    )


def part_digests(codec: Codec) -> PartDigests:
    """Digests of a codec's parts: sha256, first 32 hex digits.

    Each covers (name, type, shape, bytes) of the part's tensors in the order of their names, and
    the configuration that decides results without showing in the tensors (number of heads, ...).
    """
    state = codec.state_dict()
    parts: dict[Part, list[str]] = {part: [] for part in Part}
    for key in sorted(state):
        parts[codec.part_of(key)].append(key)
    digests = {
        part.value: _digest_tensors(codec, part, ((key, state[key]) for key in keys))
        for part, keys in parts.items()
        if part is not Part.TRAINING and (keys or part is not Part.SSL)
    }
    return PartDigests.model_validate(digests)


def _digest_tensors(codec: Codec, part: Part, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps(codec.identity(part), sort_keys=True, allow_nan=False).encode())
    for key, value in tensors:
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


def _read_weights(uri: str, manifest: CodecManifest, fetch: Fetch | None) -> dict[str, Tensor]:
    path = local_file(uri, WEIGHTS_FILE)
    data = fetch_file(uri, WEIGHTS_FILE, fetch) if path is None else b""
    try:
        found = hashlib.sha256(data).hexdigest() if path is None else _sha256_of_file(path)
        if found != manifest.weights_sha256:
            raise CheckpointError(
                f"{WEIGHTS_FILE} of codec {uri!r} has sha256 {found[:16]}..., its {MANIFEST_FILE} "
                f"says {manifest.weights_sha256[:16]}...: the file is damaged or was replaced."
            )
        return parse_safetensors(data) if path is None else load_safetensors(path)
    except OSError as error:
        raise CheckpointError(
            f"Codec {uri!r} has no readable {WEIGHTS_FILE} ({error.strerror})."
        ) from error
    except SafetensorError as error:
        raise CheckpointError(f"{WEIGHTS_FILE} of codec {uri!r} is no safetensors file.") from error


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    for key in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"Codec {name} lacks the tensor {key!r}.")
    for key in sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"Codec {name} has the tensor {key!r}, for which there is no place.")
    for key, value in found.items():
        wanted = expected[key]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise CheckpointError(
                f"Tensor {key!r} of codec {name} is {value.dtype} {tuple(value.shape)}; "
                f"expected {wanted.dtype} {tuple(wanted.shape)}."
            )
    _check_finite(found, name)


def _check_facts(codec: Codec, manifest: CodecManifest) -> None:
    """What the manifest repeats of tensors and architecture must be what they say."""
    card = CodecCard(
        manifest.name, manifest.is_trained, manifest.weights_licence, source=manifest.source
    )
    found = describe_codec(codec, card, manifest.weights_sha256).model_dump(mode="json")
    stated = manifest.model_dump(mode="json")
    # The architecture may lack fields that came later; the parts' digests cover what matters.
    wrong = [key for key in stated if key != "architecture" and stated[key] != found[key]]
    if wrong:
        raise CheckpointError(
            f"{wrong[0]} in {MANIFEST_FILE} of codec {manifest.name} is not what its weights and "
            "architecture give: it was edited, or written by another version; convert it again."
        )


def _check_finite(state: Mapping[str, Tensor], name: str) -> None:
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"Tensor {key!r} of codec {name} holds values that are not finite."
            )
