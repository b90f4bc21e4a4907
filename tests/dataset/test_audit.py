"""The audit beside the checks: what is sampled, and what its result does to a version."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcodec_core.dataset.audit import (
    AuditResult,
    FileAudit,
    audit_result_uri,
    audit_uri,
    make_audit_job,
    read_audit,
)
from hcodec_core.dataset.card import card_files, make_card
from hcodec_core.dataset.checks import failure_of, validate_plan
from hcodec_core.dataset.report import ValidationResult
from hcodec_core.dataset.versions import publish
from hcodec_core.errors import ConfigError, ValidationFailedError
from hcodec_core.jobs import AuditJob, Outcome, read_any_job
from tests.dataset.factories import World


def sample(world: World, plan_uri: str, **options: float) -> list[str]:
    uri = make_audit_job(world.storage, plan_uri, **options)
    assert uri is not None
    job = read_any_job(world.storage.read(uri))
    assert isinstance(job, AuditJob)
    assert job.num_files == len(job.files)
    return [file.uri for file in job.files]


def test_a_sample_is_of_rows_only_and_always_the_same(local_world: World) -> None:
    world = local_world
    world.put(*(f"{number}.wav" for number in range(20)))
    plan = world.plan(bad_files={"max_share": 1.0})
    bad = {world.uri(f"{number}.wav") for number in range(0, 20, 2)}
    world.work(plan, lambda uri: Outcome.QUARANTINED if uri in bad else Outcome.TOKENS)
    chosen = sample(world, plan.plan_uri, num_files=5)
    assert len(set(chosen) - bad) == 5
    assert sample(world, plan.plan_uri, num_files=5) == chosen
    assert sample(world, plan.plan_uri, num_files=99)[:5] == chosen
    assert sample(world, plan.plan_uri, max_seconds=0.001) == chosen[:1]


def test_a_plan_without_rows_has_nothing_to_audit(local_world: World) -> None:
    local_world.put("a.wav")
    plan = local_world.plan(bad_files={"max_share": 1.0})
    local_world.work(plan, lambda uri: Outcome.QUARANTINED)
    assert make_audit_job(local_world.storage, plan.plan_uri) is None
    assert read_audit(local_world.storage, plan.plan_uri) is None


def validated(world: World, tmp_path: Path, mode: str, **fault: object) -> ValidationResult:
    world.put(*(f"{number}.wav" for number in range(4)))
    plan = world.plan()
    world.work(plan)
    good = {
        "outcome": "compared",
        "num_codes": 50,
        "num_equal_codes": 50,
        "num_samples": 320,
        "num_decoded_samples": 320,
        "si_sdr_db": 3.5,
        "spectral_db": 9.0,
    }
    files = [FileAudit.model_validate({"uri": world.uri("0.wav"), **good, **fault})]
    files += [FileAudit.model_validate({"uri": world.uri("1.wav"), **good})]
    files += [FileAudit(uri=world.uri("2.wav"), outcome="deleted")]
    result = AuditResult(
        plan_id=plan.plan_id,
        encode_id=plan.encode_id,
        mode=mode,
        compute_class="cpu-test",
        files=files,
    )
    uri = audit_result_uri(audit_uri(plan.plan_uri))
    world.storage.write(uri, result.model_dump_json().encode())
    (tmp_path / "work").mkdir()
    return validate_plan(world.config, world.storage, world.commit(plan), tmp_path / "work")


def test_a_good_audit_is_in_the_report(local_world: World, tmp_path: Path) -> None:
    result = validated(local_world, tmp_path, "exact")
    assert result.passed
    observed = {check.name: check.observed for check in result.checks}
    assert observed["audit_codes_equal"] == 0
    page = Path(result.report_path).read_text()
    assert "Round-trip audit" in page
    assert "2 sampled files were decoded" in page
    assert "1 more had changed or gone since" in page
    assert "3.5 dB" in page


def test_an_audit_is_on_the_card_without_names(local_world: World, tmp_path: Path) -> None:
    world = local_world
    result = validated(world, tmp_path, "exact")
    plan_uri = world.layout.plan_uri(result.plan_id)
    publish(world.config, world.storage, plan_uri, result.snapshot_id)
    card = make_card(world.storage, world.layout, "v1")
    assert card.audit is not None
    assert (card.audit.num_files, card.audit.num_codes) == (2, 100)
    assert card.audit.median_si_sdr_db == 3.5
    page = card_files(card)["index.html"].decode()
    assert "of 100 codes the same" in page
    assert "0.wav" not in page


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ({"num_equal_codes": 49}, "audit_codes_equal"),
        ({"num_decoded_samples": 319}, "audit_lengths_equal"),
        ({"is_finite": False, "si_sdr_db": None}, "audit_audio_finite"),
    ],
)
def test_a_bad_audit_blocks_the_version_and_names_the_file(
    local_world: World, tmp_path: Path, fault: dict[str, object], check: str
) -> None:
    result = validated(local_world, tmp_path, "exact", **fault)
    assert [failed.name for failed in result.failed("error")] == [check]
    failure = failure_of(result)
    assert isinstance(failure, ValidationFailedError)
    assert local_world.uri("0.wav") in str(failure)


def test_codes_of_mode_fast_may_differ(local_world: World, tmp_path: Path) -> None:
    result = validated(local_world, tmp_path, "fast", num_equal_codes=40)
    assert result.passed
    observed = {check.name: check.observed for check in result.checks}
    assert observed["audit_codes_equal"] is None
    assert observed["audit_lengths_equal"] == 0


def test_a_damaged_result_is_refused(local_world: World) -> None:
    local_world.put("a.wav")
    plan = local_world.plan()
    local_world.work(plan)
    local_world.storage.write(audit_result_uri(audit_uri(plan.plan_uri)), b"{}")
    with pytest.raises(ConfigError, match="is no audit of ours"):
        read_audit(local_world.storage, plan.plan_uri)
