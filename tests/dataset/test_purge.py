from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hcodec_core.dataset.card import card_files, make_card, read_card, write_card
from hcodec_core.dataset.checks import validate_plan
from hcodec_core.dataset.compaction import compact
from hcodec_core.dataset.ledger import version_entries
from hcodec_core.dataset.lock import DatasetLock, LockSeeker, lock_holder, lock_uri
from hcodec_core.dataset.maintenance import referenced_uris
from hcodec_core.dataset.mentions import Targets, avro_blocks, count_in_document, redact_document
from hcodec_core.dataset.purge import (
    PurgeRecord,
    PurgeRequest,
    purge,
    readmit_objects,
    survey_purge,
)
from hcodec_core.dataset.reader import open_dataset
from hcodec_core.dataset.schema import audio_id_of
from hcodec_core.dataset.table import load_table, refs_of
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.dataset.versions import drop_branch, list_versions, rollback, version_record
from hcodec_core.errors import (
    CommitConflictError,
    ConfigError,
    PlanIncompleteError,
    StorageError,
    ValidationFailedError,
)
from hcodec_core.jobs import Outcome
from hcodec_core.storage import Storage, join_uri
from tests.dataset.factories import World, by_shard, finish_shard, job_of

GONE = "0/speaker b/clip.wav"
NAMES = ("0/z.wav", GONE, GONE + ".bak", "1/c.wav", "1/d & e.wav", "1/f.wav")


def request(world: World, *names: str, **changes: Any) -> PurgeRequest:
    uris = tuple(world.uri(name) for name in names)
    return PurgeRequest(dataset="demo", uris=uris, **changes)


def run(world: World, *names: str, **changes: Any) -> PurgeRecord:
    return purge(world.config, world.storage, request(world, *names, **changes))


def fill(world: World) -> None:
    """Three versions: rows added, one changed and one removed, small files compacted."""
    world.put(*NAMES)
    world.version(num_shards=2)
    world.put("1/c.wav", data="new")
    world.put("2/bad.wav")
    world.version(lambda uri: Outcome.QUARANTINED if "bad" in uri else Outcome.TOKENS)
    world.put("2/g.wav")
    plan = world.plan()
    world.work(plan)
    info = world.commit(plan)
    work_path = world.local_path / "work"
    work_path.mkdir(exist_ok=True)
    validate_plan(world.config, world.storage, info, work_path)
    world.publish(plan, info)
    compact(world.storage, world.layout, dry_run=False)


def rows(world: World, version: str = "latest") -> dict[str, dict[str, Any]]:
    found = open_dataset(world.config, "demo", version).to_arrow(None).to_pylist()
    assert len({row["uri"] for row in found}) == len(found)
    return {row["uri"]: row for row in found}


def everything(world: World) -> Iterator[tuple[str, bytes]]:
    """Every object that is not a source; a plain look at bytes, by none of the code under test."""
    for path in (world.local_path / "root" / "out").rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()


def mentions(world: World, name: str, etags: set[str]) -> list[str]:
    uri = world.uri(name)
    bare = uri.removeprefix("file://").encode()
    ids = {audio_id_of(uri, etag).encode() for etag in etags}
    found = []
    for path, data in everything(world):
        if path.endswith(".avro"):
            data = b"".join(avro_blocks(data)).replace(bare + b".bak", b"")
            data = data.replace(bare, bare + b" ")
        if path.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            data += json.dumps(table.to_pylist(), default=str).encode()
        needles = [bare + end for end in (b'"', b"'", b" ", b"<", b"\x00", b"&")]
        needles += [(b"file://" + bare).hex().encode() + b'"', *ids, *(i[:16] for i in ids)]
        if any(needle in data for needle in needles):
            found.append(path)
    return found


def etags(world: World, name: str) -> set[str]:
    info = world.storage.head(world.uri(name))
    assert info is not None
    return {info.etag}


def test_an_object_leaves_every_version_and_file(local_world: World) -> None:
    fill(local_world)
    before = {version: rows(local_world, version) for version in ("v1", "v2", "v3", "latest")}
    tags = etags(local_world, GONE)
    assert len(mentions(local_world, GONE, tags)) > 9
    planned = survey_purge(local_world.config, local_world.storage, request(local_world, GONE))
    assert len(mentions(local_world, GONE, tags)) > 9
    record = run(local_world, GONE)
    assert mentions(local_world, GONE, tags) == []
    assert record.proof.num_mentions == 0
    assert record.proof.num_parquet > 5
    assert record.proof.num_avro > 3
    assert record.num_rows == planned.num_rows == 2  # v1's file and the compacted one
    assert list(record.versions.values()) == [{"v1": 1, "v2": 1, "v3": 1}]
    for version, known in before.items():
        known.pop(local_world.uri(GONE))
        assert rows(local_world, version) == known
    assert local_world.uri(GONE + ".bak") in rows(local_world)


def test_versions_keep_their_names_and_tell_of_the_purge(local_world: World) -> None:
    fill(local_world)
    main_before = refs_of(load_table(local_world.layout))["main"].snapshot_id
    run(local_world, GONE)
    versions = list_versions(local_world.layout)
    assert [(v.version, v.num_rows, v.is_current) for v in versions] == [
        ("v1", 5, False),
        ("v2", 5, False),
        ("v3", 6, True),
    ]
    table = load_table(local_world.layout)
    assert table.snapshot_by_id(main_before) is None
    for version, entry in version_entries(table).items():
        record = version_record(local_world.storage, local_world.layout, version)
        assert record.snapshot_id == entry.snapshot_id == refs_of(table)[version].snapshot_id
        assert [note.num_rows for note in record.purges] == [1]
        assert record.counts.num_total_rows == len(rows(local_world, version))
    assert not any("purge" in name for name in refs_of(table))
    lock = lock_uri(local_world.config, "demo")
    assert lock_holder(local_world.storage, lock, "demo") is None
    rollback(local_world.layout, "v1")
    assert len(rows(local_world)) == 5


def test_cards_are_made_again(local_world: World) -> None:
    fill(local_world)
    for version in ("v1", "v2", "v3"):
        write_card(local_world.storage, local_world.layout, version)
    run(local_world, GONE)
    for version in ("v1", "v2", "v3"):
        card = read_card(local_world.storage, local_world.layout, version)
        assert card == make_card(local_world.storage, local_world.layout, version)
        assert card is not None
        assert card.num_files == len(rows(local_world, version))
        record = version_record(local_world.storage, local_world.layout, version)
        assert [(p.purged_at, p.num_rows) for p in card.purges] == [
            (note.purged_at, 1) for note in record.purges
        ]
        assert len(card.purges) == 1
        assert ": 1 row of this version" in card_files(card)["index.html"].decode()


def test_work_goes_on_after_a_purge(local_world: World) -> None:
    """No plan brings the object back; a new content of it neither; what was published holds."""
    fill(local_world)
    run(local_world, GONE)
    plan = local_world.plan()
    assert plan.is_empty
    assert plan.num_excluded_files == 1
    local_world.put(GONE, data="another content")
    assert local_world.plan().is_empty
    local_world.put("3/new.wav")
    assert local_world.version().version == "v4"
    assert len(rows(local_world)) == 7
    assert readmit_objects(local_world.config, local_world.storage, request(local_world, GONE)) == 1
    assert local_world.version().version == "v5"
    assert local_world.uri(GONE) in rows(local_world)
    assert local_world.uri(GONE) not in rows(local_world, "v4")


def test_a_published_plan_is_validated_again_after_a_purge(local_world: World) -> None:
    local_world.put(*NAMES)
    plan = local_world.plan(num_shards=2)
    local_world.work(plan)
    local_world.publish(plan, local_world.commit(plan))
    run(local_world, GONE)
    work_path = local_world.local_path / "work"
    work_path.mkdir()
    result = validate_plan(
        local_world.config, local_world.storage, local_world.commit(plan), work_path
    )
    assert result.passed, result.failed("error")
    assert result.summary.num_files == 5


def test_a_folder_is_erased_by_its_prefix(local_world: World) -> None:
    fill(local_world)
    record = run(local_world, "0/", is_prefix=True)
    assert {uri.removeprefix(local_world.source_uri)[:2] for uri in rows(local_world)} == {
        "1/",
        "2/",
    }
    assert record.versions[local_world.layout.table_name] == {"v1": 3, "v2": 3, "v3": 3}
    local_world.put("0/never seen before.wav")
    assert local_world.plan().is_empty


def test_quarantined_objects_are_erased_too(local_world: World) -> None:
    fill(local_world)
    tags = etags(local_world, "2/bad.wav")
    assert mentions(local_world, "2/bad.wav", tags)
    run(local_world, "2/bad.wav")
    assert mentions(local_world, "2/bad.wav", tags) == []
    assert local_world.plan().is_empty


def test_rejected_rows_and_foreign_branches_are_erased(local_world: World) -> None:
    local_world.put("0/z.wav")
    local_world.version()
    local_world.put(*NAMES)
    plan = local_world.plan()
    local_world.work(plan)
    local_world.commit(plan)
    drop_branch(local_world.config, local_world.storage, plan.plan_uri, f"{local_world.uri(GONE)}")
    table = load_table(local_world.layout)
    table.manage_snapshots().create_branch(
        table.refs()[f"rejected_{plan.plan_id}_1"].snapshot_id, "somebody"
    ).commit()
    tags = etags(local_world, GONE)
    run(local_world, GONE)
    assert mentions(local_world, GONE, tags) == []
    table = load_table(local_world.layout)
    for name in ("somebody", f"rejected_{plan.plan_id}_1"):
        assert len(table.scan(snapshot_id=table.refs()[name].snapshot_id).to_arrow()) == 5
    info = local_world.commit(plan)  # what was rejected may be committed again, without the row
    assert local_world.publish(plan, info).version == "v2"
    assert len(rows(local_world)) == 5


def test_an_unfinished_plan_is_refused_or_dropped(local_world: World) -> None:
    local_world.put("0/y.wav", "0/x.wav")
    local_world.version()
    local_world.put(*NAMES)
    plan = local_world.plan(num_shards=2)
    finish_shard(
        local_world.storage,
        job_of(local_world.storage, plan.plan_uri),
        by_shard(local_world.files(plan))[0],
    )
    before = {path for path, _ in everything(local_world)}
    with pytest.raises(PlanIncompleteError, match=r"plans/.*--drop-open-plans"):
        run(local_world, GONE)
    assert {p for p, _ in everything(local_world)} - before <= {
        path for path, _ in everything(local_world) if "exclusions" in path or "locks" in path
    }
    assert run(local_world, "0/y.wav").num_rows == 1  # a plan that does not name it goes on
    record = run(local_world, GONE, drop_open_plans=True)
    assert record.proof.num_mentions == 0
    assert list_folder(local_world.storage, plan.plan_uri) == []
    local_world.version()
    assert len(rows(local_world)) == 6


def test_a_finished_plan_is_published_without_the_object(local_world: World) -> None:
    """Committed or not, what its workers did for the others is not lost."""
    local_world.put("0/z.wav")
    local_world.version()
    local_world.put(*NAMES)
    plan = local_world.plan(num_shards=2)
    local_world.work(plan)
    local_world.commit(plan)
    tags = etags(local_world, GONE)
    run(local_world, GONE)
    assert mentions(local_world, GONE, tags) == []
    local_world.publish(plan, local_world.commit(plan))
    assert len(rows(local_world)) == 5


def test_a_purge_waits_for_other_runs(local_world: World) -> None:
    fill(local_world)
    lock = LockSeeker(local_world.config, local_world.storage, "demo", "dag/run 7").acquire()
    assert isinstance(lock, DatasetLock)
    with pytest.raises(CommitConflictError, match="dag/run 7"):
        run(local_world, GONE)


def test_a_purge_of_nothing_known_is_refused_or_empty(local_world: World) -> None:
    fill(local_world)
    with pytest.raises(ConfigError, match="datasets: demo"):
        purge(
            local_world.config,
            local_world.storage,
            PurgeRequest(dataset="nope", uris=(local_world.uri(GONE),)),
        )
    before = rows(local_world)
    record = run(local_world, "never/heard of.wav")
    assert (record.num_rows, record.num_files, record.proof.num_mentions) == (0, 0, 0)
    assert rows(local_world) == before
    for uris in ((), ("s3://bucket/",), ("not a uri",)):
        with pytest.raises(ConfigError):
            purge(local_world.config, local_world.storage, PurgeRequest(dataset="demo", uris=uris))


def test_the_proof_can_fail(local_world: World) -> None:
    fill(local_world)
    stray = join_uri(local_world.layout.work_uri, "notes.bin")
    record = run(local_world, GONE)
    local_world.storage.write(
        join_uri(local_world.layout.table_uri, "metadata", "left.txt"),
        f"see {local_world.uri(GONE)}: broken".encode(),
    )
    with pytest.raises(ValidationFailedError, match=r"still named 1 times.*left\.txt"):
        run(local_world, GONE)
    assert record.proof.num_mentions == 0
    assert local_world.storage.head(stray) is None


def test_erased_names_are_nowhere_in_what_the_purge_leaves(local_world: World) -> None:
    fill(local_world)
    run(local_world, GONE)
    left = [data for path, data in everything(local_world) if "purges/" in path or "excl" in path]
    assert len(left) == 2
    assert not any(b"speaker b" in data for data in left)


class KilledError(BaseException):
    """Not an ``Exception``: nothing on the way may swallow it."""


class MortalStorage:
    """A storage whose process dies at the ``deadline``-th change, before or after it."""

    def __init__(self, storage: Storage, deadline: int, *, is_after: bool) -> None:
        self._storage = storage
        self._deadline = deadline
        self._is_after = is_after
        self.num_changes = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._storage, name)
        if name not in {"write", "create", "delete", "upload"}:
            return call
        return lambda *values: self._change(call, *values)

    def _change(self, call: Callable[..., Any], *values: Any) -> Any:
        with self._lock:
            self.num_changes += 1
            is_last = self.num_changes == self._deadline
        if is_last and not self._is_after:
            raise KilledError
        result = call(*values)
        if is_last:
            raise KilledError
        return result


def check_killed(world: World, deadline: int, *, is_after: bool) -> bool:
    """Kill a purge at one change and run it again; false when it ends before that change."""
    fill(world)
    tags = etags(world, GONE)
    wanted = {version: rows(world, version) for version in ("v1", "v2", "v3", "latest")}
    mortal: Any = MortalStorage(world.storage, deadline, is_after=is_after)
    try:
        purge(world.config, mortal, request(world, GONE))
    except KilledError:
        pass
    else:
        return False
    record = run(world, GONE)
    assert mentions(world, GONE, tags) == []
    assert record.proof.num_mentions == 0
    for version, known in wanted.items():
        known.pop(world.uri(GONE))
        assert rows(world, version) == known
    assert world.plan().is_empty
    assert len(list_versions(world.layout)) == 3
    listed = {info.uri for info in list_folder(world.storage, world.layout.data_uri)}
    loose = listed - referenced_uris(load_table(world.layout))
    assert all("/purged/" in uri for uri in loose)  # unused new files go with the next sweep
    records = [
        version_record(world.storage, world.layout, f"v{number}").purges for number in (1, 2, 3)
    ]
    assert [[note.num_rows for note in notes] for notes in records] == [[1], [1], [1]]
    return True


@pytest.mark.parametrize(("deadline", "is_after"), [(4, True), (5, True), (7, False), (12, True)])
def test_a_killed_purge_goes_on(local_world: World, deadline: int, is_after: bool) -> None:
    assert check_killed(local_world, deadline, is_after=is_after)


@pytest.mark.parametrize("step", ["write_detached", "commit", "_delete"])
def test_a_purge_killed_around_a_table_change_goes_on(
    local_world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hcodec_core.dataset import purge_table

    owner: Any = {
        "write_detached": purge_table,
        "commit": purge_table.RefChange,
        "_delete": purge_table.TablePurge,
    }[step]
    fill(local_world)
    tags = etags(local_world, GONE)
    wanted = rows(local_world, "v1")
    wanted.pop(local_world.uri(GONE))
    original = getattr(owner, step)

    def after(*values: Any) -> None:
        original(*values)
        raise KilledError

    def before(*values: Any) -> None:
        raise KilledError

    for fault in (before, after):
        monkeypatch.setattr(owner, step, fault)
        with pytest.raises(KilledError):
            run(local_world, GONE)
        monkeypatch.setattr(owner, step, original)
    run(local_world, GONE)
    assert mentions(local_world, GONE, tags) == []
    assert rows(local_world, "v1") == wanted
    notes = version_record(local_world.storage, local_world.layout, "v1").purges
    assert [note.num_rows for note in notes] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("is_after", [False, True])
def test_a_purge_killed_at_any_change_goes_on(tmp_path: Path, is_after: bool) -> None:
    from hcodec_core.config import StorageConfig
    from hcodec_core.storage import file_uri, open_storage

    for deadline in range(1, 200):
        root = tmp_path / str(deadline) / "root"
        (root / "audio").mkdir(parents=True)
        world = World(file_uri(root), root.parent, open_storage(StorageConfig()))
        if not check_killed(world, deadline, is_after=is_after):
            assert deadline > 20
            return
    pytest.fail("the purge never ends")


def test_a_purge_of_a_bucket(s3_world: World) -> None:
    s3_world.put(*NAMES)
    s3_world.version(num_shards=2)
    s3_world.put("new.wav")
    s3_world.version()
    record = run(s3_world, GONE)
    assert record.proof.num_mentions == 0
    assert (len(rows(s3_world, "v1")), len(rows(s3_world, "v2"))) == (5, 6)


URI = "s3://bucket/0/speaker b/clip ü&.wav"


@pytest.mark.parametrize(
    "text",
    [
        f"cannot read {URI}: broken",
        f"<td>{URI.replace('&', '&amp;')}</td>",
        json.dumps({"detail": f"{URI} is cut off"}),
        "GET /bucket/0/speaker%20b/clip%20%C3%BC%26.wav HTTP/1.1",
        f'{{"2": "{URI.encode().hex()}"}}',
        f"row {audio_id_of(URI, 'etag')}",
    ],
)
def test_names_are_found_however_they_are_written(text: str) -> None:
    targets = Targets((URI,)).with_keys([(URI, "etag"), ("s3://bucket/other", "etag")])
    for name in ("page.html", "a.json", "b.log"):
        assert count_in_document(name, text.encode(), targets) == 1
        cleaned = redact_document(name, text.encode(), targets)
        assert count_in_document(name, cleaned, targets) == 0
        assert b"speaker" not in cleaned


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a.wav.bak",
        "s3://bucket/a.wav2",
        "s3://other-bucket/a.wav",
        '{"uri": "s3://bucket/a.wav and more"}',
        "0" * 32,
    ],
)
def test_other_names_are_left_alone(text: str) -> None:
    targets = Targets(("s3://bucket/a.wav",)).with_keys([("s3://bucket/a.wav", "etag")])
    name = "x.json" if text.startswith("{") else "x.log"
    assert count_in_document(name, text.encode(), targets) == 0


def test_a_damaged_avro_file_is_no_proof() -> None:
    with pytest.raises(StorageError, match="damaged"):
        list(avro_blocks(b"Obj\x01\x02\x10av"))
