"""Documents of an earlier build are still read, and a plan in flight goes on over an upgrade.

The documents lie in ``golden_formats``; its NOTES.md says where they come from.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import BaseModel, ValidationError

from hcodec_core.codecs import load_manifest
from hcodec_core.config import StorageConfig
from hcodec_core.dataset.checks import ValidationResult, validate_plan
from hcodec_core.dataset.inventory import INVENTORY_SCHEMA, InventoryInfo
from hcodec_core.dataset.layout import DatasetLayout
from hcodec_core.dataset.leases import Claim, Heartbeat
from hcodec_core.dataset.ledger import CompactionEntry, PlanEntry, RollbackEntry, VersionEntry
from hcodec_core.dataset.plan import FILES_SCHEMA
from hcodec_core.dataset.plan_documents import Plan
from hcodec_core.dataset.quarantine import QUARANTINE_SCHEMA
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.results import result_uri
from hcodec_core.dataset.tabular import list_folder, read_table, write_table
from hcodec_core.dataset.versions import VersionRecord, publish
from hcodec_core.inference.engine import compute_class
from hcodec_core.inference.worker import WorkerOptions, run_worker
from hcodec_core.jobs import JOB_FILE, ShardResult, TokenizeJob, WorkerProgress, read_job
from hcodec_core.storage import Storage, file_uri, join_uri, open_storage
from hcodec_core.tokens import CodecSpec
from tests.dataset.factories import World
from tests.inference.plans import SETTINGS, wav

GOLDEN = Path(__file__).parent / "golden_formats"
MTIME = 1_700_000_000
DOCUMENTS: dict[str, type[BaseModel]] = {
    "job.json": TokenizeJob,
    "plan.json": Plan,
    "result-0.json": ShardResult,
    "result-1.json": ShardResult,
    "worker.json": WorkerProgress,
    "lease.json": Claim,
    "heartbeat.json": Heartbeat,
    "version.json": VersionRecord,
    "inventory.json": InventoryInfo,
    "validation.json": ValidationResult,
}
TABLES = {
    "files.parquet": FILES_SCHEMA,
    "quarantine.parquet": QUARANTINE_SCHEMA,
    "inventory-part.parquet": INVENTORY_SCHEMA,
}


def text_of(name: str, root: str = "/root", encode_id: str = "0" * 32) -> str:
    text = (GOLDEN / name).read_text()
    for hole, value in (
        ("{root}", root),
        ("{encode_id}", encode_id),
        ("{compute_class}", compute_class("cpu")),
    ):
        text = text.replace(hole, value)
    return text


@pytest.mark.parametrize(("name", "kind"), DOCUMENTS.items())
def test_documents_of_version_1_are_read(name: str, kind: type[BaseModel]) -> None:
    document = kind.model_validate_json(text_of(name))
    assert kind.model_validate_json(document.model_dump_json()) == document
    later = text_of(name).replace('"format_version": 1', '"format_version": 2')
    if later != text_of(name):
        with pytest.raises(ValidationError):  # later formats are refused, never guessed at
            kind.model_validate_json(later)


@pytest.mark.parametrize(("name", "schema"), TABLES.items())
def test_tables_of_version_1_are_read(name: str, schema: pa.Schema) -> None:
    storage = open_storage(StorageConfig())
    rows = read_table(storage, file_uri(GOLDEN / name)).cast(schema)
    assert len(rows) == (1 if name == "quarantine.parquet" else 5)


def test_the_ledger_of_version_1_is_read() -> None:
    import json

    properties = json.loads(text_of("table_properties.json"))
    kinds: dict[str, type[BaseModel]] = {
        "hcodec.plan.": PlanEntry,
        "hcodec.version.": VersionEntry,
        "hcodec.rollback.": RollbackEntry,
        "hcodec.compaction.": CompactionEntry,
    }
    found = [
        kind.model_validate_json(text)
        for name, text in properties.items()
        for prefix, kind in kinds.items()
        if name.startswith(prefix)
    ]
    assert {type(entry) for entry in found} == {PlanEntry, VersionEntry}


class Upgrade:
    """The plan of an earlier build, put back into a folder as that build left it."""

    def __init__(self, folder: Path) -> None:
        (folder / "root" / "audio").mkdir(parents=True)
        self.root = folder / "root"
        self.storage: Storage = open_storage(StorageConfig())
        manifest = load_manifest("hcodec-nano")
        self.world = World(file_uri(self.root), folder, self.storage, manifest=manifest)
        self.encode_id = CodecSpec(manifest, SETTINGS).encode_id
        for index in range(4):
            content = wav(0.4 + 0.1 * index, seed=index)
            (self.root / "audio" / f"clip {index}.wav").write_bytes(content)
        (self.root / "audio" / "notes.wav").write_bytes(b"this is no audio at all " * 20)
        for path in (self.root / "audio").iterdir():
            os.utime(path, (MTIME, MTIME))
        plan = Plan.model_validate_json(self.text("plan.json"))
        self.plan_uri = plan.plan_uri
        for name in ("files.parquet", "tombstones.parquet"):
            self._put_table(name)
        for name in ("plan.json", JOB_FILE):
            self.storage.write(join_uri(self.plan_uri, name), self.text(name).encode())

    def text(self, name: str) -> str:
        # The folder of a dataset bears the first digits of its encode id.
        old = Plan.model_validate_json(text_of("plan.json")).plan_uri.split("/")[-3]
        text = text_of(name, str(self.root), self.encode_id)
        return text.replace(f"/{old}/", f"/{self.encode_id[:12]}/").replace(
            f"__{old}/", f"__{self.encode_id[:12]}/"
        )

    def _put_table(self, name: str) -> None:
        rows = read_table(self.storage, file_uri(GOLDEN / name))
        names = pc.replace_substring_regex(
            rows["uri"], r".*/audio/", self.world.source_uri.replace("\\", "\\\\")
        )
        index = rows.schema.get_field_index("uri")
        rows = rows.set_column(index, rows.schema.field(index), names.cast(pa.string()))
        write_table(self.storage, join_uri(self.plan_uri, name), rows)

    def work(self, folder: Path) -> None:
        folder.mkdir()
        options = WorkerOptions(scratch_path=folder, heartbeat_seconds=0.3)
        job_uri = join_uri(self.plan_uri, JOB_FILE)
        assert run_worker(job_uri, self.storage, options, threading.Event()) == 0

    def publish(self) -> VersionRecord:
        from hcodec_core.dataset.commit import commit_plan

        info = commit_plan(self.world.config, self.storage, self.plan_uri)
        work_path = self.world.local_path / "work"
        work_path.mkdir()
        assert validate_plan(self.world.config, self.storage, info, work_path).passed
        return publish(self.world.config, self.storage, self.plan_uri, info.snapshot_id)


@pytest.fixture
def upgrade(tmp_path: Path) -> Upgrade:
    return Upgrade(tmp_path)


def test_a_plan_made_before_an_upgrade_is_worked_and_published(
    upgrade: Upgrade, tmp_path: Path
) -> None:
    upgrade.work(tmp_path / "scratch")
    record = upgrade.publish()
    assert (record.version, record.counts.num_rows) == ("v1", 4)
    assert len(list(open_dataset(upgrade.world.config, "demo"))) == 4
    layout = DatasetLayout(upgrade.world.config, "demo", upgrade.encode_id)
    assert record.quarantine_uri.startswith(layout.quarantine_uri)


def test_results_written_before_an_upgrade_are_committed(upgrade: Upgrade, tmp_path: Path) -> None:
    """One shard was done by the old build, the other is done by this one."""
    upgrade.work(tmp_path / "scratch")
    job = read_job(upgrade.storage.read(join_uri(upgrade.plan_uri, JOB_FILE)))
    old = ShardResult.model_validate_json(upgrade.text("result-0.json"))
    new_uri = result_uri(upgrade.plan_uri, old.shard_id)
    new = ShardResult.model_validate_json(upgrade.storage.read(new_uri))
    assert old.data_file is not None
    assert new.data_file is not None
    # The old build's data file itself is not kept here: this build's stands in its place.
    path = Path(old.data_file.uri.removeprefix("file://"))
    path.write_bytes(upgrade.storage.read(new.data_file.uri))
    info = upgrade.storage.head(old.data_file.uri)
    assert info is not None
    there = {"size": info.size, "etag": info.etag}
    file = old.data_file.model_copy(update=there)
    text = old.model_copy(update={"data_file": file}).model_dump_json()
    upgrade.storage.write(new_uri, text.encode())
    assert (old.num_tokens, old.plan_id) == (new.num_tokens, job.plan_id)
    assert upgrade.publish().counts.num_rows == 4
    assert len(list_folder(upgrade.storage, join_uri(upgrade.plan_uri, "results"))) == 2
