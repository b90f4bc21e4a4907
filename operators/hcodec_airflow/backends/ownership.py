"""Whose workers they are, kept in storage, where it outlives Jobs, pods and triggerers.

    <plan_uri>/backend/<job name>/owner.json          the task try that submitted last
    <plan_uri>/backend/<job name>/killed-<try>.json   that try asked to stop them
    <plan_uri>/backend/<job name>/g<n>.yaml           manifest of generation n

Only a submit writes ``owner.json``, only a kill its mark, so that a triggerer that hung and wakes
up can undo neither.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, ValidationError

from hcodec_airflow.backends.base import JobRequest
from hcodec_airflow.progress import list_folder
from hcodec_core.errors import ObjectMissingError, StorageError
from hcodec_core.storage import Storage, join_uri

_GENERATION = re.compile(r"g(\d+)\.yaml")


def manifest_uri(request: JobRequest, generation: int = 0) -> str:
    """Where the manifest of a generation is kept."""
    return join_uri(request.plan_uri, "backend", request.name, f"g{generation}.yaml")


class Standing(BaseModel):
    """``owner``: the task try; ``base_generation``: the one it found or made first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    owner: str = ""
    base_generation: int = 0


class Ownership:
    """The records of one job."""

    def __init__(self, storage: Storage, request: JobRequest) -> None:
        """Nothing is read yet."""
        self._storage = storage
        self._folder_uri = join_uri(request.plan_uri, "backend", request.name)

    def claim(self, owner: str, base_generation: int) -> None:
        """Make ``owner`` the one whose restarts and kills count from now on."""
        standing = Standing(owner=owner, base_generation=base_generation)
        self._storage.write(self._uri("owner.json"), standing.model_dump_json().encode())

    def read(self) -> Standing:
        """The present owner; an empty one before any submit."""
        try:
            return Standing.model_validate_json(self._storage.read(self._uri("owner.json")))
        except ObjectMissingError:
            return Standing()
        except ValidationError as error:
            uri = self._uri("owner.json")
            raise StorageError(f"{uri} is damaged: end its workers and delete it.") from error

    def is_held_by(self, owner: str) -> bool:
        """Whether ``owner`` submitted last and has not asked to stop."""
        return self.read().owner == owner and not self.is_killed(owner)

    def mark_killed(self, owner: str) -> None:
        """Note that ``owner`` wants no workers any more."""
        self._storage.create(self._uri(f"killed-{owner}.json"), b"{}")

    def is_killed(self, owner: str) -> bool:
        """Whether that was noted."""
        return self._storage.head(self._uri(f"killed-{owner}.json")) is not None

    def keep_manifest(self, generation: int, manifest: str) -> str:
        """Store what was submitted; returns its URI."""
        uri = self._uri(f"g{generation}.yaml")
        self._storage.write(uri, manifest.encode())
        return uri

    def last_generation(self) -> int:
        """Highest generation whose manifest was kept, -1 when there is none."""
        names = (i.uri.rpartition("/")[2] for i in list_folder(self._storage, self._uri("")))
        numbers = [int(match[1]) for match in map(_GENERATION.fullmatch, names) if match]
        return max(numbers, default=-1)

    def _uri(self, name: str) -> str:
        return f"{self._folder_uri}/{name}"
