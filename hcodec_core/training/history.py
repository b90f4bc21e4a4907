"""The numbers of a run by step, beside its checkpoints: ``history/<first>-<last>.json``.

A resumed run writes the steps it repeats again, with the same values; readers take the later one.
"""

from __future__ import annotations

import json
import re

from hcodec_core.dataset.tabular import list_folder
from hcodec_core.storage import Storage, join_uri

Numbers = dict[str, float]
_FOLDER = "history"
_NAME = re.compile(r"/(\d{9})-(\d{9})\.json$")


class History:
    """Collects numbers of steps and writes them out when a checkpoint is made."""

    def __init__(self, storage: Storage, run_uri: str) -> None:
        """Nothing is read or written yet."""
        self._storage, self._run_uri = storage, run_uri
        self._steps: dict[int, Numbers] = {}

    def add(self, step: int, numbers: Numbers) -> None:
        """Keep numbers of a step, beside those it has already."""
        self._steps.setdefault(step, {}).update(numbers)

    def write(self) -> None:
        """Write what was collected since the last time."""
        if not self._steps:
            return
        name = f"{min(self._steps):09d}-{max(self._steps):09d}.json"
        text = json.dumps({str(step): self._steps[step] for step in sorted(self._steps)})
        self._storage.write(join_uri(self._run_uri, _FOLDER, name), text.encode())
        self._steps.clear()


def read_history(storage: Storage, run_uri: str) -> dict[int, Numbers]:
    """Numbers of all steps that were logged, by step."""
    found: list[tuple[int, int, str]] = []
    for info in list_folder(storage, join_uri(run_uri, _FOLDER)):
        if match := _NAME.search(info.uri):
            found.append((int(match[1]), int(match[2]), info.uri))
    steps: dict[int, Numbers] = {}
    for _, _, uri in sorted(found):
        for step, numbers in json.loads(storage.read(uri)).items():
            steps.setdefault(int(step), {}).update(numbers)
    return dict(sorted(steps.items()))
