"""What an evaluation found, as one versioned JSON document.

Everything in it is a function of codecs, files and settings on one kind of machine, but for
``timings``, ``build`` and ``report_uri``. Labels of the sides: ``codec``, ``against``, and the
names of baselines.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_core.config import GateConfig, describe
from hcodec_core.errors import ConfigError
from hcodec_core.tokens import digest_of

CODEC, AGAINST = "codec", "against"
RESULT_FILE = "evaluation.json"

Status = Literal["pass", "fail", "not enough files"]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StreamFacts(_Document):
    """One stream of codes."""

    name: str
    num_codebooks: int
    codebook_size: int


class SideFacts(_Document):
    """What was evaluated. Identities are "" for baselines, which have none.

    ``uri``: where the codec lay; ``version``: as the registry named it, else ""; ``digest``: of
    its manifest. ``frames_per_second`` and ``nominal_bits_per_second``: at the base frame rate.
    """

    name: str
    uri: str
    version: str = ""
    digest: str = ""
    sample_rate: int
    is_trained: bool = True
    num_parameters: int = 0
    encode_id: str = ""
    decode_id: str = ""
    codebook_id: str = ""
    streams: list[StreamFacts] = []
    frames_per_second: float | None = None
    nominal_bits_per_second: float | None = None


class CodebookUse(_Document):
    """How one codebook was used. ``entropy_bits`` of the codes' frequencies (no context).

    ``bars``: counts over equal ranges of code indices.
    """

    stream: str
    codebook: int
    size: int
    num_codes: int
    num_used: int
    entropy_bits: float
    bars: list[int]

    @property
    def perplexity(self) -> float:
        """How many equally likely codes would be as varied; 0 if none."""
        return 2.0**self.entropy_bits if self.num_codes else 0.0

    @property
    def used_share(self) -> float:
        """Share of the codebook's entries that were used at all."""
        return self.num_used / self.size


class MetricSummary(_Document):
    """One metric of one side over the files for which it could be measured."""

    num_files: int
    mean: float
    median: float
    p5: float
    p95: float


class SideSummary(_Document):
    """One side over the whole set.

    ``entropy_bits_per_second``: what an ideal coder without context would need for the codes;
    ``measured_bits_per_second``: of coders that count their own bits.
    """

    facts: SideFacts
    num_files: int
    num_failed: int
    audio_seconds: float
    metrics: dict[str, MetricSummary]
    codebooks: list[CodebookUse] = []
    tokens_per_second: float | None = None
    entropy_bits_per_second: float | None = None
    measured_bits_per_second: float | None = None


class FileScores(_Document):
    """One file. ``seconds``: what of it was used.

    ``scores``: value by metric, by side. ``failures``: why a side could not process the file at
    all. ``unmeasured``: why a metric has no value, by side.
    """

    name: str
    seconds: float
    scores: dict[str, dict[str, float]]
    failures: dict[str, str] = {}
    unmeasured: dict[str, dict[str, str]] = {}


class UnreadableFile(_Document):
    """A file of the set that is no usable audio, and why."""

    name: str
    reason: str


class HeldOut(_Document):
    """The set: ``digest`` over names and contents of all its files, also the unreadable ones."""

    uri: str
    digest: str
    num_files: int
    num_usable: int
    audio_seconds: float
    max_seconds: float
    unreadable: list[UnreadableFile] = []


class MetricVerdict(_Document):
    """One metric of the challenger, against the champion or a bound; one clear ``sentence``.

    ``gain``: mean over pairs of how much better the challenger is, in the metric's unit;
    ``lower`` and ``upper``: its interval, each end one-sided at the gate's confidence.
    """

    metric: str
    status: Status
    sentence: str
    is_required: bool
    num_pairs: int
    margin: float | None = None
    worst: float | None = None
    challenger_mean: float | None = None
    champion_mean: float | None = None
    gain: float | None = None
    lower: float | None = None
    upper: float | None = None


class Verdict(_Document):
    """Whether the challenger may take the champion's place."""

    status: Status
    sentence: str
    num_pairs: int
    metrics: list[MetricVerdict]


class SideTiming(_Document):
    """Seconds spent; factors are seconds of audio per second of work."""

    encode_seconds: float
    decode_seconds: float
    encode_realtime_factor: float | None
    decode_realtime_factor: float | None


class EvaluationResult(_Document):
    """All of an evaluation. ``verdict`` is None without ``against``.

    ``notes``: what a reader must know to compare the numbers. ``not_run``: why a metric was not
    tried. ``local_models``: digest by use. ``evaluation_id``: digest of the inputs.
    """

    kind: Literal["evaluation"] = "evaluation"
    format_version: Literal[1] = 1
    evaluation_id: str
    held_out: HeldOut
    sides: dict[str, SideSummary]
    files: list[FileScores]
    not_run: dict[str, str]
    notes: list[str]
    gate: GateConfig
    verdict: Verdict | None
    local_models: dict[str, str] = {}
    timings: dict[str, SideTiming] = {}
    build: dict[str, str] = {}
    report_uri: str = ""

    def content(self) -> dict[str, Any]:
        """What must come out the same when the same is measured again on the same machine."""
        return self.model_dump(mode="json", exclude={"timings", "build", "report_uri"})

    @property
    def content_digest(self) -> str:
        """Digest of ``content``."""
        return digest_of(self.content())


def read_result(text: bytes | str) -> EvaluationResult:
    """Parse a result document. Raises ``ConfigError`` naming each wrong entry."""
    try:
        return EvaluationResult.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"The evaluation cannot be used by this version: {describe(error)}."
        ) from error
