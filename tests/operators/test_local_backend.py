"""Workers on this machine: one set per plan, found again, ended when asked by their owner."""

from __future__ import annotations

import itertools
import os
import threading

import pytest

from hcodec_airflow.backends import check_backend_name, processes
from hcodec_airflow.backends.base import Phase
from hcodec_airflow.backends.local import LocalBackend, refuse_remote_executor, worker_environment
from hcodec_core.dataset.leases import EndingKind, read_ending, worker_identity
from hcodec_core.errors import ConfigError
from hcodec_core.jobs import WorkerProgress


def _pids(backend, request):
    return [worker.pid for worker in backend._read(request).workers]


def test_submit_starts_as_many_as_asked_for(make_backend, request_for_two):
    observation = make_backend().submit_or_adopt(request_for_two, "try-1")
    assert observation.phase is Phase.RUNNING
    assert observation.num_alive == 2
    assert [worker.num_starts for worker in observation.workers] == [1, 1]


def test_retry_and_another_process_adopt_and_start_no_second_set(make_backend, request_for_two):
    first = make_backend()
    first.submit_or_adopt(request_for_two, "try-1")
    pids = _pids(first, request_for_two)
    second = make_backend()  # a restarted triggerer has nothing but the storage
    assert second.observe(request_for_two).num_alive == 2
    second.submit_or_adopt(request_for_two, "try-2")
    assert _pids(second, request_for_two) == pids
    assert second._read(request_for_two).owner == "try-2"


def test_two_submitters_at_once_start_one_set(make_backend, request_for_two):
    backends = [make_backend() for _ in range(4)]
    threads = [
        threading.Thread(target=backend.submit_or_adopt, args=(request_for_two, f"try-{number}"))
        for number, backend in enumerate(backends)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alive = [
        process
        for process in map(processes.psutil.Process, processes.psutil.pids())
        if request_for_two.plan_uri.removeprefix("file://") in _command_line(process)
        and process.pid == os.getpgid(process.pid)
    ]
    assert len(alive) == 2


def _command_line(process):
    try:
        return process.cmdline()
    except processes.psutil.Error:
        return []


def test_worker_started_without_a_record_is_adopted(make_backend, request_for_two, storage):
    backend = make_backend()
    backend.submit_or_adopt(request_for_two, "try-1")
    pids = _pids(backend, request_for_two)
    # The starter died between starting its workers and writing them down.
    record = backend._read(request_for_two)
    backend._write(request_for_two, record.model_copy(update={"workers": ()}))
    backend.submit_or_adopt(request_for_two, "try-2")
    assert _pids(backend, request_for_two) == pids


def test_only_ended_workers_are_restarted_and_only_so_often(
    make_backend, request_for_two, wait_until
):
    backend = make_backend()
    backend.submit_or_adopt(request_for_two, "try-1")
    survivor = _pids(backend, request_for_two)[1]
    for num_starts in (2, 2):  # max_restarts is 1: the second end is final
        record = backend._read(request_for_two)
        processes.stop([record.workers[0].group], grace_seconds=0)
        wait_until(lambda: backend.observe(request_for_two).num_alive == 1)
        backend.restart_ended(request_for_two, "try-1")
        observation = backend.observe(request_for_two)
        assert observation.workers[0].num_starts == num_starts
        assert _pids(backend, request_for_two)[1] == survivor
    assert observation.num_alive == 1
    # A new try counts anew.
    assert backend.submit_or_adopt(request_for_two, "try-2").num_alive == 2
    assert _pids(backend, request_for_two)[1] == survivor


@pytest.mark.parametrize("owner", ["try-1", "try-2"])
def test_shards_of_an_ended_worker_are_free_at_once(
    make_backend, request_for_two, storage, wait_until, owner
):
    backend = make_backend()
    backend.submit_or_adopt(request_for_two, "try-1")
    held = {0: "shard-a", 1: "shard-b"}
    for index, shard in held.items():
        report = WorkerProgress(
            worker_id=worker_identity(f"tokenize-p1-{index}"),
            plan_id="p1",
            sequence=1,
            phase="encode",
            held_shards={shard: 1},
        )
        uri = f"{request_for_two.plan_uri}/workers/{report.worker_id}.json"
        storage.write(uri, report.model_dump_json().encode())
    processes.stop([backend._read(request_for_two).workers[0].group], grace_seconds=0)
    wait_until(lambda: backend.observe(request_for_two).num_alive == 1)
    if owner == "try-1":
        backend.restart_ended(request_for_two, owner)
    else:
        backend.submit_or_adopt(request_for_two, owner)
    leases = f"{request_for_two.plan_uri}/leases"
    assert read_ending(storage, f"{leases}/shard-a", 1).kind is EndingKind.RELEASED
    assert read_ending(storage, f"{leases}/shard-b", 1) is None


def test_only_the_owner_kills_or_restarts(make_backend, request_for_two):
    backend = make_backend()
    backend.submit_or_adopt(request_for_two, "try-1")
    backend.submit_or_adopt(request_for_two, "try-2")
    assert not backend.kill(request_for_two, "try-1")
    assert backend.observe(request_for_two).num_alive == 2
    assert backend.kill(request_for_two, "try-2")
    observation = backend.observe(request_for_two)
    assert observation.phase is Phase.KILLED
    backend.restart_ended(request_for_two, "try-2")
    assert backend.observe(request_for_two).num_alive == 0
    assert backend.submit_or_adopt(request_for_two, "try-3").phase is Phase.RUNNING


def test_kill_before_any_submit_does_nothing(make_backend, request_for_two):
    assert not make_backend().kill(request_for_two, "try-1")


def test_logs_are_read_and_archived(make_backend, request_for_two, storage, wait_until):
    backend = make_backend("import sys; [print(n) for n in range(50)]; sys.exit(1)")
    backend.submit_or_adopt(request_for_two, "try-1")
    wait_until(lambda: backend.observe(request_for_two).num_alive == 0)
    assert [w.exit_code for w in backend.observe(request_for_two).workers] == [1, 1]
    worker = backend.observe(request_for_two).workers[1]
    assert backend.logs(request_for_two, worker, 3) == ["47", "48", "49"]
    uris = backend.conclude(request_for_two, "try-1")
    assert [uri.rpartition("/")[2] for uri in uris] == [
        "tokenize-p1-worker-0.log",
        "tokenize-p1-worker-1.log",
    ]
    assert storage.read(uris[0]).decode().splitlines()[-1] == "49"


def _heartbeat(sequence):
    report = WorkerProgress(worker_id="a", plan_id="p1", sequence=sequence, phase="encode")
    return report.model_dump_json().encode()


def _move_to_another_host(backend, request):
    record = backend._read(request)
    elsewhere = {"host_id": "boot/pid:[1]", "host_name": "node-7"}
    backend._write(request, record.model_copy(update=elsewhere))
    return record


def test_workers_of_another_host_are_refused_while_they_move(
    make_backend, request_for_two, storage
):
    backend = make_backend()
    backend.submit_or_adopt(request_for_two, "try-1")
    local = _move_to_another_host(backend, request_for_two)
    with pytest.raises(ConfigError, match="node-7"):
        backend.observe(request_for_two)
    assert not backend.kill(request_for_two, "try-1")
    stop = threading.Event()
    numbers = itertools.count()

    def beat():
        while not stop.wait(0.1):
            storage.write(f"{request_for_two.plan_uri}/workers/a.json", _heartbeat(next(numbers)))

    beater = threading.Thread(target=beat)
    beater.start()
    try:
        with pytest.raises(ConfigError, match="needs scheduler, tasks and triggerer on one host"):
            backend.submit_or_adopt(request_for_two, "try-2")
    finally:
        stop.set()
        beater.join()
        processes.stop([worker.group for worker in local.workers], grace_seconds=0)


def test_workers_of_a_host_that_is_gone_are_replaced(make_backend, request_for_two, storage):
    backend = make_backend()
    backend.submit_or_adopt(request_for_two, "try-1")
    storage.write(f"{request_for_two.plan_uri}/workers/a.json", _heartbeat(1))
    local = _move_to_another_host(backend, request_for_two)
    processes.stop([worker.group for worker in local.workers], grace_seconds=0)
    assert backend.submit_or_adopt(request_for_two, "try-2").num_alive == 2
    assert backend._read(request_for_two).host_id == processes.host_id()


def test_the_real_command(storage, tmp_path, request_for_two):
    backend = LocalBackend(storage, tmp_path / "state", tmp_path / "hcodec.toml")
    command = backend._command(request_for_two, tmp_path, 1)
    assert command[1:5] == ["-m", "hcodec_core.cli", "run", request_for_two.job_uri]
    assert command[5:] == [
        "--config", str(tmp_path / "hcodec.toml"), "--index", "1", "--identity", "tokenize-p1-1",
        "--device", "cpu", "--threads", "1", "--decoders", "1",
        "--scratch", str(tmp_path / "scratch" / "1"),
    ]  # fmt: skip


def test_workers_get_no_variables_of_airflow():
    given = {
        "AWS_ACCESS_KEY_ID": "key",
        "PATH": "/bin",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "secret",
        "AIRFLOW_CTX_DAG_ID": "d",
        "_AIRFLOW_PROCESS_CONTEXT": "client",
        "__AIRFLOW_SUPERVISOR_FD": "3",
    }
    assert worker_environment(given) == {"AWS_ACCESS_KEY_ID": "key", "PATH": "/bin"}


@pytest.mark.parametrize(
    "executor",
    ["LocalExecutor", "airflow.executors.local_executor.LocalExecutor", "LocalExecutor,X"],
)
def test_executors_of_one_host_are_accepted(executor):
    refuse_remote_executor(executor)


@pytest.mark.parametrize(
    "executor",
    [
        "CeleryExecutor",
        "KubernetesExecutor",
        "airflow.providers.celery.executors.celery_executor.CeleryExecutor",
        "CeleryExecutor,LocalExecutor",
    ],
)
def test_executors_of_many_hosts_are_refused(executor):
    with pytest.raises(ConfigError, match="use LocalExecutor on one host"):
        refuse_remote_executor(executor)


def test_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="no backend 'slurm' in this version: use one of"):
        check_backend_name("slurm")
