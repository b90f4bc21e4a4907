"""The faults: what happens, where, and what is expected to put it right.

Each takes a fresh bed and makes one fault happen; ``harness`` then lets the dataset recover and
looks at the books. One that could not be made to happen raises ``NotHitError``.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hcodec_core.dataset.commit import commit_plan
from hcodec_core.dataset.compaction import compact
from hcodec_core.dataset.ledger import version_entries
from hcodec_core.dataset.maintenance import expire_snapshots, sweep_orphans
from hcodec_core.dataset.plan import Plan
from hcodec_core.dataset.results import read_result, results_uri
from hcodec_core.dataset.table import load_table
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.dataset.versions import drop_branch, publish, rollback
from hcodec_core.errors import CommitConflictError, HCodecError, PlanIncompleteError
from tests.chaos.bed import LEASE_SECONDS, Bed, Running, new_clip
from tests.chaos.patience import NotHitError
from tests.chaos.proxy import Trap
from tests.chaos.steps import WorkTerms

CLAIM = r"PUT .*/leases/[^/]+/1\.json"
SOURCE = r"GET /[^/]+/audio/"
FILES = r"GET .*/files\.parquet"
DATA = r"PUT .*/data/.*\.parquet"
RESULT = r"PUT .*/results/"
METADATA = r"PUT .*\.metadata\.json"
MANIFEST = r"PUT .*\.avro"
RECORD = r"PUT .*/versions/v"
LISTING = r"GET .*list-type=2.*prefix=audio"
ANY = r"."

# A bed, or a scene in a real Airflow.
Inject = Callable[[Any], None]


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    where: str
    recovered_by: str
    inject: Inject
    is_quick: bool = False
    is_random: bool = False
    in_airflow: bool = False


FAULTS: list[Fault] = []


def fault(name: str, where: str, recovered_by: str, *, quick: bool = False) -> Callable[..., None]:
    def add(inject: Inject) -> None:
        FAULTS.append(Fault(name, where, recovered_by, inject, quick))

    return add


def happened(*traps: Trap) -> None:
    if not any(trap.hits for trap in traps):
        raise NotHitError(f"no request was like {' or '.join(trap.pattern for trap in traps)}")


def expect(is_so: object, what: str) -> None:
    if not is_so:
        raise AssertionError(what)


# Workers that die -------------------------------------------------------------------------------


def worker_dies(
    name: str, where: str, pattern: str, *, after: bool = False, quick: bool = False, skip: int = 0
) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.plan()
        trap = Trap(pattern, "kill", is_after=after, skip=skip)
        bed.worker(plan, trap).killed_by(trap)

    FAULTS.append(Fault(name, where, "another worker, once the lease stood still", inject, quick))


worker_dies("worker killed at start", "reading the plan", FILES)
worker_dies("worker killed before its first claim arrives", "lease PUT", CLAIM)
worker_dies("worker killed after its claim", "lease PUT done", CLAIM, after=True)
worker_dies("worker killed while it downloads", "source GET", SOURCE)
worker_dies("worker killed before write", "Parquet PUT", DATA)
worker_dies("worker killed between Parquet and result", "Parquet PUT done", DATA, after=True,
            quick=True)  # fmt: skip
worker_dies("worker killed before its result arrives", "result PUT", RESULT)
worker_dies("worker killed between result and commit", "result PUT done", RESULT, after=True)
worker_dies("worker killed on its last shard", "third result PUT", RESULT, skip=2)


@fault("three workers killed in turn", "Parquet PUT, each time", "a fourth worker")
def _(bed: Bed) -> None:
    plan = bed.plan(num_shards=1, max_attempts=9)
    for index in range(3):
        trap = Trap(DATA, "kill", is_after=bool(index % 2))
        bed.worker(plan, trap, index=index).killed_by(trap)


@fault("worker asked to stop (SIGTERM)", "source GET", "lease released; next worker at once",
       quick=True)  # fmt: skip
def _(bed: Bed) -> None:
    trap = Trap(SOURCE, "term")
    worker = bed.worker(bed.plan(), trap)
    worker.reach(trap)
    expect(worker.wait() == 143, f"the worker was not preempted:\n{worker.log()}")


# Workers that meet ------------------------------------------------------------------------------


@fault("three workers race for every shard", "the whole plan", "leases")
def _(bed: Bed) -> None:
    plan = bed.plan()
    workers = [bed.worker(plan, index=index) for index in range(3)]
    expect([w.wait() for w in workers] == [0, 0, 0], "a worker failed")


def pauses(name: str, where: str, pattern: str, after: bool, *, quick: bool = False) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.plan(num_shards=1)
        trap = Trap(pattern, "stop", is_after=after)
        paused = bed.worker(plan, trap)
        paused.reach(trap)
        bed.work(plan)
        paused.resume()
        expect(paused.wait() == 0, f"the paused worker ended badly:\n{paused.log()}")

    by = "lease check, conditional result; loser cleans up"
    FAULTS.append(Fault(name, where, by, inject, quick))


pauses("paused worker wakes after its lease was taken", "before Parquet PUT", DATA, False)
pauses("paused worker wakes with its Parquet written", "Parquet PUT done", DATA, True,
       quick=True)  # fmt: skip


def late_request(name: str, where: str, pattern: str, recovered_by: str) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.plan(num_shards=1)
        trap = Trap(pattern, "hold")
        slow = bed.worker(plan, trap)
        slow.reach(trap)
        bed.work(plan)
        trap.gate.set()
        expect(slow.wait() == 0, f"the slow worker ended badly:\n{slow.log()}")

    FAULTS.append(Fault(name, where, recovered_by, inject))


late_request("same shard run by two workers; the first result comes late", "result PUT under way",
             RESULT, "If-None-Match; loser deletes its file")  # fmt: skip
late_request("heartbeat thread outlives a hung loop", "source GET hangs",
             SOURCE, "only progress advances the lease")  # fmt: skip


@fault("heartbeats of a worker never arrive", "every heartbeat PUT, beside another worker",
       "the lease is taken over; it looks at its lease before its result")  # fmt: skip
def _(bed: Bed) -> None:
    plan = bed.plan()
    beats = Trap(r"PUT .*\.heartbeat\.json", "status", status=503, times=9999)
    slow = Trap(DATA, "late", seconds=3 * LEASE_SECONDS, times=99)
    cut_off, other = bed.worker(plan, beats, slow), bed.worker(plan, index=1)
    expect(other.wait() == 0, f"the other worker ended badly:\n{other.log()}")
    cut_off.wait()
    happened(beats, slow)


@fault("paused worker wakes when its plan has a successor", "before Parquet PUT",
       "a new generation of the plan; its late result is not the successor's")  # fmt: skip
def _(bed: Bed) -> None:
    plan = bed.plan(num_shards=1, max_attempts=1)
    trap = Trap(DATA, "stop")
    paused = bed.worker(plan, trap)
    paused.reach(trap)
    # Takes the lease over to write that the only attempt failed.
    bed.worker(plan, index=1).wait()
    successor = bed.worked_plan()
    expect(successor.plan_id != plan.plan_id, "the plan has no successor")
    bed.finish(successor)
    paused.resume()
    paused.wait()


# Storage that misbehaves ------------------------------------------------------------------------


def storage_faults(
    name: str,
    where: str,
    *traps: tuple[str, dict[str, object]],
    quick: bool = False,
    recovered_by: str = "client retry",
    **changes: object,
) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.plan(**changes)
        made = [Trap(pattern, **options) for pattern, options in traps]  # type: ignore[arg-type]
        bed.worker(plan, *made).wait()
        happened(*made)

    FAULTS.append(Fault(name, where, recovered_by, inject, quick))


storage_faults("answer of a claim lost", "lease PUT", (CLAIM, {"deed": "lose"}),
               recovered_by="nonce in the stored body")  # fmt: skip
storage_faults("answer of a result lost", "result PUT", (RESULT, {"deed": "lose"}), quick=True,
               recovered_by="body in storage is compared")  # fmt: skip
storage_faults("answer of a Parquet PUT lost", "Parquet PUT", (DATA, {"deed": "lose"}))
storage_faults("storage answers 500", "result PUT, twice", (RESULT, {"deed": "status", "times": 2}))
storage_faults("storage answers 503 SlowDown", "every PUT, 8 times",
               ("PUT ", {"deed": "status", "status": 503, "times": 8}))  # fmt: skip
storage_faults("storage answers 409 to a conditional PUT", "result PUT",
               (RESULT, {"deed": "status", "status": 409}))  # fmt: skip
storage_faults("source body truncated", "source GET, 3 times",
               (SOURCE, {"deed": "cut", "times": 3}))  # fmt: skip
storage_faults("file list truncated", "plan GET", (FILES, {"deed": "cut"}),
               recovered_by="refused; next worker")  # fmt: skip
storage_faults("connections dropped", "any request, 6 times",
               (ANY, {"deed": "drop", "times": 6, "skip": 3}))  # fmt: skip
storage_faults("storage is slow", "10 requests, 1 s each",
               (ANY, {"deed": "late", "seconds": 1.0, "times": 10}))  # fmt: skip
storage_faults("storage does not answer in time", "result PUT, 65 s; the client waits for 60",
               (RESULT, {"deed": "late", "seconds": 65.0}))  # fmt: skip
storage_faults("storage away for one worker", "all its writes after the claim",
               (DATA, {"deed": "status", "status": 503, "times": 400}),
               recovered_by="attempts fail; a new generation", max_attempts=3)  # fmt: skip


@fault("scratch disk full", "download and Parquet file (RLIMIT_FSIZE)",
       "attempts fail; a new generation of the plan")  # fmt: skip
def _(bed: Bed) -> None:
    worker = bed.worker(bed.plan(max_attempts=1), terms=WorkTerms(max_file_bytes=12_000))
    expect(worker.wait() != 0, "the disk was not full")


@fault("scratch disk full from the start", "file system of 40 KiB",
       "attempts fail; a new generation of the plan")  # fmt: skip
def _(bed: Bed) -> None:
    terms = WorkTerms(scratch_path=bed.small_disk(40))
    worker = bed.worker(bed.plan(max_attempts=1), terms=terms)
    if worker.wait() == 0:
        raise NotHitError("the disk was large enough")


@fault("scratch disk full for a while", "file system of 1 MiB filled by a neighbour, then freed",
       "attempts fail, later ones succeed; else a new generation of the plan")  # fmt: skip
def _(bed: Bed) -> None:
    disk = bed.small_disk(1024)
    full, freed = Trap(SOURCE, "hold"), Trap(CLAIM, "hold", skip=1)
    worker = bed.worker(bed.plan(), full, freed, terms=WorkTerms(scratch_path=disk))
    worker.reach(full)
    neighbour = disk / "neighbour"
    fill(neighbour)
    full.gate.set()
    with contextlib.suppress(NotHitError):
        worker.reach(freed)
    expect("No space left" in worker.log() or "full" in worker.log(), worker.log())
    neighbour.unlink()
    freed.gate.set()
    worker.wait()


def fill(path: Path) -> None:
    """Let a file take all room that is left on its file system."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


# Results that lie -------------------------------------------------------------------------------


def spoiled_result(name: str, where: str, spoil: Callable[[Bed, Plan, str], None]) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.worked_plan()
        uri = list_folder(bed.storage, results_uri(plan.plan_uri))[0].uri
        spoil(bed, plan, uri)
        try:
            commit_plan(bed.config, bed.storage, plan.plan_uri)
        except HCodecError as error:
            print(f"    refused as it should: {error}")
        else:
            raise AssertionError("the commit believed a result that lies")

    by = "commit refuses; the next generation of the plan does the shard again"
    FAULTS.append(Fault(name, where, by, inject))


def _missing(bed: Bed, plan: Plan, uri: str) -> None:
    file = read_result(bed.storage, uri).data_file
    assert file is not None
    bed.storage.delete([file.uri])


def _truncated(bed: Bed, plan: Plan, uri: str) -> None:
    file = read_result(bed.storage, uri).data_file
    assert file is not None
    bed.storage.write(file.uri, bed.storage.read(file.uri)[:-100])


def _half_document(bed: Bed, plan: Plan, uri: str) -> None:
    bed.storage.write(uri, bed.storage.read(uri)[:200])


spoiled_result("result names a missing file", "between result and commit", _missing)
spoiled_result("result names a truncated file", "between result and commit", _truncated)
spoiled_result("result document truncated", "between result and commit", _half_document)


@fault("result deleted before the commit", "between result and commit", "commit refuses; redone")
def _(bed: Bed) -> None:
    plan = bed.worked_plan()
    bed.storage.delete([list_folder(bed.storage, results_uri(plan.plan_uri))[0].uri])
    try:
        commit_plan(bed.config, bed.storage, plan.plan_uri)
    except PlanIncompleteError:
        return
    raise AssertionError("an incomplete plan was committed")


# Committers that die ----------------------------------------------------------------------------


def committer_dies(
    name: str,
    where: str,
    pattern: str,
    *,
    after: bool = False,
    skip: int = 0,
    quick: bool = False,
) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.worked_plan()
        bed.commit_root(plan)
        trap = Trap(pattern, "kill", is_after=after, skip=skip)
        bed.publisher(plan, trap).killed_by(trap)

    FAULTS.append(Fault(name, where, "the step run again; ledger", inject, quick))


committer_dies("committer killed before commit", "results GET", r"GET .*/results/")
committer_dies("committer killed during commit", "manifest PUT", MANIFEST, quick=True)
committer_dies("committer killed before its commit lands", "metadata PUT", METADATA)
committer_dies("committer killed in the catalog's swap", "metadata PUT done", METADATA, after=True)
committer_dies("committer killed between commit and publish", "validation reads the plan",
               r"GET .*/tombstones\.parquet", skip=1)  # fmt: skip
committer_dies("publisher killed before main moves", "second metadata PUT", METADATA, skip=1)
committer_dies("publisher killed in the catalog's swap", "second metadata PUT done", METADATA,
               skip=1, after=True)  # fmt: skip
committer_dies("publisher killed after main moved", "version record PUT", RECORD, quick=True)
committer_dies("publisher killed after the record", "version record PUT done", RECORD, after=True)


@fault("first committer killed while it makes the table", "first metadata PUT", "made again")
def _(bed: Bed) -> None:
    trap = Trap(METADATA, "kill")
    bed.publisher(bed.worked_plan(), trap).killed_by(trap)


def catalog_storage(name: str, where: str, **options: object) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.worked_plan()
        trap = Trap(METADATA, **options)  # type: ignore[arg-type]
        bed.publisher(plan, trap).wait()
        happened(trap)

    FAULTS.append(Fault(name, where, "client retry, else the step run again", inject))


catalog_storage("metadata PUT answers 500", "commit", deed="status", times=2)
catalog_storage("answer of the metadata PUT lost", "commit", deed="lose")
catalog_storage("metadata PUT dropped", "publish", deed="drop", skip=2)


def committer_pauses(name: str, where: str, skip: int, after: bool) -> None:
    """It wakes when another has done its work, and the run after that is published as well."""

    def inject(bed: Bed) -> None:
        plan = bed.worked_plan("0/")
        bed.commit_root(plan)
        trap = Trap(METADATA, "stop", skip=skip, is_after=after)
        paused = bed.publisher(plan, trap)
        paused.reach(trap)
        bed.finish(plan)
        bed.finish(bed.worked_plan())
        paused.resume()
        paused.wait()
        expect(len(bed.rows()) == 20, "what was published later is gone")

    FAULTS.append(Fault(name, where, "catalog's swap; ledger", inject))


committer_pauses("paused committer wakes two versions later", "metadata PUT", 0, False)
committer_pauses("paused committer wakes, its metadata written", "metadata PUT done", 0, True)
committer_pauses("paused publisher wakes two versions later", "second metadata PUT", 1, False)
committer_pauses("paused publisher wakes, its metadata written", "second metadata PUT done", 1,
                 True)  # fmt: skip


@fault("catalog locked by another process", "its database, for 20 s, during the commit",
       "waits, else the step run again")  # fmt: skip
def _(bed: Bed) -> None:
    plan = bed.worked_plan()
    bed.commit_root(plan)
    trap = Trap(METADATA, "hold")
    committer = bed.publisher(plan, trap)
    committer.reach(trap)
    with contextlib.closing(sqlite3.connect(bed.folder / "catalog.db")) as catalog:
        catalog.execute("BEGIN EXCLUSIVE")
        trap.gate.set()
        time.sleep(20)
        catalog.rollback()
    committer.wait()


@fault("committer's disk full", "swap of a file of which rows go", "the step run again")
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan())
    bed.delete("0/clip 06.wav")
    bed.put("1/clip 05.wav", new_clip(2))
    plan = bed.worked_plan()
    committer = bed.publisher(plan, tmp_path=bed.small_disk(4))
    expect(committer.wait() != 0, "the disk was not full")


# Committers that meet ---------------------------------------------------------------------------


@fault("two committers race", "both held at the metadata PUT", "catalog's swap; ledger",
       quick=True)  # fmt: skip
def _(bed: Bed) -> None:
    plan = bed.worked_plan()
    bed.commit_root(plan)
    _race(bed, lambda trap: bed.committer(plan, trap))


def _race(bed: Bed, start: Callable[[Trap], Running]) -> None:
    traps = [Trap(METADATA, "hold") for _ in range(2)]
    both = [start(trap) for trap in traps]
    for running, trap in zip(both, traps, strict=True):
        running.reach(trap)
    for trap in traps:
        trap.gate.set()
    expect([r.wait() for r in both] == [0, 0], f"one failed:\n{both[0].log()}\n{both[1].log()}")


@fault("two publishers of one plan race", "both held at the metadata PUT", "ledger: one version")
def _(bed: Bed) -> None:
    plan = bed.worked_plan()
    info = commit_plan(bed.config, bed.storage, plan.plan_uri)
    _race(bed, lambda trap: bed.sole_publisher(plan, info.snapshot_id, trap))
    expect(len(version_entries(load_table(bed.layout))) == 1, "two versions of one plan")


@fault("commit task run twice", "after the first", "ledger")
def _(bed: Bed) -> None:
    plan = bed.worked_plan()
    first = commit_plan(bed.config, bed.storage, plan.plan_uri)
    expect(first == commit_plan(bed.config, bed.storage, plan.plan_uri), "two commits of one plan")


@fault("whole publish run twice", "after the first", "ledger")
def _(bed: Bed) -> None:
    plan = bed.worked_plan()
    bed.finish(plan)
    bed.finish(plan)
    expect(len(version_entries(load_table(bed.layout))) == 1, "two versions of one plan")


@fault("publish races another publish", "main moved after the commit", "committed again on top",
       quick=True)  # fmt: skip
def _(bed: Bed) -> None:
    early, other = bed.worked_plan("0/"), bed.worked_plan("1/")
    info = commit_plan(bed.config, bed.storage, early.plan_uri)
    bed.finish(other)
    _refused(bed, early, info.snapshot_id)
    bed.finish(early)


def _refused(bed: Bed, plan: Plan, snapshot_id: int) -> None:
    try:
        publish(bed.config, bed.storage, plan.plan_uri, snapshot_id)
    except CommitConflictError:
        return
    raise AssertionError("a snapshot on an old base was published")


@fault("publish races a rollback", "main moved back after the commit", "committed again on top")
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan("0/"))
    bed.put("1/clip 01.wav", new_clip(0))
    bed.finish(bed.worked_plan("1/", max_hours_per_version=0.0003))
    plan = bed.worked_plan()
    info = commit_plan(bed.config, bed.storage, plan.plan_uri)
    rollback(bed.layout, "v1")
    _refused(bed, plan, info.snapshot_id)
    bed.finish(plan)


@fault("publish races retention", "expiry and sweep between commit and publish",
       "open plans and branches are spared")  # fmt: skip
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan("0/"))
    plan = bed.worked_plan("1/")
    info = commit_plan(bed.config, bed.storage, plan.plan_uri)
    bed.server.age(bed.bucket, days=10)
    expire_snapshots(bed.layout, datetime.now(UTC))
    sweep_orphans(bed.storage, bed.layout, timedelta(hours=2), dry_run=False)
    publish(bed.config, bed.storage, plan.plan_uri, info.snapshot_id)


@fault("sweep while shards are finished but not committed", "between result and commit",
       "open plans are spared")  # fmt: skip
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan("0/"))
    plan = bed.worked_plan("1/")
    bed.server.age(bed.bucket, days=10)
    sweep_orphans(bed.storage, bed.layout, timedelta(hours=2), dry_run=False)
    bed.finish(plan)


@fault("rejected plan followed by a good one", "after validation",
       "a branch per plan; its rows stay behind a tag")  # fmt: skip
def _(bed: Bed) -> None:
    plan = bed.worked_plan("0/")
    commit_plan(bed.config, bed.storage, plan.plan_uri)
    drop_branch(bed.config, bed.storage, plan.plan_uri, "chaos")
    bed.finish(bed.worked_plan("1/"))


# Compaction -------------------------------------------------------------------------------------


def _compact(bed: Bed) -> None:
    expect(compact(bed.storage, bed.layout, dry_run=False).snapshot_id, "nothing was compacted")


@fault("commit retried after compaction", "after v1", "ledger", quick=True)
def _(bed: Bed) -> None:
    plan = bed.worked_plan()
    bed.finish(plan)
    _compact(bed)
    expect(commit_plan(bed.config, bed.storage, plan.plan_uri).version == "v1", "committed twice")
    bed.finish(plan)


@fault("publish races a compaction", "main compacted after the commit", "committed again on top")
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan("0/"))
    plan = bed.worked_plan("1/")
    info = commit_plan(bed.config, bed.storage, plan.plan_uri)
    _compact(bed)
    _refused(bed, plan, info.snapshot_id)
    bed.finish(plan)


def compaction_dies(name: str, where: str, skip: int, after: bool) -> None:
    def inject(bed: Bed) -> None:
        bed.finish(bed.worked_plan())
        trap = Trap(METADATA, "kill", is_after=after, skip=skip)
        bed.compactor(trap).killed_by(trap)
        _compact(bed)

    FAULTS.append(Fault(name, where, "the next compaction; sweep", inject))


compaction_dies("compaction killed before its branch", "metadata PUT", 0, False)
compaction_dies("compaction killed between branch and main", "second metadata PUT", 1, False)
compaction_dies("compaction killed in the catalog's swap", "second metadata PUT done", 1, True)


# Clocks that jump -------------------------------------------------------------------------------


def clock_jumps(
    name: str, where: str, *hours: float, recovered_by: str, checks_clock: bool = False
) -> None:
    """A worker whose wall clock is off by ``hours`` in turn, at each of its next Parquet PUTs."""

    def inject(bed: Bed) -> None:
        clock = bed.clock()
        traps = [Trap(DATA, "hold", skip=number) for number in range(len(hours))]
        plan = bed.plan()
        worker = bed.worker(plan, *traps, clock=clock, checks_clock=checks_clock)
        for trap, offset in zip(traps, hours, strict=True):
            worker.reach(trap)
            clock.jump_to(offset)
            trap.gate.set()
        code = worker.wait()
        expect(checks_clock or code == 0, f"the worker ended with {code}:\n{worker.log()}")

    FAULTS.append(Fault(name, where, recovered_by, inject))


clock_jumps("worker's clock jumps six hours on", "Parquet PUT", 6.0,
            recovered_by="leases are judged by monotonic clocks")  # fmt: skip
clock_jumps("worker's clock jumps nine hours back", "Parquet PUT", -9.0,
            recovered_by="leases are judged by monotonic clocks")  # fmt: skip
clock_jumps("worker's clock jumps on and back", "two Parquet PUTs", 6.0, -9.0,
            recovered_by="leases are judged by monotonic clocks")  # fmt: skip
clock_jumps("storage refuses a worker whose clock jumped", "Parquet PUT", 6.0, checks_clock=True,
            recovered_by="the worker fails; another host's worker")  # fmt: skip


@fault("two workers, clocks 15 hours apart, meet at every shard", "the whole plan", "leases")
def _(bed: Bed) -> None:
    plan = bed.plan(num_shards=6)
    ahead, behind = bed.clock(6.0), bed.clock(-9.0)
    workers = [bed.worker(plan, clock=ahead), bed.worker(plan, index=1, clock=behind)]
    expect([worker.wait() for worker in workers] == [0, 0], "a worker failed")


@fault("paused worker wakes ten hours later by its clock", "before Parquet PUT",
       "lease check, conditional result; loser cleans up")  # fmt: skip
def _(bed: Bed) -> None:
    plan, clock = bed.plan(num_shards=1), bed.clock()
    trap = Trap(DATA, "stop")
    paused = bed.worker(plan, trap, clock=clock)
    paused.reach(trap)
    bed.work(plan)
    clock.jump_to(10.0)
    paused.resume()
    expect(paused.wait() == 0, f"the paused worker ended badly:\n{paused.log()}")


def committer_clock(name: str, where: str, before: float, after: float) -> None:
    """Versions by committers whose clocks are off by hours, the later one's behind the first's."""

    def inject(bed: Bed) -> None:
        first = bed.worked_plan("0/")
        done = bed.publisher(first, clock=bed.clock(before))
        expect(done.wait() == 0, f"the first committer failed:\n{done.log()}")
        second = bed.worked_plan("1/")
        clock, trap = bed.clock(before), Trap(METADATA, "hold")
        committer = bed.publisher(second, trap, clock=clock)
        committer.reach(trap)
        clock.jump_to(after)
        trap.gate.set()
        expect(committer.wait() == 0, f"the second committer failed:\n{committer.log()}")
        expect(len(bed.rows()) == 20, "rows are missing")

    by = "order of versions is that of the ledger, not of clocks"
    FAULTS.append(Fault(name, where, by, inject))


committer_clock("committer's clock jumps nine hours back", "metadata PUT", 6.0, -3.0)
committer_clock("committer's clock jumps six hours on", "metadata PUT", 0.0, 6.0)


def upkeep_by_a_wrong_clock(bed: Bed, start: Callable[..., Running]) -> None:
    bed.finish(bed.worked_plan("0/"))
    plan = bed.worked_plan("1/")
    trap = Trap(METADATA, "hold")
    committer = bed.publisher(plan, trap)
    committer.reach(trap)
    upkeep = start(clock=bed.clock(96.0))
    expect(upkeep.wait() == 0, f"upkeep failed:\n{upkeep.log()}")
    trap.gate.set()
    expect(committer.wait() == 0, f"the committer failed:\n{committer.log()}")
    expect(len(bed.rows()) == 20, "rows are missing")


@fault("upkeep by a clock four days ahead, during a commit", "committer held at its metadata PUT",
       "catalog's swap; ages are taken by the storage's clock")  # fmt: skip
def _(bed: Bed) -> None:
    upkeep_by_a_wrong_clock(bed, bed.maintainer)


@fault("sweep by a clock four days ahead, during a commit", "committer held at its metadata PUT",
       "ages are taken by the storage's clock")  # fmt: skip
def _(bed: Bed) -> None:
    upkeep_by_a_wrong_clock(bed, bed.sweeper)


# Sources that move ------------------------------------------------------------------------------


@fault("source changed between inventory and read", "after the plan",
       "outcome `changed`; next run", quick=True)  # fmt: skip
def _(bed: Bed) -> None:
    plan = bed.plan()
    bed.put("0/clip 02.wav", new_clip(1))
    bed.work(plan)
    bed.finish(plan)


@fault("source deleted between inventory and read", "after the plan", "outcome `deleted`")
def _(bed: Bed) -> None:
    plan = bed.plan()
    bed.delete("1/clip 03.wav")
    bed.work(plan)
    bed.finish(plan)


@fault("a missed run: added, changed, deleted, renamed", "after v1", "level-triggered plan")
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan())
    bed.put("2/added.wav", new_clip(2))
    bed.put("0/clip 04.wav", new_clip(3))
    bed.delete("0/clip 06.wav")
    bed.put("0/renamed.wav", bed.storage.read(bed.uri("0/clip 08.wav")))
    bed.delete("0/clip 08.wav")


@fault("quarantined file replaced by a good one", "after v1", "new etag is new work")
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan())
    bed.put("0/notes.wav", new_clip(1))
    bed.quarantined = set()


@fault("good file replaced by a bad one", "after v1", "row removed, file in quarantine")
def _(bed: Bed) -> None:
    bed.finish(bed.worked_plan())
    bed.put("1/clip 05.wav", b"no audio any more " * 9)
    bed.quarantined = {"0/notes.wav", "1/clip 05.wav"}


# Listings and plans -----------------------------------------------------------------------------


def bad_listing(name: str, recovered_by: str, **options: object) -> None:
    def inject(bed: Bed) -> None:
        bed.finish(bed.worked_plan())
        trap = Trap(LISTING, times=99, **options)  # type: ignore[arg-type]
        planner = bed.planner(trap)
        planner.wait()
        happened(trap)
        expect(len(bed.rows()) == 20, "rows went because of a listing that failed")
        expect(not _tombstones(bed), f"tombstones from a listing that failed:\n{planner.log()}")

    FAULTS.append(Fault(name, "inventory after v1", recovered_by, inject))


def _tombstones(bed: Bed) -> list[str]:
    found = []
    for info in list_folder(bed.storage, bed.layout.plans_uri):
        if info.uri.endswith("/plan.json"):
            plan = Plan.model_validate_json(bed.storage.read(info.uri))
            found += [plan.plan_id] * (plan.num_tombstones > 0)
    return found


bad_listing("listing truncated", "inventory not complete; no tombstones", deed="cut")
bad_listing("listing unauthorised", "inventory not complete; no tombstones",
            deed="status", status=403)  # fmt: skip
bad_listing("listing wrongly empty", "share of deletes is capped; tombstones withheld",
            deed="empty")  # fmt: skip


@fault("inventory killed", "part PUT", "the next inventory")
def _(bed: Bed) -> None:
    trap = Trap(r"PUT .*part-00000", "kill")
    bed.planner(trap).killed_by(trap)


@fault("planner killed between its files", "job PUT", "job.json comes last: no plan, or whole")
def _(bed: Bed) -> None:
    trap = Trap(r"PUT .*/job\.json", "kill")
    bed.planner(trap).killed_by(trap)


@fault("plan computed twice, at once", "both planners", "content-addressed id")
def _(bed: Bed) -> None:
    both = [bed.planner(), bed.planner()]
    expect([p.wait() for p in both] == [0, 0], "a planner failed")
    jobs = [i for i in list_folder(bed.storage, bed.layout.plans_uri) if "/job.json" in i.uri]
    expect(len(jobs) == 1, f"{len(jobs)} plans of one difference")
