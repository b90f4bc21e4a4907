"""The README's tree names every folder of the product, and nothing that is not there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Below these, folders are explained by files of their own.
OPAQUE = ("tests/", "docs/", ".ci/")


def tracked_folders() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    folders = {f"{parent}/" for name in listed for parent in Path(name).parents if name}
    shown = {next((o for o in OPAQUE if folder.startswith(o)), folder) for folder in folders}
    # Data folders inside a package are described by the package.
    return {f for f in shown if f in OPAQUE or f == "dags/" or list((ROOT / f).glob("*.py"))}


def tree_entries() -> set[str]:
    tree = README.rpartition("## The tree")[2].split("```")[1]
    return {line.split()[0] for line in tree.strip().splitlines()}


def test_tree_lists_every_folder():
    assert tracked_folders() - {"./"} - tree_entries() == set()


def test_tree_lists_nothing_that_is_not_there():
    assert [entry for entry in tree_entries() if not (ROOT / entry).exists()] == []


def test_commands_of_the_readme_exist():
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"demo", "test"}
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []


def test_pictures_and_pages_of_the_readme_exist():
    names = re.findall(r"\((docs/[^)]+)\)", README) + re.findall(r"`(docs/[^`]+\.md)`", README)
    assert len(names) >= 3
    assert [name for name in names if not (ROOT / name).exists()] == []
