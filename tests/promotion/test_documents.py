"""Documents that the first version wrote stay readable, and keep their identities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcodec_core.config import GateConfig
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import EvaluateJob, read_any_job
from hcodec_core.promotion.documents import (
    GateDecision,
    HistoryStep,
    RegisteredCodec,
    Rejection,
    check_name,
    parse_document,
)

# As the first version wrote them; never regenerate this file.
DOCUMENTS = json.loads((Path(__file__).parent / "documents-v1.json").read_text())


def parsed(name: str, model):
    return parse_document(json.dumps(DOCUMENTS[name]).encode(), name, model)


def test_a_decision_keeps_its_id():
    decision = parsed("decision", GateDecision)
    assert decision.content_id() == decision.decision_id
    assert decision.passed
    assert decision.gate.metrics["stoi"].worst == 0.8


def test_the_other_documents_are_read():
    assert parsed("step", HistoryStep).to.version == 2
    assert parsed("rejection", Rejection).by == "eve"
    assert parsed("registered", RegisteredCodec).uri == "models:/nano/2"


def test_an_evaluate_job_is_read():
    job = read_any_job(json.dumps(DOCUMENTS["evaluate-job"]))
    assert isinstance(job, EvaluateJob)
    assert GateConfig.model_validate(job.gate).min_files == 4
    assert job.codec.version == "models:/nano/2"


@pytest.mark.parametrize(("name", "model"), [("decision", GateDecision), ("step", HistoryStep)])
def test_later_versions_are_refused(name, model):
    text = json.dumps(DOCUMENTS[name] | {"format_version": 2}).encode()
    with pytest.raises(ConfigError, match="format_version"):
        parse_document(text, name, model)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", "x" * 65, "-dash"])
def test_names_that_make_no_path_are_refused(name):
    with pytest.raises(ConfigError, match="is no name for a registered codec"):
        check_name(name)
