"""A configuration with a real MLflow registry on sqlite, two real codecs, evaluations by hand."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from hcodec_core.codecs import load_manifest
from hcodec_core.config import Config, GateConfig, MetricMargin, RegistryConfig
from hcodec_core.dataset.commit import commit_plan
from hcodec_core.dataset.inventory import take_inventory
from hcodec_core.dataset.plan import PlanRequest, make_plan
from hcodec_core.dataset.versions import publish
from hcodec_core.evaluation.documents import (
    EvaluationResult,
    FileScores,
    HeldOut,
    SideFacts,
    SideSummary,
)
from hcodec_core.evaluation.verdicts import judge
from hcodec_core.models.random_weights import write_random_codec
from hcodec_core.promotion.codec_versions import CodecVersions
from hcodec_core.promotion.documents import RegisteredCodec
from hcodec_core.promotion.resolving import RegisterRequest, register_codec
from hcodec_core.storage import Storage, join_uri, open_storage
from hcodec_core.tokens import EncodeSettings
from tests.dataset.factories import by_shard, files_of, finish_shard, job_of

NAME = "hcodec-tiny"
SETTINGS = EncodeSettings(compute_class="cpu-test")
GATE = GateConfig(
    min_files=4, num_resamples=300, metrics={"stoi": MetricMargin(margin=0.01, is_required=True)}
)


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory) -> Path:
    """An MLflow database with its tables: making them takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    config = make_config(path.parent, f"sqlite:///{path}")
    assert CodecVersions(config).names() == []
    return path


@pytest.fixture(scope="session")
def codecs(tmp_path_factory) -> dict[str, Path]:
    """Three codecs; ``decoder`` differs from ``one`` in its decoder only."""
    from hcodec_core.models.loading import CodecCard, save_codec
    from hcodec_core.models.random_weights import random_codec

    folder = tmp_path_factory.mktemp("codecs")
    for seed, name in enumerate(("one", "two", "three")):
        write_random_codec("hcodec-tiny", folder / name, seed=seed)
    changed = random_codec("hcodec-tiny", 0)
    decoder = next(key for key in changed.state_dict() if changed.part_of(key) == "decoder")
    changed.state_dict()[decoder].add_(0.5)
    save_codec(changed, CodecCard("hcodec-tiny", False, "Apache-2.0"), folder / "decoder")
    return {path.name: path for path in folder.iterdir()}


def make_config(folder: Path, registry_uri: str | None = None) -> Config:
    return Config.model_validate(
        {
            "access": {
                "source_prefixes": [f"file://{folder}/"],
                "destination_prefixes": [f"file://{folder}/"],
            },
            "catalog": {
                "uri": f"sqlite:///{folder}/catalog.db",
                "warehouse_uri": f"file://{folder}/warehouse",
            },
            "work": {"work_uri": f"file://{folder}/work"},
            "registry": RegistryConfig(uri=registry_uri).model_dump(),
            "gate": GATE.model_dump(),
            "cost": {"worker_hour": 3.0, "default_realtime_factor": 100.0},
        }
    )


@dataclass
class Bench:
    """Everything a test needs, with short ways to do what the DAG does."""

    config: Config
    storage: Storage
    codecs: dict[str, Path]

    def register(self, codec: str, **facts: str) -> RegisteredCodec:
        request = RegisterRequest(name=NAME, codec_uri=str(self.codecs[codec]), **facts)
        return register_codec(self.config, self.storage, request)

    def evaluation(self, codec: str, against: str | None, gain: float = 0.05, num: int = 8) -> str:
        """URI of a stored evaluation in which ``codec`` has ``gain`` more STOI."""
        result = make_result(self.codecs, codec, against, gain, num)
        uri = join_uri(self.config.work.work_uri, "evaluations", result.evaluation_id, "e.json")
        self.storage.write(uri, result.model_dump_json().encode())
        return uri

    @property
    def versions(self) -> CodecVersions:
        return CodecVersions(self.config)

    @property
    def champion(self) -> int | None:
        return self.versions.aliases(NAME).get("champion")


@pytest.fixture
def bench(tmp_path, empty_registry, codecs) -> Bench:
    shutil.copy(empty_registry, tmp_path / "mlflow.db")
    config = make_config(tmp_path)
    return Bench(config, open_storage(config.storage), codecs)


def make_result(
    codecs: dict[str, Path], codec: str, against: str | None, gain: float, num: int
) -> EvaluationResult:
    sides = {"codec": _side(codecs[codec])}
    if against is not None:
        sides["against"] = _side(codecs[against])
    files = [
        FileScores(
            name=f"{index}.wav",
            seconds=1.0,
            scores={label: {"stoi": 0.8 + (gain if label == "codec" else 0.0)} for label in sides},
        )
        for index in range(num)
    ]
    uri = "file:///held-out"
    held_out = HeldOut(
        uri=uri, digest="d", num_files=num, num_usable=num, audio_seconds=num, max_seconds=30
    )
    return EvaluationResult(
        evaluation_id=f"{codec}-{against}-{gain}-{num}",
        held_out=held_out,
        sides=sides,
        files=files,
        not_run={},
        notes=[],
        gate=GATE,
        verdict=judge(files, sides, {}, GATE),
    )


def _side(folder: Path) -> SideSummary:
    manifest = load_manifest(str(folder))
    facts = SideFacts(
        name=manifest.name, uri=str(folder), digest=manifest.digest, sample_rate=16_000
    )
    return SideSummary(facts=facts, num_files=8, num_failed=0, audio_seconds=8.0, metrics={})


@pytest.fixture
def dataset(bench, tmp_path) -> str:
    """A published dataset of five files, made with codec ``one``."""
    (tmp_path / "audio").mkdir()
    for index in range(5):
        (tmp_path / "audio" / f"{index}.wav").write_bytes(bytes(32_000 * (index + 1)))
    inventory_uri = join_uri(bench.config.work.work_uri, "inventories", "speech", "1")
    take_inventory(bench.config, bench.storage, [f"file://{tmp_path}/audio"], inventory_uri)
    request = PlanRequest(
        dataset="speech",
        inventory_uri=inventory_uri,
        codec_uri=str(bench.codecs["one"]),
        manifest=load_manifest(str(bench.codecs["one"])),
        settings=SETTINGS,
    )
    plan = make_plan(bench.config, bench.storage, request)
    job = job_of(bench.storage, plan.plan_uri)
    for files in by_shard(files_of(bench.storage, plan.plan_uri)):
        finish_shard(bench.storage, job, files)
    info = commit_plan(bench.config, bench.storage, plan.plan_uri)
    publish(bench.config, bench.storage, plan.plan_uri, info.snapshot_id, "")
    return "speech"
