"""What becomes of a job when things die: real workers on the test API server, one row per fault.

For each fault: worker pods left two minutes later, Jobs active at once, rows lost, rows doubled;
expected are 0, at most 1, 0, 0. The tokens themselves must be those of an undisturbed run. Faults
that need Airflow itself are in ``test_kube_airflow.py``. The last test prints the table.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hcodec_airflow.kubernetes.losses import Losses
from hcodec_airflow.progress import JobSize
from hcodec_airflow.states import JobState
from hcodec_core.config import StorageConfig
from hcodec_core.dataset.leases import read_attempts
from hcodec_core.dataset.results import results_uri
from hcodec_core.dataset.shards import lease_uri, results_by_shard
from hcodec_core.dataset.tabular import list_folder
from hcodec_core.jobs import TokenizeJob
from hcodec_core.storage import open_storage
from tests.inference.plans import contents, rows, wav, write_plan
from tests.kube.server import KubeServer, NodeSpec
from tests.operators.kube_bed import LEASE_SECONDS, Bed, Triggerer, wait_until

pytestmark = pytest.mark.slow

NUM_SHARDS, NUM_FILES, SECONDS = 6, 12, 40.0
LEFT_SECONDS = 120.0
FIVE_MINUTES = 300.0
PRODUCTION_LEASE_SECONDS = TokenizeJob.model_fields["lease_seconds"].default
SMALL = {"cpu": "2", "memory": "64Gi"}
TABLE: list[tuple[str, int, int, int, int]] = []


@dataclass
class Scene:
    """A job under way in one cluster, and what a fault may do to it."""

    kube: KubeServer
    bed: Bed
    request: object
    job: object
    watches: list[Triggerer]

    def watch(self, owner="try-1") -> Triggerer:
        size = JobSize(self.job.num_shards, self.job.num_files)
        made = Triggerer(self.bed, self.request, owner, size)
        self.watches.append(made)
        return made

    def submit(self, owner="try-1") -> None:
        self.bed.backend().submit_or_adopt(self.request, owner)

    def pods(self):
        return self.kube.running_pods()

    def num_results(self) -> int:
        return sum(1 for _ in list_folder(self.bed.storage, results_uri(self.job.plan_uri)))

    def holders(self) -> dict:
        """Reports of workers that hold shards, by the UID of their pod."""
        return Losses(self.bed.storage, self.request.job_uri, self.job.plan_uri).holders()

    def held_by(self, pod) -> list[str]:
        """Shards that a pod works on."""
        reports = self.holders().get(pod["metadata"]["uid"], [])
        return [shard for report in reports for shard in report.held_shards]

    def wait_for_work(self) -> dict:
        """A pod that holds a shard, while work is left."""

        def holder():
            holders = self.holders()
            return next((p for p in self.pods() if p["metadata"]["uid"] in holders), None)

        found = wait_until(holder, "a pod at work")
        assert self.num_results() < self.job.num_shards, "the plan is too small for this machine"
        return found

    def num_attempts(self, shard: str) -> int:
        return len(read_attempts(self.bed.storage, lease_uri(self.job, shard)))


def name_of(pod) -> str:
    return pod["metadata"]["name"]


def nothing(scene: Scene) -> None:
    scene.submit()
    scene.watch()


def worker_dies(scene: Scene) -> None:
    scene.submit()
    scene.watch()
    scene.kube.faults.kill_process(name_of(scene.wait_for_work()))


def worker_hangs(scene: Scene) -> None:
    scene.submit()
    scene.watch()
    scene.kube.faults.pause(name_of(scene.wait_for_work()))


def worker_paused_and_woken(scene: Scene) -> None:
    """Paused until others took its shard over; the lease is short, five minutes are below."""
    scene.submit()
    scene.watch()
    pod = scene.wait_for_work()
    scene.kube.faults.pause(name_of(pod))
    held = scene.held_by(pod)
    wait_until(lambda: any(scene.num_attempts(shard) > 1 for shard in held), "a take-over")
    scene.kube.faults.wake(name_of(pod))


def worker_paused_for_five_minutes(scene: Scene) -> None:
    """With the lease of production: woken when another works on its shard, and has for long.

    That one is held as well, once it has the shard: the job would be over before the first wakes.
    """
    scene.submit()
    scene.watch()
    pod = scene.wait_for_work()
    scene.kube.faults.pause(name_of(pod))
    paused_at, held = time.monotonic(), scene.held_by(pod)
    wait_until(lambda: all(scene.num_attempts(s) > 1 for s in held), "a take-over", 900)
    (other,) = [name_of(p) for p in scene.pods() if name_of(p) != name_of(pod)]
    scene.kube.faults.pause(other)
    time.sleep(max(0.0, paused_at + FIVE_MINUTES - time.monotonic()))
    assert scene.num_results() < scene.job.num_shards
    assert name_of(pod) in map(name_of, scene.pods())
    scene.kube.faults.wake(name_of(pod))
    scene.kube.faults.wake(other)


def triggerer_dies(scene: Scene) -> None:
    scene.submit()
    first = scene.watch()
    scene.wait_for_work()
    first.die()
    scene.watch()


def triggerer_hangs_and_second_takes_over(scene: Scene) -> None:
    scene.submit()
    first = scene.watch()
    scene.wait_for_work()
    first.hang()
    second = scene.watch()
    second.wait()
    first.wake()


def task_retried_two_owners(scene: Scene) -> None:
    scene.submit("try-1")
    scene.watch("try-1")
    scene.wait_for_work()
    scene.submit("try-2")
    scene.watch("try-2")
    assert not scene.bed.backend().kill(scene.request, "try-1")


def job_deleted_under_us(scene: Scene) -> None:
    scene.submit()
    scene.watch()
    scene.wait_for_work()
    scene.kube.faults.delete_job(scene.bed.jobs(scene.request)[0]["metadata"]["name"])


def job_queued_ten_minutes(scene: Scene) -> None:
    for node in ("node-1", "node-2"):
        scene.kube.nodes.remove(node)
    scene.submit()
    watch = scene.watch()
    backend = scene.bed.backend()
    wait_until(lambda: backend.observe(scene.request).reason)
    scene.kube.clock.advance(600)
    time.sleep(2.0)
    assert watch.verdict is None
    scene.kube.nodes.add(NodeSpec("node-3"))


def quota_full(scene: Scene) -> None:
    scene.kube.set_quota({"pods": "0"})
    scene.submit()
    scene.watch()
    wait_until(lambda: "quota" in scene.bed.backend().observe(scene.request).reason)
    scene.kube.set_quota({"pods": "10"})


def node_lost(scene: Scene) -> None:
    scene.submit()
    scene.watch()
    pod = scene.wait_for_work()
    scene.kube.faults.lose_node(pod["spec"]["nodeName"])
    scene.kube.nodes.add(NodeSpec("node-3"))
    time.sleep(2.0)
    scene.kube.faults.remove_node(pod["spec"]["nodeName"])


def node_cut_off(scene: Scene) -> None:
    """Its workers go on unseen, and their pods are evicted meanwhile."""
    scene.submit()
    scene.watch()
    pod = scene.wait_for_work()
    scene.kube.faults.lose_node(pod["spec"]["nodeName"], kills_processes=False)
    time.sleep(4.0)
    scene.kube.faults.return_node(pod["spec"]["nodeName"])


def evictions_in_a_row(scene: Scene) -> None:
    scene.submit()
    scene.watch()
    for _ in range(5):
        pod = wait_until(lambda: next(iter(scene.pods()), None) or scene.num_results() == 6)
        if pod is True:
            break
        scene.kube.faults.evict(name_of(pod))
        gone = name_of(pod)
        scene.kube.wait_until(lambda gone=gone: gone not in map(name_of, scene.pods()))


def api_away_for_a_minute(scene: Scene) -> None:
    scene.submit()
    scene.watch()
    scene.wait_for_work()
    scene.kube.faults.go_away(60.0)


def finished_job_collected(scene: Scene) -> None:
    scene.submit()
    watch = scene.watch()
    scene.wait_for_work()
    watch.hang()
    name = scene.bed.jobs(scene.request)[0]["metadata"]["name"]
    scene.kube.wait_for_job(name, timeout_seconds=120)
    scene.kube.clock.advance(90_000)
    scene.kube.wait_until(lambda: scene.kube.job(name) is None, "its collection")
    watch.wake()


def out_of_memory(scene: Scene) -> None:
    scene.submit()
    scene.watch()
    scene.kube.faults.kill_for_memory(name_of(scene.wait_for_work()))


SCENARIOS: dict[str, Callable[[Scene], None]] = {
    "nothing happens": nothing,
    "worker dies": worker_dies,
    "worker hangs": worker_hangs,
    "worker paused and woken": worker_paused_and_woken,
    "worker out of memory": out_of_memory,
    "triggerer dies": triggerer_dies,
    "triggerer hangs, a second one takes over": triggerer_hangs_and_second_takes_over,
    "task retried (two owners)": task_retried_two_owners,
    "Job deleted under us": job_deleted_under_us,
    "Job queued 10 min": job_queued_ten_minutes,
    "quota full": quota_full,
    "node lost": node_lost,
    "node cut off and back": node_cut_off,
    "5 evictions in a row": evictions_in_a_row,
    "API away 60 s": api_away_for_a_minute,
    "finished Job garbage-collected": finished_job_collected,
}


class Census(threading.Thread):
    """Counts the active Jobs all the time."""

    def __init__(self, bed: Bed, request) -> None:
        super().__init__(daemon=True)
        self._bed, self._request = bed, request
        self._stopped = threading.Event()
        self.most = 0

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            self.most = max(self.most, len(self._bed.active_jobs(self._request)))

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.most


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Audio that all scenarios share, and the digests of an undisturbed run."""
    folder = tmp_path_factory.mktemp("matrix")
    files = {f"clip {i:02d}.wav": wav(SECONDS, i) for i in range(NUM_FILES)}
    return folder, files, {}


@pytest.mark.parametrize("name", SCENARIOS)
def test_fault(name, corpus, tmp_path):
    run_with_fault(name, SCENARIOS[name], corpus, tmp_path)


@pytest.mark.chaos
def test_worker_paused_for_five_minutes(corpus, tmp_path):
    options = {"num_shards": 2, "lease_seconds": PRODUCTION_LEASE_SECONDS}
    name = "worker paused 5 min, lease of 60 s"
    run_with_fault(name, worker_paused_for_five_minutes, corpus, tmp_path, **options)


def run_with_fault(
    name, scenario, corpus, tmp_path, num_shards=NUM_SHARDS, lease_seconds=LEASE_SECONDS
):
    folder, files, undisturbed = corpus
    storage = open_storage(StorageConfig())
    with KubeServer() as kube:
        bed = Bed(kube, tmp_path, env={"OMP_NUM_THREADS": "1"}, termination_grace_seconds=5)
        plan = name.replace(" ", "-").replace(",", "")
        root, terms = f"file://{folder}", {"lease_seconds": lease_seconds}
        job = write_plan(storage, root, files, num_shards, plan=plan, **terms)
        scene = Scene(kube, bed, bed.request(job.plan_uri, 2, **terms), job, [])
        census = Census(bed, scene.request)
        census.start()
        try:
            scenario(scene)
            verdicts = [w.wait(240) for w in scene.watches if not w.is_dead]
        finally:
            for watch in scene.watches:
                watch.die()
        most = census.stop()
        left = _pods_left(kube)
    lost, doubled = _account(storage, job)
    TABLE.append((name, left, most, lost, doubled))
    assert (left, lost, doubled) == (0, 0, 0)
    assert most <= 1
    assert verdicts[-1].state is JobState.DONE
    tokens = {file: _tokens(row) for file, row in rows(storage, job).items()}
    assert all(tokens.values())
    assert undisturbed.setdefault("tokens", tokens) == tokens
    # A killed process may leave a file that no result names; a committed one is never touched.
    contents(storage, job, max_orphans=2)


def _tokens(row) -> dict[str, list[int]]:
    return {name: value for name, value in row.items() if isinstance(value, list) and value}


def _pods_left(kube) -> int:
    deadline = time.monotonic() + LEFT_SECONDS
    while kube.running_pods() and time.monotonic() < deadline:
        time.sleep(0.2)
    return len(kube.running_pods())


def _account(storage, job) -> tuple[int, int]:
    """Files without an outcome, and outcomes beyond the first of a file."""
    found = Counter(o.uri for r in results_by_shard(storage, job).values() for o in r.outcomes)
    return job.num_files - len(found), sum(found.values()) - len(found)


def test_table(capsys):
    with capsys.disabled():
        print("\n| fault | pods left | Jobs at once | rows lost | rows doubled |")
        print("|---|---|---|---|---|")
        for row in TABLE:
            print("| " + " | ".join(map(str, row)) + " |")
    assert TABLE
