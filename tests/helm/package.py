"""Packages the chart into ``dist/``; ``--with-airflow`` adds Airflow's own chart as a dependency.

The dependency is written into a copy: a chart that declares one must have it fetched before helm
does anything with it, also where it is switched off.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helm.tools import find_tool

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "hcodec"
DEPENDENCY = "airflow-dependency.yaml"


def package(out: Path, *, with_airflow: bool, repository: str = "") -> Path:
    """Write the chart's archive into ``out``; returns its path.

    ``repository`` stands for the one that the dependency names. Raises ``CalledProcessError`` with
    helm's own words when the dependency cannot be fetched.
    """
    helm = str(find_tool("helm"))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "hcodec"
        shutil.copytree(CHART, copy)
        if with_airflow:
            add_airflow(copy, repository)
            _run(helm, "dependency", "update", str(copy))
        _run(helm, "package", str(copy), "--destination", str(out))
    return max(out.glob("hcodec-*.tgz"), key=lambda path: path.stat().st_mtime)


def add_airflow(chart: Path, repository: str = "") -> None:
    """Declare Airflow's chart in ``Chart.yaml`` of a copy."""
    text = (chart / DEPENDENCY).read_text()
    if repository:
        text = text.replace("https://airflow.apache.org", repository)
    with (chart / "Chart.yaml").open("a") as file:
        file.write(text)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def main() -> None:
    """``python -m tests.helm.package [--with-airflow]``."""
    parser = argparse.ArgumentParser(description="package the chart into dist/")
    parser.add_argument("--with-airflow", action="store_true")
    options = parser.parse_args()
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    sys.stdout.write(f"{package(out, with_airflow=options.with_airflow)}\n")


if __name__ == "__main__":
    main()
