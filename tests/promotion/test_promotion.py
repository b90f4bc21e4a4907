"""Gate decisions, promotion as compare-and-set, rollback; what was tampered with is refused."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from hcodec_core.config import GateConfig, MetricMargin, RegistryConfig
from hcodec_core.errors import CheckpointError, PromotionRefusedError, RegistryError
from hcodec_core.evaluation.documents import read_result
from hcodec_core.promotion.deciding import decide, load_decision, reject
from hcodec_core.promotion.documents import GateDecision, decision_uri
from hcodec_core.promotion.history import History
from hcodec_core.promotion.promoting import promote, roll_back
from hcodec_core.promotion.resolving import ResolvedCodec

NAME = "hcodec-tiny"


def decision_for(bench, codec: str, against: str | None, **values) -> GateDecision:
    registered = bench.register(codec)
    uri = bench.evaluation(codec, against, **values)
    return decide(bench.config, bench.storage, registered, uri)


def promoted(bench, codec: str, against: str | None, **values) -> GateDecision:
    decision = decision_for(bench, codec, against, **values)
    promote(bench.config, bench.storage, NAME, decision.decision_id, by="ann")
    return decision


def history(bench) -> list[tuple[str, int | None, int]]:
    steps = History(bench.config, bench.storage, NAME).steps()
    return [(step.kind, step.from_version, step.to.version) for step in steps]


def test_the_first_champion_and_its_successor(bench):
    promoted(bench, "one", None)
    assert bench.champion == 1
    assert bench.versions.aliases(NAME) == {"champion": 1}  # no challenger is left
    decision = promoted(bench, "two", "one")
    assert bench.champion == 2
    assert history(bench) == [("promotion", None, 1), ("promotion", 1, 2)]
    step = History(bench.config, bench.storage, NAME).steps()[-1]
    assert (step.by, step.decision_id) == ("ann", decision.decision_id)
    assert step.reason.startswith("Pass")


def test_promoting_again_changes_nothing(bench):
    promoted(bench, "one", None)
    decision = promoted(bench, "two", "one")
    again = promote(bench.config, bench.storage, NAME, decision.decision_id, by="bob")
    assert (again.number, again.by) == (2, "ann")
    assert len(history(bench)) == 2


def test_deciding_again_gives_the_same_document(bench):
    first = decision_for(bench, "one", None)
    assert decision_for(bench, "one", None) == first
    assert load_decision(bench.config, bench.storage, NAME, first.decision_id) == first


def test_the_registry_says_where_the_evaluation_lies(bench):
    decision = decision_for(bench, "one", None)
    codec = bench.versions.get(NAME, 1)
    assert codec.evaluation_uri == decision.evaluation_uri
    assert codec.pin() == ResolvedCodec(codec.codec_uri, codec.digest, codec.uri).pin()


def test_a_challenger_that_is_worse_is_not_promoted(bench):
    promoted(bench, "one", None)
    decision = decision_for(bench, "two", "one", gain=-0.05)
    assert not decision.passed
    with pytest.raises(PromotionRefusedError, match="STOI did not hold"):
        promote(bench.config, bench.storage, NAME, decision.decision_id)
    assert bench.champion == 1


def test_too_few_files_do_not_promote(bench):
    promoted(bench, "one", None)
    decision = decision_for(bench, "two", "one", num=3)
    with pytest.raises(PromotionRefusedError, match="Not enough files"):
        promote(bench.config, bench.storage, NAME, decision.decision_id)


def test_margins_are_data(bench):
    promoted(bench, "one", None)
    registered, uri = bench.register("two"), bench.evaluation("two", "one", gain=-0.05)
    loose = GateConfig(min_files=4, metrics={"stoi": MetricMargin(margin=0.1)})
    strict = decide(bench.config, bench.storage, registered, uri)
    lenient = decide(bench.config, bench.storage, registered, uri, loose)
    assert (strict.passed, lenient.passed) == (False, True)
    assert lenient.gate == loose


def test_a_champion_that_changed_meanwhile_needs_another_evaluation(bench):
    promoted(bench, "one", None)
    slow = decision_for(bench, "two", "one")
    promoted(bench, "three", "one")
    with pytest.raises(PromotionRefusedError, match="champion of hcodec-tiny is version 3 now: ev"):
        promote(bench.config, bench.storage, NAME, slow.decision_id)
    assert bench.champion == 3


def test_an_evaluation_of_others_decides_nothing(bench):
    promoted(bench, "one", None)
    two = bench.register("two")
    with pytest.raises(PromotionRefusedError, match="evaluate that one"):
        decide(bench.config, bench.storage, two, bench.evaluation("three", "one"))
    with pytest.raises(PromotionRefusedError, match="against nobody, the champion"):
        decide(bench.config, bench.storage, two, bench.evaluation("two", None))
    with pytest.raises(PromotionRefusedError, match="evaluate again"):
        decide(bench.config, bench.storage, two, bench.evaluation("two", "three"))


def tamper(bench, decision: GateDecision, **changes) -> GateDecision:
    """Write a changed decision under the id that fits its new content."""
    draft = decision.model_copy(update=changes)
    forged = draft.model_copy(update={"decision_id": draft.content_id()})
    uri = decision_uri(bench.config, NAME, forged.decision_id)
    bench.storage.write(uri, forged.model_dump_json().encode())
    return forged


def test_a_decision_that_was_edited_is_refused(bench):
    promoted(bench, "one", None)
    decision = decision_for(bench, "two", "one", gain=-0.05)
    uri = decision_uri(bench.config, NAME, decision.decision_id)
    text = json.loads(bench.storage.read(uri))
    text["verdict"]["status"] = "pass"
    bench.storage.write(uri, json.dumps(text).encode())
    with pytest.raises(PromotionRefusedError, match="was changed after it was made"):
        promote(bench.config, bench.storage, NAME, decision.decision_id)


def test_a_verdict_that_does_not_follow_from_its_evaluation_is_refused(bench):
    promoted(bench, "one", None)
    decision = decision_for(bench, "two", "one", gain=-0.05)
    passing = decision.verdict.model_copy(update={"status": "pass"})
    forged = tamper(bench, decision, verdict=passing)
    with pytest.raises(PromotionRefusedError, match="does not follow from its evaluation"):
        promote(bench.config, bench.storage, NAME, forged.decision_id)
    assert bench.champion == 1


def test_an_evaluation_that_was_edited_is_refused(bench):
    promoted(bench, "one", None)
    decision = decision_for(bench, "two", "one")
    data = bench.storage.read(decision.evaluation_uri)
    edited = read_result(data).model_copy(update={"notes": ["all is well"]})
    bench.storage.write(decision.evaluation_uri, edited.model_dump_json().encode())
    with pytest.raises(PromotionRefusedError, match="was changed after decision"):
        promote(bench.config, bench.storage, NAME, decision.decision_id)


def test_a_codec_that_was_replaced_after_the_evaluation_is_refused(bench, tmp_path):
    bench.codecs = dict(bench.codecs) | {"two": tmp_path / "two"}
    shutil.copytree(bench.codecs["one"], tmp_path / "one")
    shutil.copytree(bench.codecs["three"], bench.codecs["two"])
    decision = decision_for(bench, "two", None)
    shutil.rmtree(bench.codecs["two"])
    shutil.copytree(bench.codecs["one"], bench.codecs["two"])
    with pytest.raises(CheckpointError, match="it was replaced"):
        promote(bench.config, bench.storage, NAME, decision.decision_id)
    assert bench.champion is None


def test_a_rejected_decision_is_never_promoted(bench):
    decision = decision_for(bench, "one", None)
    first = reject(bench.config, bench.storage, NAME, decision.decision_id, by="eve", reason="hum")
    again = reject(bench.config, bench.storage, NAME, decision.decision_id, by="bob", reason="-")
    assert again == first
    with pytest.raises(PromotionRefusedError, match="turned down by eve: hum"):
        promote(bench.config, bench.storage, NAME, decision.decision_id)
    assert bench.champion is None


def test_rollback_goes_back_and_further_back(bench):
    promoted(bench, "one", None)
    promoted(bench, "two", "one")
    promoted(bench, "three", "two")
    assert roll_back(bench.config, bench.storage, NAME, by="ann", reason="hiss").to.version == 2
    assert bench.champion == 2
    assert roll_back(bench.config, bench.storage, NAME).to.version == 1
    with pytest.raises(PromotionRefusedError, match="no champion before version 1"):
        roll_back(bench.config, bench.storage, NAME)
    assert history(bench)[-2:] == [("rollback", 3, 2), ("rollback", 2, 1)]


def test_rollback_with_the_expected_champion_is_done_once(bench):
    promoted(bench, "one", None)
    promoted(bench, "two", "one")
    first = roll_back(bench.config, bench.storage, NAME, expected_version=2)
    again = roll_back(bench.config, bench.storage, NAME, expected_version=2)
    assert first == again
    assert bench.champion == 1
    with pytest.raises(PromotionRefusedError, match="nothing was rolled back"):
        roll_back(bench.config, bench.storage, NAME, expected_version=7)


def test_what_was_rolled_back_is_promoted_only_by_a_new_decision(bench):
    promoted(bench, "one", None)
    old = promoted(bench, "two", "one")
    roll_back(bench.config, bench.storage, NAME)
    with pytest.raises(PromotionRefusedError, match="and rolled back at"):
        promote(bench.config, bench.storage, NAME, old.decision_id)
    new = promoted(bench, "two", "one")
    assert new.decision_id != old.decision_id
    assert bench.champion == 2


def test_a_promotion_that_died_before_the_alias_moved_is_finished(bench, monkeypatch):
    promoted(bench, "one", None)
    decision = decision_for(bench, "two", "one")

    def die(self, *_):
        raise RegistryError("away")

    with monkeypatch.context() as patch:
        patch.setattr("hcodec_core.promotion.codec_versions.CodecVersions.set_alias", die)
        with pytest.raises(RegistryError):
            promote(bench.config, bench.storage, NAME, decision.decision_id)
    assert bench.champion == 1  # readers still see the old one
    promote(bench.config, bench.storage, NAME, decision.decision_id)
    assert bench.champion == 2
    assert len(history(bench)) == 2


def test_an_alias_moved_by_hand_is_respected(bench):
    promoted(bench, "one", None)
    promoted(bench, "two", "one")
    bench.versions.set_alias(NAME, "champion", 1)
    promoted(bench, "three", "one")
    assert bench.champion == 3
    assert history(bench)[-1] == ("promotion", 1, 3)


def test_a_registry_that_is_away_promotes_nothing(bench):
    decision = decision_for(bench, "one", None)
    away = bench.config.model_copy(update={"registry": RegistryConfig(uri="http://127.0.0.1:9")})
    with pytest.raises(RegistryError):
        promote(away, bench.storage, NAME, decision.decision_id)
    assert history(bench) == []
    assert bench.champion is None


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(bench):
    promoted(bench, "one", None)
    decisions = [decision_for(bench, name, "one") for name in ("two", "three")]
    barrier = threading.Barrier(2)
    outcomes: list[str] = []

    def run(decision: GateDecision) -> None:
        barrier.wait()
        while True:
            try:
                promote(bench.config, bench.storage, NAME, decision.decision_id)
                outcomes.append("promoted")
            except PromotionRefusedError:
                outcomes.append("refused")
            except RegistryError:
                continue  # the database was locked for too long: as a task would, try again
            return

    threads = [threading.Thread(target=run, args=(decision,)) for decision in decisions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["promoted", "refused"]
    assert bench.champion == history(bench)[-1][2]
    assert len(history(bench)) == 2


def test_a_promotion_that_slips_in_between_looking_and_writing_is_met(bench, monkeypatch):
    promoted(bench, "one", None)
    slow, quick = (decision_for(bench, name, "one") for name in ("two", "three"))
    settle = History.settle

    def settle_then_lose(self, versions):
        found = settle(self, versions)
        monkeypatch.setattr(History, "settle", settle)
        promote(bench.config, bench.storage, NAME, quick.decision_id)
        return found

    monkeypatch.setattr(History, "settle", settle_then_lose)
    with pytest.raises(PromotionRefusedError, match="is version 3 now: evaluate again"):
        promote(bench.config, bench.storage, NAME, slow.decision_id)
    assert bench.champion == 3
    assert len(history(bench)) == 2
