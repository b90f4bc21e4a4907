"""Rates that workers reached, kept for the estimates of later plans."""

from __future__ import annotations

import pytest

from hcodec_core.config import CostConfig
from hcodec_core.dataset.plan import make_plan
from hcodec_core.dataset.rates import remember_rate
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import JOB_FILE, FormatUse, StepUse, TokenizeJob, WorkUse, read_job
from hcodec_core.storage import join_uri
from tests.dataset.factories import World


def _work(audio_seconds: float, busy: float, lanes: float) -> WorkUse:
    return WorkUse(
        steps={
            "network": StepUse(busy_seconds=4.0, lane_seconds=8 * lanes),
            "encode": StepUse(busy_seconds=busy, lane_seconds=lanes),
        },
        formats={
            "flac": FormatUse(num_bytes=3_200_000, audio_seconds=audio_seconds, decode_seconds=0.5)
        },
        audio_seconds=audio_seconds,
    )


def _job(world: World) -> TokenizeJob:
    world.put("a.wav")
    return read_job(world.storage.read(join_uri(world.plan().plan_uri, JOB_FILE)))


def test_the_line_names_the_bottleneck_and_what_the_encoder_needs() -> None:
    assert _work(100.0, 9.0, 10.0).for_people == (
        "bottleneck: encode 90 %; network 5 %; an encoder of 11 x real time needs "
        "0.056 cores and 0.36 MB/s for flac"
    )


def test_work_of_several_shards_adds_up() -> None:
    total = WorkUse.total([_work(100.0, 9.0, 10.0), _work(300.0, 1.0, 10.0)])
    assert (total.audio_seconds, total.encode_rate) == (400.0, 40.0)
    assert total.steps["encode"].share == 0.5
    assert total.formats["flac"].num_bytes == 6_400_000
    assert WorkUse().for_people == "bottleneck: not known, no shard was finished"


def test_a_plan_is_estimated_with_the_measured_rate(local_world: World) -> None:
    job = _job(local_world)
    cost = CostConfig(worker_hour=2.0, realtime_factors={job.manifest.name: 0.5})
    config = local_world.config.model_copy(update={"cost": cost})
    request = local_world.request()
    before = make_plan(config, local_world.storage, request, dry_run=True)
    assert (before.realtime_factor, before.rate_source) == (0.5, "configured")

    remember_rate(config, local_world.storage, job, _work(7200.0, 60.0, 90.0))
    plan = make_plan(config, local_world.storage, request, dry_run=True)
    assert plan.realtime_factor == pytest.approx(80.0)
    assert plan.worker_hours == pytest.approx(plan.audio_hours / 80)
    assert plan.rate_text == f"80 x real time per worker, measured by plan {job.plan_id}"

    other = request.model_copy(
        update={"settings": request.settings.model_copy(update={"compute_class": "cpu-other"})}
    )
    assert make_plan(config, local_world.storage, other, dry_run=True).rate_source == "configured"


def test_too_little_work_says_nothing_of_the_rate(local_world: World) -> None:
    job = _job(local_world)
    remember_rate(local_world.config, local_world.storage, job, _work(30.0, 9.0, 10.0))
    plan = make_plan(local_world.config, local_world.storage, local_world.request(), dry_run=True)
    assert plan.rate_source == "default, not measured"


def test_a_damaged_rate_is_named(local_world: World) -> None:
    job = _job(local_world)
    remember_rate(local_world.config, local_world.storage, job, _work(7200.0, 60.0, 90.0))
    name = f"{job.settings.compute_class}-{job.settings.mode}.json"
    uri = join_uri(local_world.config.work.work_uri, "rates", job.manifest.name, name)
    local_world.storage.write(uri, b"{}")
    with pytest.raises(ConfigError, match="is no measured rate"):
        make_plan(local_world.config, local_world.storage, local_world.request(), dry_run=True)
