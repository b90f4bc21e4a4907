"""Processes of the demo are found and ended by another process, whatever they call themselves."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from hcodec_airflow.demo.services import DemoError, Services, end_marked_processes

RENAMED = (
    "import subprocess, sys, time, setproctitle; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "setproctitle.setproctitle('another name ' * 200); "
    "open(sys.argv[1], 'w').close(); time.sleep(600)"
)


def started(state_path: Path) -> Services:
    services = Services(state_path)
    ready = state_path / "ready"
    services.start("renamed", [sys.executable, "-c", RENAMED, str(ready)], os.environ)
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    services.check()
    return services


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_a_renamed_process_and_its_children_are_ended_by_another_demo(tmp_path):
    before = set(descendants())
    started(tmp_path)
    assert len(set(descendants()) - before) == 2
    assert end_marked_processes(tmp_path) == 2
    alive = [p for p in set(descendants()) - before if p.status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    assert end_marked_processes(tmp_path) == 0


def test_stop_ends_what_was_started(tmp_path):
    before = set(descendants())
    started(tmp_path).stop()
    assert set(descendants()) - before == set()


def test_a_process_that_ended_is_reported_with_its_log(tmp_path):
    services = Services(tmp_path)
    services.start("short", [sys.executable, "-c", "raise SystemExit(3)"], os.environ)
    with pytest.raises(DemoError, match=r"exit code 3.*short\.log"):
        services.wait_for("short", 20)


def test_another_state_folder_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    services = started(tmp_path / "a")
    assert end_marked_processes(tmp_path / "b") == 0
    services.check()
    services.stop()
