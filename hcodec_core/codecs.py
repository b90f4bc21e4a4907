"""Finding a codec by its URI and reading its manifest, without torch.

A codec is a folder holding ``codec.json`` (the manifest) and ``model.safetensors``. It is named by

    hcodec-nano                         a preset whose weights ship with this package
    /models/h1 or file:///models/h1     a local folder
    s3://bucket/models/h1               a folder in object storage (read through ``fetch``)
    hf://org/name@revision              a repository of the Hugging Face hub (revision: main)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.tokens import MANIFEST_FILE, CodecManifest

Fetch = Callable[[str], bytes]
"""Returns the content of the object at an ``s3://`` URI; ``Storage.read`` is one."""

_PACKAGE_PATH = Path(__file__).parent
SHIPPED: Mapping[str, Path] = {"hcodec-nano": _PACKAGE_PATH / "models" / "hcodec" / "nano"}
"""Presets with weights in this package: name -> folder."""


def load_manifest(
    uri: str, *, expected_digest: str | None = None, fetch: Fetch | None = None
) -> CodecManifest:
    """Manifest of the codec at ``uri`` (forms: see the module).

    Args:
        uri: The codec's URI.
        expected_digest: ``CodecManifest.digest`` that the manifest must have.
        fetch: Reads ``s3://`` objects; needed for those only.

    Raises:
        ConfigError: The URI has no known form, or is ``s3://`` and ``fetch`` is missing.
        CheckpointError: There is no manifest, or it is damaged or not the expected one.
    """
    path = local_file(uri, MANIFEST_FILE)
    data = _read(path, uri) if path is not None else fetch_file(uri, MANIFEST_FILE, fetch)
    manifest = _parse_manifest(data, uri)
    if expected_digest is not None and manifest.digest != expected_digest:
        raise CheckpointError(
            f"Codec {uri!r} has digest {manifest.digest}, expected {expected_digest}: "
            "it was replaced; plan again with the codec that is wanted now."
        )
    return manifest


def local_file(uri: str, name: str) -> Path | None:
    """Local path of file ``name`` of a codec, or None when the codec lies in object storage.

    ``hf://`` files are downloaded into the hub's own cache. The path need not exist.

    Raises ``ConfigError`` when the URI has no known form, ``CheckpointError`` when the hub does not
    have the file.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _named_or_local_folder(uri) / name
    if scheme == "file" and rest.startswith("/"):
        return Path(rest) / name
    if scheme == "hf":
        return _download_from_hub(rest, name, uri)
    if scheme == "s3":
        return None
    raise ConfigError(
        f"Codec {uri!r} has no known form: write a preset ({', '.join(SHIPPED)}), a folder, "
        "file:///folder, s3://bucket/prefix or hf://org/name@revision."
    )


def fetch_file(uri: str, name: str, fetch: Fetch | None) -> bytes:
    """Content of file ``name`` of the codec at an ``s3://`` URI.

    Raises ``ConfigError`` when there is no ``fetch``; lets through what ``fetch`` raises.
    """
    if fetch is None:
        raise ConfigError(f"Codec {uri!r} lies in object storage, which is not configured here.")
    return fetch(f"{uri.rstrip('/')}/{name}")


def _named_or_local_folder(uri: str) -> Path:
    if uri in SHIPPED:
        return SHIPPED[uri]
    if "/" in uri and not uri.startswith("models:"):
        return Path(uri)
    raise ConfigError(
        f"There is no codec named {uri!r}: presets with weights are {', '.join(SHIPPED)}; "
        "write a folder with a slash (./name), and resolve registry aliases before this point."
    )


def _download_from_hub(rest: str, name: str, uri: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = rest.partition("@")
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{name} of codec {uri!r} cannot be had from the hub ({type(error).__name__}): check "
            "the name, the revision, the access rights and the network."
        ) from error


def _read(path: Path, uri: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Codec {uri!r} has no readable {path.name} ({error.strerror}): "
            "convert or copy it there."
        ) from error


def _parse_manifest(data: bytes, uri: str) -> CodecManifest:
    try:
        return CodecManifest.model_validate(json.loads(data))
    except (ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{MANIFEST_FILE} of codec {uri!r} is damaged or of another version ({reason})."
        ) from error
