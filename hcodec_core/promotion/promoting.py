"""Promotion and rollback: the champion's place changes hands, once per decision."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from hcodec_core.config import Config
from hcodec_core.errors import PromotionRefusedError
from hcodec_core.promotion.codec_versions import CodecVersions
from hcodec_core.promotion.deciding import find_rejection, load_decision
from hcodec_core.promotion.documents import CodecRef, GateDecision, HistoryStep, check_name
from hcodec_core.promotion.history import History
from hcodec_core.promotion.resolving import check_place
from hcodec_core.storage import Storage

logger = logging.getLogger(__name__)

_TRIES = 5


def promote(
    config: Config, storage: Storage, name: str, decision_id: str, *, by: str = ""
) -> HistoryStep:
    """Make the challenger of a decision the champion; asking again changes nothing.

    Raises:
        PromotionRefusedError: The gate did not pass, somebody said no, decision or evaluation were
            changed, the codec was rolled back since, or the champion is no longer the one that the
            evaluation compared with (evaluate again).
        CheckpointError: The challenger's files are gone or others.
        RegistryError: The registry is away; nothing is promoted, and trying again goes on.
    """
    decision = load_decision(config, storage, check_name(name), decision_id)
    _check_allowed(config, storage, decision)
    check_place(decision.challenger.codec_uri, decision.challenger.digest, storage)
    versions = CodecVersions(config)
    _check_registered(versions, decision)
    history = History(config, storage, name)
    for _ in range(_TRIES):
        steps, current = history.settle(versions)
        done = _step_of(steps, decision_id)
        if done is not None:
            return done
        _check_champion(decision, current)
        step = HistoryStep(
            number=len(steps) + 1,
            kind="promotion",
            name=name,
            from_version=current,
            to=decision.challenger,
            decision_id=decision_id,
            by=by,
            reason=decision.verdict.sentence,
            at=_now(),
        )
        if history.create(step):
            history.settle(versions)
            logger.info("%s: version %d is the champion now.", name, step.to.version)
            return step
    raise PromotionRefusedError(f"Others keep changing the champion of {name}: look, then retry.")


def roll_back(
    config: Config,
    storage: Storage,
    name: str,
    *,
    expected_version: int | None = None,
    by: str = "",
    reason: str = "",
) -> HistoryStep:
    """Make the champion before this one the champion again; the history keeps both.

    Args:
        config: Whose registry and work folder.
        storage: Where the history lies.
        name: Name of the registered codec.
        expected_version: The champion that is to leave. With it, asking again changes nothing.
        by: Who asks.
        reason: Why.

    Raises:
        PromotionRefusedError: There is no champion before, or the champion is not the expected one.
        CheckpointError: The files of the champion before are gone or others.
        RegistryError: The registry is away; nothing was changed.
    """
    versions = CodecVersions(config)
    history = History(config, storage, check_name(name))
    for _ in range(_TRIES):
        steps, current = history.settle(versions)
        if expected_version is not None and current != expected_version:
            return _rolled_back(steps, expected_version, current)
        target = _champion_before(steps, current, name)
        check_place(target.codec_uri, target.digest, storage)
        step = HistoryStep(
            number=len(steps) + 1,
            kind="rollback",
            name=name,
            from_version=current,
            to=target,
            by=by,
            reason=reason,
            at=_now(),
        )
        if history.create(step):
            history.settle(versions)
            logger.info("%s: version %d is the champion again.", name, target.version)
            return step
    raise PromotionRefusedError(f"Others keep changing the champion of {name}: look, then retry.")


def _check_allowed(config: Config, storage: Storage, decision: GateDecision) -> None:
    if not decision.passed:
        raise PromotionRefusedError(
            f"The gate did not let version {decision.challenger.version} of {decision.name} pass. "
            f"{decision.verdict.sentence}"
        )
    rejection = find_rejection(config, storage, decision.name, decision.decision_id)
    if rejection is not None:
        raise PromotionRefusedError(
            f"Decision {decision.decision_id} was turned down by {rejection.by or 'somebody'}: "
            f"{rejection.reason or 'no reason given'}."
        )


def _check_registered(versions: CodecVersions, decision: GateDecision) -> None:
    found = versions.get(decision.name, decision.challenger.version)
    if CodecRef.of(found) != decision.challenger:
        raise PromotionRefusedError(
            f"{found.uri} is not the codec of decision {decision.decision_id} any more: evaluate "
            "again."
        )


def _check_champion(decision: GateDecision, current: int | None) -> None:
    expected = None if decision.champion is None else decision.champion.version
    if current != expected:
        raise PromotionRefusedError(
            f"Decision {decision.decision_id} compared with {_version(expected)}, but the champion "
            f"of {decision.name} is {_version(current)} now: evaluate again."
        )


def _step_of(steps: Sequence[HistoryStep], decision_id: str) -> HistoryStep | None:
    """The step that a decision made, unless that was undone."""
    made = next((step for step in steps if step.decision_id == decision_id), None)
    if made is None:
        return None
    undone = next(
        (
            step
            for step in steps[made.number :]
            if step.kind == "rollback" and step.from_version == made.to.version
        ),
        None,
    )
    if undone is not None:
        raise PromotionRefusedError(
            f"Decision {decision_id} was carried out and rolled back at {undone.at}: decide again."
        )
    return made


def _rolled_back(steps: Sequence[HistoryStep], expected: int, current: int | None) -> HistoryStep:
    last = steps[-1] if steps else None
    if last is not None and last.kind == "rollback" and last.from_version == expected:
        return last
    raise PromotionRefusedError(
        f"The champion is {_version(current)}, not {_version(expected)}: nothing was rolled back."
    )


def _champion_before(steps: Sequence[HistoryStep], current: int | None, name: str) -> CodecRef:
    made = [s for s in steps if s.kind == "promotion" and s.to.version == current]
    before = made[-1].from_version if made else None
    found = [step.to for step in steps if step.to.version == before]
    if not found:
        raise PromotionRefusedError(
            f"{name} has no champion before {_version(current)} in its history: nothing to go back "
            "to."
        )
    return found[-1]


def _version(number: int | None) -> str:
    return "nobody" if number is None else f"version {number}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
