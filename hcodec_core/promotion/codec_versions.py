"""Versions of codecs and their aliases in an MLflow model registry.

A version's tag ``hcodec.codec`` holds ``RegisteredCodec`` as JSON; ``hcodec.digest`` and others
repeat parts of it for the eyes of people. MLflow's own usage reporting is switched off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hcodec_core.config import Config
from hcodec_core.errors import ConfigError, RegistryError
from hcodec_core.promotion.documents import RegisteredCodec, check_name, parse_document

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
_TAG = "hcodec.codec"
_SHOWN = ("digest", "weights_sha256", "decode_id", "data_version", "git_revision")
_PAGE = 200


def registry_uri(config: Config) -> str:
    """Where the registry is. Raises ``ConfigError`` when nothing says so."""
    uri = config.registry.uri
    if uri is None:
        catalog = config.catalog.uri
        if not catalog.startswith("sqlite:///"):
            raise ConfigError(
                "No model registry is configured: set registry.uri to sqlite:////folder/mlflow.db "
                "or to the address of an MLflow server."
            )
        return catalog.rpartition("/")[0] + "/mlflow.db"
    if urlsplit(uri).scheme.partition("+")[0] not in _SCHEMES:
        raise ConfigError(
            "registry.uri must be sqlite:////folder/mlflow.db, another database, or http(s)://: "
            "MLflow's file store has no future and no aliases that hold."
        )
    return uri


class CodecVersions:
    """The registry of one configuration. All methods raise ``RegistryError`` when it is away."""

    def __init__(self, config: Config) -> None:
        """Nothing is opened before it is asked for."""
        self._uri = registry_uri(config)
        self._opened: MlflowClient | None = None

    def register(self, codec: RegisteredCodec) -> RegisteredCodec:
        """Add a version; ``codec.version`` is ignored.

        What is there already with the same digest and data version is returned as it is. Raises
        ``ConfigError`` for a codec of this machine where the registry is a server.
        """
        check_name(codec.name)
        self._check_reachable(codec.codec_uri)
        known = [
            other
            for other in self.versions(codec.name)
            if (other.digest, other.data_version) == (codec.digest, codec.data_version)
        ]
        if known:
            return known[0]
        with self._calls("registering a codec") as client:
            self._ensure_name(client, codec.name)
            made = client.create_model_version(codec.name, codec.codec_uri)
            registered = codec.model_copy(update={"version": int(made.version)})
            for key, value in _tags(registered).items():
                client.set_model_version_tag(codec.name, str(made.version), key, value)
        return registered

    def _check_reachable(self, codec_uri: str) -> None:
        is_server = self._uri.startswith("http")
        if is_server and not codec_uri.startswith(("s3://", "hf://")):
            raise ConfigError(
                f"The codec {codec_uri} lies on this machine, the registry {self.place} is a "
                "server for all: put the codec into object storage and register it there."
            )

    def names(self) -> list[str]:
        """Names of all registered codecs."""
        with self._calls("listing codecs") as client:
            models = _all(lambda token: client.search_registered_models(page_token=token))
        return sorted(str(model.name) for model in models)

    def versions(self, name: str) -> list[RegisteredCodec]:
        """All versions of a codec, oldest first; none when the name is unknown.

        Versions of other makers, and those that were not finished, are left out.
        """
        check_name(name)
        with self._calls("listing versions") as client:
            found = _all(
                lambda token: client.search_model_versions(
                    f"name='{name}'", max_results=_PAGE, page_token=token
                )
            )
        known = [_codec_of(version) for version in found if _TAG in version.tags]
        return sorted(known, key=lambda codec: codec.version)

    def get(self, name: str, version: int) -> RegisteredCodec:
        """One version. Raises ``ConfigError`` when it does not exist."""
        check_name(name)
        with self._calls("reading a version", f"models:/{name}/{version}") as client:
            found = client.get_model_version(name, str(version))
        if _TAG not in found.tags:
            raise ConfigError(f"models:/{name}/{version} was not registered by hcodec.")
        return _codec_of(found)

    def aliases(self, name: str) -> dict[str, int]:
        """Version by alias. Raises ``ConfigError`` when the name is unknown."""
        check_name(name)
        with self._calls("reading aliases", f"models:/{name}") as client:
            found: Mapping[str, Any] = client.get_registered_model(name).aliases
        return {alias: int(version) for alias, version in found.items()}

    def note(self, name: str, version: int, facts: Mapping[str, str]) -> None:
        """Write facts about a version for people, as tags ``hcodec.<fact>``."""
        with self._calls("writing tags", f"models:/{name}/{version}") as client:
            for fact, text in facts.items():
                client.set_model_version_tag(name, str(version), f"hcodec.{fact}", text)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let an alias name a version."""
        with self._calls("moving an alias", f"models:/{name}/{version}") as client:
            client.set_registered_model_alias(name, alias, str(version))

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias, if it is there."""
        with self._calls("removing an alias", f"models:/{name}") as client:
            client.delete_registered_model_alias(name, alias)

    @contextmanager
    def _calls(self, action: str, what: str = "") -> Iterator[MlflowClient]:
        """A client whose errors are ours; ``what`` is named when it does not exist."""
        client = self._client(action)
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield client
        except MlflowException as error:
            if what and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise ConfigError(
                    f"{what} is not in the registry {self.place}: register it first."
                ) from error
            raise self._failure(action, error) from error
        except (SQLAlchemyError, OSError) as error:
            raise self._failure(action, error) from error

    @property
    def place(self) -> str:
        """The registry's address without credentials."""
        parts = urlsplit(self._uri)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"

    def _failure(self, action: str, error: Exception) -> RegistryError:
        return RegistryError(
            f"The model registry {self.place} failed while {action} ({type(error).__name__}): "
            "nothing was changed by this step; check that it runs, then try again."
        )

    def _client(self, action: str) -> MlflowClient:
        if self._opened is None:
            self._opened = self._open(action)
        return self._opened

    def _open(self, action: str) -> MlflowClient:
        # MLflow reads these when it is imported and at each request; a user's own values stay.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ConfigError(
                "The model registry needs mlflow, which is not installed: install this package "
                "with the extra 'train'."
            ) from error
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            # Without a tracking URI of its own the client makes a database where it stands.
            return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            raise self._failure(action, error) from error

    @staticmethod
    def _ensure_name(client: MlflowClient, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name, description="Codec of hcodec-pipelines.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _tags(codec: RegisteredCodec) -> dict[str, str]:
    shown = {f"hcodec.{name}": str(getattr(codec, name)) for name in _SHOWN}
    # The whole comes last: a version without it was not finished.
    return {name: value for name, value in shown.items() if value} | {_TAG: codec.model_dump_json()}


def _codec_of(version: ModelVersion) -> RegisteredCodec:
    place = f"models:/{version.name}/{version.version}"
    codec = parse_document(version.tags[_TAG].encode(), place, RegisteredCodec)
    if (codec.name, codec.version) != (version.name, int(version.version)):
        raise ConfigError(f"The tag of {place} is of {codec.uri}: register the codec again.")
    evaluated = version.tags.get("hcodec.evaluation_uri", codec.evaluation_uri)
    return codec.model_copy(update={"evaluation_uri": evaluated})


def _all(fetch: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = fetch(token)
        found += page
        token = page.token
        if not token:
            return found
