"""What tests of training share: small data, a tiny teacher, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file

from hcodec_core.models.hcodec.config import tiny
from hcodec_core.nn.ssl import SslModel
from hcodec_core.nn.ssl_config import SslConfig
from hcodec_core.training.synthetic import synthesise

RATE = 16_000


def write_clips(folder_path: Path, num_files: int, seconds: float = 1.5, rate: int = RATE) -> str:
    """Clips of ``num_files`` speakers; returns the folder's URI."""
    folder_path.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        audio = synthesise(int(seconds * rate), rate, np.random.default_rng(number))
        soundfile.write(folder_path / f"{number:03d}-a.wav", audio, rate, subtype="PCM_16")
    return f"file://{folder_path}"


def write_teacher(folder_path: Path, config: SslConfig | None = None) -> Path:
    """An SSL model as a transformers folder; by default of the tiny codec's shape."""
    folder_path.mkdir(parents=True, exist_ok=True)
    config = config or tiny().ssl
    assert config is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(SslModel(config).state_dict(), folder_path / "model.safetensors")
    (folder_path / "config.json").write_text(config.model_dump_json())
    return folder_path


@dataclass
class Rank:
    """One process of a run; ``steps`` grows as it reports them."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    grown: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.grown:
                self.lines.append(line)
                self.grown.notify_all()
        with self.grown:
            self.grown.notify_all()

    def wait_for_step(self, step: int) -> None:
        """Return when the step was reported, or the process has ended."""

        def is_there() -> bool:
            said = any(line.startswith(f"step {step}/") for line in self.lines)
            return said or self.process.poll() is not None

        with self.grown:
            assert self.grown.wait_for(is_there, timeout=300), "".join(self.lines)


DRIVER = """
import sys
from hcodec_core import cli
from hcodec_core.cli import training
training._LINE_SECONDS = 0.0  # a line for every step
sys.exit(cli.main(sys.argv[1:]))
"""


def start_ranks(arguments: list[str], num_ranks: int) -> list[Rank]:
    """``hcodec ARGUMENTS`` in so many processes, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if num_ranks > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        command = [sys.executable, "-c", DRIVER, *arguments]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        ranks.append(Rank(process))
        threading.Thread(target=ranks[-1].read, daemon=True).start()
    return ranks


def finish(ranks: list[Rank]) -> None:
    """Wait for all ranks, which must succeed."""
    for rank in ranks:
        rank.process.wait(timeout=300)
    assert [rank.process.returncode for rank in ranks] == [0] * len(ranks), "".join(
        line for rank in ranks for line in rank.lines
    )


def kill(ranks: list[Rank]) -> None:
    """SIGKILL to all ranks at once."""
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.wait(timeout=60)


def history_of(run_path: Path) -> dict[int, dict[str, float]]:
    """All numbers of a run by step, as they were written."""
    steps: dict[int, dict[str, float]] = {}
    for path in sorted((run_path / "history").iterdir()):
        for step, numbers in json.loads(path.read_text()).items():
            steps.setdefault(int(step), {}).update(numbers)
    return steps
