"""What a promotion means for a dataset: nothing, or a plan with files, hours and cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcodec_core.codecs import load_manifest
from hcodec_core.errors import ConfigError
from hcodec_core.promotion.resolving import ResolvedCodec
from hcodec_core.promotion.retokenising import RetokenisePlan, plan_retokenising


def planned(bench, dataset: str, folder: Path) -> RetokenisePlan:
    uri = f"file://{folder}"
    codec = ResolvedCodec(uri, load_manifest(uri).digest)
    return plan_retokenising(bench.config, bench.storage, dataset, codec)


def test_another_encoder_means_all_files_anew(bench, dataset, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    plan = planned(bench, dataset, bench.codecs["two"])
    assert plan.changes_tokens
    assert plan.new_encode_id != plan.old_encode_id
    assert (plan.num_files, plan.num_bytes) == (5, 32_000 * 15)
    assert plan.audio_hours * 3600 == pytest.approx(15.0, rel=0.5)  # guessed from sizes
    assert plan.worker_hours == pytest.approx(plan.audio_hours / 100)
    assert plan.cost == pytest.approx(plan.worker_hours * 3.0)
    assert "All tokens of speech change: 5 files" in plan.sentence
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_another_decoder_means_no_token_changes(bench, dataset):
    plan = planned(bench, dataset, bench.codecs["decoder"])
    assert load_manifest(str(bench.codecs["decoder"])).digest != plan.old_encode_id
    assert not plan.changes_tokens
    assert (plan.num_files, plan.cost) == (0, 0.0)
    assert plan.sentence.startswith("No token changes")


def test_a_dataset_that_is_not_there_is_refused(bench, dataset):
    with pytest.raises(ConfigError, match="There is no dataset 'music'"):
        planned(bench, "music", bench.codecs["two"])
