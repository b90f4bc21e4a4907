"""torchrun whose exit code says what the processes' exit codes say."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from hcodec_core.errors import EXIT_BAD_CONFIG, EXIT_FAILURE, EXIT_PREEMPTED
from hcodec_core.training.launch import verdict

LAUNCH = [sys.executable, "-m", "hcodec_core.training.launch", "--standalone"]


@pytest.mark.parametrize(
    ("exit_codes", "expected"),
    [
        ([43], EXIT_BAD_CONFIG),
        ([1, 43], EXIT_BAD_CONFIG),
        ([143, 143], EXIT_PREEMPTED),
        ([-signal.SIGTERM], EXIT_PREEMPTED),
        ([143, 1], EXIT_FAILURE),
        ([-signal.SIGKILL], EXIT_FAILURE),
    ],
)
def test_verdict(exit_codes, expected):
    assert verdict(exit_codes) == expected


def test_refusal_of_one_rank_is_the_nodes(tmp_path):
    script = tmp_path / "refuse.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(43)\n"
        "time.sleep(600)\n"  # ended by the launcher
    )
    done = subprocess.run(
        [*LAUNCH, "--nproc-per-node=2", str(script)], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == EXIT_BAD_CONFIG, done.stderr.decode()


def test_asked_to_stop_is_preempted(tmp_path):
    script = tmp_path / "work.py"
    script.write_text("import time\nprint('at work', flush=True)\ntime.sleep(600)\n")
    with subprocess.Popen(
        [*LAUNCH, "--nproc-per-node=1", str(script)], stdout=subprocess.PIPE, text=True
    ) as node:
        assert node.stdout is not None
        assert "at work" in node.stdout.readline()
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=300) == EXIT_PREEMPTED
