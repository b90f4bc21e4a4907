"""The gate's decision as a document that can be checked: made from an evaluation, by data alone."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from hcodec_core.config import Config, GateConfig
from hcodec_core.errors import ConfigError, PromotionRefusedError
from hcodec_core.evaluation.documents import (
    AGAINST,
    CODEC,
    EvaluationResult,
    Verdict,
    read_result,
)
from hcodec_core.evaluation.verdicts import judge
from hcodec_core.promotion.codec_versions import CodecVersions
from hcodec_core.promotion.documents import (
    CHAMPION,
    CodecRef,
    GateDecision,
    RegisteredCodec,
    Rejection,
    decision_uri,
    read_document,
)
from hcodec_core.promotion.history import History
from hcodec_core.storage import Storage


def decide(
    config: Config,
    storage: Storage,
    challenger: RegisteredCodec,
    evaluation_uri: str,
    gate: GateConfig | None = None,
) -> GateDecision:
    """Judge a stored evaluation and store the decision; the same again gives the same document.

    Args:
        config: Whose registry and work folder.
        storage: Where the evaluation lies.
        challenger: The registered version that was evaluated.
        evaluation_uri: Its ``evaluation.json``.
        gate: Margins; None takes the configuration's.

    Raises:
        PromotionRefusedError: The evaluation is of another codec, or not against the champion
            of now: evaluate again.
        ConfigError: The evaluation cannot be used.
        RegistryError: The registry is away.
    """
    data = storage.read(evaluation_uri)
    result = read_result(data)
    versions = CodecVersions(config)
    champion = champion_of(versions, challenger.name)
    _check_sides(result, challenger, champion)
    used = gate or config.gate
    draft = GateDecision(
        decision_id="",
        name=challenger.name,
        challenger=CodecRef.of(challenger),
        champion=None if champion is None else CodecRef.of(champion),
        after_step=History(config, storage, challenger.name).last_number,
        evaluation_uri=evaluation_uri,
        evaluation_sha256=hashlib.sha256(data).hexdigest(),
        report_uri=result.report_uri,
        gate=used,
        verdict=_verdict(result, used),
    )
    decision = draft.model_copy(update={"decision_id": draft.content_id()})
    uri = decision_uri(config, decision.name, decision.decision_id)
    storage.write(uri, decision.model_dump_json(indent=1).encode())
    facts = {
        "evaluation_uri": evaluation_uri,
        "report_uri": result.report_uri,
        "decision_id": decision.decision_id,
        "verdict": decision.verdict.sentence,
    }
    versions.note(challenger.name, challenger.version, facts)
    return decision


def champion_of(versions: CodecVersions, name: str) -> RegisteredCodec | None:
    """The champion by its alias; None when there is none yet."""
    version = versions.aliases(name).get(CHAMPION)
    return None if version is None else versions.get(name, version)


def load_decision(config: Config, storage: Storage, name: str, decision_id: str) -> GateDecision:
    """A stored decision, checked against everything it was made from.

    Raises ``PromotionRefusedError`` when decision or evaluation were changed since.
    """
    uri = decision_uri(config, name, decision_id)
    decision = read_document(storage, uri, GateDecision)
    if decision.content_id() != decision_id or decision.decision_id != decision_id:
        raise PromotionRefusedError(
            f"The decision {uri} was changed after it was made: decide again."
        )
    data = storage.read(decision.evaluation_uri)
    if hashlib.sha256(data).hexdigest() != decision.evaluation_sha256:
        raise PromotionRefusedError(
            f"The evaluation {decision.evaluation_uri} was changed after decision {decision_id}: "
            "evaluate again."
        )
    # An id can be made for any text; the verdict must follow from the evaluation itself.
    if _gist(_verdict(read_result(data), decision.gate)) != _gist(decision.verdict):
        raise PromotionRefusedError(
            f"The verdict of decision {decision_id} does not follow from its evaluation: decide "
            "again."
        )
    return decision


def reject(
    config: Config, storage: Storage, name: str, decision_id: str, *, by: str, reason: str
) -> Rejection:
    """Record that a person said no; the decision can never be promoted. The first word counts."""
    read_document(storage, decision_uri(config, name, decision_id), GateDecision)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    rejection = Rejection(decision_id=decision_id, by=by, reason=reason, at=at)
    uri = _rejection_uri(config, name, decision_id)
    if storage.create(uri, rejection.model_dump_json(indent=1).encode()):
        return rejection
    return read_document(storage, uri, Rejection)


def find_rejection(
    config: Config, storage: Storage, name: str, decision_id: str
) -> Rejection | None:
    """Who turned a decision down, if anybody did."""
    uri = _rejection_uri(config, name, decision_id)
    return None if storage.head(uri) is None else read_document(storage, uri, Rejection)


def _rejection_uri(config: Config, name: str, decision_id: str) -> str:
    return decision_uri(config, name, decision_id).removesuffix(".json") + ".rejected.json"


def _verdict(result: EvaluationResult, gate: GateConfig) -> Verdict:
    return judge(result.files, result.sides, result.not_run, gate)


def _gist(verdict: Verdict) -> tuple[object, ...]:
    """What a verdict says, without its wording, which a later version may change."""
    parts = [(metric.metric, metric.status, metric.num_pairs) for metric in verdict.metrics]
    return (verdict.status, verdict.num_pairs, parts)


def _check_sides(
    result: EvaluationResult, challenger: RegisteredCodec, champion: RegisteredCodec | None
) -> None:
    if CODEC not in result.sides:
        raise ConfigError("The evaluation has no side 'codec': evaluate again.")
    found = result.sides[CODEC].facts.digest
    if found != challenger.digest:
        raise PromotionRefusedError(
            f"The evaluation is of codec {found[:12]}, {challenger.uri} is {challenger.digest[:12]}"
            ": evaluate that one."
        )
    against = result.sides[AGAINST].facts.digest if AGAINST in result.sides else None
    wanted = None if champion is None else champion.digest
    if against != wanted:
        raise PromotionRefusedError(
            f"The evaluation is against {_named(against)}, the champion of {challenger.name} is "
            f"{_named(wanted)}: evaluate again."
        )


def _named(digest: str | None) -> str:
    return "nobody" if digest is None else f"codec {digest[:12] or '(baseline)'}"
