"""From a name in the registry to a place with a digest. Plans and jobs hold only the latter."""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hcodec_core.codecs import SHIPPED, load_manifest, local_file
from hcodec_core.config import Config
from hcodec_core.errors import CheckpointError, ConfigError
from hcodec_core.jobs import CodecPin
from hcodec_core.promotion.codec_versions import CodecVersions
from hcodec_core.promotion.documents import (
    CHALLENGER,
    RegisteredCodec,
    check_name,
    decode_id_of,
)
from hcodec_core.storage import Storage, file_uri, join_uri, sha256_of_file
from hcodec_core.tokens import WEIGHTS_FILE, CodecManifest

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class ResolvedCodec:
    """A codec by place and digest. ``version``: ``models:/NAME/3``, "" outside the registry."""

    uri: str
    digest: str
    version: str = ""

    def pin(self, threshold: float | None = None) -> CodecPin:
        """As job documents hold it."""
        return CodecPin(uri=self.uri, digest=self.digest, version=self.version, threshold=threshold)


def is_registry_uri(uri: str) -> bool:
    """Whether a registry has to be asked."""
    return uri.startswith("models:")


def resolve_codec(config: Config, uri: str, storage: Storage | None = None) -> ResolvedCodec:
    """``models:/NAME@champion`` or ``models:/NAME/3`` to a place with a digest, as of now.

    Other URIs stay as they are; their digest is that of the manifest found there (``storage`` is
    needed for ``s3://``).

    Raises ``ConfigError`` for a name, alias or version that does not exist, ``RegistryError`` when
    the registry is away.
    """
    if not is_registry_uri(uri):
        fetch = None if storage is None else storage.read
        return ResolvedCodec(uri, load_manifest(uri, fetch=fetch).digest)
    found = find_version(CodecVersions(config), uri)
    return ResolvedCodec(found.codec_uri, found.digest, found.uri)


def find_version(versions: CodecVersions, uri: str) -> RegisteredCodec:
    """The registered version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` names."""
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise ConfigError(f"{uri!r} names no codec: write models:/NAME@champion or models:/NAME/3.")
    name = check_name(parts["name"])
    if parts["version"]:
        return versions.get(name, int(parts["version"]))
    aliases = versions.aliases(name)
    if parts["alias"] not in aliases:
        known = ", ".join(sorted(aliases)) or "none"
        raise ConfigError(
            f"Codec {name} has no {parts['alias']!r} in the registry; its aliases are: {known}."
        )
    return versions.get(name, aliases[parts["alias"]])


@dataclass(frozen=True)
class RegisterRequest:
    """A codec to be registered, and what is known of how it came to be."""

    name: str
    codec_uri: str
    data_version: str = ""
    git_revision: str = ""
    training_run: str = ""


def register_codec(config: Config, storage: Storage, request: RegisterRequest) -> RegisteredCodec:
    """Check a codec's files against its manifest, register it, and call it the challenger.

    Registering the same codec of the same data again changes nothing but the alias.

    Raises ``CheckpointError`` when the weights are not those of the manifest, ``ConfigError`` and
    ``RegistryError`` as everywhere here.
    """
    uri = _absolute(request.codec_uri)
    manifest = load_manifest(uri, fetch=storage.read)
    _check_weights(uri, manifest, storage)
    versions = CodecVersions(config)
    codec = versions.register(
        RegisteredCodec(
            name=request.name,
            version=0,
            codec_uri=uri,
            digest=manifest.digest,
            weights_sha256=manifest.weights_sha256,
            parts=manifest.parts,
            decode_id=decode_id_of(manifest),
            is_trained=manifest.is_trained,
            data_version=request.data_version,
            git_revision=request.git_revision,
            training_run=request.training_run,
        )
    )
    versions.set_alias(codec.name, CHALLENGER, codec.version)
    return codec


def check_place(codec_uri: str, digest: str, storage: Storage) -> CodecManifest:
    """The manifest at a place. Raises ``CheckpointError`` when it is gone or another one."""
    return load_manifest(codec_uri, expected_digest=digest, fetch=storage.read)


def _absolute(uri: str) -> str:
    if "://" in uri or uri in SHIPPED:
        return uri
    if is_registry_uri(uri):
        raise ConfigError(f"{uri} is registered already: name the folder of a codec.")
    return file_uri(Path(uri).resolve())


def _check_weights(uri: str, manifest: CodecManifest, storage: Storage) -> None:
    path = local_file(uri, WEIGHTS_FILE)
    if path is None:
        with tempfile.TemporaryDirectory(prefix="hcodec-") as folder:
            path = Path(folder) / WEIGHTS_FILE
            storage.download(join_uri(uri, WEIGHTS_FILE), path)
            found = sha256_of_file(path)
    else:
        found = _digest_of_local(path, uri)
    if found != manifest.weights_sha256:
        raise CheckpointError(
            f"{WEIGHTS_FILE} of codec {uri!r} has sha256 {found[:16]}..., its manifest says "
            f"{manifest.weights_sha256[:16]}...: export the codec again."
        )


def _digest_of_local(path: Path, uri: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"Codec {uri!r} has no readable {WEIGHTS_FILE} ({error.strerror})."
        ) from error
