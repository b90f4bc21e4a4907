"""Renders the chart as users would, for tests and their golden files.

``python -m tests.helm.render`` writes the golden files anew: look at the difference.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.helm.tools import find_tool

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "hcodec"
HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
SITE = HERE / "site.yaml"
CASES: dict[str, list[Path]] = {
    "site": [SITE],
    "everything": [SITE, HERE / "everything.yaml"],
    "existing-airflow": [CHART / "values-existing-airflow.yaml", SITE],
    "eks": [CHART / "values-eks.yaml", SITE],
    "gke": [CHART / "values-gke.yaml", SITE],
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm; the caller looks at the exit code."""
    command = [str(find_tool("helm")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def template(values: Sequence[Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """``helm template`` of a release ``hcodec`` in namespace ``airflow``, on Kubernetes 1.34."""
    files = [word for path in values for word in ("--values", str(path))]
    options = ["--namespace", "airflow", *files, *arguments]
    if "--kube-version" not in arguments:
        options += ["--kube-version", "1.34.0"]
    return helm("template", "hcodec", str(CHART), *options)


def render(values: Sequence[Path], *arguments: str) -> list[dict[str, Any]]:
    """The objects; raises ``AssertionError`` with helm's words when there are none."""
    done = template(values, *arguments)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def main() -> None:
    """Write the golden files."""
    GOLDEN.mkdir(exist_ok=True)
    for name, values in CASES.items():
        done = template(values)
        assert done.returncode == 0, done.stderr
        (GOLDEN / f"{name}.yaml").write_text(done.stdout)


if __name__ == "__main__":
    main()
