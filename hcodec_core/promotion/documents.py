"""Documents of promotion: a registered codec, the gate's decision, a step of the history.

Under ``<work_uri>/promotion/<name>/`` lie

    decisions/<decision_id>.json            ``GateDecision``
    decisions/<decision_id>.rejected.json   ``Rejection``, where a person said no
    history/<number>.json                   ``HistoryStep``, created once, numbered from 1
    history/<number>.done                   the alias was moved
"""

from __future__ import annotations

import re
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import Config, GateConfig, describe
from hcodec_core.errors import ConfigError
from hcodec_core.evaluation.documents import Verdict
from hcodec_core.jobs import CodecPin
from hcodec_core.storage import Storage, join_uri
from hcodec_core.tokens import CodecManifest, PartDigests, digest_of

CHAMPION, CHALLENGER = "champion", "challenger"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Parsed = TypeVar("Parsed", bound=_Document)


class RegisteredCodec(_Document):
    """One version of a codec in the registry.

    ``digest``: of its manifest; ``parts`` and ``decode_id``: its fingerprint. ``data_version``:
    what it was trained on. ``evaluation_uri``: of the last decision. Empty text where a fact was
    not given.
    """

    name: str
    version: int
    codec_uri: str
    digest: str
    weights_sha256: str
    parts: PartDigests
    decode_id: str
    is_trained: bool
    data_version: str = ""
    git_revision: str = ""
    training_run: str = ""
    evaluation_uri: str = ""

    @property
    def uri(self) -> str:
        """How the registry names it: ``models:/NAME/VERSION``."""
        return f"models:/{self.name}/{self.version}"

    def pin(self, threshold: float | None = None) -> CodecPin:
        """As job documents hold it."""
        return CodecPin(
            uri=self.codec_uri, digest=self.digest, version=self.uri, threshold=threshold
        )


class CodecRef(_Document):
    """A registered version, with the digest that it must have."""

    version: int
    codec_uri: str
    digest: str

    @classmethod
    def of(cls, codec: RegisteredCodec) -> CodecRef:
        """The reference to a registered codec."""
        return cls(version=codec.version, codec_uri=codec.codec_uri, digest=codec.digest)


class GateDecision(_Document):
    """What the gate says of a challenger, with all it rests on; a pure function of that.

    ``champion`` is None when there was none. ``after_step``: number of the history's last step.
    """

    kind: Literal["gate-decision"] = "gate-decision"
    format_version: Literal[1] = 1
    decision_id: str
    name: str
    challenger: CodecRef
    champion: CodecRef | None
    after_step: int
    evaluation_uri: str
    evaluation_sha256: str
    report_uri: str
    gate: GateConfig
    verdict: Verdict

    @property
    def passed(self) -> bool:
        """Whether the challenger may be promoted."""
        return self.verdict.status == "pass"

    def content_id(self) -> str:
        """The id that this content has."""
        return digest_of(self.model_dump(mode="json", exclude={"decision_id"}))[:24]


class Rejection(_Document):
    """A person turned a decision down."""

    format_version: Literal[1] = 1
    decision_id: str
    by: str
    reason: str
    at: str


class HistoryStep(_Document):
    """The champion's place changed hands. ``at``: UTC; ``by``: who asked, as far as known."""

    format_version: Literal[1] = 1
    number: int
    kind: Literal["promotion", "rollback"]
    name: str
    from_version: int | None
    to: CodecRef
    decision_id: str = ""
    by: str = ""
    reason: str = ""
    at: str


def check_name(name: str) -> str:
    """The name of a registered codec. Raises ``ConfigError`` for one that makes no path or URI."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a registered codec: use letters, digits, dots, dashes and "
            "underscores."
        )
    return name


def folder_uri(config: Config, name: str) -> str:
    """Folder of a codec's decisions and history."""
    return join_uri(config.work.work_uri, "promotion", check_name(name))


def decision_uri(config: Config, name: str, decision_id: str) -> str:
    """Where a decision lies."""
    return join_uri(folder_uri(config, name), "decisions", f"{decision_id}.json")


def read_document(storage: Storage, uri: str, model: type[Parsed]) -> Parsed:
    """Read one of these documents. Raises ``ObjectMissingError`` and ``ConfigError``."""
    return parse_document(storage.read(uri), uri, model)


def parse_document(data: bytes, uri: str, model: type[Parsed]) -> Parsed:
    """Parse one of these documents. Raises ``ConfigError`` naming each wrong entry."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"{uri} cannot be used by this version: {describe(error)}.") from error


def decode_id_of(manifest: CodecManifest) -> str:
    """``CodecSpec.decode_id``, for which no settings are needed."""
    return digest_of({"codebooks": manifest.parts.codebooks, "decoder": manifest.parts.decoder})
