"""The faults: what happens, where, and what is expected to put it right.

Each takes a fresh bed and makes one fault happen; ``harness`` then lets the dataset recover and
looks at the books. A fault that did not happen is an error of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

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
from tests.chaos.bed import Bed, Running, new_clip, wait_for
from tests.chaos.proxy import Trap

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

Inject = Callable[[Bed], None]


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    where: str
    recovered_by: str
    inject: Inject
    is_quick: bool = False


FAULTS: list[Fault] = []


def fault(name: str, where: str, recovered_by: str, *, quick: bool = False) -> Callable[..., None]:
    def add(inject: Inject) -> None:
        FAULTS.append(Fault(name, where, recovered_by, inject, quick))

    return add


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
        expect(bed.worker(plan, trap).wait() == -9, "the worker was not killed")

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
        expect(bed.worker(plan, trap, index=index).wait() == -9, "the worker was not killed")


@fault("worker asked to stop (SIGTERM)", "source GET", "lease released; next worker at once",
       quick=True)  # fmt: skip
def _(bed: Bed) -> None:
    trap = Trap(SOURCE, "term")
    expect(bed.worker(bed.plan(), trap).wait() == 143, "the worker was not preempted")


# Workers that meet ------------------------------------------------------------------------------


@fault("three workers race for every shard", "the whole plan", "leases")
def _(bed: Bed) -> None:
    plan = bed.plan()
    workers = [bed.worker(plan, index=index) for index in range(3)]
    expect([w.wait() for w in workers] == [0, 0, 0], "a worker failed")


def pauses(name: str, where: str, pattern: str, after: bool) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.plan(num_shards=1)
        trap = Trap(pattern, "stop", is_after=after)
        paused = bed.worker(plan, trap)
        wait_for(trap.hit, name)
        bed.work(plan)
        paused.resume()
        expect(paused.wait() == 0, f"the paused worker ended badly:\n{paused.log()}")

    FAULTS.append(Fault(name, where, "lease check, conditional result; loser cleans up", inject))


pauses("paused worker wakes after its lease was taken", "before Parquet PUT", DATA, False)
pauses("paused worker wakes with its Parquet written", "Parquet PUT done", DATA, True)


def late_request(name: str, where: str, pattern: str, recovered_by: str) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.plan(num_shards=1)
        trap = Trap(pattern, "hold")
        slow = bed.worker(plan, trap)
        wait_for(trap.hit, name)
        bed.work(plan)
        trap.gate.set()
        expect(slow.wait() == 0, f"the slow worker ended badly:\n{slow.log()}")

    FAULTS.append(Fault(name, where, recovered_by, inject))


late_request("same shard run by two workers; the first result comes late", "result PUT under way",
             RESULT, "If-None-Match; loser deletes its file")  # fmt: skip
late_request("heartbeat thread outlives a hung loop", "source GET hangs",
             SOURCE, "only progress advances the lease")  # fmt: skip


# Storage that misbehaves ------------------------------------------------------------------------


def storage_faults(
    name: str,
    where: str,
    *traps: tuple[str, dict[str, object]],
    quick: bool = False,
    recovered_by: str = "client retry",
) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.plan()
        made = [Trap(pattern, **options) for pattern, options in traps]  # type: ignore[arg-type]
        bed.worker(plan, *made).wait()
        expect(any(trap.hits for trap in made), "the fault did not happen")

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
storage_faults("storage away for one worker", "all its writes after the claim",
               (DATA, {"deed": "status", "status": 503, "times": 400}),
               recovered_by="attempts fail; a new generation of the plan")  # fmt: skip


@fault("scratch disk full", "download and Parquet file (RLIMIT_FSIZE)",
       "attempts fail; a new generation of the plan")  # fmt: skip
def _(bed: Bed) -> None:
    worker = bed.worker(bed.plan(max_attempts=1), max_file_bytes=12_000)
    expect(worker.wait() != 0, "the disk was not full")


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
        bed.storage.delete([uri])

    by = "commit refuses; its result deleted, a worker redoes the shard"
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
        expect(bed.publisher(plan, trap).wait() == -9, "the committer was not killed")

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
    expect(bed.publisher(bed.worked_plan(), trap).wait() == -9, "the committer was not killed")


def catalog_storage(name: str, where: str, **options: object) -> None:
    def inject(bed: Bed) -> None:
        plan = bed.worked_plan()
        trap = Trap(METADATA, **options)  # type: ignore[arg-type]
        bed.publisher(plan, trap).wait()
        expect(trap.hits, "the fault did not happen")

    FAULTS.append(Fault(name, where, "client retry, else the step run again", inject))


catalog_storage("metadata PUT answers 500", "commit", deed="status", times=2)
catalog_storage("answer of the metadata PUT lost", "commit", deed="lose")
catalog_storage("metadata PUT dropped", "publish", deed="drop", skip=2)


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
    for trap in traps:
        wait_for(trap.hit, "both at the metadata PUT")
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
        expect(bed.compactor(trap).wait() == -9, "the compaction was not killed")
        _compact(bed)

    FAULTS.append(Fault(name, where, "the next compaction; sweep", inject))


compaction_dies("compaction killed before its branch", "metadata PUT", 0, False)
compaction_dies("compaction killed between branch and main", "second metadata PUT", 1, False)
compaction_dies("compaction killed in the catalog's swap", "second metadata PUT done", 1, True)


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
        expect(trap.hits, "the fault did not happen")
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
    planner = bed.planner(Trap(r"PUT .*part-00000", "kill"))
    expect(planner.wait() == -9, "the planner was not killed")


@fault("planner killed between its files", "job PUT", "job.json comes last: no plan, or whole")
def _(bed: Bed) -> None:
    planner = bed.planner(Trap(r"PUT .*/job\.json", "kill"))
    expect(planner.wait() == -9, "the planner was not killed")


@fault("plan computed twice, at once", "both planners", "content-addressed id")
def _(bed: Bed) -> None:
    both = [bed.planner(), bed.planner()]
    expect([p.wait() for p in both] == [0, 0], "a planner failed")
    jobs = [i for i in list_folder(bed.storage, bed.layout.plans_uri) if "/job.json" in i.uri]
    expect(len(jobs) == 1, f"{len(jobs)} plans of one difference")
