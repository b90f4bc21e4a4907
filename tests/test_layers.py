"""The layers of the architecture, held by the linter and by a real interpreter."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent

WITHOUT_TORCH = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchaudio", "transformers"}:
            raise ImportError(name + " must not be imported on the Airflow side")

sys.meta_path.insert(0, Refuse())
import hcodec_airflow, hcodec_core.dataset, hcodec_core.audio, hcodec_core.codecs
import hcodec_core.evaluation, hcodec_core.promotion
names = []
CORE = (hcodec_core.dataset, hcodec_core.audio, hcodec_core.evaluation, hcodec_core.promotion)
for package in (hcodec_airflow, *CORE):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name == "hcodec_core.dataset.torch_reader":
            continue  # the reader for training, the one module there that needs torch
        importlib.import_module(module.name)
        names.append(module.name)
print(len(names))
"""


def test_import_linter_keeps_every_contract():
    command = [str(Path(sysconfig.get_path("scripts")) / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_airflow_side_imports_without_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=tmp_path,
        env={"AIRFLOW_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 15


def test_core_modules_are_light_to_import():
    heavy = {"torch", "boto3", "pyiceberg", "duckdb", "obstore", "great_expectations", "airflow"}
    code = (
        "import sys, hcodec_core.cli, hcodec_core.storage, hcodec_core.codecs; "
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not heavy & {name.split(".")[0] for name in done.stdout.split()}
