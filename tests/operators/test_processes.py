"""Processes that outlive their parent, found again and ended as a group."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from hcodec_airflow.backends import processes

STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen(['sleep', '60'])\n"
    "print('ready', flush=True)\n"
    "time.sleep(60)\n"
)
STARTER = (
    "import pathlib, sys\n"
    "from hcodec_airflow.backends.processes import start_group\n"
    "folder = pathlib.Path(sys.argv[1])\n"
    "group = start_group(['sleep', '60'], {}, folder / 'log', folder / 'exit')\n"
    "print(group.pid, group.started_at)\n"
)


def _wait(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    groups = []

    def run(*command):
        group = processes.start_group(
            command, {"PATH": os.environ["PATH"]}, tmp_path / "log", tmp_path / "exit"
        )
        groups.append(group)
        return group

    yield run
    processes.stop(groups, grace_seconds=0)


@pytest.mark.parametrize("code", [0, 1, 43])
def test_exit_code_and_output_are_kept(start, tmp_path, code):
    group = start(sys.executable, "-c", f"print('said'); raise SystemExit({code})")
    _wait(lambda: processes.read_exit_code(tmp_path / "exit") is not None)
    assert processes.read_exit_code(tmp_path / "exit") == code
    assert (tmp_path / "log").read_text() == "said\n"
    _wait(lambda: not processes.is_alive(group))


def test_polite_stop_leaves_the_exit_code(start, tmp_path):
    group = start(sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(60)")
    _wait(lambda: "ready" in (tmp_path / "log").read_text())
    assert processes.is_alive(group)
    processes.stop([group], grace_seconds=10)
    assert not processes.is_alive(group)
    assert processes.read_exit_code(tmp_path / "exit") == 143


def test_stop_by_force_takes_children_along(start, tmp_path):
    group = start(sys.executable, "-c", STUBBORN)
    _wait(lambda: "ready" in (tmp_path / "log").read_text())
    processes.stop([group], grace_seconds=0.2)
    _wait(lambda: not processes.is_alive(group))
    assert processes.read_exit_code(tmp_path / "exit") is None


def test_group_whose_leader_was_killed_is_still_alive(start, tmp_path):
    group = start(sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(60)")
    _wait(lambda: "ready" in (tmp_path / "log").read_text())
    os.kill(group.pid, 9)
    time.sleep(0.2)
    assert processes.is_alive(group)
    processes.stop([group], grace_seconds=5)
    _wait(lambda: not processes.is_alive(group))


def test_same_pid_with_another_start_time_is_another_process(start):
    group = start("sleep", "60")
    assert not processes.is_alive(replace(group, started_at=group.started_at - 100))
    processes.stop([replace(group, started_at=group.started_at - 100)], grace_seconds=0)
    assert processes.is_alive(group)


def test_it_outlives_the_process_that_started_it(tmp_path):
    command = [sys.executable, "-c", STARTER, str(tmp_path)]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    words = starter.communicate()[0].split()
    group = processes.ProcessGroup(int(words[0]), float(words[1]))
    assert starter.returncode == 0
    assert processes.is_alive(group)
    processes.stop([group], grace_seconds=5)
    assert not processes.is_alive(group)


def test_a_group_is_found_by_its_command(start):
    marker = f"60.{os.getpid()}"
    assert processes.find_group(["sleep", marker]) is None
    group = start("sleep", marker)
    found = processes.find_group(["sleep", marker])
    assert found is not None
    assert found.pid == group.pid
