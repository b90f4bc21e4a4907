"""A real Spark, in an environment of its own: where Great Expectations finds pyspark beside it,
importing it ends Python without a word.

pyspark is fetched once by pip (450 MB) into a cache; a Java of at least 17 must be installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VERSION = "4.3.0"
_READER = Path(__file__).with_name("spark_reader.py")
_INSTALL_SECONDS, _READ_SECONDS = 900, 300


class SparkMissingError(Exception):
    """Java or pyspark cannot be had; the message says which, and how to get it."""


def find_spark() -> Path:
    """Folder of packages that holds pyspark; filled on first use. Raises ``SparkMissingError``."""
    _check_java()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "hcodec" / f"pyspark-{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _install(Path(scratch, "packages"))
            # Whole or not at all, also when two test runs fetch it.
            if not folder.exists():
                Path(scratch, "packages").replace(folder)
    return folder


def read_with_spark(packages: Path, paths: dict[str, list[str]], fields: tuple[str, ...]) -> Any:
    """What Spark says of each version's files: ``rows`` (sorted by uri), ``schema``, ``sums``."""
    with tempfile.TemporaryDirectory(prefix="spark-") as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": str(packages),
            "SPARK_HOME": str(packages / "pyspark"),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYSPARK_PYTHON": sys.executable,
            "TMPDIR": folder,
        }
        # -S: none of this environment's packages, only the standard library and those above.
        done = subprocess.run(
            [sys.executable, "-S", str(_READER), folder],
            env=environment,
            input=json.dumps({"paths": paths, "fields": fields}),
            capture_output=True,
            text=True,
            timeout=_READ_SECONDS,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check_java() -> None:
    java = shutil.which("java")
    if java is None:
        raise SparkMissingError("Spark needs Java: install default-jre-headless (17 or newer)")
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r'version "(\d+)', done.stderr)
    if found is None or int(found[1]) < 17:
        first = (done.stderr.splitlines() or ["it says no version"])[0]
        raise SparkMissingError(f"Spark {VERSION} needs Java 17 or newer, {java} is: {first}")


def _install(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    done = subprocess.run(
        [*command, f"pyspark=={VERSION}"],
        capture_output=True,
        text=True,
        timeout=_INSTALL_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SparkMissingError(f"pip could not fetch pyspark {VERSION}: {last}")
